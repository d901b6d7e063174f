"""Losses that change during a run: the λ of each step and of each evaluation, for any split of the steps."""

import itertools

import pytest

from tests.tiny_models import perturbed, tiny_model
from tests.trainers import logged, make_trainer, pairs

SHIFT = {"loss_type": "dpo_shift", "loss_params": {"lambda_coef": 0.5, "lambda_end": 1.0}}


@pytest.mark.parametrize(
    "split",
    [
        {"per_device_train_batch_size": 4},
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        {"per_device_train_batch_size": 4, "max_tokens_per_batch": 40},
    ],
    ids=["whole", "accumulated", "by tokens"],
)
def test_lambda_goes_with_the_optimizer_steps(split, tmp_path):
    """Four steps from ½ to 1: 0.5, 0.625, 0.75, 0.875; evaluations after steps 2 and 4 have 0.75 and 1."""
    settings = {"train_dataset": pairs(8), "eval_dataset": pairs(3, seed=1), "eval_strategy": "steps", "eval_steps": 2}
    trainer = make_trainer(tmp_path, **SHIFT, **settings, **split, num_train_epochs=2)
    trainer.train()
    assert logged(trainer, "loss/dpo_shift_lambda") == pytest.approx([0.5, 0.625, 0.75, 0.875])
    assert logged(trainer, "eval_loss/dpo_shift_lambda") == pytest.approx([0.75, 1.0])


def test_an_evaluation_has_the_lambda_of_the_steps_taken(tmp_path):
    """Before training, it is that of a constant λ = lambda_coef, and afterwards that
    of lambda_end; at learning rate 0, the policy is the same for both.
    """
    model = {"model": perturbed(tiny_model(), scale=0.05), "ref_model": tiny_model()}
    data, still = pairs(6), {"learning_rate": 0.0, "max_steps": 2}
    constant = {
        value: make_trainer(
            tmp_path, **model, loss_type="dpo_shift", loss_params={"lambda_coef": value}, train_dataset=None
        ).evaluate(data)["eval_loss"]
        for value in (0.5, 1.0)
    }
    trainer = make_trainer(tmp_path, **model, **SHIFT, train_dataset=data, **still)
    before = trainer.evaluate(data)["eval_loss"]
    trainer.train()
    after = trainer.evaluate(data)["eval_loss"]
    assert (before, after) == pytest.approx((constant[0.5], constant[1.0]), rel=1e-6)
    assert abs(before - after) > 1e-3


@pytest.mark.parametrize("layout", ["padded", "shared"])
def test_sampo_draws_again_in_each_epoch_and_alike_in_every_split(layout, tmp_path):
    """The policy does not change, and three epochs have one step over all rows: each has another loss, and splitting
    the step gives the same losses. The evaluations between them are equal. Sums in another order differ by 1e-5.
    """
    model = {"model": perturbed(tiny_model(), scale=0.05), "ref_model": tiny_model()}
    settings = {"loss_type": "sampo", "beta": 1.0, "learning_rate": 0.0, "num_train_epochs": 3, "layout": layout}
    settings |= {"train_dataset": pairs(8), "eval_dataset": pairs(4, seed=1), "eval_strategy": "epoch"}
    losses = []
    for size in (8, 1):
        steps = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        trainer = make_trainer(tmp_path, **model, **settings, **steps)
        trainer.train()
        losses.append(logged(trainer, "loss"))
        assert len({*logged(trainer, "eval_loss")}) == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert min(abs(a - b) for a, b in itertools.combinations(losses[0], 2)) > 1e-3


def test_other_losses_are_told_nothing(tmp_path):
    """`progress` is not a hyperparameter, and only losses that name it are called with it."""
    with pytest.raises(ValueError, match=r"progress=0.5 is not used by any loss: dpo_shift takes beta"):
        make_trainer(tmp_path, loss_type="dpo_shift", loss_params={"progress": 0.5})
    make_trainer(tmp_path, loss_type=["dpo_shift", "dpo"], max_steps=1).train()
