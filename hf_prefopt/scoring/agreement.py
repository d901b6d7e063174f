"""Check before training that scores equal the log-probs of the model's own logits.

Scoring (`scoring.forward`) computes logits from hidden states with the model's head and a transformation (a scale, a
soft-cap). It reads the transformation from known entries of the config. A model may use an unknown entry, or use a
known entry with another meaning. Such an error would be silent: policy and reference share it, and the first loss is
still correct. Therefore one synthetic sequence is scored and also passed through the model's own forward. If the
results differ, all later scores use the logits of the model's own forward.

In a model that is not causal, the log-prob of a token could depend on the token itself. Therefore the model's own
forward also runs with other tokens at the end of the sequence. The log-probs of the earlier positions must not change.
"""

import random
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from peft import PeftModel, PeftType
from torch import Tensor, nn

from hf_prefopt.batch import PreferenceBatch
from hf_prefopt.scoring.forward import base_causal_lm, score, score_by_own_logits, scores_by_own_logits, transform_of
from hf_prefopt.scoring.modes import ModuleTree, adapters_off, evaluation_mode, training_mode
from hf_prefopt.scoring.tail import body_of

# Numbers of tokens at the start and at the end of the synthetic sequence. The test of causality changes only the end.
_KEPT, _CHANGED = 10, 6
# Number of roundings to the model's dtype in the computation of a logit with a soft-cap: the matrix product, the
# division by the cap, tanh, and the multiplication by the cap.
_ROUNDINGS = 4
# Relative error of a sum in fp32. Matrix products sum in an order that depends on their shapes, and the error grows
# with the square root of the hidden size (128 is the square root of 16,384).
_SUMMING = 128 * 2.0**-24


def settle_scores(model: nn.Module, compute_dtype: torch.dtype | None = None) -> bool:
    """Check that scores of a synthetic sequence equal log softmax(logits / temperature) of the model's own forward.

    If they differ, make the model score with the logits of its own forward (see `scoring.tail`), and compare again. The
    model also scores in this way if its logits depend on a trained parameter outside the base model and the head.

    Three tokens are scored at every position: the most likely token, the least likely token and the next token. Let z
    be the logits, z_t the logit of the scored token, and u the unit roundoff of the dtype. A score may differ by
    4u · (|z_t| + mean|z|), because rounding explains such a difference. If all logits are wrong by a factor of 1 + f,
    this is detected if f is at least about 4u · (|z_min| + mean|z|) / |z_min − mean z|. For logits around 0, this
    threshold is 4u to 8u: 2 to 3 % in bf16, and below 10⁻³ in fp32.

    Args:
        model: A model prepared by `scoring.forward.install_scoring`, on its device. The model runs three or four times
            on 16 tokens, on all ranks.
        compute_dtype: Dtype of the computation, if an engine or autocast makes it different from the weights' dtype.

    Returns:
        True if scores use the logits of the model's own forward.

    Raises:
        ValueError: the model's log-probs are NaN, the scores still differ from the log-probs of the model's own
            forward, or a log-prob depends on later tokens.
        TypeError: the model's class does not follow transformers' conventions; see `_says_what_is_missing`.
    """
    causal_lm = base_causal_lm(model)
    name, temperature = _named(model), transform_of(causal_lm.get_output_embeddings()).temperature
    generator = random.Random(0)
    kept, following, others = (made_up_tokens(causal_lm.config, n, generator) for n in (_KEPT, _CHANGED, _CHANGED))
    ids, changed = torch.tensor([[*kept, *following], [*kept, *others]], device=device_of(model)).split(1)
    with torch.no_grad(), evaluation_mode(model), _says_which_adapter(model), _says_what_is_missing(model):
        logits, changed_logits = (_plain_logits(model, each) / temperature for each in (ids, changed))
    targets = torch.stack([logits.argmax(-1), logits.argmin(-1), ids[0].roll(-1).to(logits.device)], dim=1)
    plain, plain_changed = (each.log_softmax(-1).gather(1, targets) for each in (logits, changed_logits))
    if plain.isnan().any():
        raise ValueError(
            f"{name} gives NaN for synthetic tokens: check its weights for NaN, or use bf16 instead of fp16"
        )
    unit, body_unit = _units(model, compute_dtype)
    # `size` is |z_t| + mean|z|, where the mean is over the predicted distribution. For a token with z_t = −∞, the
    # allowed difference is 0, so its score must be exactly −∞.
    size = logits.gather(1, targets).abs() + (logits.softmax(-1) * logits.abs()).nansum(1, keepdim=True)
    rounding = (_ROUNDINGS * unit * size + _SUMMING * (size + plain.abs())).nan_to_num(posinf=0.0)

    if _trains_between(model, ids):
        score_by_own_logits(causal_lm)
    off = _distance(model, ids, targets, plain)
    if not (off <= rounding).all() and not scores_by_own_logits(causal_lm):
        score_by_own_logits(causal_lm)
        off = _distance(model, ids, targets, plain)
    if not (off <= rounding).all():
        worst, explained = off.max(), rounding.flatten()[off.argmax()]
        raise ValueError(
            f"the log-probs of {name} used in training differ from those of its own logits: the largest difference "
            f"over {targets.numel()} synthetic tokens is {worst:.3g} nats, and rounding explains only {explained:.1g}. "
            "The computation from hidden states to logits depends on other positions, or bypasses the model's forward, "
            "which is not supported: choose a model of another class"
        )
    _refuse_leak(name, _difference(plain_changed, plain).amax(1), rounding.amax(1), body_unit)
    return scores_by_own_logits(causal_lm)


def _trains_between(model: nn.Module, ids: Tensor) -> bool:
    """Return True if the model's own logits depend on a trained parameter outside its base model and its head.

    At the start of training, such a parameter may have no effect (a bias of 0, a scale of 1). Scores that do not use
    the parameter are then still correct, but the parameter would never be trained.
    """
    causal_lm = base_causal_lm(model)
    parts = (body_of(causal_lm), causal_lm.get_output_embeddings())
    inside = {id(parameter) for part in parts for parameter in part.parameters()}
    between = [p for p in causal_lm.parameters() if p.requires_grad and id(p) not in inside]
    if not between:
        return False
    with torch.enable_grad(), evaluation_mode(model):
        total = _plain_logits(model, ids).logsumexp(-1).sum()
    gradients = torch.autograd.grad(total, between, allow_unused=True) if total.requires_grad else ()
    return any(gradient is not None for gradient in gradients)


def _refuse_leak(name: str, effect: Tensor, rounding: Tensor, body_unit: float) -> None:
    """Raise `ValueError` if changing the last tokens changes earlier log-probs.

    Args:
        effect: `[T]`. Largest change of a log-prob at each position.
        rounding: `[T]`. Change that rounding explains at each position.
        body_unit: Unit roundoff u of the base model.
    """
    # Rounding errors grow inside the model. Therefore a change counts as a leak only if it exceeds the rounding of the
    # logits plus √u times the mean effect at the changed tokens.
    leak, noise = effect[:_KEPT], rounding[:_KEPT] + body_unit**0.5 * effect[_KEPT:].mean()
    if not (leak <= noise).all():
        raise ValueError(
            f"{name} is not causal: changing the last tokens of a sequence changes earlier log-probs by up to "
            f"{leak.max():.3g} nats, so the score of a token could depend on the token itself. Choose a causal "
            "language model, or make this model causal in its config (is_decoder=True for models like BERT)"
        )


@contextmanager
def _says_which_adapter(model: nn.Module) -> Iterator[None]:
    """Turn errors of a PEFT model's forward within this context into a `ValueError` that names the PEFT method.

    Such an error occurs if an adapter needs an additional argument of the forward, such as a task ID.
    """
    try:
        yield
    except (TypeError, ValueError, KeyError) as error:
        if not isinstance(model, PeftModel):
            raise
        raise ValueError(
            f"{_named(model)} cannot run with only token ids ({type(error).__name__}: {error}): choose another "
            "peft_config"
        ) from error


@contextmanager
def _says_what_is_missing(model: nn.Module) -> Iterator[None]:
    """Raise `TypeError` if a forward within this context shows that a custom class breaks transformers' conventions.

    The class then lacks an argument or an output that all models of transformers have.
    """
    try:
        yield
    except (TypeError, AttributeError) as error:
        if not re.search("unexpected keyword argument|has no attribute '(logits|last_hidden_state)'", str(error)):
            raise
        raise TypeError(
            f"{_named(model)} does not follow the conventions of transformers' models ({error}): its forward and its "
            "base model's forward must accept use_cache and return_dict (**kwargs is enough) and return a ModelOutput, "
            "with logits and last_hidden_state, respectively"
        ) from error


def _named(model: nn.Module) -> str:
    """Return the name of the model's class and of its PEFT methods."""
    name = type(base_causal_lm(model)).__name__
    if not isinstance(model, PeftModel):
        return name
    methods = {cast(PeftType, config.peft_type).value for config in model.peft_config.values()}
    return f"{name} under {', '.join(sorted(methods))}"


def _distance(model: nn.Module, ids: Tensor, targets: Tensor, plain: Tensor) -> Tensor:
    """Score the targets `[T, K]`; return their absolute differences `[T, K]` from the log-probs `plain`, in nats."""
    with torch.no_grad(), evaluation_mode(model), _says_what_is_missing(model):
        scores = _scores(model, ids, targets.to(ids.device)).to(plain.device)
    return _difference(scores, plain)


def _difference(some: Tensor, others: Tensor) -> Tensor:
    """Return |some − others|, and 0 where both are −∞."""
    return torch.where(some == others, 0.0, (some - others).abs())


def training_noise(model: nn.Module, compute_dtype: torch.dtype | None = None) -> float:
    """Return the largest difference between log-probs in training and evaluation mode, in nats.

    The policy is scored in training mode, and the reference in evaluation mode. If a router has jitter, or a kernel
    depends on the mode, the two differ before the first step. This function disables adapters, so that their dropout
    has no effect.

    Args:
        model, compute_dtype: See `settle_scores`. The model runs twice on 16 tokens.

    Returns:
        The largest difference for one synthetic sequence, or 0 if rounding explains all differences.
    """
    ids = torch.tensor([made_up_tokens(base_causal_lm(model).config, _KEPT + _CHANGED, random.Random(0))])
    ids = ids.to(device_of(model))
    devices = [ids.device] if ids.device.type == "cuda" else []
    tree = ModuleTree(model)
    without = adapters_off(tree) if isinstance(model, PeftModel) else nullcontext()
    with torch.no_grad(), without, torch.random.fork_rng(devices):
        with evaluation_mode(tree):
            evaluated = _plain_logits(model, ids)
        with training_mode(tree):
            trained = _plain_logits(model, ids)
    size = evaluated.abs() + evaluated.abs().mean(-1, keepdim=True)
    off = (trained.log_softmax(-1) - evaluated.log_softmax(-1)).abs()
    return float(off.max()) if (off > relative_rounding(model, compute_dtype) * size).any() else 0.0


def made_up_tokens(config: Any, count: int, generator: random.Random) -> list[int]:
    """Return `count` random token ids, except ids that the config names (such as an EOS token or an image token)."""
    text_config = config.get_text_config()
    named = [value for part in (config, text_config) for key, value in vars(part).items() if "token" in key]
    # A config entry may be a list of ids, such as several EOS tokens.
    special = {id for value in named for id in (value if isinstance(value, list | tuple) else [value])}
    ids = [id for id in (generator.randrange(text_config.vocab_size) for _ in range(8 * count)) if id not in special]
    return ids[:count]


def device_of(model: nn.Module) -> torch.device:
    """Return the device for a model's inputs: the device of its first parameter that is not on the meta device.

    Offloaded weights are on the meta device. For them, accelerate's hooks move the weights and the inputs.
    """
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def _plain_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Compute the logits `[T, V]` of a sequence `[1, T]` with the model's own forward, in full precision."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, return_dict=True).logits
    # Adapters may put virtual tokens before a sequence, so the last T positions are taken.
    return logits[0, -ids.shape[1] :].to(torch.promote_types(logits.dtype, torch.float32))


def _scores(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """Compute the log-probs `[T, K]` of K targets at each position of a sequence `[1, T]`."""
    return score(model, scored_batch(ids, targets)).token_logps.view_as(targets)


def scored_batch(ids: Tensor, targets: Tensor) -> PreferenceBatch:
    """Build a padded batch from one sequence `[1, T]` and its targets `[T, K]`, K tokens to score at each position.

    All targets together form one response with T · K scored tokens.
    """
    count = targets.numel()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "scored_rows": torch.arange(len(targets), device=ids.device).repeat_interleave(targets.shape[1]),
        "targets": targets.flatten(),
        "response_index": ids.new_zeros(count),
        "response_lengths": ids.new_full((1,), count),
        "longest_response": count,
    }


def relative_rounding(model: nn.Module, compute_dtype: torch.dtype | None = None) -> float:
    """Return the maximum rounding error of a token's log-prob, divided by |z_t| + mean|z|.

    Here z are the logits, and z_t is the logit of the token. The error comes from rounding in the base model or from
    the order of summation, whichever is larger.
    """
    return max(_ROUNDINGS * _units(model, compute_dtype)[1], _SUMMING)


def body_precision(model: nn.Module, compute_dtype: torch.dtype | None = None) -> float:
    """Return the machine epsilon of the coarsest dtype used in the base model. Arguments: see `settle_scores`."""
    return 2 * _units(model, compute_dtype)[1]


def _units(model: nn.Module, compute_dtype: torch.dtype | None) -> tuple[float, float]:
    """Return the unit roundoffs of the head and of the base model, from the coarsest dtype used in each.

    GPUs may multiply fp32 matrices in TF32, which has 11 significant bits. With 8-bit weights, activations are also
    quantized to 8 bits, with a scale that depends on all tokens of the batch; the head keeps a higher precision. 4-bit
    weights are stored as two per byte, so they look like 8-bit weights. On a CPU, they are multiplied in bf16, which
    also has 8 significant bits.
    """
    held = {p.dtype for p in model.parameters()}
    floats = {dtype for dtype in held if dtype.is_floating_point and dtype.itemsize > 1}
    floats |= set() if compute_dtype is None else {compute_dtype}
    head = max(torch.finfo(dtype).eps / 2 for dtype in floats)
    head = head if device_of(model).type == "cpu" else max(head, 2.0**-11)
    eight_bits = [torch.finfo(d).eps / 2 if d.is_floating_point else 2.0**-8 for d in held if d.itemsize == 1]
    return head, max(head, *eight_bits, 0.0)
