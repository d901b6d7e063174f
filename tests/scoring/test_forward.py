"""The scoring forward on real architectures: the log-prob of a response equals that from plain logits."""

import copy
import inspect

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from hf_prefopt.data.layouts import PaddedCollator
from hf_prefopt.scoring.forward import base_causal_lm, install_scoring, logit_transform, score
from tests.scoring.plain import padded_batch, plain_response_logps
from tests.tiny_models import perturbed, random_rows, tiny_model, with_lora

# Each family has its own scale, cap or layer between hidden states and log-probs, with a value that has an effect.
ARCHITECTURES = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "gemma2": {"final_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "gpt2": {},
}
each_architecture = pytest.mark.parametrize("model_type", ARCHITECTURES)


def build(model_type, lora=False, **settings):
    model = tiny_model(model_type, **ARCHITECTURES[model_type], **settings)
    return perturbed(with_lora(model)) if lora else model


@each_architecture
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_a_response_has_the_log_prob_of_plain_logits(model_type, lora, temperature):
    """The body computes the same; the head differs by float64 rounding: 1e-12 of sums of about 100 nats."""
    model, batch = build(model_type, lora, dtype=torch.float64), padded_batch()
    with torch.no_grad():
        expected = plain_response_logps(model, batch, temperature)
        install_scoring(model, temperature)
        torch.testing.assert_close(score(model, batch).logps, expected, rtol=1e-12, atol=0)


@each_architecture
def test_fp32_is_exact_to_its_own_rounding(model_type):
    """In fp32, each token's log-prob has a few roundings (6e-8) of logits of up to about 30 nats: at most 2e-5 per
    token. The error of the sum over a response is at most that times the number of tokens.
    """
    model, batch = build(model_type), padded_batch()
    with torch.no_grad():
        expected = plain_response_logps(model, batch)
        install_scoring(model)
        difference = (score(model, batch).logps - expected).abs()
    assert (difference <= 2e-5 * batch["response_lengths"]).all()


@each_architecture
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_model_goes_on_as_before(model_type, lora):
    """Logits and greedy generation are the same as before scoring was installed, bit for bit."""
    model = build(model_type, lora)
    prompt = torch.tensor([[5, 6, 7, 8]])
    settings = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 5, "do_sample": False}
    with torch.no_grad():
        before = model(prompt).logits, model.generate(input_ids=prompt, **settings)
        install_scoring(model, temperature=2.0)
        score(model, padded_batch())
        after = model(prompt).logits, model.generate(input_ids=prompt, **settings)
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_deep_copy_scores_with_its_own_weights(lora):
    """A copy that is made after installing gives the original's log-probs until one of the two models changes."""
    model, batch = build("llama", lora), padded_batch()
    install_scoring(model)
    with torch.no_grad():
        original = score(model, batch).token_logps
        copied = copy.deepcopy(model)
        assert torch.equal(score(copied, batch).token_logps, original)
        perturbed(copied, seed=7)
        assert not torch.equal(score(copied, batch).token_logps, original)
        assert torch.equal(score(model, batch).token_logps, original)


def test_installing_again_only_changes_the_temperature():
    """The forward is not wrapped twice, and the second temperature replaces the first."""
    model, batch = build("llama", dtype=torch.float64), padded_batch()
    with torch.no_grad():
        expected = plain_response_logps(model, batch, temperature=0.5)
        install_scoring(model, temperature=3.0)
        first = model.forward
        install_scoring(model, temperature=0.5)
        torch.testing.assert_close(score(model, batch).logps, expected, rtol=1e-12, atol=0)
    assert model.forward is first


def test_only_response_tokens_are_scored():
    """N is the number of response tokens, and the targets are these tokens in order, including EOS, without prompts."""
    batch = padded_batch()
    responses = [response for row in random_rows(3) for response in row["response_ids"]]
    assert batch["targets"].tolist() == [token for response in responses for token in response]
    model = build("llama")
    install_scoring(model)
    scores = score(model, batch)
    assert scores.token_logps.shape == batch["targets"].shape
    assert scores.lengths.tolist() == [len(response) for response in responses]


def test_an_unscored_token_leaves_the_sum_and_stays_in_the_context():
    """If the mask of the first response token is 0, the response's sum lacks exactly the log-prob of this token."""
    rows = random_rows(2)
    for row in rows:
        row["response_ids"] = [[9, 10, *response] for response in row["response_ids"]]
        row["scored_masks"] = [[1] * len(response) for response in row["response_ids"]]
    model = build("llama", dtype=torch.float64)
    install_scoring(model)
    with torch.no_grad():
        full = score(model, PaddedCollator(0)(rows))
        for row in rows:
            row["scored_masks"] = [[0, *mask[1:]] for mask in row["scored_masks"]]
        masked = score(model, PaddedCollator(0)(rows))
    first = full.token_logps[torch.cat([torch.zeros(1, dtype=torch.long), full.lengths.cumsum(0)[:-1]])]
    torch.testing.assert_close(masked.logps, full.logps - first, rtol=1e-13, atol=1e-12)


def test_token_statistics_are_of_the_tempered_distribution():
    """Σp² and the entropy are those of softmax(logits / T), the distribution whose log-probs are returned."""
    model, batch = build("gemma2", dtype=torch.float64), padded_batch()
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logps = (logits.flatten(0, 1)[batch["scored_rows"]] / 1.7).log_softmax(-1)
        install_scoring(model, temperature=1.7)
        stats = score(model, batch, ("entropy", "log_sum_sq_probs")).token_stats
    torch.testing.assert_close(stats["entropy"], -(logps.exp() * logps).sum(-1), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(stats["log_sum_sq_probs"], logps.exp().square().sum(-1).log(), rtol=1e-11, atol=1e-12)
    assert score(model, batch).token_stats == {}


def test_what_a_config_says_of_its_logits():
    """Scale, cap and temperature are read from the fields in the architectures' own configs."""
    transforms = {name: logit_transform(build(name).config, 2.0) for name in ARCHITECTURES}
    found = {name: (t.scale, t.softcap, t.temperature) for name, t in transforms.items()}
    assert found == {
        "llama": (1.0, None, 2.0),
        "qwen2": (1.0, None, 2.0),
        "gemma2": (1.0, 5.0, 2.0),
        "cohere": (0.25, None, 2.0),
        "granite": (1 / 3, None, 2.0),
        "gpt2": (1.0, None, 2.0),
    }


def test_a_model_without_a_head_is_refused():
    """A language model's body without a head cannot score."""
    with pytest.raises(ValueError, match="has no language-model head"):
        install_scoring(tiny_model().base_model)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("takes_anything", [False, True])
def test_a_forward_that_was_replaced_is_named(takes_anything, lora):
    """A kernel library replaces the forward on the instance after the scoring forward was installed."""
    model = build("llama", lora)
    install_scoring(model)
    output = CausalLMOutputWithPast(logits=torch.zeros(1))

    def forward(
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        labels=None,
        return_dict=None,
        output_attentions=None,
        output_hidden_states=None,
    ):
        return output

    causal_lm = base_causal_lm(model)
    causal_lm.forward = (lambda **_: output) if takes_anything else forward
    with pytest.raises(RuntimeError, match=r"LlamaForCausalLM does not accept scored_rows.*replaced the forward"):
        score(model, padded_batch())


def test_other_type_errors_stay_what_they_are():
    model = build("llama")
    install_scoring(model)
    model.model.norm.forward = lambda: None
    with pytest.raises(TypeError, match="positional argument"):
        score(model, padded_batch())


def test_forwards_keep_their_signatures():
    """`generate` and PEFT read a model's arguments from the signature of its forward, which stays the model's own."""
    model = build("llama", True)
    causal_lm = base_causal_lm(model)
    modules = (causal_lm, causal_lm.get_output_embeddings())
    before = [inspect.signature(module.forward) for module in modules]
    install_scoring(model)
    assert [inspect.signature(module.forward) for module in modules] == before
