"""What is stored for the backward pass does not change any bit of a gradient, in any
layout; counts show the savings.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from hf_prefopt.training.activations import ATTENTION, OffloadedActivations, keep_attention
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import logged, make_config, make_trainer, pairs, weights

LAYERS = 3
LAYOUTS = ("shared", "around", "padded")
CHECKPOINTED = {"gradient_checkpointing": True}


def trainer_of(folder, model=None, **settings):
    model = perturbed(with_lora(tiny_model(num_hidden_layers=LAYERS)), 0.1) if model is None else model
    data = {"train_dataset": pairs(4), "reference": "adapter_off", "max_steps": 1, "learning_rate": 1e-2}
    return make_trainer(folder, model, **{**data, **settings})


class Attention(TorchDispatchMode):
    """A mode that counts attention's forward operators."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.runs += function._schema.name in ATTENTION
        return function(*args, **(kwargs or {}))


def outcome(trainer):
    """Return losses, gradient norms, weights, the number of attention calls, and FLOPs."""
    with FlopCounterMode(display=False) as flops, Attention() as attention:
        trainer.train()
    figures = [logged(trainer, name) for name in ("loss", "grad_norm")]
    return figures, weights(trainer.model), attention.runs, flops


def same_bits(one, other):
    return one[0] == other[0] and all(torch.equal(values, other[1][name]) for name, values in one[1].items())


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Return the results without checkpointing, by layout."""
    folder = tmp_path_factory.mktemp("plain")
    return {layout: outcome(trainer_of(folder, layout=layout)) for layout in LAYOUTS}


def recomputed(layout):
    """Return the attention calls that full checkpointing adds: one per segment, or one per padded batch."""
    return LAYERS * (4 if layout == "shared" else 1)


def products(one):
    return {str(name): count for name, count in one[3].get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_attention_that_is_kept_is_not_computed_again(layout, plain, tmp_path):
    """Matrix products are recomputed as with full checkpointing. (PyTorch does not
    count FLOPs of attention on a CPU.)
    """
    full = outcome(trainer_of(tmp_path, layout=layout, **CHECKPOINTED))
    kept = outcome(trainer_of(tmp_path, layout=layout, checkpointing_keeps="attention", **CHECKPOINTED))
    assert same_bits(full, plain[layout]) and same_bits(kept, plain[layout])
    assert full[2] == plain[layout][2] + recomputed(layout)
    assert kept[2] == plain[layout][2]
    assert products(kept) == products(full) != products(plain[layout])


@pytest.mark.skipif(
    not hasattr(PreTrainedModel, "activation_checkpointing_enable"), reason="needs transformers with every_n_layers"
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keeps", ["nothing", "attention"])
def test_every_other_layer(keeps, layout, plain, tmp_path):
    """With transformers' `every_n_layers`, the first and third of three layers are recomputed."""
    chosen = {"gradient_checkpointing_kwargs": {"every_n_layers": 2}, "checkpointing_keeps": keeps, **CHECKPOINTED}
    found = outcome(trainer_of(tmp_path, layout=layout, **chosen))
    assert same_bits(found, plain[layout])
    assert found[2] == plain[layout][2] + (0 if keeps == "attention" else recomputed(layout) * 2 // LAYERS)


def test_attention_with_dropout_is_computed_again(tmp_path):
    """The adapter's dropout draws after attention: if attention did not draw again,
    the adapter would draw other numbers.
    """

    def model():
        return perturbed(with_lora(tiny_model(attention_dropout=0.5), lora_dropout=0.5), 0.1)

    settings = {"disable_dropout": False, **CHECKPOINTED}
    full = outcome(trainer_of(tmp_path, model(), **settings))
    kept = outcome(trainer_of(tmp_path, model(), checkpointing_keeps="attention", **settings))
    assert same_bits(full, kept)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "checkpointing_keeps='attention' is only used with gradient_checkpointing=True"),
        ({"gradient_checkpointing_kwargs": {"use_reentrant": True}, **CHECKPOINTED}, "use_reentrant=False"),
        ({"torch_compile": True, **CHECKPOINTED}, "torch_compile=True fuses operators"),
        ({"gradient_checkpointing_kwargs": {"context_fn": print}, **CHECKPOINTED}, "context_fn, which gradient_chec"),
    ],
)
def test_what_it_cannot_go_with_is_an_error(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, checkpointing_keeps="attention", **settings)


def test_other_attention_is_an_error(tmp_path):
    model = tiny_model(attn_implementation="eager")
    with pytest.raises(ValueError, match=r"needs attn_implementation='sdpa' or 'flash_attention_2', .* has 'eager'"):
        trainer_of(tmp_path, model, reference="auto", checkpointing_keeps="attention", **CHECKPOINTED)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "checkpointing",
    [{}, CHECKPOINTED, {"checkpointing_keeps": "attention", **CHECKPOINTED}],
    ids=["plain", "checkpointed", "attention kept"],
)
def test_offloaded_activations_give_the_same_gradients(checkpointing, layout, plain, tmp_path, monkeypatch):
    """All saved tensors are moved, except for parameters and their views, which are saved, too."""
    moved, stayed = [], []

    def watched(is_on, tree, device):
        context = OffloadedActivations(tree.model.parameters(), device, least_bytes=0)
        storages = {p.untyped_storage().data_ptr() for p in tree.model.parameters()}
        pack = context.pack_hook

        def watch(tensor):
            packed = pack(tensor)
            (moved if isinstance(packed, tuple) else stayed).append(tensor.untyped_storage().data_ptr() in storages)
            return packed

        context.pack_hook = watch
        return context

    monkeypatch.setattr("hf_prefopt.trainer.offloaded", watched)
    found = outcome(trainer_of(tmp_path, layout=layout, **checkpointing))
    assert same_bits(found, plain[layout])
    assert moved and not any(moved)
    assert stayed and all(stayed)


def test_small_tensors_stay():
    context = OffloadedActivations([], torch.device("cpu"), least_bytes=1024)
    assert isinstance(context.pack_hook(torch.ones(255)), torch.Tensor)
    assert isinstance(context.pack_hook(torch.ones(256)), tuple)


@pytest.mark.parametrize("made", [torch.Tensor.t, lambda tensor: tensor[:, 1:], lambda tensor: tensor.view(2, 4, 8).mT])
def test_a_tensor_comes_back_with_its_strides(made):
    """Compiled backward passes refuse others. Memory between the rows of a slice is left out, as in `empty_like`."""
    tensor = made(torch.randn(8, 8))
    context = OffloadedActivations([], torch.device("cpu"), least_bytes=0)
    packed = context.pack_hook(tensor)
    found = context.unpack_hook(packed)
    assert torch.equal(found, tensor) and found.stride() == torch.empty_like(tensor).stride()
    assert packed[1].data_ptr() != tensor.data_ptr()


def test_devices_are_compared_by_their_types():
    """A device without an index is the current one."""
    context = OffloadedActivations([], torch.device("cpu", 0), least_bytes=0)
    assert isinstance(context.pack_hook(torch.ones(4)), tuple)
    assert isinstance(context.pack_hook(torch.ones(4, device="meta")), torch.Tensor)


def test_offloading_on_a_cpu_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="activation_offloading=True has no effect on a CPU"):
        trainer_of(tmp_path, activation_offloading=True)


def test_checkpointed_layers_are_found(tmp_path):
    model = tiny_model(num_hidden_layers=LAYERS)
    assert keep_attention(model) == 0
