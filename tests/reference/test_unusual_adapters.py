"""Adapters that use several tokens, need other inputs, or change the base model: right results, or an error."""

from types import SimpleNamespace

import peft
import pytest
import torch
from accelerate.utils import DistributedType
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from hf_prefopt.scoring.modes import ModuleTree
from hf_prefopt.training.acting import acting_adapter
from hf_prefopt.training.engines import check_adapter
from tests.reference.test_adapters import mean_chosen_logp
from tests.tiny_models import perturbed, random_rows, tiny_model, with_lora
from tests.trainers import make_trainer, pairs

ATTENTION = {"target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
INVOCATION = [5, 6]
FSDP, ALONE = (SimpleNamespace(distributed_type=kind) for kind in (DistributedType.FSDP, DistributedType.NO))
ZERO2, ZERO3 = (
    SimpleNamespace(
        distributed_type=DistributedType.DEEPSPEED,
        state=SimpleNamespace(deepspeed_plugin=SimpleNamespace(zero_stage=stage)),
    )
    for stage in (2, 3)
)


def test_an_adapter_that_begins_at_invocation_tokens_is_scored_as_the_plain_model_scores_it(tmp_path):
    """aLoRA searches for the last invocation tokens of a row; in the layout "shared", a row has several sequences.

    Rounding: for sums of about 10 log-probs of about 5 nats in float32, 1e-4 is 20 roundings of one.
    """
    config = LoraConfig(r=4, alora_invocation_tokens=INVOCATION, **ATTENTION)
    model = perturbed(get_peft_model(tiny_model(), config), 0.5, seed=3)
    rows = [{**row, "prompt_ids": [*row["prompt_ids"], *INVOCATION, 7]} for row in random_rows(4, longest=10)]
    expected = mean_chosen_logp(model, rows)
    assert abs(mean_chosen_logp(tiny_model(), rows) - expected) > 0.1
    trainer = make_trainer(tmp_path, model, eval_dataset=Dataset.from_list(rows))
    metrics = trainer.evaluate()
    assert metrics["eval_logps/chosen"] == pytest.approx(expected, abs=1e-4)
    assert trainer.layout == "padded"


def test_a_fresh_adapter_that_looks_ahead_is_refused(tmp_path):
    """Lily's routers use the mean over a sequence. A new adapter has no effect, so
    this is only visible after training.
    """
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), peft.LilyConfig(r=4, **ATTENTION))
    with pytest.raises(ValueError, match="LlamaForCausalLM under LILY is not causal"):
        make_trainer(tmp_path, model, train_dataset=pairs(4)).train()


def test_the_noise_of_the_trial_is_gone_after_it():
    """The weights are restored bit for bit; plain LoRA is not tested with noise."""
    unusual = get_peft_model(tiny_model(), peft.IA3Config(task_type="CAUSAL_LM"))
    for model, is_tried in ((unusual, True), (with_lora(tiny_model()), False)):
        before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
        with acting_adapter(ModuleTree(model)):
            now = dict(model.named_parameters())
            assert all(torch.equal(now[name], values) != is_tried for name, values in before.items())
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)


@pytest.mark.parametrize(
    ("config", "settings"),
    [
        (peft.PolyConfig, {"r": 4, "n_tasks": 2, **ATTENTION}),
        (peft.MultitaskPromptTuningConfig, {"num_virtual_tokens": 4, "num_tasks": 2, "task_type": "CAUSAL_LM"}),
    ],
    ids=["Poly", "multitask prompt tuning"],
)
def test_an_adapter_that_wants_a_task_is_an_error_that_names_it(config, settings, tmp_path):
    model = get_peft_model(tiny_model(), config(**settings))
    with pytest.raises(
        ValueError, match=r"under (POLY|MULTITASK_PROMPT_TUNING) cannot run with only token ids.*task_ids"
    ):
        make_trainer(tmp_path, model, train_dataset=pairs(4)).train()


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora"])
@pytest.mark.parametrize("setting", ["adapter_off", "adapter:first"])
def test_a_base_that_an_adapter_has_changed_is_no_reference(init, setting, tmp_path):
    """Without its adapter, the model is what the initialization has left of the base model."""
    model = with_lora(tiny_model(), init_lora_weights=init)
    left, whole = (m.model.layers[0].mlp.up_proj.weight for m in (model.get_base_model(), tiny_model()))
    assert (left - whole).abs().max() > 0.1
    model.add_adapter("first", LoraConfig(r=4, **ATTENTION))
    with pytest.raises(ValueError, match=f"init_lora_weights='{init}'.* use reference='copy'"):
        make_trainer(tmp_path, model, reference=setting)


@pytest.mark.parametrize("init", [True, "gaussian", "orthogonal"])
def test_a_base_that_stays_as_it_was_is_one(init, tmp_path):
    """Without the adapter, the model is the pretrained model, up to the rounding above."""
    rows = random_rows(4, longest=10)
    model = perturbed(with_lora(tiny_model(), init_lora_weights=init), 0.1)
    trainer = make_trainer(tmp_path, model, reference="adapter_off", eval_dataset=pairs(4))
    metrics = trainer.evaluate()
    expected = 0.1 * (mean_chosen_logp(model, rows) - mean_chosen_logp(tiny_model(), rows))
    assert abs(expected) > 1e-3
    assert metrics["eval_rewards/chosen"] == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_soft_prompts_are_an_error_where_weights_are_sharded(config):
    model = get_peft_model(tiny_model(), config(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    for accelerator, name in ((FSDP, "FSDP2"), (ZERO3, "ZeRO-3")):
        with pytest.raises(ValueError, match=rf"{name} cannot save soft prompts \(.*_TUNING\): use DDP or ZeRO-2"):
            check_adapter(accelerator, model)
        check_adapter(accelerator, with_lora(tiny_model()))
    for accelerator in (ALONE, ZERO2):
        check_adapter(accelerator, model)


@pytest.mark.parametrize(
    ("config", "settings"),
    [(peft.VeraConfig, {"r": 4}), (peft.RandLoraConfig, {"r": 4})],
    ids=["VeRA", "RandLoRA"],
)
def test_buffers_that_layers_share_are_an_error_under_fsdp2(config, settings):
    """Without this error, PyTorch's set_model_state_dict would raise a KeyError when the run is resumed."""
    model = get_peft_model(tiny_model(), config(target_modules=["q_proj"], task_type="CAUSAL_LM", **settings))
    with pytest.raises(ValueError, match=r"FSDP2 cannot load checkpoints of this adapter \((VERA|RANDLORA)\)"):
        check_adapter(FSDP, model)
    for accelerator in (ALONE, ZERO3):
        check_adapter(accelerator, model)
