"""`GlobalBatch` alone: in one process with a fake objective, and as one of two ranks with a fake accelerator.

`tests/distributed` tests two real ranks.
"""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from hf_prefopt.objective.build import build_objective
from hf_prefopt.training.global_batch import GlobalBatch


def accelerator(ranks=1, rank=0, gather=None, dataset=None, at_end=True):
    """Return a fake accelerator with the attributes that a `GlobalBatch` reads."""
    loader = SimpleNamespace(dataset=dataset)
    state = SimpleNamespace(end_of_dataloader=at_end, active_dataloader=loader)
    device = torch.device("cpu")
    return SimpleNamespace(
        num_processes=ranks, process_index=rank, gradient_state=state, device=device, gather=gather, reduce=None
    )


def pieces(*sizes):
    """Return pieces with these numbers of pairs; each pair is from a different row."""
    numbers = torch.arange(sum(sizes)).split(sizes)
    return [{"rows": part, "pair_in_row": torch.zeros_like(part), "chosen": part} for part in numbers]


def kept_of(at, *batches):
    """Return the pairs that are kept in each batch of a step."""
    loaded = [{"pieces": pieces_of_batch} for pieces_of_batch in batches]
    at.without_repeats(loaded, 2)
    return [[number for piece in batch["pieces"] for number in piece["chosen"].tolist()] for batch in loaded]


def inputs_of(objective, count, seed=0):
    """Return random log-probs around −10 for the inputs of an objective of pairs, with gradients."""
    generator = torch.Generator().manual_seed(seed)
    names = [name for name in objective.inputs if "logps" in name]
    values = torch.randn(len(names), count, generator=generator, dtype=torch.float64) - 10
    return {name: row.clone().requires_grad_() for name, row in zip(names, values, strict=True)}


@pytest.mark.parametrize("sizes", [(4,), (1, 1, 1, 1), (3, 1), (1, 2, 1)])
@pytest.mark.parametrize("loss", ["dpo", "aot", "kto_pair"])
def test_the_gradients_of_the_pieces_add_up_to_that_of_the_mean(loss, sizes):
    """The gradient is that of the objective's mean over the four pairs at once, and the values add up to the mean. In
    float64, sums of a few terms of size 1: 1e-12.
    """
    objective = build_objective([loss])
    whole = inputs_of(objective, 4)
    expected = objective(whole).losses.mean()
    gradients = torch.autograd.grad(expected, list(whole.values()))

    own = {name: values.detach().clone().requires_grad_() for name, values in whole.items()}
    parts = [dict(zip(own, part, strict=True)) for part in zip(*(v.split(sizes) for v in own.values()), strict=True)]
    step, batch = pieces(*sizes), GlobalBatch(accelerator(), objective)
    frozen = iter(parts)
    batch.begin(step, lambda piece: {name: values.detach() for name, values in next(frozen).items()})
    losses = [batch.loss(piece, part, 4)[1] for piece, part in zip(step, parts, strict=True)]
    torch.testing.assert_close(sum(losses), expected, rtol=1e-12, atol=0)
    sum(losses).backward()
    for found, wanted in zip(own.values(), gradients, strict=True):
        torch.testing.assert_close(found.grad, wanted, rtol=1e-12, atol=1e-12)


def test_a_piece_that_is_a_step_by_itself_needs_no_collecting():
    """Outside of a step, for example if you call `compute_loss`, the loss is that of the piece alone."""
    objective = build_objective(["aot"])
    own = inputs_of(objective, 3)
    output, loss = GlobalBatch(accelerator(), objective).loss(pieces(3)[0], own, None)
    torch.testing.assert_close(loss, objective(own).losses.mean(), rtol=1e-12, atol=0)
    assert len(output.losses) == 3


def collect(objective, seen, piece):
    seen.append(piece)
    return inputs_of(objective, 1)


def test_inputs_are_collected_once_and_only_for_losses_that_compare_examples():
    for loss, expected in (("dpo", 0), ("aot", 2)):
        objective, seen = build_objective([loss]), []
        batch, step = GlobalBatch(accelerator(), objective), pieces(1, 1)
        batch.begin(step, partial(collect, objective, seen))
        for piece in step:
            batch.loss(piece, inputs_of(objective, 1), 2)
        assert len(seen) == expected


@pytest.mark.parametrize(
    ("rank", "expected"),
    [(0, [True, True]), (1, [True, False])],  # seven rows, two at a time on two ranks: rows 4, 5 and rows 6, 0
)
def test_rows_that_come_again_at_the_end_do_not_count(rank, expected):
    at = GlobalBatch(accelerator(2, rank, dataset=range(7)), build_objective(["dpo"]))
    (counted,) = at.counted(pieces(2), 2)
    assert counted.tolist() == expected
    assert kept_of(at, pieces(2)) == [[place for place, counts in enumerate(expected) if counts]]


@pytest.mark.parametrize("drawn", [5, 7, 9])
def test_a_sampler_of_ones_own_may_draw_other_rows_than_there_are(drawn):
    """Of seven rows, two at a time on two ranks. accelerate deals out the batches and repeats the first rows at the
    end; each row that was drawn counts once, from the beginning and after a skipped batch."""
    for skipped in (0, 1):
        counted = 0
        for rank in (0, 1):
            batches = BatchSampler(RandomSampler(range(7), replacement=True, num_samples=drawn), 2, False)
            mine = SkipBatchSampler(BatchSamplerShard(batches, 2, rank), skipped)
            loader = DataLoader(range(7), batch_sampler=mine)
            state = SimpleNamespace(end_of_dataloader=True, active_dataloader=loader)
            shape = SimpleNamespace(**{**vars(accelerator(2, rank)), "gradient_state": state})
            kept = kept_of(GlobalBatch(shape, build_objective(["dpo"])), *(pieces(len(batch)) for batch in mine))
            counted += sum(map(len, kept))
        assert counted == drawn - 4 * skipped


@pytest.mark.parametrize(
    "where",
    [
        {"ranks": 1, "dataset": range(7)},
        {"ranks": 2, "dataset": range(7), "at_end": False},
        {"ranks": 2, "dataset": iter(range(7))},  # a stream marks its repeated rows
    ],
)
def test_otherwise_every_row_counts(where):
    at = GlobalBatch(accelerator(rank=where["ranks"] - 1, **where), build_objective(["dpo"]))
    assert at.counted(pieces(2), 2) == [None]
    assert kept_of(at, pieces(2)) == [[0, 1]]


def test_what_is_dropped_is_not_repeated():
    at = GlobalBatch(accelerator(2, 1, dataset=range(7)), build_objective(["dpo"]), drops_last=True)
    assert kept_of(at, pieces(2)) == [[0, 1]]


def test_a_piece_that_says_what_counts_is_believed():
    marked = [{**piece, "counted": torch.tensor([True, False])} for piece in pieces(2)]
    for world_size in (1, 2):
        at = GlobalBatch(accelerator(world_size, dataset=range(7)), build_objective(["dpo"]))
        assert kept_of(at, marked) == [[0]]


def test_batches_that_say_what_counts_are_believed_wherever_they_come():
    """For example, a stream with several loader workers has such batches, because
    each worker fills its own last batch.
    """
    marked = [{**piece, "counted": torch.tensor([True, False])} for piece in pieces(2)]
    at = GlobalBatch(accelerator(2, dataset=iter(range(7))), build_objective(["dpo"]))
    assert kept_of(at, marked, pieces(2)) == [[0], [0, 1]]
    # The length only determines the last batch: rows 4, 5 and rows 6, 0 on the second rank.
    at = GlobalBatch(accelerator(2, 1, dataset=range(7)), build_objective(["dpo"]))
    assert kept_of(at, pieces(2), pieces(2)) == [[0, 1], [0]]


def test_a_rank_with_fewer_pieces_gets_idle_ones():
    """The other rank has three pieces and one, and this rank has one and two, so it
    adds two idle pieces, with one gather.
    """
    asked = []

    def gather(own):
        asked.append(own.tolist())
        return torch.cat([own, torch.tensor([[3, 1]])])

    batches = [{"pieces": pieces(2)}, {"pieces": pieces(2) * 2}]
    idle = GlobalBatch(accelerator(2, gather=gather), build_objective(["dpo"])).idle(batches)
    assert [[len(piece["rows"]) for piece in those] for those in idle] == [[0, 0], []] and asked == [[[1, 2]]]
    assert idle[0][0] is not idle[0][1]
    assert GlobalBatch(accelerator(), build_objective(["dpo"])).idle(batches) == [[], []]
