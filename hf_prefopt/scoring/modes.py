"""A cached list of a model's modules, and context managers that change the state of modules during a forward pass.

The contexts are used in every step. Iterating over the modules of a model with 24 layers (2,000 modules under LoRA)
takes longer than launching the kernels of several layers. Therefore a `ModuleTree` caches the list. Before each use,
it checks that the modules of the model have not changed, which takes a fifth of the time of an iteration.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

T = TypeVar("T")
# These methods affect the forward only by setting `_disable_adapters`; other `enable_adapters` methods may do more.
_SWITCHES = {cls.enable_adapters for cls in (BaseTunerLayer, AuxiliaryTrainingWrapper, ModulesToSaveWrapper)}
# These methods affect the forward only by setting `_active_adapter`; the method of `TrainableTokensWrapper` also sets
# the attribute of the wrapped layer.
_SETTERS = {
    cls.set_adapter for cls in (BaseTunerLayer, AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper)
}
# The forward of exactly these types never depends on the training mode.
_MODELESS = {nn.Linear, nn.Identity, nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict}
# These methods have no effect if all modules are already in training mode.
_PLAIN_TRAIN = {nn.Module.train, PreTrainedModel.train}


class ModuleTree:
    """A cache of a model's modules, and of values derived from them.

    It is recomputed if a module was added, removed or replaced.

    Attributes:
        model: The root module.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._named: list[tuple[str, nn.Module]] = []
        self._modules: list[nn.Module] = []
        self._children: list[dict[str, nn.Module | None]] = []
        self._derived: dict[Callable, Any] = {}
        self._held = False

    def modules(self) -> list[nn.Module]:
        """Return `list(model.modules())`."""
        # Two dicts of modules are equal if they have the same names with the same modules.
        if not self._held and (not self._modules or [m._modules for m in self._modules] != self._children):
            self._named = list(self.model.named_modules())
            self._modules = [module for _, module in self._named]
            self._children = [dict(module._modules) for module in self._modules]
            self._derived = {}
        return self._modules

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(self.modules())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield (name, parameter) for each current parameter of the model. Shared parameters have their first name."""
        self.modules()
        seen: set[int] = set()
        for path, module in self._named:
            for name, parameter in module._parameters.items():
                if parameter is not None and id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield f"{path}.{name}" if path else name, parameter

    def derived(self, make: Callable[[list[nn.Module]], T]) -> T:
        """Return `make(modules)`, cached until the modules change; `make` must be a module-level function."""
        modules = self.modules()
        if make not in self._derived:
            self._derived[make] = make(modules)
        return self._derived[make]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Check for changed modules only once, on entry. The modules must not change within this context."""
        self.modules()
        outer, self._held = self._held, True
        try:
            yield
        finally:
            self._held = outer


def body_parameters(modules: list[nn.Module]) -> int:
    """Return the number of parameters of a transformers or PEFT model, `modules[0]`, without embeddings."""
    return cast(PreTrainedModel, modules[0]).num_parameters(exclude_embeddings=True)


def trained_parameters(modules: list[nn.Module]) -> int:
    """Return the number of trainable parameters of a transformers or PEFT model, `modules[0]`, without embeddings."""
    return cast(PreTrainedModel, modules[0]).num_parameters(only_trainable=True, exclude_embeddings=True)


@contextmanager
def evaluation_mode(model: nn.Module | ModuleTree) -> Iterator[None]:
    """Give forward passes within this context the effect of `model.eval()`; restore each module's mode afterwards."""
    modules = (model if isinstance(model, ModuleTree) else ModuleTree(model)).derived(_with_modes)
    # Set in __dict__ because nn.Module.__setattr__ is slow: it checks for parameters and modules.
    states = [module.__dict__ for module in modules if module.training]
    for state in states:
        state["training"] = False
    try:
        yield
    finally:
        for state in states:
            state["training"] = True


def _with_modes(modules: list[nn.Module]) -> list[nn.Module]:
    """Return the modules whose forward may depend on the training mode, except bitsandbytes' 8-bit layers.

    In evaluation mode, bitsandbytes may use another kernel for 8-bit weights. The reference must use the same kernel as
    the policy, so the mode of these layers is not changed.
    """
    depends = [module for module in modules if type(module) not in _MODELESS or "forward" in vars(module)]
    return [module for module in depends if not any(cls.__name__ == "Linear8bitLt" for cls in _of_bitsandbytes(module))]


def _of_bitsandbytes(module: nn.Module) -> list[type]:
    return [cls for cls in type(module).__mro__ if cls.__module__.startswith("bitsandbytes.")]


@contextmanager
def training_mode(tree: ModuleTree) -> Iterator[None]:
    """Put the model into training mode within this context; restore each module's mode afterwards."""
    states = [module.__dict__ for module in tree if not module.training]
    tree.model.train()
    try:
        yield
    finally:
        for state in states:
            state["training"] = False


@contextmanager
def light_train(tree: ModuleTree) -> Iterator[None]:
    """Make `model.train()` return at once within this context if every module is already in training mode.

    If any module overrides `train`, `model.train()` always runs.
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
    """Disable the adapters of a `PeftModel` within this context.

    Unlike `model.disable_adapter()`, this context does not change `requires_grad` of the adapters' tensors, so use it
    under `torch.no_grad()`.
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
    """Return the adapter layers of a `PeftModel`; `None` if disabling adapters needs more than a flag in each layer."""
    layers = [module for module in modules if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    is_plain = _switched_by_layer(modules[0]) and all(type(layer).enable_adapters in _SWITCHES for layer in layers)
    return layers if is_plain else None


@contextmanager
def adapter_on(tree: ModuleTree, name: str) -> Iterator[None]:
    """Activate only the named adapter of a `PeftModel` with LoRA adapters within this context.

    Unlike `model.set_adapter(name)`, this context does not change `requires_grad` of the adapters' tensors, so use it
    under `torch.no_grad()`. `is_set_by_layer(tree)` must be True.
    """
    layers = tree.derived(_set_layers) or []
    before = [(layer.__dict__, layer._active_adapter, layer._disable_adapters) for layer in layers]
    for layer in layers:
        # If the adapter has no copy of a module that PEFT wraps, the base model's module is used.
        is_off = isinstance(layer, AuxiliaryTrainingWrapper) and name not in layer._get_available_adapters()
        layer.__dict__.update(_active_adapter=[name], _disable_adapters=is_off)
    try:
        yield
    finally:
        for state, active, disabled in before:
            state.update(_active_adapter=active, _disable_adapters=disabled)


def is_set_by_layer(tree: ModuleTree) -> bool:
    """Return True if activating an adapter of a `PeftModel` only changes flags in its adapter layers."""
    configs = cast(PeftModel, tree.model).peft_config.values()
    are_plain = all(
        config.peft_type == PeftType.LORA and not getattr(config, "alora_invocation_tokens", None) for config in configs
    )
    return are_plain and tree.derived(_set_layers) is not None


def _set_layers(modules: list[nn.Module]) -> list[Any] | None:
    """Return the adapter layers; `None` if activating an adapter needs more than flags, such as undoing a merge."""
    layers = _switched_layers(modules) or []
    is_plain = all(type(layer).set_adapter in _SETTERS and not getattr(layer, "merged", False) for layer in layers)
    return layers if layers and is_plain else None


def is_switched_by_layer(tree: ModuleTree) -> bool:
    """Return True if disabling the adapters of a `PeftModel` only changes flags in its adapter layers."""
    return tree.derived(_switched_layers) is not None


@contextmanager
def adapter_casts_off(tree: ModuleTree, autocast: bool) -> Iterator[None]:
    """Stop LoRA from casting its inputs within this context if autocast casts the inputs anyway.

    The results are bitwise equal. PEFT casts the input of each adapter to the adapter's dtype, fp32, and keeps the
    result for the backward pass; autocast then casts the input back. Use the context around forward and backward pass,
    because checkpointing runs parts of the forward pass in the backward pass. Other adapters keep their casts: DoRA,
    for example, computes the norms of weights in the dtype of its input.
    """
    layers = tree.derived(_plain_lora_layers) if autocast else []
    states = [layer.__dict__ for layer in layers if getattr(layer, "cast_input_dtype_enabled", False)]
    for state in states:
        state["cast_input_dtype_enabled"] = False
    try:
        yield
    finally:
        for state in states:
            state["cast_input_dtype_enabled"] = True


def _plain_lora_layers(modules: list[nn.Module]) -> list[LoraLayer]:
    """Return the LoRA layers without a variant. Their adapters are two linear modules, whose inputs autocast casts."""
    return [module for module in modules if isinstance(module, LoraLayer) and not module.lora_variant]


def _switched_by_layer(model: nn.Module) -> bool:
    """Return True if PEFT disables the adapters of this model layer by layer, without replacing forwards or modules."""
    tuner = type(model.base_model)
    return issubclass(tuner, BaseTuner) and tuner.disable_adapter_layers is BaseTuner.disable_adapter_layers
