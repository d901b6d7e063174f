"""Two processes under an engine get the same losses, weights and evaluation as one process with the same global batch.

Everything is in fp32, and only the order of sums differs. A loss is computed from log-probs of about
50 nats, with a unit in the last place of 4e-6, times β = 0.1 (SimPO's log-probs are per token): 1e-5
is more than ten such units. Weights of about 1 have a unit in the last place of 1.2e-7, and the
largest change is 1e-2: 1e-4 of that is eight units. If the row that accelerate's data loader repeats
to fill the last batch were counted, weights would change by 13 % of the largest change or more.
"""

import functools
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.distributed.cases import ALL_OF, CASES, IN_SUITE
from tests.distributed.engines import ENGINES
from tests.distributed.launch import differences, largest_difference, launch, one_process
from tests.tiny_models import tiny_model
from tests.trainers import make_trainer

TOLERANCE = {"losses": 1e-5, "weights": 1e-4, "metrics": 1e-5}
CAN_RESUME_DDP = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.18"),
    reason="needs transformers 5.18: earlier versions cannot load the optimizer state in several CPU processes",
)


@pytest.fixture(scope="module")
def outcomes_of(request, tmp_path_factory):
    """Return the outcomes of a case. Two processes are started once for all requested engines, and once for those of
    DeepSpeed, which leave settings behind that exclude FSDP. The nightly cases start them again.
    """
    items = [item for item in request.session.items if item.module is request.module]
    wanted = [engine for engine in ENGINES if any(item.callspec.params["engine"] == engine for item in items)]

    @functools.cache
    def launched(is_deepspeed, in_suite):
        engines = [engine for engine in wanted if ENGINES[engine].is_deepspeed is is_deepspeed]
        pairs = [(engine, case) for engine in engines for case in ALL_OF[engine]]
        runs = [(engine, case) for engine, case in pairs if (case in IN_SUITE[engine]) is in_suite]
        return launch(runs, tmp_path_factory.mktemp("engines"))

    return lambda engine, case: launched(ENGINES[engine].is_deepspeed, case in IN_SUITE[engine])[engine, case]


def each(engines, only=""):
    pairs = [
        pytest.param(
            engine,
            case,
            id=f"{engine}: {case}",
            marks=[
                *[CAN_RESUME_DDP] * (engine == "ddp" and CASES[case].resumes),
                *[pytest.mark.nightly] * (case not in IN_SUITE[engine]),
            ],
        )
        for engine in engines
        for case in ALL_OF[engine]
        if only in case
    ]
    return pytest.mark.parametrize(("engine", "case"), pairs)


@each(ENGINES)
def test_two_processes_do_what_one_does(outcomes_of, engine, case):
    """All ranks have the results of one process. A run that is resumed in its second
    epoch ends with the same weights.
    """
    expected = one_process(case)
    for outcome in outcomes_of(engine, case):
        assert "error" not in outcome, outcome["error"]
        found = differences(outcome, expected)
        assert outcome["lower_layers"] == expected["lower_layers"] == (2 if "upper layers" in case else 0)
        assert {name: value for name, value in found.items() if value > TOLERANCE[name]} == {}
        if CASES[case].resumes:
            assert largest_difference(outcome["resumed"], outcome["weights"]) <= 1e-6 * outcome["scale"]
    print(f"{engine}: {case}: {found}")


@each(ENGINES)
def test_what_was_saved_loads_without_the_engine(outcomes_of, engine, case):
    """transformers and PEFT load the saved model without the engine, with the trained weights, bit for bit."""
    outcome = outcomes_of(engine, case)[0]
    if CASES[case].lora:
        base = tiny_model(**CASES[case].model)
        loaded = PeftModel.from_pretrained(base, outcome["saved"], is_trainable=True)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(outcome["saved"])
    weights = dict(loaded.named_parameters())
    assert all(torch.equal(weights[name].detach(), value) for name, value in outcome["weights"].items())


@each(["zero3", "fsdp2"])
def test_every_parameter_is_sharded(outcomes_of, engine, case):
    """After a step, no rank has a full parameter."""
    assert [outcome["whole_parameters"] for outcome in outcomes_of(engine, case)] == [[], []]


@each(["zero3"])
def test_the_heads_weight_is_whole_only_inside_the_head(outcomes_of, engine, case):
    """In policy and reference, with and without gradients, the weight is sharded
    while the last layer runs and after the head.

    Below an adapter, or in a head of several layers, the head is called once more in
    the backward pass, and then stays gathered for its own gradient.
    """
    after = {False, True} if "adapted head" in case or "LoRA, own logits" in case else {False}
    expected = {"before": {False}, "inside": {True}, "after": after}
    assert [outcome["head_is_whole"] for outcome in outcomes_of(engine, case)] == [expected, expected]


@pytest.mark.parametrize("engine", ENGINES)
def test_ktos_baseline_is_above_zero(outcomes_of, engine):
    """KTO's baseline is above 0 in every step and in the evaluation of every case.

    If z = max(0, mean) were 0, the comparison of engines would not test the baselines.
    """
    baselines = {case: outcomes_of(engine, case)[0]["baselines"] for case in IN_SUITE[engine] if case[:4] == "kto,"}
    assert all(len(found) >= 3 and min(found) > 0 for found in baselines.values()), baselines


@pytest.mark.parametrize("engine", [pytest.param("ddp", marks=CAN_RESUME_DDP), "zero2", "zero3", "fsdp2"])
def test_a_moved_reference_goes_on_with_another_number_of_ranks(outcomes_of, engine, tmp_path):
    """The checkpoint of two ranks has full tensors: one process can resume from it,
    and it equals that of one process.
    """
    case = "dpo, shared, full, moving reference, resumed"
    expected = one_process(case)
    trainer = make_trainer(tmp_path, CASES[case].build_model(), train_dataset=None, **CASES[case].merged_settings(1))
    tolerance = TOLERANCE["weights"] * expected["scale"]
    assert largest_difference(trainer.reference.copies.tensors, expected["moved"]) > 1000 * tolerance
    trainer.scorer.load(Path(outcomes_of(engine, case)[0]["checkpoint"]))
    assert largest_difference(trainer.reference.copies.tensors, expected["moved"]) <= tolerance


@each(ENGINES, only="full, token budget")
def test_a_token_budget_cuts_ranks_batches_unequally(outcomes_of, engine, case):
    """Therefore the comparison above includes ranks that add pieces without examples."""
    first, second = (outcome["pieces"] for outcome in outcomes_of(engine, case))
    assert len(first) == len(second) and first != second
