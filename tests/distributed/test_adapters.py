"""PEFT methods other than LoRA under each engine: the results equal those of one process, or an error says what to do.

The tolerances are those of `test_habits` in fp32: 1e-5 for a loss, and 1e-4 of the largest change of a weight for a
weight. A log-prob of a response is a sum of ten terms of 8 nats: 1e-4 is twenty roundings of this sum.
"""

import functools

import pytest
import torch
from peft import PeftModel

from tests.distributed import adapters
from tests.distributed.adapters import ALL_BIASES, ROWS, scene, scene_name
from tests.distributed.engines import Engine
from tests.distributed.habits import Place
from tests.distributed.scenes import play
from tests.distributed.test_habits import apart

ENGINES = ("fsdp2", "ddp", "zero2", "zero3")  # DeepSpeed leaves settings that exclude FSDP, so FSDP2 comes first
KINDS = [
    *(
        (kind, "auto")
        for kind in (
            "DoRA",
            "IA3",
            "VeRA",
            "trained tokens",
            "LoRA with trained tokens",
            "LoRA with modules_to_save",
            ALL_BIASES,
            "prompt tuning",
            "prefix tuning",
        )
    ),
    *((kind, "adapter_off") for kind in ("DoRA", "IA3", "VeRA", "trained tokens", "LoRA with modules_to_save")),
]
REFUSED = {("zero3", kind): "ZeRO-3 cannot save soft prompts" for kind in ("prompt tuning", "prefix tuning")}
# The tests enable FSDP2 after construction, so its errors do not occur here: see reference/test_unusual_adapters.py.
NOT_UNDER_FSDP2 = ("VeRA", "prompt tuning", "prefix tuning")
CELLS = [(engine, *run) for engine in ENGINES for run in KINDS if engine != "fsdp2" or run[0] not in NOT_UNDER_FSDP2]

pytestmark = pytest.mark.nightly


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """Return the outcomes of the runs; two processes are started once for all of them."""
    params = [item.callspec.params for item in request.session.items if item.module is request.module]
    scenes = [scene(p["engine"], p["kind"], p["reference"]) for p in params]
    return play(scenes, tmp_path_factory.mktemp("adapters"), timeout=3600)


@functools.cache
def one_process(kind, reference, folder):
    """Return the outcome of a run in one process."""
    return adapters.run(Place(Engine(), False, folder / kind / reference), kind, reference)


@functools.cache
def start(kind):
    """Return the trained weights before the run."""
    return {name: p.detach().clone() for name, p in adapters.adapted(kind).named_parameters() if p.requires_grad}


@functools.cache
def plain_logps(kind, reference):
    """Return the log-probs of `ROWS` under the unchanged reference, one sequence at a time."""
    model = (adapters.base(kind) if reference == "adapter_off" else adapters.adapted(kind)).eval()
    found = []
    for row in ROWS:
        for response in row["response_ids"]:
            ids = torch.tensor([[*row["prompt_ids"], *response]])
            with torch.no_grad():
                logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(response) - 1 : -1]
            found.append(logits.log_softmax(-1).gather(1, ids[0, -len(response) :, None]).sum())
    return torch.stack(found)


@pytest.mark.parametrize(("engine", "kind", "reference"), CELLS)
def test_an_adapter_trains_is_saved_and_is_resumed_as_in_one_process(
    outcomes, tmp_path_factory, engine, kind, reference
):
    ranks = outcomes[scene_name(engine, kind, reference)]
    if (engine, kind) in REFUSED:
        assert all(f"ValueError: {REFUSED[engine, kind]}" in error for error in ranks)
        return
    expected = one_process(kind, reference, tmp_path_factory.getbasetemp())
    scale = apart_weights(expected["weights"], start(kind))
    assert scale > 1e-3
    for outcome in ranks:
        assert isinstance(outcome, dict), outcome
        found = {
            "losses": (apart(outcome["losses"], expected["losses"]), 1e-5),
            "evaluation": (abs(outcome["metrics"][-1]["eval_loss"] - expected["metrics"][-1]["eval_loss"]), 1e-5),
            "weights": (apart_weights(outcome["weights"], expected["weights"]) / scale, 1e-4),
            "resumed": (apart_weights(outcome["resumed"], outcome["weights"]) / scale, 1e-6),
            "reference": ((outcome["reference"] - plain_logps(kind, reference)).abs().max().item(), 1e-4),
            "saved": (apart_weights(loaded(kind, outcome["saved"]), outcome["weights"]), 0.0),
        }
        print(engine, kind, reference, {name: f"{value:.0e}" for name, (value, _) in found.items()})
        assert {name: value for name, (value, bound) in found.items() if not value <= bound} == {}


def loaded(kind, folder):
    """Return the weights that PEFT loads on the base model."""
    model = PeftModel.from_pretrained(adapters.base(kind), folder)
    return dict(model.named_parameters())


def apart_weights(found, expected):
    """Return the largest difference of any expected weight."""
    return max((found[name] - values).abs().max().item() for name, values in expected.items())
