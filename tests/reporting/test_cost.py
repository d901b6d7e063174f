"""The cost of the metrics that every loss has, as counts of operators and elements in a step, not as times."""

from torch.utils._python_dispatch import TorchDispatchMode

from hf_prefopt.reporting import observed
from tests.tiny_models import tiny_model, with_lora
from tests.trainers import make_trainer, pairs

# The size of the demo's model.
LAYERS = 30


class Operators(TorchDispatchMode):
    """A mode that counts operators and the elements of their results."""

    def __init__(self):
        super().__init__()
        self.calls, self.numbers = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        self.calls += 1
        self.numbers += sum(
            t.numel() for t in (found if isinstance(found, tuple | list) else [found]) if hasattr(t, "numel")
        )
        return found


def counts(folder, monkeypatch, layers):
    """Return (operators of a training step with its reference, operators of the
    metrics, elements that these compute).
    """
    own = Operators()

    def watched(*args):
        with own:
            return observe(*args)

    observe = observed.observe
    monkeypatch.setattr("hf_prefopt.trainer.observe", watched)
    options = {"max_steps": 1, "logging_steps": 50, "per_device_train_batch_size": 8, "reference": "adapter_off"}
    trainer = make_trainer(folder, with_lora(tiny_model(num_hidden_layers=layers)), train_dataset=pairs(8), **options)
    trainer.scorer.settle()
    with Operators() as everything:
        trainer.train()
    monkeypatch.setattr("hf_prefopt.trainer.observe", observe)
    return everything.calls, own.calls, own.numbers


def test_less_than_one_operator_in_a_hundred_is_for_the_metrics(tmp_path, monkeypatch):
    """The operators of a step grow with the number of layers, and those of the metrics do not."""
    (two, own, numbers), (four, same, _) = (counts(tmp_path, monkeypatch, layers) for layers in (2, 4))
    assert own == same > 0
    assert own < 0.01 * (two + (LAYERS - 2) * (four - two) / 2)
    # Elements per scored token: a layer of the demo's model computes more than 10 · 576 for each token.
    tokens = sum(len(ids) for row in pairs(8) for ids in row["response_ids"])
    assert numbers < 30 * tokens
