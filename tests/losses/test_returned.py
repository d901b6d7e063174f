"""A loss that does not return one number per example raises an error with its name and its file."""

import re

import pytest
import torch

from hf_prefopt.losses import get_loss, register_loss, registry
from hf_prefopt.losses.base import LossOutput
from tests.trainers import make_config

ARGUMENTS = ("policy_chosen_logps", "policy_rejected_logps", "ref_chosen_logps", "ref_rejected_logps")


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    monkeypatch.setattr(registry, "_ALIASES", dict(registry._ALIASES))


def pairs(count=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    given = {name: -10 * torch.rand(count, dtype=dtype, generator=generator) for name in ARGUMENTS}
    return {name: tensor.requires_grad_(name.startswith("policy")) for name, tensor in given.items()}


def registered(change):
    """Register a DPO-like loss, with its result changed by `change`."""

    @register_loss("changed")
    def changed(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=0.1):
        chosen, rejected = policy_chosen_logps - ref_chosen_logps, policy_rejected_logps - ref_rejected_logps
        return change(-torch.nn.functional.logsigmoid(beta * (chosen - rejected)))

    return get_loss("changed")


def rewards_of(shape):
    return lambda losses: LossOutput(losses, torch.zeros(shape))


def component_of(values):
    return lambda losses: LossOutput(losses, None, {"part": values(losses)})


REFUSED = {
    "a mean": (torch.mean, "losses of shape [].", "remove mean()"),
    "a sum": (torch.sum, "losses of shape []", "remove mean()"),
    "a broadcast": (lambda losses: losses[:, None] + losses, "losses of shape [4, 4]", "x[:, None]"),
    "a column": (lambda losses: losses[:, None], "losses of shape [4, 1]", "x[:, None]"),
    "some": (lambda losses: losses[:2], "losses of shape [2]", "[4]"),
    "a number": (lambda losses: losses.mean().item(), "losses of type float", "return a tensor"),
    "nothing": (lambda losses: None, "losses of type NoneType", "return a tensor"),
    "integers": (lambda losses: (losses > 1).long(), "in torch.int64", "keep the dtype"),
    "truths": (lambda losses: losses > 1, "in torch.bool", "keep the dtype"),
    "half precision": (lambda losses: losses.bfloat16(), "in torch.bfloat16", "keep the dtype"),
    "another device": (lambda losses: losses.to("meta"), "on meta", "zeros_like()"),
    "detached": (lambda losses: losses.detach(), "losses without a gradient", "remove detach()"),
    "rewards of one": (rewards_of((4,)), "rewards of shape [4]", "shape [4, 2]"),
    "rewards broadcast": (rewards_of((4, 4)), "rewards of shape [4, 4]", "shape [4, 2]"),
    "rewards transposed": (rewards_of((2, 4)), "rewards of shape [2, 4]", "shape [4, 2]"),
    "a component's mean": (component_of(torch.mean), "component 'part' of shape []", "remove mean()"),
    "a component's number": (component_of(lambda losses: 1.0), "component 'part' of type float", "return a tensor"),
}


@pytest.mark.parametrize(("change", "found", "cure"), REFUSED.values(), ids=REFUSED)
def test_refuses(change, found, cure):
    with pytest.raises(ValueError, match=re.escape(found)) as error:
        registered(change)(**pairs())
    assert "loss 'changed'" in str(error.value) and f"{__file__}:" in str(error.value) and cure in str(error.value)


ACCEPTED = {
    "the losses": lambda losses: losses,
    "more digits": lambda losses: losses.double(),
    "an expanded mean": lambda losses: losses.mean().expand(4),
    "rewards": rewards_of((4, 2)),
    "counts": component_of(lambda losses: (losses > 1).detach()),
}


@pytest.mark.parametrize("change", ACCEPTED.values(), ids=ACCEPTED)
def test_accepts(change):
    assert registered(change)(**pairs()).losses.shape == (4,)


@pytest.mark.parametrize("count", [0, 1])
def test_accepts_any_number_of_examples(count):
    assert registered(lambda losses: losses)(**pairs(count)).losses.shape == (count,)


def test_without_gradients_none_is_asked_for():
    with torch.no_grad():
        registered(lambda losses: losses)(**pairs())


def test_half_precision_is_given_back_for_half_precision():
    registered(lambda losses: losses)(**pairs(dtype=torch.bfloat16))


@pytest.mark.parametrize("change", [torch.mean, lambda losses: losses[:, None] + losses])
def test_a_configuration_refuses_it_before_anything_is_loaded(change, tmp_path):
    registered(change)
    with pytest.raises(ValueError, match="loss 'changed'"):
        make_config(tmp_path, loss_type="changed")


CELL = """
@register_loss("of_a_cell", aliases=({aliases}))
def of_a_cell(policy_chosen_logps, policy_rejected_logps, beta=0.1):
    return {factor} * beta * (policy_rejected_logps - policy_chosen_logps)
"""


def run_cell(factor, aliases="", module="__main__"):
    exec(CELL.format(factor=factor, aliases=aliases), {"register_loss": register_loss, "__name__": module})


def value():
    given = pairs()
    return get_loss("of_a_cell")(**{name: given[name] for name in ARGUMENTS[:2]}).losses


def test_a_cell_that_is_run_again_takes_the_place_of_what_it_had_registered():
    run_cell(1.0, '"old", "kept"')
    before = value()
    run_cell(2.0, '"kept", "new"')
    assert torch.equal(value(), 2 * before)
    assert get_loss("kept") is get_loss("new") is get_loss("of_a_cell")
    with pytest.raises(ValueError, match="there is no loss old; "):
        get_loss("old")


def test_a_name_that_is_taken_stays_an_error():
    run_cell(1.0, '"alias",')
    before = value()
    for name in ("of_a_cell", "alias", "dpo"):
        with pytest.raises(ValueError, match=f"{name} is already registered"):
            registered_as(name)
    with pytest.raises(ValueError, match="of_a_cell is already registered"):
        run_cell(2.0, module="another_module")
    assert torch.equal(value(), before)


def registered_as(name):
    @register_loss(name)
    def other(policy_chosen_logps, policy_rejected_logps):
        return policy_rejected_logps - policy_chosen_logps


def test_losses_that_a_factory_makes_do_not_replace_each_other():
    registered(lambda losses: losses)
    with pytest.raises(ValueError, match="changed is already registered"):
        registered(lambda losses: 2 * losses)


def test_lambdas_do_not_replace_each_other():
    register_loss("small")(lambda policy_chosen_logps: -policy_chosen_logps)
    with pytest.raises(ValueError, match="small is already registered"):
        register_loss("small")(lambda policy_chosen_logps: -2 * policy_chosen_logps)
