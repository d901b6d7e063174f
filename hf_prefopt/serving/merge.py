"""Merge an adapter into its base model, and check that the merged model equals the trained model.

Weights are merged in place, one layer at a time, so a merge needs memory for the base model, the adapter, and one layer
in float32. For each weight W that the adapter changes by ΔW, the sum W + ΔW is computed in float32 and rounded once to
the dtype of the base model.

Merging into quantized weights is not supported, because quantizing the merged weights would remove most of the
adapter's effect.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME

from hf_prefopt.folders import check_folder
from hf_prefopt.loading import holds_adapter, load_adapter, load_checkpoint, processing_class_of, read_tensors
from hf_prefopt.scoring.agreement import relative_rounding
from hf_prefopt.scoring.modes import ModuleTree, adapters_off
from hf_prefopt.serving.agreement import Agreement, compare
from hf_prefopt.serving.kept_rows import KeptRows, read_rows
from hf_prefopt.serving.token_logps import TokenLogps, token_logps
from hf_prefopt.serving.tying import cut_tie, settle_tie


class MergedModel(NamedTuple):
    """A merged model.

    Attributes:
        folder: Folder of the merged model.
        agreement: Result of the comparison with the trained model.
        notes: Notes for users of the model, such as a warning about a quantized base model.
    """

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
    """Merge an adapter into its base model, save the merged model, and check it.

    The check loads the saved model and compares its log-probs with those of the base model with its adapter.
    `hf_prefopt.serving.agreement` defines the tolerance.

    The saved model has the class that the base checkpoint names. It has all tensors of the checkpoint, including those
    that the class does not load. The tokenizer or processor, the chat template and the generation config are saved as
    well. If embeddings and head are tied in the base model, they stay tied only if their merged weights are equal.

    Args:
        run: Folder or Hub name of an adapter.
        folder: New or empty folder for the merged model.
        base: Folder or Hub name of the base model. Default: the base model that the adapter's configuration names.
        adapters: Names of subfolders of `run`, each with an adapter. Their weight changes are added up. Default: the
            adapter in `run`.
        dtype: Dtype of the merged model. Default: the dtype of the base checkpoint.
        max_shard_size: Maximum size of a safetensors file.
        trust_remote_code: Whether to run code from the base model's repository.
        say: Function that is called with a line of text for each step.

    Raises:
        ValueError: If `run` has no adapter, or has several and `adapters` selects none; if the base model is quantized;
            if the adapter cannot be merged; if `folder` is not empty or cannot be written; or if the merged model
            differs from the trained model by more than rounding. In the last case, `folder` is not created.
    """
    check_folder("folder", folder)
    folder = Path(folder).expanduser()
    names = _adapter_names(str(run), adapters)
    if folder.exists() and any(folder.iterdir()):
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
    with _replacing(folder) as partial:
        _save(model, partial, read_tensors(base, left_out, kwargs), max_shard_size)
        processing_class_of(names[0], kwargs, base).save_pretrained(partial)
        rounding = relative_rounding(model)
        del model  # one model at a time
        reloaded, _ = load_checkpoint(str(partial), {**kwargs, "dtype": "auto"})
        agreement = compare(token_logps(reloaded, kept.rows), trained, untrained, rounding, reloaded.dtype)
        _check(agreement)
    say(f"check on {len(kept.rows)} {kept.name}: {agreement}")
    notes = _notes(kept, base)
    for note in notes:
        say(f"note: {note}")
    return MergedModel(folder, agreement, notes)


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """Yield the path of a temporary folder. On exit, it is renamed to `folder`; after an error, it is removed."""
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        yield partial
        partial.replace(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def merged(policy: PeftModel) -> PreTrainedModel:
    """Merge the active adapters into the base model in place, and return the base model.

    The sums are computed in float32 and rounded to the dtype of the weights.

    Raises:
        ValueError: If adapters of this type cannot be merged, or if merged weights are not finite.
    """
    name = policy.active_peft_config.peft_type.value
    if policy.active_peft_config.is_prompt_learning or not isinstance(policy.base_model, BaseTuner):
        raise ValueError(
            f"an adapter of type {name} does not change weights, so it cannot be merged: serve it with its base model"
        )
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
            model = cast(PreTrainedModel, policy.base_model.unload())
    except (NotImplementedError, AttributeError, RuntimeError) as error:
        raise ValueError(f"PEFT cannot merge this {name} adapter: {error}") from error
    if was_tied:
        settle_tie(model)
    return model


@contextmanager
def _in_float32(layer: nn.Module, only: str | None = None) -> Iterator[None]:
    """Convert a layer's half-precision weights to float32, and round them to their former dtype on exit.

    Weights of submodules are not converted. If `only` is given, only the weight of this name is converted.
    """
    own = {name: p for name, p in layer.named_parameters(recurse=False) if only in (None, name)}
    dtypes = {name: p.dtype for name, p in own.items() if p.dtype in (torch.bfloat16, torch.float16)}
    for name in dtypes:
        layer.get_parameter(name).data = layer.get_parameter(name).data.float()
    try:
        yield
    finally:
        for name, dtype in dtypes.items():
            layer.get_parameter(name).data = layer.get_parameter(name).data.to(dtype)


def _adapter_names(run: str, adapters: Sequence[str]) -> list[str]:
    """Return the folders or Hub names of the adapters to merge."""
    inside = _adapters_in(run)
    if unknown := [name for name in adapters if name not in inside]:
        raise ValueError(f"{run} has no adapter {unknown[0]}; its adapters are: {', '.join(inside) or 'none'}")
    if adapters:
        return [str(Path(run) / name) for name in adapters]
    if holds_adapter(run):
        return [run]
    if inside:
        found = ", ".join(inside)
        raise ValueError(f"{run} has several adapters or checkpoints ({found}): select one, such as {run}/{inside[-1]}")
    if Path(run, CONFIG_NAME).is_file():
        raise ValueError(f"{run} is a full model, not an adapter: there is nothing to merge; serve {run} directly")
    raise ValueError(f"{run} is not an adapter: there is no adapter_config.json in a folder or Hub repository {run}")


def _adapters_in(run: str) -> list[str]:
    return sorted((path.parent.name for path in Path(run).glob("*/adapter_config.json")), key=lambda n: (len(n), n))


def _unquantized(base: str | None, adapter: str, kwargs: dict[str, Any]) -> tuple[PreTrainedModel, list[str]]:
    """Load the base model, and return it with the names of the checkpoint tensors that its class does not load.

    Raises:
        ValueError: If the base model is unknown, is not found, or is quantized.
    """
    if not base:
        raise ValueError(f"{adapter}/adapter_config.json names no base model: pass it with --base (base=…)")
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=kwargs.get("trust_remote_code", False))
    except OSError as error:
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(f"the base model {base} was not found: pass it with --base (base=…). {reason}") from error
    if quantization := getattr(config, "quantization_config", None):
        method = quantization["quant_method"] if isinstance(quantization, dict) else quantization.quant_method
        raise ValueError(
            f"the base model {base} is quantized ({getattr(method, 'value', method)}), but an adapter can only be "
            "merged into the unquantized model: pass the unquantized model with --base (base=…)"
        )
    return load_checkpoint(base, kwargs)


def _with_adapters(model: PreTrainedModel, names: list[str]) -> PeftModel:
    """Load all adapters onto the model, and activate them."""
    if PeftConfig.from_pretrained(names[0]).is_prompt_learning:
        raise ValueError(f"{names[0]} is a soft prompt, which does not change weights, so it cannot be merged")
    policy = load_adapter(model, names[0])
    for name in names[1:]:
        policy.load_adapter(name, adapter_name=Path(name).name)
    if len(names) > 1:
        cast(BaseTuner, policy.base_model).set_adapter([*policy.peft_config])
    return policy.eval()


def _without_adapter(policy: PeftModel, kept: KeptRows) -> TokenLogps:
    with torch.no_grad(), adapters_off(ModuleTree(policy)):
        return token_logps(policy, kept.rows)


def _save(model: PreTrainedModel, folder: Path, left_out: dict[str, Tensor], max_shard_size: str) -> None:
    """Save the model together with `left_out`, the checkpoint tensors that its class does not load."""
    state = {**model.state_dict(), **left_out} if left_out else None
    model.save_pretrained(folder, state_dict=state, max_shard_size=max_shard_size)


def _check(agreement: Agreement) -> None:
    """Raise `ValueError` if rounding does not explain the difference between the merged and the trained model.

    Also raise it if rounding has removed more than half of the adapter's effect.
    """
    if not agreement.difference <= agreement.bound:
        raise ValueError(
            f"the merged model differs from the trained model, so it was not saved: {agreement} Merge with --dtype "
            "float32 (dtype=…), which reduces rounding. If that also fails, the merge itself is wrong"
        )
    # In a float32 model, rounding does not remove the adapter's changes, so only a different order of summation can
    # cause a difference. `bound` allows 128u for this, where u = 2⁻²⁴ is the unit roundoff. A layer probably lacks its
    # change if the difference is above 4u (bound / 32) and also above a 20th of the adapter's effect.
    allowed = max(agreement.effect / 20, agreement.bound / 32)
    if agreement.dtype == torch.float32 and allowed < agreement.difference <= agreement.effect / 2:
        raise ValueError(f"the merged model lacks a part of the adapter, so it was not saved: {agreement}")
    if agreement.difference > agreement.effect / 2 and agreement.effect > 0:
        raise ValueError(
            f"the merged model has lost more than half of the adapter's effect, so it was not saved: {agreement} Merge "
            "with --dtype float32 (dtype=…), or serve the adapter with its base"
        )


def _notes(kept: KeptRows, base: str) -> list[str]:
    notes = []
    if kept.quantized:
        notes.append(
            f"the adapter was trained on a base model quantized to {kept.quantized}, and was merged into {base} "
            "without quantization, so the log-probs differ from training by the quantization error"
        )
    return notes


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
