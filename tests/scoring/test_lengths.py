"""Rotary embeddings that depend on the length of a sequence use its own length, not
that of other sequences in the batch.
"""

import pytest
import torch

from hf_prefopt.data.layouts import PaddedCollator
from hf_prefopt.scoring.forward import install_scoring, score
from hf_prefopt.scoring.layout import reason_against, reason_of_length
from hf_prefopt.scoring.lengths import length_limit
from tests.scoring.plain import assert_same_gradients, gradients
from tests.tiny_models import random_rows, tiny_model, with_lora
from tests.trainers import logged, make_trainer, pairs

# For heads of size 8, with factors for 4 frequencies. Sequences have 6 to 37 tokens.
ORIGINAL = 20
ROPES = {
    "dynamic": ("llama", {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}, {"max_position_embeddings": 20}),
    "longrope": (
        "phi3",
        {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [2.0, 4.0, 8.0, 16.0],
            "original_max_position_embeddings": ORIGINAL,
        },
        {"original_max_position_embeddings": ORIGINAL, "sliding_window": None},
    ),
}
each_rope = pytest.mark.parametrize("kind", ROPES)


def build(kind, **settings):
    model_type, rope, more = ROPES[kind]
    return tiny_model(model_type, rope_parameters=dict(rope), **{**more, **settings})


def alone(kind, rows, lora=False):
    """Return each response's log-prob, `[R]`, from its sequence alone, with a new copy of the model."""
    sums = []
    for row in rows:
        for response in row["response_ids"]:
            model = build(kind).double()
            ids = torch.tensor([row["prompt_ids"] + response])
            logps = model(ids).logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
            sums.append(logps.gather(-1, torch.tensor(response)[:, None]).sum())
    return torch.stack(sums)


@each_rope
def test_a_sequences_own_length_decides(kind):
    """In float64, with frequencies in fp32 as in the model itself, the results agree
    to 1e-10: in one batch, in the other order, and twice, because "dynamic" has
    state. For the whole batch, the model's own forward would be off by nats.
    """
    rows, model = random_rows(4), build(kind).double()
    lengths = [len(row["prompt_ids"]) + len(ids) for row in rows for ids in row["response_ids"]]
    assert min(lengths) <= ORIGINAL < max(lengths)
    with torch.no_grad():
        expected = alone(kind, rows)
        install_scoring(model)
        for _ in range(2):
            torch.testing.assert_close(score(model, PaddedCollator(0)(rows)).logps, expected, rtol=1e-10, atol=0)
        found = score(model, PaddedCollator(0)(rows[::-1])).logps.view(4, 2).flip(0).flatten()
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
        model.ropes_by_length = []
        assert (score(model, PaddedCollator(0)(rows)).logps - expected).abs().max() > 0.1


@each_rope
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_do_not_depend_on_the_batch(kind, checkpointing):
    """The sum over single rows is compared, in float64."""
    model = build(kind).double().train()
    install_scoring(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rows = random_rows(4)
    single = sum(score(model, PaddedCollator(0)([row])).logps.sum() for row in rows)
    together = score(model, PaddedCollator(0)(rows)).logps.sum()
    assert_same_gradients(gradients(together, model), gradients(single, model), rtol=1e-9)


@each_rope
def test_the_models_own_forward_stays_its_own(kind):
    model, ids = build(kind), torch.randint(3, 300, (1, 30))
    with torch.no_grad():
        before = model(ids).logits
        install_scoring(model)
        score(model, PaddedCollator(0)(random_rows(2)))
        assert torch.equal(model(ids).logits, before)


@each_rope
def test_prompts_are_shared_where_no_sequence_is_longer(kind):
    """`max_length` decides; the reason names a sufficient value."""
    model = build(kind)
    install_scoring(model)
    assert length_limit(model) == ORIGINAL
    assert reason_of_length([model], ORIGINAL) is None and reason_against("shared", model) is None
    for longer in (ORIGINAL + 1, None):
        assert f"(max_length={ORIGINAL} avoids it)" in reason_of_length([tiny_model(), model], longer)
    assert length_limit(tiny_model()) is None


@each_rope
def test_losses_and_the_cache_do_not_depend_on_batches(kind, tmp_path):
    """Batches of 4 and of 1 × 4; a cache that was filled with the former gives log 2
    as the first loss of the latter.
    """
    train = pairs(4, longest=20)
    settings = {"train_dataset": train, "max_steps": 2, "train_sampling_strategy": "sequential"}
    cached = {"precompute_ref_log_probs": True, "reference_cache_dir": str(tmp_path / "cache")}

    def losses(size, **more):
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size}
        trainer = make_trainer(tmp_path / "run", with_lora(build(kind)), **settings, **batch, **more)
        trainer.train()
        return logged(trainer, "loss")

    torch.testing.assert_close(losses(4), losses(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses(4, **cached), losses(1, **cached), rtol=1e-4, atol=1e-5)
