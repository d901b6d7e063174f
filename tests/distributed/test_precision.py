"""Under engines that compute in bf16, the inputs of the losses are neither cast nor rounded.

Scores of 8.51 and 8.5 are equal in bf16, which has steps of 1/16 there, and so are Elo ratings of 1508 and 1510.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from hf_prefopt.reference.shards import gathered
from hf_prefopt.scoring.forward import score
from tests.distributed.engines import ENGINES, zero
from tests.distributed.scenes import play
from tests.tiny_models import perturbed, tiny_model
from tests.trainers import first_batch, make_trainer, pairs, with_column

ZERO3 = {"deepspeed": zero(3)}
COLUMNS = {
    "chosen_scores": lambda row: 8.51 + row,
    "rejected_scores": lambda row: 8.5 + row,
    "margins": lambda row: 0.3001 + row / 1000,
    "weights": lambda row: 1.001 + row / 1000,
}


def scored_pairs(count=4):
    rows = pairs(count)
    for name, value in COLUMNS.items():
        rows = with_column(rows, name, value)
    return rows


def watched(trainer):
    """Record the inputs of the objective by name; training and evaluation fill the dict."""
    seen = []
    objective = trainer.criterion

    class Watch(type(objective)):
        def __call__(self, inputs, training=True):
            seen.append({name: tensor.detach().clone() for name, tensor in inputs.items()})
            return super().__call__(inputs, training)

    objective.__class__ = Watch
    return seen


def in_bf16(engine: dict, folder: Path):
    """Train in bf16, and return the inputs of the losses, whether the gradient is above 0, and the logs."""
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    data = {"train_dataset": scored_pairs(), "eval_dataset": scored_pairs()}
    trainer = make_trainer(
        folder,
        loss_type=["odpo", "dpo"],
        bf16=True,
        per_device_train_batch_size=4 // ranks,
        per_device_eval_batch_size=4 // ranks,
        ref_model=perturbed(tiny_model(), 0.1, seed=3),
        **data,
        **engine,
    )
    seen = watched(trainer)
    trainer.train()
    trainer.evaluate()
    return seen, trainer.state.log_history


def deepspeed(stage: int):
    return {"deepspeed": {**zero(stage), "bf16": {"enabled": True}}}


def zero2_in_bf16(folder):
    return in_bf16(deepspeed(2), folder)


def zero3_in_bf16(folder):
    return in_bf16(deepspeed(3), folder)


def ddp_in_bf16(folder):
    return in_bf16({}, folder)


def zero3_evaluates_first(folder):
    """Return the metrics of an evaluation before training, and the error of training after it."""
    trainer = make_trainer(folder, eval_dataset=pairs(6), ref_model=perturbed(tiny_model(), 0.1, seed=3), **ZERO3)
    metrics = trainer.evaluate()
    with pytest.raises(ValueError) as error:
        trainer.train()
    return metrics, str(error.value)


def zero2_trains_twice(folder):
    trainer = make_trainer(folder, max_steps=1, deepspeed=zero(2))
    trainer.train()
    with pytest.raises(ValueError) as error:
        trainer.train()
    return str(error.value)


def fsdp2_in_bf16(folder):
    """Return log-probs of the policy and of an explicit reference, and the full
    weights with which they were computed.
    """
    reference = perturbed(tiny_model(), 0.1, seed=3)
    engine = ENGINES["fsdp2"]
    trainer = make_trainer(
        folder,
        train_dataset=pairs(4),
        ref_model=reference,
        layout="padded",
        learning_rate=0.0,
        max_steps=1,
        per_device_train_batch_size=2,
        **engine.settings,
    )
    engine.adapt(trainer)
    trainer.accelerator.state.fsdp_plugin.set_mixed_precision("bf16")
    trainer.train()
    batch = first_batch(trainer)
    outcome = {"batch": dict(batch)}
    with torch.no_grad():
        outcome["policy"] = score(trainer.model, batch).token_logps
    outcome["ref"] = trainer.reference.score(batch).token_logps
    for name, model in (("policy", trainer.model), ("ref", trainer.reference.model)):
        weights = {}
        for key, parameter in model.named_parameters():
            with gathered(parameter) as values:
                weights[key] = values.clone()
        outcome[f"{name}_weights"] = weights
    return outcome


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    # DeepSpeed leaves settings behind that exclude FSDP, so it comes last.
    scenes = [fsdp2_in_bf16, ddp_in_bf16, zero2_in_bf16, zero3_in_bf16, zero3_evaluates_first, zero2_trains_twice]
    return play(scenes, tmp_path_factory.mktemp("scenes"))


@pytest.mark.parametrize("scene", ["ddp_in_bf16", "zero2_in_bf16", "zero3_in_bf16"])
def test_loss_inputs_are_what_the_data_say(outcomes, scene):
    """The inputs are in fp32 and exact, in training and evaluation. Log-probs are
    not bf16 numbers, and weights do train.
    """
    rows = set()
    for outcome in outcomes[scene]:
        assert not isinstance(outcome, str), outcome
        seen, logs = outcome
        assert len(seen) >= 3
        for inputs in seen:
            numbers = (inputs["chosen_scores"] - torch.tensor(8.51)).round()
            for name, value in COLUMNS.items():
                expected = torch.tensor([value(row) for row in numbers.tolist()], dtype=torch.float32)
                assert inputs[name].dtype == torch.float32
                assert torch.equal(inputs[name], expected), name
            for name in ("policy_chosen_logps", "ref_chosen_logps"):
                assert inputs[name].dtype == torch.float32
                assert not torch.equal(inputs[name], inputs[name].bfloat16().float()), name
            rows |= set(numbers.tolist())
        assert all(entry["grad_norm"] > 0 for entry in logs if "grad_norm" in entry)
    assert rows == {0, 1, 2, 3}


@pytest.mark.parametrize("name", ["policy", "ref"])
def test_fsdp2_returns_log_probs_in_fp32(outcomes, name):
    """The log-probs equal those of a plain model with these weights in bf16, with logits normalized in fp32.

    Logits of up to 8 have steps of 1/32 in bf16, so the two log-probs may differ by
    some steps. If log-probs below −4 were rounded to bf16, they would be multiples of
    1/32 or more; a distance of 1e-3 from such multiples cannot be rounding in fp32.
    """
    for outcome in outcomes["fsdp2_in_bf16"]:
        assert not isinstance(outcome, str), outcome
        found, batch = outcome[name], outcome["batch"]
        assert found.dtype == torch.float32
        model = tiny_model()
        model.load_state_dict(outcome[f"{name}_weights"], strict=False)
        with torch.no_grad():
            logits = model.to(torch.bfloat16)(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logps = logits.float().flatten(0, 1)[batch["scored_rows"]].log_softmax(-1)
        expected = logps.gather(1, batch["targets"][:, None])[:, 0]
        assert (found - expected).abs().max() < 0.25
        assert (found - found.bfloat16().float()).abs().max() > 1e-3


def test_zero3_evaluates_before_training_and_refuses_to_train_then(outcomes, tmp_path):
    """The evaluation equals that of one process up to rounding in fp32: log-probs of 50 nats times 0.1."""
    alone = make_trainer(tmp_path, eval_dataset=pairs(6), ref_model=perturbed(tiny_model(), 0.1, seed=3))
    expected = {name: value for name, value in alone.evaluate().items() if "/" in name or name == "eval_loss"}
    for outcome in outcomes["zero3_evaluates_first"]:
        assert not isinstance(outcome, str), outcome
        metrics, error = outcome
        assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert "eval_on_start=True" in error


def test_under_deepspeed_a_second_training_is_refused(outcomes):
    """Without the error, the first backward pass would fail, because accelerate has destroyed the engine."""
    assert all(
        "a trainer can train only once" in error and "new model" in error for error in outcomes["zero2_trains_twice"]
    )
