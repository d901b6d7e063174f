"""With fresh and trained adapters of all kinds, the reference is the policy as passed, so DPO's first loss is log 2."""

import math

import peft
import pytest
import torch
from peft import PeftType, get_peft_model

from hf_prefopt.reference.choose import is_fresh_adapter
from tests.quick import at_least
from tests.tiny_models import perturbed, random_rows, tiny_model, with_lora
from tests.trainers import logged, make_trainer, pairs

IN_THE_DATA = random_rows(4, longest=10)[0]["prompt_ids"]
ATTENTION = {"target_modules": ["q_proj", "v_proj"]}
SQUARE = {"target_modules": ["q_proj", "o_proj"]}
KINDS = {
    "LoRA": (peft.LoraConfig, {"r": 4, **ATTENTION}),
    "DoRA": (peft.LoraConfig, {"r": 4, "use_dora": True, **ATTENTION}),
    "rsLoRA": (peft.LoraConfig, {"r": 4, "use_rslora": True, **ATTENTION}),
    "OLoRA": (peft.LoraConfig, {"r": 4, "init_lora_weights": "olora", **ATTENTION}),
    "LoRA with a bias": (peft.LoraConfig, {"r": 4, "lora_bias": True, **ATTENTION}),
    "LoRA with modules_to_save": (peft.LoraConfig, {"r": 4, "modules_to_save": ["lm_head"], **ATTENTION}),
    "LoRA with trained tokens": (peft.LoraConfig, {"r": 4, "trainable_token_indices": IN_THE_DATA, **ATTENTION}),
    "IA3": (peft.IA3Config, {}),
    "AdaLoRA": (peft.AdaLoraConfig, {"init_r": 4, "target_r": 2, "total_step": 10, **ATTENTION}),
    "LoHa": (peft.LoHaConfig, {"r": 4, **ATTENTION}),
    "LoKr": (peft.LoKrConfig, {"r": 4, **ATTENTION}),
    "OFT": (peft.OFTConfig, {"r": 0, "oft_block_size": 4, **ATTENTION}),
    "BOFT": (peft.BOFTConfig, {"boft_block_size": 4, **ATTENTION}),
    "VeRA": (peft.VeraConfig, {"r": 4, **SQUARE}),
    "FourierFT": (peft.FourierFTConfig, {"n_frequency": 20, **ATTENTION}),
    "LN tuning": (peft.LNTuningConfig, {"target_modules": ["input_layernorm"]}),
    "trained tokens": (peft.TrainableTokensConfig, {"token_indices": IN_THE_DATA}),
    "HRA": (peft.HRAConfig, {"r": 4, **ATTENTION}),
    "VB-LoRA": (peft.VBLoRAConfig, {"r": 2, "num_vectors": 8, "vector_length": 4, "topk": 2, **ATTENTION}),
    "MiSS": (peft.MissConfig, {"r": 4, "target_modules": ["q_proj"]}),
    "RandLoRA": (peft.RandLoraConfig, {"r": 4, "target_modules": ["q_proj"]}),
    "RoAd": (peft.RoadConfig, {"group_size": 4, **SQUARE}),
    "SHiRA": (peft.ShiraConfig, {"r": 2, **ATTENTION}),
    "C3A": (peft.C3AConfig, {"block_size": 4, **ATTENTION}),
    "WaveFT": (peft.WaveFTConfig, {"n_frequency": 20, **ATTENTION}),
    "prompt tuning": (peft.PromptTuningConfig, {"num_virtual_tokens": 5}),
    "prefix tuning": (peft.PrefixTuningConfig, {"num_virtual_tokens": 5}),
    "projected prefix": (
        peft.PrefixTuningConfig,
        {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 16},
    ),
    "p-tuning": (peft.PromptEncoderConfig, {"num_virtual_tokens": 5, "encoder_hidden_size": 16}),
    "CPT": (peft.CPTConfig, {"cpt_token_ids": [5, 6, 7], "cpt_mask": [1, 1, 1], "cpt_tokens_type_mask": [1, 2, 2]}),
    "adaption prompts": (peft.AdaptionPromptConfig, {"adapter_len": 4, "adapter_layers": 1}),
}
SWITCHED_OFF = {"LoRA", "DoRA", "rsLoRA", "LoRA with a bias", "LoRA with modules_to_save"}


def adapted(kind, trained):
    config, settings = KINDS[kind]
    torch.manual_seed(0)
    model = get_peft_model(tiny_model(), config(task_type="CAUSAL_LM", **settings))
    return perturbed(model, scale=0.1, seed=5) if trained else model


def mean_chosen_logp(model, rows):
    """Return the mean log-prob, one sequence at a time, from `model(...).logits`;
    virtual tokens precede the sequence.
    """
    sums = []
    model.eval()
    for row in rows:
        prompt, chosen = row["prompt_ids"], row["response_ids"][0]
        ids = torch.tensor([[*prompt, *chosen]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -ids.shape[1] :]
        logps = logits[len(prompt) - 1 : -1].log_softmax(-1)
        sums.append(logps.gather(1, ids[0, len(prompt) :, None]).sum().item())
    return sum(sums) / len(sums)


@pytest.mark.parametrize("trained", at_least([True], [False, True]))
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_log_2_against_the_policy_as_given(kind, trained, tmp_path):
    """Policy and reference have the log-probs of the plain model, so rewards are 0;
    after a step, the reference still does.

    Log-probs of about 10 tokens of about 5 nats in float32: 1e-4 is 20 roundings of
    their sum. If the reference were another model, the difference would be at least
    0.1 where the adapter has an effect (the tests assert this for trained ones).
    """
    model = adapted(kind, trained)
    rows = random_rows(4, longest=10)
    expected = mean_chosen_logp(model, rows)
    data = {"train_dataset": pairs(4), "eval_dataset": pairs(4), "max_steps": 1, "learning_rate": 0.05}
    data["per_device_train_batch_size"] = 4
    trainer = make_trainer(tmp_path, model, **data)
    assert trainer.reference.description.startswith("the base" if kind in SWITCHED_OFF and not trained else "a frozen")
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert metrics["eval_logps/chosen"] == pytest.approx(expected, abs=1e-4)
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2), abs=1e-6)
    after = trainer.evaluate()
    # The reference has not changed: the reward is β times the change of the plain model.
    moved = mean_chosen_logp(trainer.model, rows) - expected
    assert after["eval_rewards/chosen"] == pytest.approx(0.1 * moved, abs=2e-5)
    assert after["eval_loss"] != metrics["eval_loss"]


def test_a_trained_adapter_acts():
    """The trained adapters of the test above change the model, for each kind;
    otherwise the test would prove nothing.
    """
    base = mean_chosen_logp(tiny_model(), random_rows(4, longest=10))
    silent = [
        kind
        for kind in KINDS
        if abs(mean_chosen_logp(adapted(kind, trained=True), random_rows(4, longest=10)) - base) < 1e-3
    ]
    assert silent == []


def test_magnitudes_alone_make_a_dora_adapter_trained():
    """B·A is still zero, but the output is not that of the base model."""
    model = with_lora(tiny_model(), use_dora=True)
    assert is_fresh_adapter(model)
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "magnitude" in name).mul_(1.1)
    assert not is_fresh_adapter(model)


def test_only_lora_is_ever_called_fresh():
    """A PEFT method that is not named LoRA is never called fresh, even a new one."""
    for kind in KINDS:
        model = adapted(kind, trained=False)
        assert is_fresh_adapter(model) <= (model.active_peft_config.peft_type == PeftType.LORA)
