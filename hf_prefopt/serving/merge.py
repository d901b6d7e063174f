"""An adapter merged into its base model: a folder that is served like any other model, and a check that it is the same.

Weights are merged in place, one tensor after the other, so a merge takes the memory of the base, the adapter, and one
tensor in float32. In float32 each changed weight becomes W + ΔW, which is then rounded once to the base's dtype.

Left out on purpose: merging into quantized weights, which would round most of an adapter away.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from hf_prefopt.loading import holds_adapter, load_adapter, load_checkpoint, processing_class_of, read_tensors
from hf_prefopt.scoring.agreement import relative_rounding
from hf_prefopt.scoring.modes import ModuleTree, adapters_off
from hf_prefopt.serving.agreement import Agreement, compare
from hf_prefopt.serving.kept_rows import KeptRows, read_rows
from hf_prefopt.serving.token_logps import TokenLogps, token_logps
from hf_prefopt.serving.tying import cut_tie, settle_tie


class MergedModel(NamedTuple):
    """A merged model. folder: where it is. agreement: how the check came out. notes: what its user should know."""

    folder: Path
    agreement: Agreement
    notes: list[str]


def merge_adapter(
    run: str | Path,
    folder: str | Path,
    base: str | None = None,
    adapters: Sequence[str] = (),
    dtype: str | torch.dtype = "auto",
    max_shard_size: str = "5GB",
    trust_remote_code: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> MergedModel:
    """Merge an adapter into its base model, save the result, reload it and compare its log-probs.

    The model is of the class that the base's checkpoint names, with all of its tensors, also those that the class does
    not load. Tokenizer or processor, chat template and generation config are saved along. Embeddings that share their
    weights with the head keep doing so only if the merged ones are equal. What the comparison tolerates is in
    `hf_prefopt.serving.agreement`.

    Args:
        run: the folder or Hub name of an adapter.
        folder: where the model is written; a new or empty folder.
        base: the base model, in place of the one that the adapter's configuration names.
        adapters: folders inside `run` of the adapters to merge, all of them added up; by default the one in `run`.
        dtype: of the merged model; by default the base checkpoint's.
        max_shard_size: of the safetensors files.
        trust_remote_code: run code that comes with the base model.
        say: gets a line for each step.

    Raises:
        ValueError: there is no adapter, or several to choose from; the base is quantized; the adapter cannot be merged;
            `folder` is not empty; or the merged model is not the trained one, and then nothing is left in `folder`.
    """
    folder = Path(folder)
    names = _adapter_names(str(run), adapters)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: name a new folder")
    base = base or PeftConfig.from_pretrained(names[0]).base_model_name_or_path
    kwargs = {"dtype": dtype, **({"trust_remote_code": True} if trust_remote_code else {})}
    model, left_out = _unquantized(base, names[0], kwargs)
    say(f"merging {', '.join(names)} into {base} ({type(model).__name__}, {_short(model.dtype)})")
    kept = read_rows(Path(run), model.config)
    policy = _with_adapters(model, names)
    trained, untrained = token_logps(policy, kept.rows), _without_adapter(policy, kept)
    model = merged(policy)
    del policy
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        _save(model, partial, read_tensors(base, left_out, kwargs), max_shard_size)
        processing_class_of(names[0], kwargs, base).save_pretrained(partial)
        rounding = relative_rounding(model)
        del model  # one model at a time
        reloaded, _ = load_checkpoint(str(partial), {**kwargs, "dtype": "auto"})
        agreement = compare(token_logps(reloaded, kept.rows), trained, untrained, rounding, reloaded.dtype)
        _check(agreement)
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    say(f"check on {len(kept.rows)} {kept.name}: {agreement}")
    notes = _notes(kept, base)
    for note in notes:
        say(f"note: {note}")
    return MergedModel(folder, agreement, notes)


def merged(policy: PeftModel) -> PreTrainedModel:
    """The model beneath, its active adapters added to its weights in place: in float32, then rounded to their dtype.

    Raises:
        ValueError: the kind of adapter cannot be merged, or it gives weights that are not finite.
    """
    name = policy.active_peft_config.peft_type.value
    if policy.active_peft_config.is_prompt_learning or not isinstance(policy.base_model, BaseTuner):
        raise ValueError(f"an adapter of type {name} is no change of weights and cannot be merged: serve it as it is")
    was_tied = cut_tie(policy)
    try:
        policy.base_model._check_merge_allowed()
        with torch.no_grad():
            for module in list(policy.modules()):
                if isinstance(module, ModulesToSaveWrapper):
                    module.modules_to_save.to(next(module.original_module.parameters()).dtype)
                elif isinstance(module, BaseTunerLayer):
                    with _in_float32(module.get_base_layer(), getattr(module, "parameter_name", None)):
                        module.merge(safe_merge=True)
            model = policy.base_model.unload()
    except (NotImplementedError, AttributeError, RuntimeError) as error:
        raise ValueError(f"PEFT cannot merge this {name} adapter: {error}") from error
    if was_tied:
        settle_tie(model)
    return model


@contextmanager
def _in_float32(layer: nn.Module, only: str | None = None) -> Iterator[None]:
    """A layer's own weights in float32, or only one of them, rounded to their dtype at the end."""
    own = {name: p for name, p in layer.named_parameters(recurse=False) if only in (None, name)}
    dtypes = {name: p.dtype for name, p in own.items() if p.dtype in (torch.bfloat16, torch.float16)}
    for name in dtypes:
        layer._parameters[name].data = layer._parameters[name].data.float()
    try:
        yield
    finally:
        for name, dtype in dtypes.items():
            layer._parameters[name].data = layer._parameters[name].data.to(dtype)


def _adapter_names(run: str, adapters: Sequence[str]) -> list[str]:
    """The folders or names of the adapters to merge."""
    inside = _adapters_in(run)
    if unknown := [name for name in adapters if name not in inside]:
        raise ValueError(f"{unknown[0]} is no adapter in {run}, which holds {', '.join(inside) or 'none'}")
    if adapters:
        return [str(Path(run) / name) for name in adapters]
    if holds_adapter(run):
        return [run]
    if inside:
        found = ", ".join(inside)
        raise ValueError(f"{run} holds several adapters or checkpoints ({found}): name one, {run}/{inside[-1]}")
    if Path(run, CONFIG_NAME).is_file():
        raise ValueError(f"{run} is a whole model and no adapter: there is nothing to merge, serve it as it is")
    raise ValueError(f"{run} is no adapter: there is no adapter_config.json in such a folder, nor on the Hub")


def _adapters_in(run: str) -> list[str]:
    return sorted((path.parent.name for path in Path(run).glob("*/adapter_config.json")), key=lambda n: (len(n), n))


def _unquantized(base: str | None, adapter: str, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, list[str]]:
    """The base model in full precision, and the tensors that its class leaves out."""
    if not base:
        raise ValueError(f"{adapter}/adapter_config.json names no base model: pass it by --base (base=…)")
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=kwargs.get("trust_remote_code", False))
    except OSError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"the base model {base} is not found: pass it by --base (base=…). {reason}") from error
    if quantization := getattr(config, "quantization_config", None):
        method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
        raise ValueError(
            f"the base model {base} is quantized ({getattr(method, 'value', method)}): an adapter is merged into the "
            "unquantized model, so pass its name by --base (base=…)"
        )
    return load_checkpoint(base, kwargs)


def _with_adapters(model: PreTrainedModel, names: list[str]) -> PeftModel:
    """The model under all of these adapters, each active."""
    if PeftConfig.from_pretrained(names[0]).is_prompt_learning:
        raise ValueError(f"{names[0]} is a soft prompt and no change of weights, so it cannot be merged")
    policy = load_adapter(model, names[0])
    for name in names[1:]:
        policy.load_adapter(name, adapter_name=Path(name).name)
    if len(names) > 1:
        policy.base_model.set_adapter([*policy.peft_config])
    return policy.eval()


def _without_adapter(policy: PeftModel, kept: KeptRows) -> TokenLogps:
    with torch.no_grad(), adapters_off(ModuleTree(policy)):
        return token_logps(policy, kept.rows)


def _save(model: PreTrainedModel, folder: Path, left_out: dict[str, Tensor], max_shard_size: str) -> None:
    """The model with the tensors of the checkpoint that its class does not load."""
    state = {**model.state_dict(), **left_out} if left_out else None
    model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)


def _check(agreement: Agreement) -> None:
    """Raise `ValueError` for a merged model that is not the trained one."""
    if not agreement.difference <= agreement.bound:
        raise ValueError(
            f"the merged model is not the trained one, so it was not kept: {agreement} Merge with --dtype float32 "
            "(dtype=…), which rounds far less: if that fails, too, the merge itself is wrong"
        )
    if agreement.difference > agreement.effect / 2 and agreement.effect > 0:
        raise ValueError(
            f"the merged model has lost more than half of what the adapter does, so it was not kept: {agreement} Merge "
            "with --dtype float32 (dtype=…), or serve the adapter with its base"
        )


def _notes(kept: KeptRows, base: str) -> list[str]:
    notes = []
    if kept.quantized:
        notes.append(
            f"the adapter was trained on a base in {kept.quantized}, and is merged into {base} without quantization, "
            "which gives other log-probs than the base that it was trained on"
        )
    return notes


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
