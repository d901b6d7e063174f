"""The layout "shared" computes every prompt once, with the results of separate, padded sequences.

Log-probs of single tokens are of order 10, so fp32 rounding is about 1e-6 per token and layer. Sums over up to 20
tokens and two layers stay below 5e-5, a thousandth of the change if one token were wrongly attended to or not.
Gradients, compared in norm, accumulate rounding over all tokens: 1e-5 relative.
"""

import copy

import pytest
import torch

from hf_prefopt.batch import SegmentLengths
from hf_prefopt.data.layouts import PaddedCollator, SharedCollator
from hf_prefopt.scoring import attention, forward, layout
from hf_prefopt.scoring.attention import install_segment_attention
from hf_prefopt.scoring.forward import base_causal_lm, install_scoring, score
from hf_prefopt.scoring.layout import reason_against
from tests.scoring.architectures import AROUND, SHARING, adapted, architecture
from tests.tiny_models import perturbed, random_rows, tiny_model, with_lora

LOGPS, GRADIENTS = 5e-5, 1e-5


def mixed_rows():
    """Return pairs, a list of four responses, a single response, a response with
    unscored tokens, and an empty prompt.
    """
    rows = random_rows(6)
    rows[0]["response_ids"] += [[5, 6, 7, 8], [9, 9, 2]]
    rows[1]["response_ids"] = rows[1]["response_ids"][:1]
    rows[3]["prompt_ids"] = []
    for row in rows:
        row["scored_masks"] = [[1] * len(response) for response in row["response_ids"]]
        row["pairs"] = [[0, i] for i in range(1, len(row["response_ids"]))]
    rows[2]["scored_masks"][0][0] = 0
    for mask in rows[3]["scored_masks"]:
        mask[0] = 0
    return rows


def scores_and_gradients(model, batch):
    """Return per-token log-probs, and the gradients of a random weighting of them."""
    model.zero_grad()
    logps = score(model, batch).token_logps
    (logps * torch.randn(logps.shape, generator=torch.Generator().manual_seed(0))).sum().backward()
    return logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_layouts_equal(model, rows, logps_tolerance=LOGPS, gradient_tolerance=GRADIENTS):
    install_scoring(model)
    assert reason_against("shared", model) is None
    padded, padded_gradients = scores_and_gradients(model, PaddedCollator(0)(rows))
    shared, shared_gradients = scores_and_gradients(model, SharedCollator()(rows))
    assert (padded - shared).abs().max() < logps_tolerance
    assert padded_gradients.keys() == shared_gradients.keys()
    # Some gradients are only rounding (a bias of keys cancels in the softmax): eps of the whole gradient is allowed.
    floor = 1.2e-7 * torch.stack([gradient.norm() for gradient in padded_gradients.values()]).norm()
    for name, gradient in padded_gradients.items():
        assert (gradient - shared_gradients[name]).norm() <= gradient_tolerance * gradient.norm() + floor, name


@pytest.mark.parametrize("name", SHARING)
def test_equals_padded_full(name):
    """Log-probs and every gradient are compared; all weights train."""
    assert_layouts_equal(architecture(name), mixed_rows()[:3] + mixed_rows()[4:])


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("name", SHARING)
def test_equals_the_plain_logits_of_each_sequence_alone(name, lora):
    """Both layouts are compared, token by token, with the model's own forward of one sequence without padding."""
    model = perturbed(adapted(name)) if lora else architecture(name)
    rows = mixed_rows()[:3] + mixed_rows()[4:]
    plain = {}
    with torch.no_grad():
        for prompt, ids in ((row["prompt_ids"], ids) for row in rows for ids in row["response_ids"]):
            logps = model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
            plain[tuple(prompt), tuple(ids)] = logps.gather(1, torch.tensor(ids)[:, None])[:, 0]
        expected = [
            plain[tuple(row["prompt_ids"]), tuple(ids)][torch.tensor(mask, dtype=torch.bool)]
            for row in rows
            for ids, mask in zip(row["response_ids"], row["scored_masks"], strict=True)
        ]
        install_scoring(model)
        padded = score(model, PaddedCollator(0)(rows)).token_logps
        assert reason_against("shared", model) is None
        shared = score(model, SharedCollator()(rows)).token_logps
    for found in (padded, shared):
        torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=LOGPS)


@pytest.mark.parametrize("name", SHARING)
def test_equals_padded_under_lora(name):
    """The model has a trained LoRA adapter on all linear layers, and a frozen head."""
    assert_layouts_equal(perturbed(adapted(name)), mixed_rows()[:3] + mixed_rows()[4:])


@pytest.mark.parametrize("name", SHARING)
def test_the_probe_lets_share_what_can(name):
    """The probe runs in fp32 and in bf16, where rounding must not look like a wrong layout."""
    for dtype in (torch.float32, torch.bfloat16):
        model = architecture(name).to(dtype)
        install_scoring(model)
        assert reason_against("shared", model) is None


@pytest.mark.parametrize("name", AROUND)
def test_falls_back_where_it_would_be_wrong(name):
    """A message has the reason for the padded layout, which scores the model as its plain logits do."""
    model = architecture(name)
    install_scoring(model)
    assert AROUND[name][1] in reason_against("shared", model).words
    batch = PaddedCollator(0)(random_rows(3))
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        expected = logits.flatten(0, 1).log_softmax(-1)[batch["scored_rows"], batch["targets"]]
        torch.testing.assert_close(score(model, batch).token_logps, expected, rtol=0, atol=LOGPS)


def test_an_empty_prompt_is_shared_too():
    """The first token of each response is not scored, because nothing precedes it."""
    assert_layouts_equal(tiny_model(), mixed_rows())


@pytest.mark.parametrize("adapter", [{"use_dora": True}, {"use_rslora": True}, {"target_modules": ["q_proj"]}])
def test_equals_padded_under_other_adapters(adapter):
    assert_layouts_equal(perturbed(with_lora(tiny_model(), **adapter)), mixed_rows())


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("name", ["llama", "nemotron", "gpt_oss"])
def test_survives_activation_checkpointing(name, lora, reentrant):
    """A layer's forward runs again in the backward pass, with the same segments: the
    gradients equal those without checkpointing.
    """
    model = perturbed(adapted(name)) if lora else architecture(name)
    install_scoring(model)
    assert reason_against("shared", model) is None
    batch = SharedCollator()(mixed_rows())
    model.train()
    logps, expected = scores_and_gradients(model, batch)
    base_causal_lm(model).gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    checkpointed, gradients = scores_and_gradients(model, batch)
    assert base_causal_lm(model).is_gradient_checkpointing
    torch.testing.assert_close(checkpointed, logps, rtol=0, atol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-6, atol=1e-7)


def test_attention_and_head_stay_out_of_compiled_graphs(monkeypatch):
    """Attention and head would be compiled again for the segments and chunks of each
    batch; other modules are compiled.
    """
    compiling = {"_one_segment": [], "linear_head_logps": [], "body_of": []}

    def watch(module, name):
        function = getattr(module, name)

        def watched(*args, **kwargs):
            compiling[name].append(torch.compiler.is_compiling())
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    model, batch = tiny_model(num_hidden_layers=1), SharedCollator()(mixed_rows())
    install_scoring(model)
    install_segment_attention(model)
    expected = score(model, batch).token_logps
    watch(attention, "_one_segment"), watch(forward, "linear_head_logps"), watch(forward, "body_of")
    torch._dynamo.reset()
    found = score(torch.compile(model, backend="eager"), batch).token_logps
    torch._dynamo.reset()
    assert all(compiling["body_of"]) and all(compiling.values())
    assert not any(compiling["_one_segment"] + compiling["linear_head_logps"])
    torch.testing.assert_close(found, expected, rtol=0, atol=LOGPS)


def test_no_batch_after_the_second_is_compiled_anew():
    """The number and the lengths of segments may change without another compilation."""
    model, graphs = tiny_model(num_hidden_layers=2), []
    install_scoring(model)
    install_segment_attention(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    counts = []
    for count in (3, 4, 2, 5):
        batch = SharedCollator()(random_rows(count, seed=count))
        torch.testing.assert_close(score(compiled, batch).token_logps, score(model, batch).token_logps)
        counts.append(len(graphs))
    torch._dynamo.reset()
    assert 0 < counts[0] < counts[1] == counts[2] == counts[3]


def test_eager_attention_is_shared_too():
    """A model that was loaded with attn_implementation="eager" keeps it for plain
    calls, and shares prompts like any other.
    """
    assert_layouts_equal(tiny_model(attn_implementation="eager"), mixed_rows())


def test_plain_calls_are_untouched():
    """After attention over segments is installed, plain logits and generation are the same as before, bit for bit."""
    model, inputs = tiny_model(), torch.arange(3, 23).view(2, 10)
    mask = torch.ones_like(inputs)
    mask[0, :4] = 0
    before = model(input_ids=inputs, attention_mask=mask).logits
    generated = model.generate(inputs, attention_mask=mask, max_new_tokens=5, do_sample=False)
    install_scoring(model)
    install_segment_attention(model)
    assert torch.equal(model(input_ids=inputs, attention_mask=mask).logits, before)
    assert torch.equal(model.generate(inputs, attention_mask=mask, max_new_tokens=5, do_sample=False), generated)


def test_half_precision_is_no_further_from_fp32_than_padded():
    """The bf16 error of the summed log-probs against fp32, as a mean over 24
    responses, is within 1.2 times that of padded.
    """
    rows = random_rows(12)
    exact = tiny_model()
    install_scoring(exact)
    half = tiny_model().bfloat16()
    install_scoring(half)
    install_segment_attention(half)
    with torch.no_grad():
        truth = score(exact, PaddedCollator(0)(rows)).logps
        padded, shared = (score(half, collate(rows)).logps for collate in (PaddedCollator(0), SharedCollator()))
    assert (shared - truth).abs().mean() <= 1.2 * (padded - truth).abs().mean()


def implementations(model):
    """Return the attention implementation in each module's config, including the configs of its parts."""
    configs = {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}
    parts = {f"{name}.{key}": getattr(config, key) for name, config in configs.items() for key in config.sub_configs}
    return {name: config._attn_implementation for name, config in (configs | parts).items()}


class TestAttentionIsGivenBack:
    """A model that cannot share gets its own attention back, under the original names, in all configs."""

    @pytest.mark.parametrize("name", AROUND)
    @pytest.mark.parametrize("attention", ["eager", "sdpa"])
    def test_after_a_fallback(self, name, attention):
        model = architecture(name)
        model.config._attn_implementation = attention
        before = implementations(model)
        install_scoring(model)
        assert reason_against("shared", model) is not None
        assert implementations(model) == before

    def test_of_the_policy_where_the_reference_falls_back(self):
        models = [tiny_model(), architecture("doge")]
        before = [implementations(model) for model in models]
        for model in models:
            install_scoring(model)
        assert layout.settled_layout("auto", models).name == "around"
        assert [implementations(model) for model in models] == before

    @pytest.mark.parametrize("asked", ["shared", "padded"])
    def test_of_a_model_that_another_run_shared(self, asked):
        models = [tiny_model(), architecture("doge")]
        before = [implementations(model) for model in models]
        for model in models:
            install_scoring(model)
        assert layout.settled_layout("auto", models[:1]).name == "shared"
        assert implementations(models[0]) != before[0]
        if asked == "shared":
            with pytest.raises(ValueError, match="a mask that the module builds"):
                layout.settled_layout(asked, models)
        else:
            assert layout.settled_layout(asked, models).name == "padded"
        assert [implementations(model) for model in models] == before

    def test_each_part_keeps_its_own(self):
        """A vision tower and a text model have different attention, and the config of the whole model names a third."""
        from transformers import AutoConfig, Gemma3Config, Gemma3ForConditionalGeneration

        vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        text = tiny_model("gemma3_text", query_pre_attn_scalar=8).config
        vision_config = AutoConfig.for_model("siglip_vision_model", **vision, image_size=28, patch_size=14)
        config = Gemma3Config(text_config=text, vision_config=vision_config, mm_tokens_per_image=4, image_token_id=299)
        model = Gemma3ForConditionalGeneration(config).eval()
        model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
        before = implementations(model)
        assert set(before.values()) == {"eager", "sdpa"}
        install_segment_attention(model)
        installed = implementations(model)
        assert {name: value.split("|")[-1] for name, value in installed.items()} == before
        attention.remove_segment_attention(model)
        assert implementations(model) == before


@pytest.mark.parametrize("name", ["afmoe", "doge"])
def test_a_mask_that_is_passed_by_name(name, tmp_path):
    """These models call attention with `attention_mask=`; they train by default, with the log-probs of plain logits."""
    from tests.trainers import first_batch, make_trainer

    model = architecture(name)
    plain = copy.deepcopy(model)
    trainer = make_trainer(tmp_path, model, max_steps=2, gradient_checkpointing=True)
    trainer.scorer.settle()
    assert trainer.layout == ("shared" if name in SHARING else "around")
    batch, padded = first_batch(trainer), PaddedCollator(0)
    padded_batch = padded([trainer.train_dataset[int(row)] for row in batch["rows"]])
    with torch.no_grad():
        logits = plain(input_ids=padded_batch["input_ids"], attention_mask=padded_batch["attention_mask"]).logits
        rows = logits.flatten(0, 1)[padded_batch["scored_rows"]].log_softmax(-1)
        logps = score(trainer.model.eval(), batch).token_logps
    torch.testing.assert_close(logps, rows.gather(1, padded_batch["targets"][:, None])[:, 0], rtol=0, atol=LOGPS)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-5) and len(losses) == 2


NO_REFUSALS = (
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"),
    torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
    torch.distributed.DistBackendError("NCCL communicator was aborted"),
)


def raising(error):
    """Return a replacement for a collator's class, whose collators raise the error."""

    def collate(rows):
        raise error

    return lambda: collate


def test_a_model_that_was_handed_segments_is_given_back():
    model = architecture("nemotron")
    install_scoring(model)
    before = {name: type(module) for name, module in model.named_modules()}
    assert layout.settled_layout("auto", [model]).name == "shared"
    assert {name: type(module) for name, module in model.named_modules()} != before
    assert layout.settled_layout("padded", [model]).name == "padded"
    assert {name: type(module) for name, module in model.named_modules()} == before


class TestTheProbe:
    """The probe must detect silent errors: attention is broken on purpose, in each known way."""

    @pytest.fixture
    def model(self):
        model = tiny_model("mistral", sliding_window=7)
        install_scoring(model)
        return model

    def break_attention(self, monkeypatch, change):
        from hf_prefopt.scoring import attention

        right = attention.segment_attention
        monkeypatch.setattr(attention, "segment_attention", lambda *args, **kwargs: right(*args, **change(kwargs)))

    def test_a_response_that_does_not_see_its_prompt(self, model, monkeypatch):
        """Later responses attend only to their own keys, as with PyTorch's document masking."""

        def cut_off(kwargs):
            queries, keys = kwargs["segment_queries"], kwargs["segment_keys"]
            kept = torch.cat(
                [
                    index[-int(q) :]
                    for index, q in zip(
                        kwargs["segment_key_index"].split(keys.diff().tolist()), queries.diff(), strict=True
                    )
                ]
            )
            lengths = SegmentLengths(kwargs["segment_lengths"].queries, kwargs["segment_lengths"].queries)
            return {**kwargs, "segment_keys": queries, "segment_key_index": kept, "segment_lengths": lengths}

        self.break_attention(monkeypatch, cut_off)
        assert "differ from those of padded" in reason_against("shared", model).words

    def test_a_response_that_sees_another(self, model, monkeypatch):
        """The whole row is one segment, as in flash attention without bounds."""

        def run_together(kwargs):
            total = kwargs["segment_queries"][-1:]
            bounds = torch.cat([torch.zeros_like(total), total])
            longest = (int(total), int(total))
            return {
                **kwargs,
                "segment_queries": bounds,
                "segment_keys": bounds,
                "segment_key_index": torch.arange(int(total)),
                "segment_longest": longest,
                "segment_lengths": SegmentLengths(longest[:1], longest[:1]),
            }

        self.break_attention(monkeypatch, run_together)
        assert "depends on another response" in reason_against("shared", model).words

    def test_a_dropped_sliding_window(self, model, monkeypatch):
        self.break_attention(monkeypatch, lambda kwargs: {**kwargs, "sliding_window": None})
        assert "differ from those of padded" in reason_against("shared", model).words

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("window", [24, 512, 262144])
    def test_a_long_window_that_is_dropped(self, window, dtype, monkeypatch):
        """A window of any length is detected, with small initial weights and
        sequences of a few tokens; the model keeps its window.
        """
        model = tiny_model(
            "mistral", sliding_window=window, initializer_range=0.02, max_position_embeddings=window + 64
        )
        install_scoring(model.to(dtype))
        longest = self.watch_lengths(monkeypatch)
        assert reason_against("shared", model) is None
        self.break_attention(monkeypatch, lambda kwargs: {**kwargs, "sliding_window": None})
        assert "differ from those of padded" in reason_against("shared", model).words
        assert max(longest) < 100 and model.config.sliding_window == window
        assert {getattr(m, "sliding_window", window) for m in model.modules()} <= {window, None}

    def watch_lengths(self, monkeypatch):
        lengths, right = [], layout.score

        def watched(model, batch, *others):
            lengths.append(batch["input_ids"].shape[1])
            return right(model, batch, *others)

        monkeypatch.setattr(layout, "score", watched)
        return lengths

    @pytest.mark.parametrize("name", ["phimoe", "qwen2_moe"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_a_window_that_is_only_in_the_mask(self, name, dtype, monkeypatch):
        """If it is not taken from the config, log-probs differ."""
        model = architecture(name).to(dtype)
        install_scoring(model)
        assert reason_against("shared", model) is None
        monkeypatch.setattr(attention, "_hidden_by_mask", lambda module, kwargs: {})
        assert "differ from those of padded" in reason_against("shared", model).words

    def test_a_window_that_only_the_config_has_is_none(self):
        """Llama has no window, even if its config has one."""
        model = tiny_model(sliding_window=7)
        assert_layouts_equal(model, mixed_rows())

    def test_a_model_of_few_positions(self):
        """The longest sequence of the probe has as many tokens as there are learned positions."""
        model = tiny_model("gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=24)
        install_scoring(model)
        assert reason_against("shared", model) is None

    def test_positions_that_run_on(self, model, monkeypatch):
        """Position ids count along the row instead of starting again after the prompt."""

        class RunningOn(SharedCollator):
            def __call__(self, rows):
                batch = super().__call__(rows)
                batch["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
                return batch

        monkeypatch.setattr(layout, "SharedCollator", RunningOn)
        assert reason_against("shared", model) is not None

    def test_an_error_of_the_forward_is_named_and_kept(self, model, monkeypatch):
        error = RuntimeError("no such kernel\nand a page of a trace")
        monkeypatch.setattr(layout, "SharedCollator", raising(error))
        reason = reason_against("shared", model)
        assert reason.words == "its forward raises an error (RuntimeError: no such kernel)" and reason.cause is error

    @pytest.mark.parametrize("error", NO_REFUSALS, ids=lambda error: type(error).__name__)
    def test_what_is_no_refusal_is_raised(self, error, model, monkeypatch):
        """Lack of memory, a broken device or a lost process would also stop the padded layout."""
        monkeypatch.setattr(layout, "SharedCollator", raising(error))
        with pytest.raises(type(error)) as raised:
            reason_against("shared", model)
        assert raised.value is error

    def test_prompt_learning_is_refused(self):
        from peft import PromptTuningConfig, get_peft_model

        model = get_peft_model(tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
        install_scoring(model)
        assert "virtual tokens" in reason_against("shared", model).words
