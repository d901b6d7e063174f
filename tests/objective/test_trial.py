"""A user's loss is tried when a configuration is made; what would be trained wrongly is an error there."""

import pytest
import torch
from torch import nn
from torch.nn.functional import logsigmoid

from hf_prefopt.losses import get_loss, list_losses, register_loss, registry
from tests.trainers import make_config


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    monkeypatch.setattr(registry, "_ALIASES", dict(registry._ALIASES))


OWN = nn.Parameter(torch.tensor(0.1))


class Learned(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, policy_chosen_logps, policy_rejected_logps):
        return -logsigmoid(self.scale * (policy_chosen_logps - policy_rejected_logps))


def closed_over(policy_chosen_logps, policy_rejected_logps):
    return -logsigmoid(OWN * (policy_chosen_logps - policy_rejected_logps))


def in_place(policy_chosen_logps, policy_rejected_logps, ref_chosen_logps, ref_rejected_logps):
    ref_chosen_logps -= 1
    return policy_rejected_logps - policy_chosen_logps + ref_chosen_logps - ref_rejected_logps


def centered(policy_chosen_logps, policy_rejected_logps):
    margin = policy_chosen_logps - policy_rejected_logps
    return -logsigmoid(margin - margin.mean().detach())


def averaged(policy_chosen_logps, policy_rejected_logps):
    return (policy_rejected_logps - policy_chosen_logps).mean().expand(len(policy_chosen_logps))


def root(policy_chosen_logps, policy_rejected_logps, shift=0.0):
    return torch.sqrt(policy_chosen_logps * policy_rejected_logps - shift)


REFUSED = {
    "a module's parameter": (Learned().forward, {}, "a parameter of its own that requires a gradient"),
    "a parameter from outside": (closed_over, {}, "a parameter of its own that requires a gradient"),
    "an input changed": (in_place, {}, "changes its input ref_chosen_logps in place"),
    "a mean subtracted": (centered, {}, "register it with needs_global_batch=True"),
    "a mean": (averaged, {}, "register it with needs_global_batch=True"),
    "not a number": (root, {"shift": 1e6}, r"is \[nan, nan\] for two synthetic examples.*shift=1000000"),
    "a hyperparameter that is none": (root, {"shift": float("nan")}, r"shift=nan"),
}


@pytest.mark.parametrize("beside", [[], ["dpo"]], ids=["alone", "with dpo"])
@pytest.mark.parametrize(("function", "params", "said"), REFUSED.values(), ids=REFUSED)
def test_refused(function, params, said, beside, tmp_path):
    register_loss("tried")(function)
    given = {"tried": params} if beside else params
    with pytest.raises(ValueError, match=f"loss 'tried'.*{said}"):
        make_config(tmp_path, loss_type=["tried", *beside], loss_params=given)


def noisy(policy_chosen_logps, policy_rejected_logps):
    return torch.rand(len(policy_chosen_logps)) * (policy_rejected_logps - policy_chosen_logps)


ACCEPTED = {
    "declared": (centered, {"needs_global_batch": True}),
    "random": (noisy, {}),
    "a frozen parameter": (Learned().requires_grad_(False).forward, {}),
}


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("function", "capabilities"), ACCEPTED.values(), ids=ACCEPTED)
def test_accepted(function, capabilities, context, tmp_path):
    register_loss("tried", **capabilities)(function)
    with context():
        make_config(tmp_path, loss_type="tried")


def test_every_loss_of_ours_is_accepted(tmp_path):
    for name in list_losses():
        if get_loss(name).function.__module__.startswith("hf_prefopt."):  # other tests register losses, too
            make_config(tmp_path, loss_type=name)
