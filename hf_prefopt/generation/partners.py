"""Find the policy and the reference of any `transformers.Trainer`, to generate with them."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

from accelerate.utils import DistributedType
from peft import PeftModel
from torch import nn
from transformers import Trainer

from hf_prefopt.generation.answers import Problem, generate_answers, prompt_ids
from hf_prefopt.reference.cache import CachedReference
from hf_prefopt.reference.shards import is_sharded
from hf_prefopt.scoring.modes import ModuleTree, adapters_off


class Partner(NamedTuple):
    """The policy or the reference: a model, and a function that returns the context in which the model is used.

    For example, the context may disable an adapter, so that the policy's model is the reference.
    """

    model: nn.Module
    acting: Callable[[], AbstractContextManager] = nullcontext


def policy_of(trainer: Trainer) -> Partner:
    """Return the policy, without the wrapper of a training engine, such as DDP or DeepSpeed."""
    return Partner(trainer.accelerator.unwrap_model(trainer.model))


def reference_of(trainer: Trainer, given: nn.Module | None = None) -> Partner:
    """Return a reference: `given`, else the reference of a `PreferenceTrainer`, else the policy without its adapter.

    Raises:
        ValueError: If none of these exists.
    """
    if given is not None:
        return Partner(given.to(trainer.args.device))
    own = getattr(trainer, "reference", None)
    own = own.live if isinstance(own, CachedReference) else own
    if own is not None:
        return Partner(own.model, own.switch)
    policy = policy_of(trainer)
    if isinstance(policy.model, PeftModel):
        return Partner(policy.model, partial(adapters_off, ModuleTree(policy.model)))
    raise ValueError(
        "there is no reference to generate with: the policy has no adapter to disable, and the trainer has no "
        "reference model; pass reference=model, for example a second copy of the base model"
    )


def refuse_sharded(trainer: Trainer) -> None:
    """Raise `ValueError` if the training engine (FSDP or DeepSpeed) shards the model's parameters."""
    kind = trainer.accelerator.distributed_type
    if kind == DistributedType.FSDP or any(map(is_sharded, policy_of(trainer).model.parameters())):
        raise ValueError(
            f"{kind.value} shards the model's parameters, so this callback cannot generate during training: remove the "
            "callback, and compare answers of the saved model (hf_prefopt chat)"
        )


def answers_of(
    trainer: Trainer, partner: Partner, problems: Sequence[Problem | str], settings: dict[str, Any], batch_size: int
) -> list[str]:
    """Generate an answer of `partner`, the policy or the reference, to each problem, and return them in order."""
    processing_class: Any = trainer.processing_class
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    if tokenizer is None:
        raise ValueError("the trainer has no tokenizer to generate with: pass processing_class=tokenizer to it")
    prompts, texts = [prompt_ids(problem, tokenizer) for problem in problems], []
    with partner.acting():
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            texts += generate_answers(partner.model, tokenizer, batch, settings, trainer.accelerator.autocast())
    return texts
