"""Count one training step of either trainer on fake tensors."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from benchmarks import sides
from benchmarks.roofline.counting import Batch, Counting, Work
from benchmarks.roofline.fake_device import fake_gpu
from benchmarks.roofline.kernels import cuda_kernels
from benchmarks.roofline.models import build, config_of
from benchmarks.sides import Side
from benchmarks.work import Row, as_groups_of_pairs, as_pairs
from hf_prefopt import policy
from hf_prefopt.reporting.observed import Responses
from hf_prefopt.training.activations import keep_attention

# The dtype of the weights, and the trainers' autocast setting.
DTYPES = {
    "bf16": (torch.bfloat16, "bf16"),
    "fp32-autocast": (torch.float32, "bf16"),
    "fp16-autocast": (torch.float32, "fp16"),
}
# The size of the vocabulary chunks in TRL's head.
TRL_TILE = 32_768


@dataclass(frozen=True)
class Case:
    """The model and the data of a step.

    Attributes:
        model: a name in `CONFIGS`. lengths: the name of the lengths in tables. rows: the rows of one micro-batch.
        mode: "lora" or "full". dtype: a name in `DTYPES`.
        keeps_attention: whether our checkpointed layers store the outputs of attention.
        changes: fields of the model's config.
        adapted: for LoRA, the layers that have adapters; `None` means all layers. shares: whether the other layers run
            once for policy and reference.
    """

    model: str
    lengths: str
    rows: Sequence[Row]
    mode: str = "lora"
    dtype: str = "bf16"
    checkpointing: bool = False
    keeps_attention: bool = False
    changes: dict[str, Any] = field(default_factory=dict)
    adapted: tuple[int, ...] | None = None
    shares: bool = True


@dataclass(frozen=True)
class Counts:
    """The work of a step on the GPU.

    Attributes:
        work, waits, kept, peak: as in `Counting`. waits_of_log: additional waits of a logging step. positions: the
            number of computed positions. layout: our layout.
    """

    work: list[Work]
    waits: dict[str, int]
    waits_of_log: dict[str, int]
    kept: dict[str, int]
    peak: int
    positions: int
    layout: str | None

    def total(self, what: str, **where: str) -> int:
        """Return the sum of "launches", "flop" or "bytes" over the work of a phase or part."""
        chosen = (w for w in self.work if all(getattr(w, name) == value for name, value in where.items()))
        return sum(getattr(w, what) for w in chosen)


def counted_step(name: str, case: Case, **settings: Any) -> Counts:
    """Count a step of a trainer, "trl" or "ours", after the first step has created the optimizer state.

    Args:
        settings: settings of the trainer, such as `layout`.
    """
    vocabulary = config_of(case.model, **case.changes).vocab_size
    head = {vocabulary, vocabulary % TRL_TILE, min(vocabulary, TRL_TILE)}
    counting = Counting(head, sides.lora().r if case.mode == "lora" else None)
    with fake_gpu(), cuda_kernels(counting), counting:
        with torch.device("cuda"):
            side = _side(name, case, settings)
        if name == "ours":
            _settle(side.trainer.scorer, side.trainer.data_collator, case.shares)
        _make_optimizer_state(side)
        counting.begin(_values(case.rows))
        _step(side, case.rows, counting)
        step = counting.work, dict(counting.waits)
        kept, peak = dict(counting.kept), counting.peak
        counting.begin(Batch())
        with patch.object(Responses, "of", lambda _: None):  # `Responses.of` would read values
            side.trainer.log({"loss": 0.0})
        layout = getattr(side.trainer, "layout", None)
        return Counts(*step, dict(counting.waits), kept, peak, side.positions(case.rows), layout)


def _side(name: str, case: Case, settings: dict[str, Any]) -> Side:
    def model(*_: Any, **__: Any) -> nn.Module:
        return build(case.model, weights, **case.changes)

    weights, autocast = DTYPES[case.dtype]
    options = {"bf16": autocast == "bf16", "fp16": autocast == "fp16", "use_cpu": False} | settings
    if name == "ours" and case.mode == "lora":
        options["reference"] = "adapter_off"  # reference="auto" would check whether the adapter is zero
    if name == "trl":
        options["router_aux_loss_coef"] = 0.0  # off, so that both trainers have the same loss
    with ExitStack() as stack:
        stack.enter_context(patch.object(sides, "load_model", model))
        # Checks that compare values.
        stack.enter_context(patch.object(policy, "lost_adapters", lambda _: []))
        stack.enter_context(patch("hf_prefopt.objective.objective.try_loss", lambda *_: None))
        if case.adapted is not None:
            stack.enter_context(patch.object(sides, "lora", partial(sides.lora, case.adapted)))
        if case.mode == "full":
            stack.enter_context(patch.object(sides, "lora", lambda: None))
            stack.enter_context(patch("trl.trainer.dpo_trainer.create_model_from_path", model))
        side = sides.SIDES[name]("random:", **options)
    if case.checkpointing:
        side.trainer.model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.keeps_attention and name == "ours":
        keep_attention(side.trainer.model)
    return side


def _settle(scorer: Any, collator: Any, shares: bool) -> None:
    """Do what `Scorer.settle` does, without its checks on synthetic sequences, which need values."""
    from hf_prefopt.reference.lower_layers import find_lower_layers
    from hf_prefopt.scoring.attention import install_segment_attention
    from hf_prefopt.scoring.forward import base_causal_lm
    from hf_prefopt.scoring.lower_states import install_lower_states

    if scorer.reference:
        scorer.reference.place(scorer.accelerator)
    install_segment_attention(base_causal_lm(scorer.model))
    scorer.layout = collator.layout = "shared"
    lower, _ = find_lower_layers(scorer.tree, scorer.reference.model, scorer.reference.switch)
    if lower.count and shares:
        install_lower_states(base_causal_lm(scorer.model), lower.count)
        scorer.reference.lower = lower


def _make_optimizer_state(side: Side) -> None:
    for parameter in side.model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    side.optimizer.optimizer.step()
    side.model.zero_grad()


def _values(rows: Sequence[Row]) -> Batch:
    """Return the facts about attention and padding that depend on the rows."""
    sequences = [(len(r["prompt_ids"]), len(ids)) for r in as_groups_of_pairs(rows) for ids in r["response_ids"]]
    longest = max(map(sum, sequences))
    scored = sum(response for _, response in sequences) / (len(sequences) * (longest - 1))
    return Batch(sum(map(_pairs_of, rows)), scored, any(sum(sequence) < longest for sequence in sequences))


def _pairs_of(row: Row) -> int:
    """Count (query, key) pairs: a triangle for prompt and each response, a rectangle for prompt × each response."""
    prompt = len(row["prompt_ids"])
    responses = [len(ids) for ids in row["response_ids"]]
    return prompt * (prompt + 1) // 2 + sum(r * (r + 1) // 2 + r * prompt for r in responses)


def _step(side: Side, rows: Sequence[Row], counting: Counting) -> None:
    """Take a complete step, and record its work by phase."""
    trainer, model = side.trainer, side.model
    forwards = [model] + ([trainer.ref_model] if getattr(trainer, "ref_model", None) is not None else [])
    with ExitStack() as stack:
        for module in forwards:
            forward = _in_phase(module.forward, counting, is_reference=module is not model)
            stack.enter_context(patch.object(module, "forward", forward))
        backward = trainer.accelerator.backward

        def in_backward(*args: Any, **kwargs: Any) -> None:
            with counting.during("backward"):
                backward(*args, **kwargs)

        stack.enter_context(patch.object(trainer.accelerator, "backward", in_backward))
        with _disable_current_modes():  # the tensors of a data loader are real tensors on the CPU
            collated = trainer.data_collator(as_pairs(rows) if side.name == "trl" else list(rows))
        batches, count = trainer.get_batch_samples(iter([collated]), 1, trainer.args.device)
        with counting.watching_saved(), counting.during("loss"):
            loss = trainer.training_step(model, batches[0], count)
        del loss, batches
        with counting.during("optimizer"):
            trainer.accelerator.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
            side.optimizer.step()
            model.zero_grad()


def _in_phase(forward: Callable, counting: Counting, is_reference: bool) -> Callable:
    def counted(*args: Any, **kwargs: Any) -> Any:
        phase = "reference" if is_reference or not torch.is_grad_enabled() else "policy"
        with counting.during(phase):
            return forward(*args, **kwargs)

    return counted
