"""Modifiers: the losses that each one supports, and their results; neutral settings change nothing.

The tests run over the registry, so every new loss is either modified correctly or rejected with a reason.
"""

import math

import numpy as np
import pytest
import torch

from hf_prefopt.data.layouts import PaddedCollator, SharedCollator
from hf_prefopt.kinds.made_up import made_up_inputs
from hf_prefopt.losses import get_loss, list_losses
from hf_prefopt.objective.build import build_objective
from hf_prefopt.objective.divergences import FDivergence, f_prime
from hf_prefopt.objective.objective import loss_inputs
from hf_prefopt.objective.token_sums import ColumnWeights, Humanline, LengthDesensitized, TokenSums
from hf_prefopt.scoring.forward import install_scoring, score
from tests.losses.numpy_reference.basics import nll
from tests.losses.pairs import vector
from tests.tiny_models import tiny_model
from tests.trainers import make_config

# Each modifier with a setting that changes the loss, and with a neutral setting.
MODIFIERS = {
    "f_divergence": (FDivergence("js"), FDivergence("alpha", 1.0)),
    "ld_alpha": (TokenSums([LengthDesensitized(0.3)]), TokenSums([LengthDesensitized(1.0)])),
    "ld_policy_only": (TokenSums([LengthDesensitized(0.3, True)]), TokenSums([LengthDesensitized(1.0, True)])),
    "humanline": (TokenSums([Humanline(-0.05, 0.04)]), TokenSums([Humanline(-1e6, 1e6)])),
    "use_token_weights": (TokenSums([ColumnWeights()]), TokenSums([LengthDesensitized(1.0)])),
}
REFERENCE_FREE = {
    *("alphapo", "cpo", "orpo", "repo", "rrhf", "sft", "sft_lists", "sft_unpaired", "simper", "simpo", "slic_hf"),
    *("mallows_dpo_per_token", "orpo_sequence", "sft_gold", "tpo", "tpo_l"),
}
OF_TOKENS = {"d2po", "sampo", "tis_dpo"}
OF_SINGLE_RESPONSES = {"apo_zero_unpaired", "bco", "kto", "npo", "qrpo", "sft_unpaired"}
OF_LISTS = {"exo_rw", "infonca", "lipo", "nca", "plackett_luce", "rrhf", "s_dpo", "sft_lists"}
OF_KL = {"tdpo1", "tdpo2"}
OF_TRIPLES = {"sft_gold", "tpo", "tpo_l"}
OF_PROMPTS = {"orpo_sequence"}
ONE_BY_ONE = {
    *("aot_unpaired", "apo_down", "apo_zero", "apo_zero_unpaired", "bco", "bco_pair", "cal_dpo", "dpo_shift", "dpop"),
    *("kto", "kto_pair", "nca", "nca_pair", "npo", "qrpo", "sppo", "sppo_hard"),
}
REFUSED = {
    "f_divergence": REFERENCE_FREE | OF_TOKENS | OF_KL | ONE_BY_ONE | {"alpha_dpo", "aot", "chi_po"},
    "ld_alpha": OF_TOKENS | OF_KL | OF_SINGLE_RESPONSES | OF_LISTS | OF_TRIPLES | OF_PROMPTS | {"sft"},
    "ld_policy_only": OF_TOKENS | OF_KL | OF_SINGLE_RESPONSES | OF_LISTS | OF_TRIPLES | OF_PROMPTS | {"sft"},
    "humanline": REFERENCE_FREE | OF_TOKENS | OF_KL | OF_LISTS,
    "use_token_weights": OF_TOKENS | OF_KL | OF_SINGLE_RESPONSES | OF_LISTS | OF_TRIPLES | OF_PROMPTS | {"sft"},
}
COMBINATIONS = [(name, modifier) for name in list_losses() for modifier in MODIFIERS]
TAKEN = [(name, modifier) for name, modifier in COMBINATIONS if name not in REFUSED[modifier]]


def inputs_of_tokens():
    """Synthetic inputs whose sums equal those of the tokens, also for single responses."""
    inputs = made_up_inputs()
    for stem, like in (("", "chosen_"), ("mismatched_", "rejected_")):
        inputs[f"{stem}lengths"] = inputs[f"{like}lengths"]
        for model in ("policy", "ref"):
            inputs[f"{model}_{stem}token_logps"] = inputs[f"{model}_{like}token_logps"]
            inputs[f"{model}_{stem}logps"] = inputs[f"{model}_{like}logps"]
    return inputs


def modified(name, modifier, inputs, **params):
    return build_objective([name], shared_params=params, modifiers=[modifier])(inputs)


def test_a_divergence_leaves_a_normalizer_in_losses_that_read_responses_one_by_one():
    with pytest.raises(ValueError, match="cannot modify apo_zero: it judges each response on its own"):
        build_objective(["apo_zero"], modifiers=[FDivergence("js")])


@pytest.mark.parametrize(("name", "modifier"), COMBINATIONS)
def test_a_combination_is_taken_or_refused_with_its_reason(name, modifier):
    changing, _ = MODIFIERS[modifier]
    if name in REFUSED[modifier]:
        with pytest.raises(ValueError, match=rf"{modifier.split('_p')[0]}.*, but it cannot modify {name}: it "):
            build_objective([name], modifiers=[changing])
    else:
        build_objective([name], modifiers=[changing])


@pytest.mark.parametrize(("name", "modifier"), TAKEN)
def test_a_neutral_modifier_changes_nothing(name, modifier):
    """α = 1, wide bounds and weights of 1 give the plain loss and rewards, up to rounding of the sums over tokens."""
    inputs = inputs_of_tokens()
    output, plain = modified(name, MODIFIERS[modifier][1], inputs), build_objective([name])(inputs)
    torch.testing.assert_close(output.losses, plain.losses, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(output.rewards, plain.rewards, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("name", "modifier"), TAKEN)
def test_a_modifier_changes_what_the_loss_is_given_and_no_more(name, modifier):
    """The loss equals that of sums computed by hand, for policy and reference, and differs from the unmodified loss."""
    inputs = inputs_of_tokens()
    output = modified(name, MODIFIERS[modifier][0], inputs)
    by_hand = {**inputs, **BY_HAND[modifier](inputs)}
    spec = get_loss(name)
    state = {"state": {k: vector(v)[0] for k, v in spec.state.initial.items()}} if spec.state else {}
    expected = spec(**{key: by_hand[key] for key in spec.inputs if key not in spec.optional_inputs}, **state)
    torch.testing.assert_close(output.losses, expected.losses, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(output.rewards, expected.rewards, rtol=1e-12, atol=1e-14)
    assert not torch.allclose(output.losses, build_objective([name])(inputs).losses, rtol=1e-6, atol=0)


RESPONSES = ("chosen_", "rejected_", "", "mismatched_", "list_")


def _divergence_by_hand(inputs):
    """Compute the divergence by hand. js: log 2 + log σ(r) replaces the policy's
    sum, and 0 replaces the reference's.
    """
    made = {}
    for response in RESPONSES:
        ratio = inputs[f"policy_{response}logps"] - inputs[f"ref_{response}logps"]
        made[f"policy_{response}logps"] = torch.log(2 / (1 + torch.exp(-ratio)))
        made[f"ref_{response}logps"] = torch.zeros_like(ratio)
    return made


def _length_by_hand(inputs, models=("policy", "ref")):
    """Compute the weights by hand: 1 for the first min(n_w, n_l) tokens, 0.3 for the others."""
    made = {}
    shorter = [min(pair) for pair in zip(inputs["chosen_lengths"], inputs["rejected_lengths"], strict=True)]
    for response in ("chosen_", "rejected_"):
        for model in models:
            tokens = inputs[f"{model}_{response}token_logps"].tolist()
            made[f"{model}_{response}logps"] = vector(
                *(
                    sum(x if t < n else 0.3 * x for t, x in enumerate(row))
                    for row, n in zip(tokens, shorter, strict=True)
                )
            )
    return made


def _humanline_by_hand(inputs):
    made = {}
    for response in RESPONSES[:4]:
        policy, ref = (inputs[f"{model}_{response}token_logps"].numpy() for model in ("policy", "ref"))
        made[f"policy_{response}logps"] = torch.tensor((ref + np.clip(policy - ref, -0.05, 0.04)).sum(1))
    return made


def _weights_by_hand(inputs):
    return {
        f"{model}_{side}_logps": torch.einsum(
            "bt,bt->b", inputs[f"{model}_{side}_token_logps"], inputs[f"{side}_token_weights"]
        )
        for model in ("policy", "ref")
        for side in ("chosen", "rejected")
    }


BY_HAND = {
    "f_divergence": _divergence_by_hand,
    "ld_alpha": _length_by_hand,
    "ld_policy_only": lambda inputs: _length_by_hand(inputs, ("policy",)),
    "humanline": _humanline_by_hand,
    "use_token_weights": _weights_by_hand,
}


@pytest.mark.parametrize(
    "modifier",
    [
        *(modifiers[0] for modifiers in MODIFIERS.values()),
        FDivergence("forward_kl"),
        FDivergence("alpha", 0.3),
        FDivergence("alpha", 1.7),
    ],
    ids=repr,
)
def test_gradients_are_those_of_the_value(modifier):
    """Float64 gradcheck of modified DPO in all its inputs."""
    inputs = inputs_of_tokens()
    objective = build_objective(["dpo"], modifiers=[modifier])
    policy = [name for name in objective.inputs if name.startswith("policy")]

    def losses(*values):
        return objective({**inputs, **dict(zip(policy, values, strict=True))}).losses

    assert torch.autograd.gradcheck(losses, [inputs[name].clone().requires_grad_() for name in policy])


def test_f_prime_by_hand():
    """r = log 2, u = 2: reverse log 2, forward 1 − ½, JS log(2·2/3), α = ½: (2^{−½} − 1)/(−½) = 2 − √2; all 0 at 0."""
    ratio = vector(math.log(2), 0.0)
    for name, expected in (
        ("reverse_kl", math.log(2)),
        ("forward_kl", 0.5),
        ("js_divergence", math.log(4 / 3)),
        ("alpha_divergence", 2 - math.sqrt(2)),
    ):
        assert f_prime(ratio, name).tolist() == pytest.approx([expected, 0.0], abs=1e-15)


# f′ as functions of the density ratio u, from the divergences' generators.
F_PRIME = {
    "forward_kl": (FDivergence("forward_kl"), lambda u: 1 - 1 / u),
    "js": (FDivergence("js"), lambda u: np.log(2 * u / (1 + u))),
    "alpha 0.3": (FDivergence("alpha", 0.3), lambda u: (u**-0.7 - 1) / -0.7),
    "alpha 1.7": (FDivergence("alpha", 1.7), lambda u: (u**0.7 - 1) / 0.7),
}


@pytest.mark.parametrize("length_normalize", [True, False])
@pytest.mark.parametrize(("divergence", "f_prime_of"), F_PRIME.values(), ids=F_PRIME)
def test_ipo_under_a_divergence_equals_numpy(divergence, f_prime_of, length_normalize):
    """(f′(u_w)/|y_w| − f′(u_l)/|y_l| − 1/(2β))² in float64, without lengths for sums. The gradient is 2·(…)·(±u
    f″(u)/|y|), with u f″(u) from central differences in log u.
    """
    inputs = made_up_inputs()
    for side in ("chosen", "rejected"):
        inputs[f"policy_{side}_logps"].requires_grad_()
    params = {"length_normalize": length_normalize}
    output = build_objective(["ipo"], loss_params=params, shared_params={"beta": 0.3}, modifiers=[divergence])(inputs)
    output.losses.sum().backward()
    values, slopes = {}, {}
    for side in ("chosen", "rejected"):
        ratio = (inputs[f"policy_{side}_logps"] - inputs[f"ref_{side}_logps"]).detach().numpy()
        length = inputs[f"{side}_lengths"].numpy() if length_normalize else 1
        values[side] = f_prime_of(np.exp(ratio)) / length
        step = 1e-5
        slopes[side] = (f_prime_of(np.exp(ratio + step)) - f_prime_of(np.exp(ratio - step))) / (2 * step) / length
    distance = values["chosen"] - values["rejected"] - 1 / (2 * 0.3)
    np.testing.assert_allclose(output.losses.detach().numpy(), distance**2, rtol=1e-12)
    np.testing.assert_allclose(output.rewards.numpy(), 0.3 * np.stack([values["chosen"], values["rejected"]], 1))
    for side, sign in (("chosen", 1), ("rejected", -1)):
        # The error of a central difference is step²·f‴/6 ≈ 1e-10, and its rounding 1e-16/step = 1e-11, relative to the
        # terms.
        found = inputs[f"policy_{side}_logps"].grad.numpy()
        np.testing.assert_allclose(found, 2 * distance * sign * slopes[side], rtol=1e-7, atol=1e-8)


def test_alpha_goes_from_the_forward_to_the_reverse_kl():
    ratio = torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(f_prime(ratio, "alpha", 0.0), f_prime(ratio, "forward_kl"), rtol=1e-14, atol=0)
    torch.testing.assert_close(f_prime(ratio, "alpha", 1.0), ratio, rtol=0, atol=0)
    torch.testing.assert_close(f_prime(ratio, "alpha", 1 + 1e-9), ratio, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", ["forward_kl", "js", "alpha"])
def test_far_out_rewards_and_their_gradients_are_finite(name):
    """r = ±1,000 in fp32: no overflow, and responses far below the reference still have a gradient."""
    ratio = torch.tensor([1000.0, -1000.0], requires_grad=True)
    value = f_prime(ratio, name)
    value.sum().backward()
    assert value.isfinite().all() and ratio.grad.isfinite().all() and ratio.grad[1] > 0


def test_the_logged_reward_is_that_of_the_divergence():
    """The reward is β·f′ and not β·r, and the loss is ℓ of the reward margin."""
    inputs = made_up_inputs()
    output = modified("dpo", FDivergence("forward_kl"), inputs, beta=0.2)
    ratio = inputs["policy_chosen_logps"] - inputs["ref_chosen_logps"]
    torch.testing.assert_close(output.chosen_rewards, 0.2 * (1 - torch.exp(-ratio)))
    margin = (output.chosen_rewards - output.rejected_rewards).numpy()
    np.testing.assert_allclose(output.losses.numpy(), nll(margin), rtol=1e-12)


def test_an_nll_beside_a_modified_loss_stays_one():
    """For dpo + 0.5 sft with every modifier, only dpo changes; the NLL uses the sums without weights."""
    inputs = inputs_of_tokens()
    nll_of_chosen = -inputs["policy_chosen_logps"] / inputs["chosen_lengths"]
    for modifier, _ in MODIFIERS.values():
        both = build_objective(["dpo"], sft_weight=0.5, modifiers=[modifier])(inputs)
        torch.testing.assert_close(
            both.losses, modified("dpo", modifier, inputs).losses + 0.5 * nll_of_chosen, rtol=1e-13, atol=0
        )


def test_modifiers_follow_each_other():
    """The order is: clamp, token weights, the weight of the tail, then the divergence. Each is computed by hand here.

    One pair, chosen tokens ρ = (4, 4), rejected (1): clamped (1.5, 1.5) and (1); weights (2, 2) and (3): (3, 3), (3); α
    = ½ after the first token: 4.5 and 3; forward KL: 1 − e^{−4.5} and 1 − e^{−3}.
    """
    inputs = {
        "policy_chosen_token_logps": vector(4.0, 4.0)[None],
        "policy_rejected_token_logps": vector(1.0, 0.0)[None],
        "chosen_token_weights": vector(2.0, 2.0)[None],
        "rejected_token_weights": vector(3.0, 0.0)[None],
        "chosen_lengths": torch.tensor([2]),
        "rejected_lengths": torch.tensor([1]),
    }
    inputs |= {f"ref_{side}_token_logps": torch.zeros(1, 2, dtype=torch.float64) for side in ("chosen", "rejected")}
    settings = {"humanline": True, "use_token_weights": True, "ld_alpha": 0.5, "f_divergence_type": "forward_kl"}
    output = make_config("unused", beta=1.0, **settings).build_objective()(inputs)
    assert output.rewards[0].tolist() == pytest.approx([1 - math.exp(-4.5), 1 - math.exp(-3)])


@pytest.mark.parametrize("collate", [PaddedCollator(0), SharedCollator()])
def test_a_response_of_several_pairs_has_the_tail_of_each(collate):
    """A chosen response of four tokens is in pairs with rejected ones of one and three tokens. It is computed once. At
    α = 0, one of its tokens counts in the first pair, and three in the second.
    """
    from hf_prefopt.scoring.attention import install_segment_attention

    chosen, short, long = [10, 11, 12, 2], [13], [14, 15, 2]
    rows = [
        {"prompt_ids": [5, 6], "response_ids": [chosen, other], "scored_masks": [[1] * 4, [1] * len(other)]}
        | {"pairs": [[0, 1]], "row": row}
        for row, other in enumerate((short, long))
    ]
    model, batch = tiny_model(dtype=torch.float64), collate(rows)
    install_scoring(model)
    install_segment_attention(model)
    assert len(batch["response_lengths"]) == 3
    scores = score(model, batch)
    objective = build_objective(["dpo"], reference_free=True, modifiers=[TokenSums([LengthDesensitized(0.0)])])
    rewards = objective(loss_inputs(objective.inputs, batch, scores, None)).rewards
    tokens = scores.token_logps.detach()
    expected = [[tokens[0], tokens[4]], [tokens[:3].sum(), tokens[5:].sum()]]
    torch.testing.assert_close(rewards, 0.1 * torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"f_divergence_type": "kl"}, "f_divergence_type='kl' must be one of reverse_kl, forward_kl"),
        ({"f_divergence_type": "alpha", "f_alpha_divergence_coef": math.inf}, "f_alpha_divergence_coef=inf must be"),
        ({"f_divergence_type": "js", "loss_type": "sft"}, "cannot modify sft: it has no rewards"),
        ({"f_divergence_type": "js", "reference_free": True}, "it does not compare log-ratios to a reference"),
        ({"ld_alpha": 1.1}, r"ld_alpha=1.1 must be at least 0 and at most 1"),
        ({"ld_alpha": 0.5, "loss_type": "kto"}, "it compares unpaired examples, but these weights apply"),
        ({"ld_policy_only": True}, "ld_policy_only=True only has an effect with ld_alpha"),
        ({"humanline": True, "humanline_log_eps_p": 0.1}, "humanline_log_eps_p=0.1 must be"),
        ({"humanline": True, "humanline_log_eps_r": -0.1}, "humanline_log_eps_r=-0.1 must be"),
        ({"humanline": True, "reference_free": True}, "it reads log-probs without a reference"),
        ({"use_token_weights": True, "loss_type": "tis_dpo"}, "cannot modify tis_dpo: it weights tokens itself"),
        ({"ld_alpha": 0.5, "loss_type": ["dpo", "tdpo2"]}, "cannot modify tdpo2: it also reads a KL"),
    ],
)
def test_a_configuration_without_meaning_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        make_config("unused", **settings)
