"""Whether scores are a model's own: measured on the model itself, in every layout, before it trains.

What a model does between its hidden states and its logits is read off names in its config, where a name can be missing
or mean something else. A mistake there is silent: policy and reference share it, and the first loss is right. So one
made-up sequence is scored, and run through the model's own forward, too; where the two differ, logits are the model's
own from then on. The same forward with other tokens at its end
says whether the model is causal, without which a log-prob of a token has seen that token.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from hf_prefopt.batch import PreferenceBatch
from hf_prefopt.scoring.forward import base_causal_lm, score, score_by_own_logits, scores_by_own_logits, transform_of
from hf_prefopt.scoring.modes import ModuleTree, adapters_off, evaluation_mode, training_mode

_KEPT, _CHANGED = 10, 6
# Roundings to the model's dtype on the way to a logit: the product, a scale, a division by a cap, tanh, a product.
_ROUNDINGS = 4
# Products sum in fp32, in an order that depends on their shape: errors grow with the root of the hidden size.
_SUMMING = 128 * 2.0**-24


def settle_scores(model: nn.Module, compute_dtype: torch.dtype | None = None) -> bool:
    """Compare each score of one made-up sequence with log softmax(logits / temperature) of the model's own forward.

    Where they differ, scores are made of the model's own logits from then on, see `scoring.tail`, and compared again.

    Three tokens are scored at every position: the most likely one, the least likely one and the one that follows. For
    logits z, and unit roundoff u of the dtype, a score may be off by 4u · (|z_token| + mean|z|). So a factor of 1 + f
    between the two is seen from f of about 4u · (|z_min| + mean|z|) / |z_min − mean z|, which for logits around 0 is
    4u to 8u: 2 to 3 % in bf16, and below 10⁻³ in fp32.

    Args:
        model: a model that `scoring.forward.install_scoring` has been called on, on its device. It is run three or four
            times on 16 tokens, on every rank alike.
        compute_dtype: the dtype the model computes in, where an engine or autocast makes it another than its weights'.

    Returns:
        Whether scores are made of the model's own logits.

    Raises:
        ValueError: a score is not the model's own, or a log-prob depends on tokens that come later.
    """
    causal_lm = base_causal_lm(model)
    name, temperature = _named(model), transform_of(causal_lm.get_output_embeddings()).temperature
    generator = random.Random(0)
    kept, following, others = (made_up_tokens(causal_lm.config, n, generator) for n in (_KEPT, _CHANGED, _CHANGED))
    ids, changed = torch.tensor([[*kept, *following], [*kept, *others]], device=device_of(model)).split(1)
    with torch.no_grad(), evaluation_mode(model), _says_which_adapter(model):
        logits, changed_logits = (_plain_logits(model, each) / temperature for each in (ids, changed))
    targets = torch.stack([logits.argmax(-1), logits.argmin(-1), ids[0].roll(-1).to(logits.device)], dim=1)
    plain, plain_changed = (each.log_softmax(-1).gather(1, targets) for each in (logits, changed_logits))
    if plain.isnan().any():
        raise ValueError(f"{name} gives NaN for made-up tokens: look for NaN in its weights, or choose bf16 for fp16")
    unit, body_unit = _units(model, compute_dtype)
    # The mean is of the prediction. A token that the model rules out (z = −∞) must be ruled out exactly.
    size = logits.gather(1, targets).abs() + (logits.softmax(-1) * logits.abs()).nansum(1, keepdim=True)
    rounding = (_ROUNDINGS * unit * size + _SUMMING * (size + plain.abs())).nan_to_num(posinf=0.0)

    off = _distance(model, ids, targets, plain)
    if not (off <= rounding).all() and not scores_by_own_logits(causal_lm):
        score_by_own_logits(causal_lm)
        off = _distance(model, ids, targets, plain)
    if not (off <= rounding).all():
        worst, explained = off.max(), rounding.flatten()[off.argmax()]
        raise ValueError(
            f"the log-probs that {name} would train on are not those of its own logits: of {targets.numel()} made-up "
            f"tokens the worst is off by {worst:.3g} nats, and rounding explains {explained:.1g}. What it does between "
            "the hidden states of a position and its logits depends on other positions, or is not reached through its "
            "forward, so it cannot be trained here: choose a model of another class"
        )
    effect = _difference(plain_changed, plain).amax(1)
    # What rounding becomes on its way through a model cannot be told from less than half of the digits.
    leak, noise = effect[:_KEPT], rounding.amax(1)[:_KEPT] + body_unit**0.5 * effect[_KEPT:].mean()
    if not (leak <= noise).all():
        raise ValueError(
            f"{name} is not causal: other tokens at the end of a sequence change log-probs before them, by up to "
            f"{leak.max():.3g} nats, so each token would be scored with the answer in sight. Choose a causal language "
            "model, or set what makes this one causal in its config (is_decoder=True for models like BERT)"
        )
    return scores_by_own_logits(causal_lm)


@contextmanager
def _says_which_adapter(model: nn.Module) -> Iterator[None]:
    """An adapter that asks for an argument of its own in the forward, such as the number of a task, is an error."""
    try:
        yield
    except (TypeError, ValueError, KeyError) as error:
        if not isinstance(model, PeftModel):
            raise
        raise ValueError(
            f"{_named(model)} does not run on token ids alone ({type(error).__name__}: {error}): choose another "
            "peft_config"
        ) from error


def _named(model: nn.Module) -> str:
    """The model's class, and the methods of its adapters."""
    name = type(base_causal_lm(model)).__name__
    if not isinstance(model, PeftModel):
        return name
    return f"{name} under {', '.join(sorted({config.peft_type.value for config in model.peft_config.values()}))}"


def _distance(model: nn.Module, ids: Tensor, targets: Tensor, plain: Tensor) -> Tensor:
    """`[T, K]`: how far the scores of a sequence are off its plain log-probs, in nats."""
    with torch.no_grad(), evaluation_mode(model):
        scores = _scores(model, ids, targets.to(ids.device)).to(plain.device)
    return _difference(scores, plain)


def _difference(some: Tensor, others: Tensor) -> Tensor:
    """|some − others|, 0 where both are −∞."""
    return torch.where(some == others, 0.0, (some - others).abs())


def training_noise(model: nn.Module, compute_dtype: torch.dtype | None = None) -> float:
    """By how many nats log-probs of a made-up sequence differ in training mode from evaluation mode, beyond rounding.

    A router with jitter, or a kernel that is chosen by the mode, gives a policy that differs from its reference before
    the first step. Adapters are off, so their dropout does not count.

    Args:
        model: see `settle_scores`; it is run twice on 16 tokens.

    Returns:
        The largest difference, or 0 where rounding explains it.
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
    """Arbitrary token ids, none of which the config gives a meaning (of an image, say)."""
    text_config = config.get_text_config()
    named = [value for part in (config, text_config) for key, value in vars(part).items() if "token" in key]
    # A config may have several ends of a text.
    special = {id for value in named for id in (value if isinstance(value, list | tuple) else [value])}
    ids = [id for id in (generator.randrange(text_config.vocab_size) for _ in range(8 * count)) if id not in special]
    return ids[:count]


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs. Hooks that bring offloaded weights, on no device so far, bring inputs along."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def _plain_logits(model: nn.Module, ids: Tensor) -> Tensor:
    """`[T, V]` of a sequence `[1, T]`, by the model's own forward, in full precision."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, return_dict=True).logits
    # Adapters that put virtual tokens before a sequence make it longer at its front.
    return logits[0, -ids.shape[1] :].to(torch.promote_types(logits.dtype, torch.float32))


def _scores(model: nn.Module, ids: Tensor, targets: Tensor) -> Tensor:
    """`[T, K]`: the log-probs of K targets at each position of a sequence `[1, T]`."""
    return score(model, scored_batch(ids, targets)).token_logps.view_as(targets)


def scored_batch(ids: Tensor, targets: Tensor) -> PreferenceBatch:
    """A padded batch of one sequence `[1, T]`, with K targets `[T, K]` at each position, as tokens of one response."""
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
    """By which share of |z| + mean|z| rounding may move a log-prob: of the body's products, or of their sums."""
    return max(_ROUNDINGS * _units(model, compute_dtype)[1], _SUMMING)


def body_precision(model: nn.Module, compute_dtype: torch.dtype | None = None) -> float:
    """eps of the coarsest dtype that computes in a model's body; see `check_scores` for the arguments."""
    return 2 * _units(model, compute_dtype)[1]


def _units(model: nn.Module, compute_dtype: torch.dtype | None) -> tuple[float, float]:
    """The unit roundoffs of the head and of the body: the coarsest of the dtypes that compute there.

    GPUs may multiply fp32 in TF32, which has 11 bits. Where weights have 8 bits, so have what they are multiplied with,
    on a scale that depends on all tokens of a batch; heads have more. Weights of 4 bits, two of them in a byte, are
    multiplied in bf16 on a CPU, which has 8 bits, too.
    """
    held = {p.dtype for p in model.parameters()}
    floats = {dtype for dtype in held if dtype.is_floating_point and dtype.itemsize > 1} | ({compute_dtype} - {None})
    head = max(torch.finfo(dtype).eps / 2 for dtype in floats)
    head = head if device_of(model).type == "cpu" else max(head, 2.0**-11)
    eight_bits = [torch.finfo(d).eps / 2 if d.is_floating_point else 2.0**-8 for d in held if d.itemsize == 1]
    return head, max(head, *eight_bits, 0.0)
