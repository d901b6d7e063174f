"""Two processes under an engine do what one process does with the same global batch: the same losses, weights and
evaluation, whatever the loss, the layout and what trains.

Everything is in fp32, and what differs is the order of sums. A loss is made of log-probs of some 50 nats, whose last
place is 4e-6, times β = 0.1 (SimPO's are per token): 1e-5 leaves room for ten of them. Weights of about 1 have a last
place of 1.2e-7, and the largest of them moves by 1e-2: 1e-4 of that is eight last places. A row that counts twice,
which is what accelerate's data loader does to fill up the last batch, changes weights by 13 % of the largest change or
more.
"""

import functools
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.distributed.cases import ALL_OF, CASES, IN_SUITE
from tests.distributed.engines import ENGINES
from tests.distributed.launch import differences, largest_difference, launch, one_process
from tests.tiny_models import tiny_model
from tests.trainers import make_trainer

TOLERANCE = {"losses": 1e-5, "weights": 1e-4, "metrics": 1e-5}
CAN_RESUME_DDP = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="wants transformers 5.18, before which the optimizer's state cannot be loaded by several CPU processes",
)


@pytest.fixture(scope="module")
def outcomes_of(request, tmp_path_factory):
    """What came out of a case. Two processes are started once for all engines that are asked for, but for DeepSpeed's,
    which leave settings behind that exclude FSDP; and once more for the nightly cases.
    """
    items = [item for item in request.session.items if item.module is request.module]
    wanted = [engine for engine in ENGINES if any(item.callspec.params["engine"] == engine for item in items)]

    @functools.cache
    def launched(is_deepspeed, in_suite):
        engines = [engine for engine in wanted if ENGINES[engine].is_deepspeed is is_deepspeed]
        pairs = [(engine, case) for engine in engines for case in ALL_OF[engine]]
        runs = [(engine, case) for engine, case in pairs if (case in IN_SUITE[engine]) is in_suite]
        return launch(runs, tmp_path_factory.mktemp("engines"))

    return lambda engine, case: launched(ENGINES[engine].is_deepspeed, case in IN_SUITE[engine])[engine, case]


def each(engines, only=""):
    pairs = [
        pytest.param(
            engine,
            case,
            id=f"{engine}: {case}",
            marks=[
                *[CAN_RESUME_DDP] * (engine == "ddp" and CASES[case].resumes),
                *[pytest.mark.nightly] * (case not in IN_SUITE[engine]),
            ],
        )
        for engine in engines
        for case in ALL_OF[engine]
        if only in case
    ]
    return pytest.mark.parametrize(("engine", "case"), pairs)


@each(ENGINES)
def test_two_processes_do_what_one_does(outcomes_of, engine, case):
    """On every rank; and a run that is resumed in the middle of its second epoch ends where the whole one does."""
    expected = one_process(case)
    for outcome in outcomes_of(engine, case):
        assert "error" not in outcome, outcome["error"]
        found = differences(outcome, expected)
        assert outcome["lower_layers"] == expected["lower_layers"] == (2 if "upper layers" in case else 0)
        assert {name: value for name, value in found.items() if value > TOLERANCE[name]} == {}
        if CASES[case].resumes:
            assert largest_difference(outcome["resumed"], outcome["weights"]) <= 1e-6 * outcome["scale"]
    print(f"{engine}: {case}: {found}")


@each(ENGINES)
def test_what_was_saved_loads_without_the_engine(outcomes_of, engine, case):
    """By transformers and PEFT alone, every weight bit for bit what was trained."""
    outcome = outcomes_of(engine, case)[0]
    if CASES[case].lora:
        base = tiny_model(**CASES[case].model)
        loaded = PeftModel.from_pretrained(base, outcome["saved"], is_trainable=True)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(outcome["saved"])
    weights = dict(loaded.named_parameters())
    assert all(torch.equal(weights[name].detach(), value) for name, value in outcome["weights"].items())


@each(["zero3", "fsdp2"])
def test_every_parameter_is_sharded(outcomes_of, engine, case):
    """After a step a rank holds no parameter whole: what was to be sharded is."""
    assert [outcome["whole_parameters"] for outcome in outcomes_of(engine, case)] == [[], []]


@each(["zero3"])
def test_the_heads_weight_is_whole_only_inside_the_head(outcomes_of, engine, case):
    """Policy and reference, with and without gradients: not while the last layer runs, and not after the head. Beneath
    an adapter, or in a head of several layers, it is called once more in the backward, after which it stays whole for
    its own gradient."""
    after = {False, True} if "adapted head" in case or "LoRA, own logits" in case else {False}
    expected = {"before": {False}, "inside": {True}, "after": after}
    assert [outcome["head_is_whole"] for outcome in outcomes_of(engine, case)] == [expected, expected]


@pytest.mark.parametrize("engine", ENGINES)
def test_ktos_baseline_is_above_zero(outcomes_of, engine):
    """In every step and in the evaluation of every case, so that the comparison is one of baselines too: the case would
    pass without them if z = max(0, mean) were 0."""
    baselines = {case: outcomes_of(engine, case)[0]["baselines"] for case in IN_SUITE[engine] if case[:4] == "kto,"}
    assert all(len(found) >= 3 and min(found) > 0 for found in baselines.values()), baselines


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=CAN_RESUME_DDP), "zero2", "zero3", "fsdp2"])
def test_a_moved_reference_goes_on_with_another_number_of_ranks(outcomes_of, engine, tmp_path):
    """What two ranks have saved is whole: one process takes it over, and it is what the one process had saved."""
    case = "dpo, shared, full, moving reference, resumed"
    expected = one_process(case)
    trainer = make_trainer(tmp_path, CASES[case].build_model(), train_dataset=None, **CASES[case].merged_settings(1))
    tolerance = TOLERANCE["weights"] * expected["scale"]
    assert largest_difference(trainer.reference.copies.tensors, expected["moved"]) > 1000 * tolerance
    trainer.scorer.load(Path(outcomes_of(engine, case)[0]["checkpoint"]))
    assert largest_difference(trainer.reference.copies.tensors, expected["moved"]) <= tolerance


@each(ENGINES, only="full, token budget")
def test_a_token_budget_cuts_ranks_batches_unequally(outcomes_of, engine, case):
    """So the comparison above is of ranks that fill up with pieces without examples."""
    first, second = (outcome["pieces"] for outcome in outcomes_of(engine, case))
    assert len(first) == len(second) and first != second
