"""In a micro-batch, the host does not traverse the model, wait for the device, or count parameters again.

The tests count calls; `benchmarks/host_time.py` measures times.
"""

import sys
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from accelerate.utils import is_compiled_module
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainerCallback

from hf_prefopt.reference import live
from hf_prefopt.scoring.forward import score
from hf_prefopt.training import scorer
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import logged, make_trainer, pairs

WALKS = ("named_modules", "named_parameters", "parameters", "modules", "children", "_named_members")
aten = torch.ops.aten
# Methods and operators that read a tensor's values, which a GPU must compute first, such as `item`, `bool`, `int`,
# `float`.
WAITS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    aten._unique2.default,
}
READS = ("tolist", "numpy", "cpu")


@contextmanager
def counted(owner: type, names: tuple[str, ...], calls: Counter):
    """Count the calls of these methods, by method and by calling function."""
    with mock.patch.multiple(owner, **{name: counting(owner, name, calls) for name in names}):
        yield


def counting(owner, name, calls):
    function = getattr(owner, name)

    def method(self, *args, **kwargs):
        calls[name, sys._getframe(1).f_code.co_name] += 1
        return function(self, *args, **kwargs)

    return method


class Waits(TorchDispatchMode):
    """A mode that counts operators that wait for a device, by operator and by the calling function outside torch."""

    def __init__(self, calls: Counter):
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = function is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if function in WAITS or masks:
            frame = sys._getframe(1)
            while "/torch/" in frame.f_code.co_filename:
                frame = frame.f_back
            self.calls[str(function), f"{Path(frame.f_code.co_filename).name}:{frame.f_code.co_name}"] += 1
        return function(*args, **(kwargs or {}))


class MicroBatches(TrainerCallback):
    """A callback that keeps the counts up to the end of each micro-batch that is not the last one of its step."""

    def __init__(self, calls: Counter):
        self.calls, self.seen = calls, []

    def on_substep_end(self, *_, **__):
        self.seen.append(dict(self.calls))
        self.calls.clear()


def counts_of_micro_batches(folder, count: Callable[[Counter], AbstractContextManager], **settings) -> list[dict]:
    """Return the counts of the second and third of four micro-batches, in each of two steps without a log."""
    model = perturbed(with_lora(tiny_model(num_hidden_layers=3)), scale=0.1)
    calls: Counter = Counter()
    options = {"gradient_accumulation_steps": 4, "max_steps": 2, "logging_steps": 50, "train_dataset": pairs(16)}
    watch = MicroBatches(calls)
    trainer = make_trainer(folder, model, callbacks=[watch], **options, **settings)
    with count(calls):
        trainer.train()
    return watch.seen[1:3] + watch.seen[4:6]


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_no_micro_batch_walks_the_model(tmp_path, layout):
    walks = partial(counted, nn.Module, WALKS)
    assert counts_of_micro_batches(tmp_path, walks, layout=layout, reference="adapter_off") == [{}] * 4


def test_offloading_does_not_walk_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr("hf_prefopt.training.activations._check_offloading", lambda _: None)
    walks = partial(counted, nn.Module, WALKS)
    assert counts_of_micro_batches(tmp_path, walks, activation_offloading=True) == [{}] * 4


@pytest.mark.parametrize("loss", ["dpo", "simpo", "orpo"])
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_no_micro_batch_waits_for_the_device(tmp_path, layout, loss):
    """No wait occurs from the forward to the recording of metrics, except if transformers' masks check for padding."""

    @contextmanager
    def count(calls):
        with counted(torch.Tensor, READS, calls), Waits(calls):
            yield

    reference = {"reference": "adapter_off"} if loss == "dpo" else {}
    counts = counts_of_micro_batches(tmp_path, count, layout=layout, loss_type=loss, **reference)
    assert [{call: n for call, n in found.items() if "masking_utils" not in call[1]} for found in counts] == [{}] * 4
    assert layout == "padded" or counts == [{}] * 4


def test_parameters_are_counted_once(tmp_path, monkeypatch):
    """The count is that of the Trainer, and a changed model is counted again."""
    model = with_lora(tiny_model())
    trainer, counts = make_trainer(tmp_path, model), Counter()
    causal_lm = type(model.get_base_model())
    monkeypatch.setattr(causal_lm, "num_parameters", counting(causal_lm, "num_parameters", counts))
    batch = next(iter(trainer.get_train_dataloader()))
    for name in ("second", "third"):
        expected = super(type(trainer), trainer).floating_point_ops(batch)
        counts.clear()
        assert trainer.floating_point_ops(batch) == trainer.floating_point_ops(batch) == expected > 0
        assert counts.total() == 1
        model.add_adapter(name, model.peft_config["default"])


@pytest.mark.parametrize("non_blocking", [True, False])
def test_a_batch_is_moved_as_accelerate_is_told(tmp_path, non_blocking):
    trainer = make_trainer(tmp_path, accelerator_config={"non_blocking": non_blocking}, dataloader_pin_memory=True)
    tensor = torch.ones(2)
    with mock.patch.object(torch.Tensor, "to", return_value=tensor) as to:
        assert trainer._prepare_inputs({"pieces": [{"input_ids": tensor, "longest_response": 3}]})
    to.assert_called_once_with(trainer.accelerator.device, non_blocking=non_blocking)


@pytest.mark.nightly
def test_reference_and_collection_are_compiled_too(tmp_path, monkeypatch):
    """The compiled module is called, and the losses are those of a model that is not compiled.

    AOT compares examples, so the inputs of the whole step are collected first.
    """
    called: list[tuple[bool, bool]] = []

    def watched(model, *args, **asked):
        called.append((is_compiled_module(model), torch.is_grad_enabled()))
        return score(model, *args, **asked)

    def losses(**settings):
        model = perturbed(with_lora(tiny_model(num_hidden_layers=1)), scale=0.1)
        settings |= {"gradient_accumulation_steps": 2, "max_steps": 1, "train_dataset": pairs(4), "loss_type": "aot"}
        trainer = make_trainer(tmp_path, model, reference="adapter_off", layout="padded", **settings)
        trainer.scorer.settle()
        called.clear()
        torch._dynamo.reset()
        trainer.train()
        return logged(trainer, "loss")

    monkeypatch.setattr(live, "score", watched)
    monkeypatch.setattr(scorer, "score", watched)
    expected = losses()
    assert set(called) == {(False, True), (False, False)}
    found = losses(torch_compile=True, torch_compile_backend="eager")
    torch._dynamo.reset()
    assert set(called) == {(True, True), (True, False)}
    assert found == pytest.approx(expected, rel=1e-5)
