"""A DeepSpeed configuration with its own optimizer and scheduler trains like one process with the same two."""

import pytest
import torch

from tests.distributed.launch import torchrun
from tests.distributed.own_json import CONFIGURATIONS, RATE, STEPS, WARM_UP, settings
from tests.tiny_models import tiny_model
from tests.trainers import logged, make_trainer


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("own_json")
    output = torchrun("tests.distributed.own_json", folder)
    assert (folder / "outcomes.pt").exists(), output
    return torch.load(folder / "outcomes.pt")


def linear(step):
    """Compute transformers' schedule: up to 1 in the first steps, then linearly to 0."""
    return step / WARM_UP if step < WARM_UP else (STEPS - step) / (STEPS - WARM_UP)


def warmup_decay(step):
    """Compute DeepSpeed's WarmupDecayLR, which is one step late: the first two steps have the first value."""
    return linear(max(0, step - 1))


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_its_own_optimizer_and_scheduler_are_used(name, outcomes, tmp_path):
    """The tolerances are 1e-5 for losses and a thousandth of a step for weights.

    The orders of summation differ: 2⁻²⁴ of sums of about 100 nats. AdamW divides by the root of a mean of few squares.
    """
    model = tiny_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    schedule = warmup_decay if "scheduler" in name else linear
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule)
    trainer = make_trainer(tmp_path, model, **settings(1))
    trainer.optimizer, trainer.lr_scheduler = optimizer, scheduler
    trainer.train()
    found = outcomes[name]
    assert found["losses"] == pytest.approx(logged(trainer, "loss"), abs=1e-5)
    apart = max((found["weights"][key] - p).abs().max().item() for key, p in trainer.model.named_parameters())
    assert apart < 1e-3 * RATE
