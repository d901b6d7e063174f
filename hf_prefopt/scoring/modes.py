"""The modules of a model, listed once, and contexts for a forward: evaluation mode, adapters off, no adapter casts.

They are used in every step, and a walk through a model of 24 layers (2,000 modules under LoRA) takes longer than
launching the kernels of several layers. So a `ModuleTree` keeps the list, and compares it with the model before each
use, which takes a fifth of a walk.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

T = TypeVar("T")
# What these do to a layer's forward is to set `_disable_adapters`; a layer with a switch of its own may do more.
_SWITCHES = {cls.enable_adapters for cls in (BaseTunerLayer, AuxiliaryTrainingWrapper, ModulesToSaveWrapper)}
# What these do to a layer's forward is to set `_active_adapter`; one of them also in the layer inside it, another one.
_SETTERS = {
    cls.set_adapter for cls in (BaseTunerLayer, AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper)
}
# Modules of exactly these types never look at their mode.
_MODELESS = {nn.Linear, nn.Embedding, nn.Identity, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict}
# What these do to a model whose modules are all in training mode is nothing.
_PLAIN_TRAIN = {nn.Module.train, PreTrainedModel.train}


class ModuleTree:
    """A model's modules, and what is derived from them, listed again when a module was added, removed or replaced.

    Attributes:
        model: the root.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._named: list[tuple[str, nn.Module]] = []
        self._modules: list[nn.Module] = []
        self._children: list[dict[str, nn.Module | None]] = []
        self._derived: dict[Callable, Any] = {}
        self._held = False

    def modules(self) -> list[nn.Module]:
        """As `list(model.modules())`."""
        # Dicts are equal if they have the same names, and under each the same module.
        if not self._held and (not self._modules or [m._modules for m in self._modules] != self._children):
            self._named = list(self.model.named_modules())
            self._modules = [module for _, module in self._named]
            self._children = [dict(module._modules) for module in self._modules]
            self._derived = {}
        return self._modules

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.modules())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """As the model's: under its first name, each parameter that a module holds now."""
        self.modules()
        seen: set[int] = set()
        for path, module in self._named:
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.{name}" if path else name, parameter

    def derived(self, make: Callable[[list[nn.Module]], T]) -> T:
        """`make` of the modules, made once for as long as they are the same; `make` is a function of a module."""
        modules = self.modules()
        if make not in self._derived:
            self._derived[make] = make(modules)
        return self._derived[make]

    @contextmanager
    def held(self) -> Iterator[None]:
        """The modules are compared with the model now, and not in this context, in which they stay the same."""
        self.modules()
        outer, self._held = self._held, True
        try:
            yield
        finally:
            self._held = outer


def body_parameters(modules: list[nn.Module]) -> int:
    """The number of parameters of a transformers or PEFT model, given its modules, without its embeddings."""
    return cast(PreTrainedModel, modules[0]).num_parameters(exclude_embeddings=True)


def trained_parameters(modules: list[nn.Module]) -> int:
    """The number of its parameters that train, without its embeddings."""
    return cast(PreTrainedModel, modules[0]).num_parameters(only_trainable=True, exclude_embeddings=True)


@contextmanager
def evaluation_mode(model: nn.Module | ModuleTree) -> Iterator[None]:
    """What `model.eval()` means for a forward, for the time of the context; each module gets its own mode back."""
    modules = (model if isinstance(model, ModuleTree) else ModuleTree(model)).derived(_with_modes)
    # A plain attribute, set past nn.Module.__setattr__, which looks for parameters and modules.
    states = [module.__dict__ for module in modules if module.training]
    for state in states:
        state["training"] = False
    try:
        yield
    finally:
        for state in states:
            state["training"] = True


def _with_modes(modules: list[nn.Module]) -> list[nn.Module]:
    """The modules whose forward may depend on their mode, but those whose product does.

    bitsandbytes multiplies 8-bit weights by another kernel in evaluation mode, where the device has two. A reference
    is computed by the policy's.
    """
    depends = [module for module in modules if type(module) not in _MODELESS or "forward" in vars(module)]
    return [module for module in depends if not any(cls.__name__ == "Linear8bitLt" for cls in _of_bitsandbytes(module))]


def _of_bitsandbytes(module: nn.Module) -> list[type]:
    return [cls for cls in type(module).__mro__ if cls.__module__.startswith("bitsandbytes.")]


@contextmanager
def training_mode(tree: ModuleTree) -> Iterator[None]:
    """`model.train()` for the time of the context; each module gets its own mode back."""
    states = [module.__dict__ for module in tree if not module.training]
    tree.model.train()
    try:
        yield
    finally:
        for state in states:
            state["training"] = False


@contextmanager
def light_train(tree: ModuleTree) -> Iterator[None]:
    """Inside the context `model.train()` looks at every module's mode, and runs only if it changes something.

    Models with a `train` of their own, anywhere in them, go on running it.
    """
    model = tree.model

    def train(mode: bool = True) -> nn.Module:
        if mode is True and tree.derived(_has_plain_train) and not [module for module in tree if not module.training]:
            return model
        return type(model).train(model, mode)

    if "train" in vars(model):  # replaced on the instance
        yield
        return
    vars(model)["train"] = train
    try:
        yield
    finally:
        del vars(model)["train"]


def _has_plain_train(modules: list[nn.Module]) -> bool:
    return {type(module).train for module in modules} <= _PLAIN_TRAIN


@contextmanager
def adapters_off(tree: ModuleTree) -> Iterator[None]:
    """A `PeftModel` without its adapters for the time of the context.

    As `model.disable_adapter()`, but `requires_grad` of the adapters' tensors stays as it is, so use it under
    `torch.no_grad()`.
    """
    layers = tree.derived(_switched_layers)
    if layers is None:
        with cast(PeftModel, tree.model).disable_adapter():
            yield
        return
    states = [layer.__dict__ for layer in layers if not layer.disable_adapters]
    for state in states:
        state["_disable_adapters"] = True
    try:
        yield
    finally:
        for state in states:
            state["_disable_adapters"] = False


def _switched_layers(modules: list[nn.Module]) -> list[Any] | None:
    """The layers of a `PeftModel` that are switched off one by one; `None` if more has to be done."""
    layers = [module for module in modules if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    is_plain = _switched_by_layer(modules[0]) and all(type(layer).enable_adapters in _SWITCHES for layer in layers)
    return layers if is_plain else None


@contextmanager
def adapter_on(tree: ModuleTree, name: str) -> Iterator[None]:
    """A `PeftModel` of LoRA adapters under one of them alone for the time of the context.

    As `model.set_adapter(name)` and back, but `requires_grad` of the adapters' tensors stays as it is, so use it under
    `torch.no_grad()`. Only where `is_set_by_layer`.
    """
    layers = tree.derived(_set_layers) or []
    before = [(layer.__dict__, layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        # A wrapped module of which this adapter has no copy is the base model's.
        is_off = isinstance(layer, AuxiliaryTrainingWrapper) and name not in layer._get_available_adapters()
        layer.__dict__.update(_active_adapter=[name], _disable_adapters=is_off)
    try:
        yield
    finally:
        for state, active, disabled in before:
            state.update(_active_adapter=active, _disable_adapters=disabled)


def is_set_by_layer(tree: ModuleTree) -> bool:
    """Whether choosing a `PeftModel`'s adapter is choosing it in some of its layers, and changes nothing else."""
    configs = cast(PeftModel, tree.model).peft_config.values()
    are_plain = all(
        config.peft_type == PeftType.LORA and not getattr(config, "alora_invocation_tokens", None) for config in configs
    )
    return are_plain and tree.derived(_set_layers) is not None


def _set_layers(modules: list[nn.Module]) -> list[Any] | None:
    """The layers in which an adapter is chosen one by one; `None` if more has to be done, such as undoing a merge."""
    layers = _switched_layers(modules) or []
    is_plain = all(type(layer).set_adapter in _SETTERS and not getattr(layer, "merged", False) for layer in layers)
    return layers if layers and is_plain else None


def is_switched_by_layer(tree: ModuleTree) -> bool:
    """Whether switching a `PeftModel`'s adapters off is switching some of its layers, and changes nothing else."""
    return tree.derived(_switched_layers) is not None


@contextmanager
def adapter_casts_off(tree: ModuleTree, autocast: bool) -> Iterator[None]:
    """Adapters take their inputs as they come, where autocast will cast them anyway; the results are the same bits.

    PEFT casts the input of each adapter to the adapter's dtype, fp32, and keeps the cast for the backward; autocast
    then casts it back. The context belongs around forward and backward, since checkpointing runs a forward in there.
    """
    layers = tree.derived(_adapter_layers) if autocast else []
    states = [layer.__dict__ for layer in layers if getattr(layer, "cast_input_dtype_enabled", False)]
    for state in states:
        state["cast_input_dtype_enabled"] = False
    try:
        yield
    finally:
        for state in states:
            state["cast_input_dtype_enabled"] = True


def _adapter_layers(modules: list[nn.Module]) -> list[BaseTunerLayer]:
    return [module for module in modules if isinstance(module, BaseTunerLayer)]


def _switched_by_layer(model: nn.Module) -> bool:
    """Whether PEFT switches this method's adapters off layer by layer, and not by replacing forwards or modules."""
    tuner = type(model.base_model)
    return issubclass(tuner, BaseTuner) and tuner.disable_adapter_layers is BaseTuner.disable_adapter_layers
