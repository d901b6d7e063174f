"""Scores are compared with the model's own logits, and are computed from these logits if they differ.

A difference is detected from 4u · (|z_min| + mean|z|) / |z_min − mean z| on, relative (see `settle_scores`): 3 % in
bf16. The differences here are 10 % or more, in models with logits up to ±5.
"""

import copy
import math
import random

import pytest
import torch
import transformers
from peft import PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

from hf_prefopt.data.layouts import PaddedCollator
from hf_prefopt.scoring import forward
from hf_prefopt.scoring.agreement import made_up_tokens, settle_scores
from hf_prefopt.scoring.forward import install_scoring, score
from tests.scoring.architectures import AROUND, SHARING, architecture
from tests.scoring.plain import assert_same_gradients, gradients, padded_batch, plain_response_logps
from tests.tiny_models import _SIZES, QUANTIZABLE, perturbed, random_rows, tiny_model, with_lora
from tests.trainers import logged, make_trainer, weights

NOT_ITS_OWN = "differ from those of its own logits"


class OddLlama(LlamaForCausalLM):
    """A family that the package does not know: `change` modifies the logits, or `before_head` the hidden states."""

    change = staticmethod(lambda logits: logits)
    before_head = staticmethod(lambda hidden: hidden)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        logits = self.change(self.lm_head(self.before_head(hidden)))
        return transformers.modeling_outputs.CausalLMOutputWithPast(logits=logits)


def dense(hidden):
    """Return a linear layer with an activation, as BERT has before its output embeddings."""
    layer = torch.randn(32, 32, generator=torch.Generator().manual_seed(0)) / 32**0.5
    return nn.functional.gelu(hidden @ layer.to(hidden.dtype))


def biased(logits):
    noise = torch.randn(logits.shape[-1], generator=torch.Generator().manual_seed(0))
    return logits + noise.to(logits.dtype)


def one_token_ruled_out(logits):
    return logits.index_fill(-1, torch.tensor([77]), torch.finfo(logits.dtype).min)


FAULTS = {
    "scaled by 1.1": {"change": lambda logits: 1.1 * logits},
    "scaled by 0.9": {"change": lambda logits: 0.9 * logits},
    "capped": {"change": lambda logits: 4 * torch.tanh(logits / 4)},
    "a bias": {"change": biased},
    "a token ruled out": {"change": one_token_ruled_out},
    "a token impossible": {"change": lambda z: z.index_fill(-1, torch.tensor([77]), -torch.inf)},
    "a dense layer": {"before_head": dense},
    "hidden states divided": {"before_head": lambda hidden: hidden / 1.2},
}


def by_place(hidden):
    """Weight hidden states by their position in the sequence, which a single hidden state does not contain."""
    return hidden * torch.linspace(0.5, 1.5, hidden.shape[1], dtype=hidden.dtype)[:, None]


def odd_llama(fault, seed=0):
    torch.manual_seed(seed)
    model = OddLlama(AutoConfig.for_model("llama", **_SIZES)).eval()
    for name, function in {**FAULTS, "by place": {"before_head": by_place}}[fault].items():
        setattr(model, name, function)
    return model


def check(model, temperature=1.0, autocast=False):
    install_scoring(model, temperature)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        return settle_scores(model, torch.bfloat16 if autocast else None)


WAYS = {
    "fp32": (lambda model: model, False),
    "bf16": (lambda model: model.bfloat16(), False),
    "autocast": (lambda model: model, True),
    "LoRA": (lambda model: perturbed(with_lora(model)), False),
    "LoRA on the head, bf16": (lambda model: perturbed(with_lora(model, target_modules=["lm_head"])).bfloat16(), False),
}
each_way = pytest.mark.parametrize("way", WAYS)


class TestFaults:
    @each_way
    @pytest.mark.parametrize("temperature", [1.0, 2.5])
    @pytest.mark.parametrize("fault", FAULTS)
    def test_a_model_that_does_something_unknown_is_scored_by_its_own_logits(self, fault, temperature, way):
        """The scores from the model's own logits agree; otherwise there would be an error."""
        made, autocast = WAYS[way]
        assert check(made(odd_llama(fault)), temperature, autocast)

    @each_way
    def test_the_same_model_without_a_fault_is_not(self, way):
        made, autocast = WAYS[way]
        torch.manual_seed(0)
        assert not check(made(OddLlama(AutoConfig.for_model("llama", **_SIZES)).eval()), 2.5, autocast)

    @pytest.mark.parametrize("chunk_rows", [1, 7, 512])
    @pytest.mark.parametrize("fault", [fault for fault in FAULTS if not fault.startswith("a token ")])
    @pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
    def test_log_probs_and_gradients_are_those_of_its_logits(self, fault, lora, chunk_rows, monkeypatch):
        """In float64, only the rounding of the head differs: 1e-12, as in test_head.
        The chunk size does not divide N.
        """
        monkeypatch.setitem(forward.CHUNK_ROWS, "cpu", chunk_rows)
        model = odd_llama(fault).double()
        model = perturbed(with_lora(model)).double() if lora else model
        batch = padded_batch()
        weights = torch.linspace(-1, 1, len(batch["response_lengths"]), dtype=torch.float64)
        plain = plain_response_logps(model, batch, 1.7)
        expected = gradients((plain * weights).sum(), model)
        assert check(model, 1.7)
        logps = score(model, batch).logps
        torch.testing.assert_close(logps, plain, rtol=1e-12, atol=0)
        assert_same_gradients(gradients((logps * weights).sum(), model), expected, rtol=1e-11)

    def test_its_layers_run_once(self):
        """The body runs once for the scores, and not again for each chunk of logits."""
        model, calls = odd_llama("a dense layer"), []
        check(model)
        model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
        score(model, padded_batch()).logps.sum().backward()
        assert len(calls) == 1

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_small_logits_hide_no_fault(self, dtype):
        """The weights are as before any training: all logits are within ±0.4, so 10 % is 0.04 nats."""
        torch.manual_seed(0)
        model = OddLlama(AutoConfig.for_model("llama", **{**_SIZES, "initializer_range": 0.02})).eval()
        assert not check(copy.deepcopy(model).to(dtype))
        model.change = FAULTS["scaled by 1.1"]["change"]
        assert check(model.to(dtype))

    def test_nan_is_named(self):
        model = tiny_model()
        model.model.norm.weight.data[0] = torch.nan
        with pytest.raises(ValueError, match="LlamaForCausalLM gives NaN"):
            check(model)

    @pytest.mark.parametrize("role", ["policy", "reference"])
    @pytest.mark.parametrize("settings", [{"layout": "padded"}, {"layout": "shared"}, {}, {"data_collator": 0}])
    def test_nothing_trains(self, settings, role, tmp_path):
        """Every layout raises an error, also a custom collator, whether the model is
        the policy or an explicit reference.
        """
        if "data_collator" in settings:
            settings = {"data_collator": PaddedCollator(0)}
        odd = odd_llama("by place")
        models = {"model": odd} if role == "policy" else {"model": tiny_model(), "ref_model": odd}
        trainer = make_trainer(tmp_path, eval_dataset=None, **models, **settings)
        before = weights(trainer.model)
        with pytest.raises(ValueError, match=rf"OddLlama used in training {NOT_ITS_OWN}.* is ([\d.e+]+|inf) nats"):
            trainer.train()
        assert trainer.state.global_step == 0
        assert all(torch.equal(values, before[name]) for name, values in weights(trainer.model).items())

    @pytest.mark.parametrize("layout", ["padded", "shared"])
    def test_the_summary_says_that_it_is_slower(self, layout, tmp_path):
        trainer = make_trainer(tmp_path, odd_llama("capped"), layout=layout, max_steps=1)
        trainer.train()
        assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
        assert "scored with the logits of OddLlama's own forward, which is slower" in trainer.summary.as_dict()["model"]

    def test_losses_of_whole_predictions_are_refused(self, tmp_path):
        trainer = make_trainer(tmp_path, odd_llama("capped"), loss_type="tdpo1")
        with pytest.raises(
            ValueError,
            match="tdpo1 needs the distribution over the whole vocabulary, which is not supported for OddLlama",
        ):
            trainer.train()


class Neutral(LlamaForCausalLM):
    """A bias of 0 after the head, a scale of 1 before it, and a layer that the forward does not use."""

    def __init__(self, config):
        super().__init__(config)
        self.bias, self.scale = nn.Parameter(torch.zeros(config.vocab_size)), nn.Parameter(torch.ones(()))
        self.unused = nn.Linear(2, 2)

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        hidden = self.model(input_ids=input_ids, attention_mask=attention_mask, **kwargs).last_hidden_state
        return transformers.modeling_outputs.CausalLMOutputWithPast(
            logits=self.lm_head(hidden * self.scale) + self.bias
        )


@pytest.mark.parametrize("trained", [("bias",), ("scale",), ("bias", "scale"), ("unused",), ()])
def test_parameters_that_are_neutral_at_the_start_are_trained(trained):
    """The scores are those of the head alone, but their gradients are not; frozen or unused, they are no reason."""
    torch.manual_seed(0)
    model = Neutral(AutoConfig.for_model("llama", **_SIZES)).eval()
    for name in ("bias", "scale", "unused"):
        getattr(model, name).requires_grad_(name in trained)
    batch, acts = padded_batch(), {"bias", "scale"}.intersection(trained)
    expected = gradients(plain_response_logps(model, batch).sum(), model)
    assert check(model) == bool(acts)
    found = gradients(score(model, batch).logps.sum(), model)
    assert_same_gradients(found, expected, rtol=1e-4)
    assert all(found[name].abs().max() > 0 for name in acts)


VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def multimodal(kind, vision, text, **settings):
    """Return a tiny image-text model with a text model that scales its logits when it is used alone."""
    config = getattr(transformers, f"{kind}Config")(
        vision_config=AutoConfig.for_model(vision, **VISION, image_size=28, patch_size=14),
        text_config=AutoConfig.for_model(text[0], **_SIZES, **text[1]),
        image_token_index=299,
        **settings,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()


RIGHT_NOW = {
    "hyperclovax": {"logits_scaling": 0.25},
    "inkling_text": {"logits_mup_width_multiplier": 4.0},
    "recurrent_gemma": {
        "logits_soft_cap": 3.0,
        "lru_width": 32,
        "attention_window_size": 16,
        "block_types": ["recurrent", "attention"],
    },
}

BY_OWN_LOGITS = {
    "modernbert-decoder": lambda: tiny_model("modernbert-decoder"),
    "bert": lambda: tiny_model("bert", is_decoder=True),
    "roberta": lambda: tiny_model("roberta", is_decoder=True),
    "granite vision": lambda: multimodal(
        "LlavaNext", "clip_vision_model", ("granite", {"logits_scaling": 8.0}), image_grid_pinpoints=[[28, 28]]
    ),
    "aya vision": lambda: multimodal("AyaVision", "siglip_vision_model", ("cohere2", {})),
    "cohere2 vision": lambda: multimodal("Cohere2Vision", "siglip_vision_model", ("cohere2", {})),
}


class TestFamilies:
    """Families with their own scales, caps or layers between hidden states and
    logits, with values that have an effect.
    """

    @pytest.mark.parametrize("name", RIGHT_NOW)
    def test_what_was_wrong_is_right(self, name):
        """Log-probs agree up to fp32 rounding: at most 2e-5 per token (see test_forward)."""
        model, batch = tiny_model(name, **RIGHT_NOW[name]), padded_batch()
        with torch.no_grad():
            expected = plain_response_logps(model, batch)
            check(model)
            off = (score(model, batch).logps - expected).abs()
        assert (off <= 2e-5 * batch["response_lengths"]).all()

    @pytest.mark.parametrize("name", BY_OWN_LOGITS)
    def test_what_no_config_says_is_taken_from_the_model(self, name):
        """Log-probs agree up to fp32 rounding, and the gradient of every tensor to 1e-4 of its largest entry, which is
        about a thousand roundings of 6e-8. A bias of keys does not change a softmax, so its gradient is only rounding.
        """
        model, batch = BY_OWN_LOGITS[name](), padded_batch()
        plain = plain_response_logps(model, batch)
        expected = gradients(plain.sum(), model)
        assert check(model)
        logps = score(model, batch).logps
        assert ((logps - plain).abs() <= 2e-5 * batch["response_lengths"]).all()
        found = gradients(logps.sum(), model)
        assert found.keys() == expected.keys()
        moved = {name for name in expected if not name.endswith("key.bias")}
        assert_same_gradients({n: found[n] for n in moved}, {n: expected[n] for n in moved}, rtol=1e-4)

    @pytest.mark.parametrize("name", BY_OWN_LOGITS)
    def test_in_bf16(self, name):
        assert check(BY_OWN_LOGITS[name]().bfloat16())

    def test_images_are_no_reason(self):
        """The same image-text model with a text model without a scale is scored
        fast; no synthetic token stands for an image.
        """
        check(multimodal("LlavaNext", "clip_vision_model", ("llama", {}), image_grid_pinpoints=[[28, 28]]))


MORE = {  # correct without changes, each for a different reason
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    "phi": {},
    "phimoe": {"num_local_experts": 4},
    "nanochat": {},
    "glm4": {},
    "seed_oss": {},
    "bart": {"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64},
    "biogpt": {},
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64},
    "rwkv": {"attention_hidden_size": 32},
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 64},
    "bert-generation": {"is_decoder": True},
}


class TestNoFalseAlarms:
    @pytest.mark.parametrize("name", [*SHARING, *AROUND, *MORE])
    def test_what_is_right_is_scored_fast(self, name):
        """Every architecture is tested in fp32, in bf16 weights if transformers
        itself supports this, and with autocast.
        """
        build = (lambda: tiny_model(name, **MORE[name])) if name in MORE else (lambda: architecture(name))
        assert not check(build(), temperature=1.7)
        assert not check(build(), autocast=True)
        if name not in ("mamba", "mamba2"):  # the CPU implementations of these have no bf16
            assert not check(build().bfloat16())

    @pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "mixtral", "gpt2"])
    @pytest.mark.parametrize("target", ["all-linear", ["lm_head"]])
    def test_under_trained_adapters(self, name, target):
        for dtype in (torch.float32, torch.bfloat16):
            check(perturbed(with_lora(architecture(name), target_modules=target), scale=0.1).to(dtype))

    @pytest.mark.parametrize("kind", [PromptTuningConfig, PromptEncoderConfig, PrefixTuningConfig])
    def test_under_virtual_tokens(self, kind):
        check(get_peft_model(tiny_model(), kind(task_type="CAUSAL_LM", num_virtual_tokens=4)))

    def test_in_training_mode_with_dropout(self):
        """Dropout is disabled for the comparison, and enabled again afterwards."""
        model = architecture("gpt2").train()
        check(model)
        assert model.training and model.transformer.drop.training

    @pytest.mark.parametrize("weights", [{"load_in_4bit": True}, {"load_in_8bit": True}])
    def test_in_few_bits(self, weights, tmp_path):
        """In 8 bits, all tokens determine which columns stay in 16 bits: this is
        rounding, and not a leak of later tokens.
        """
        tiny_model(**QUANTIZABLE).save_pretrained(tmp_path)
        quantized = BitsAndBytesConfig(**weights, llm_int8_threshold=2.0)
        model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=quantized, device_map="cpu")
        check(model)
        check(perturbed(with_lora(model)))

    def test_several_ends_of_a_text(self):
        """Llama 3 and GLM-4 have a list of EOS ids; the synthetic sequence contains none of them."""
        model = tiny_model(eos_token_id=[2, *range(50, 150)])
        assert not check(model)
        assert set(made_up_tokens(model.config, 100, random.Random(0))).isdisjoint(range(50, 150))

    def test_with_weights_that_come_from_elsewhere(self):
        from accelerate import cpu_offload

        check(cpu_offload(tiny_model(), execution_device=torch.device("cpu")))

    def test_logits_that_stand_far_from_zero(self):
        """A common offset does not change log-probs, but bf16 rounds logits of about −100 to multiples of 0.5."""
        torch.manual_seed(0)
        model = OddLlama(AutoConfig.for_model("llama", **_SIZES)).eval().bfloat16()
        model.change = lambda logits: logits - 100
        check(model)


class Leaking(LlamaForCausalLM):
    """A model in which every position gets a part of the next position's hidden state."""

    share = 0.0

    def __init__(self, config):
        super().__init__(config)
        self.model.norm.register_forward_hook(
            lambda _, __, hidden: hidden + self.share * nn.functional.pad(hidden[:, 1:], (0, 0, 0, 1))
        )


class TestCausality:
    @pytest.mark.parametrize(("share", "dtype"), [(0.01, torch.float32), (0.3, torch.bfloat16), (1.0, torch.bfloat16)])
    def test_one_token_ahead_is_seen(self, share, dtype):
        """Scores agree with the logits, but both depend on the next token: 1 % of it is detected in fp32."""
        torch.manual_seed(0)
        model = Leaking(AutoConfig.for_model("llama", **_SIZES)).eval().to(dtype)
        check(model)
        model.share = share
        with pytest.raises(ValueError, match=r"Leaking is not causal.*by up to .* nats"):
            settle_scores(model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_attention_in_both_directions(self, dtype, tmp_path):
        """A masked language model with a plain head raises an error before the first step, in every layout."""
        model = tiny_model("bert-generation").to(dtype)
        with pytest.raises(ValueError, match=r"BertGenerationDecoder is not causal.*is_decoder=True"):
            make_trainer(tmp_path, model, layout="padded").train()

    @pytest.mark.parametrize("kind", ["T5", "Bart", "Pegasus"])
    def test_encoder_decoders_are_refused_at_construction(self, kind, tmp_path):
        sizes = {"vocab_size": 300, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "encoder_layers": 1}
        config = getattr(transformers, f"{kind}Config")(**sizes, decoder_layers=1)
        model = getattr(transformers, f"{kind}ForConditionalGeneration")(config)
        for given in ({"model": model}, {"model": with_lora(model)}, {"model": tiny_model(), "ref_model": model}):
            with pytest.raises(ValueError, match=f"{kind}ForConditionalGeneration is an encoder-decoder.*decoder-only"):
                make_trainer(tmp_path, **given)

    @pytest.mark.parametrize("name", ["bart", "pegasus", "marian"])
    def test_their_decoders_alone_are_allowed_and_exact(self, name):
        model, batch = tiny_model(name, **MORE["bart"]), PaddedCollator(0)(random_rows(3))
        with torch.no_grad():
            expected = plain_response_logps(model, batch)
            check(model)
            torch.testing.assert_close(score(model, batch).logps, expected, rtol=0, atol=2e-4)
