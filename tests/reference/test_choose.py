"""The reference that a configuration selects, its cost, and settings that contradict each other."""

import pytest
import torch
from peft import IA3Config, get_peft_model

from hf_prefopt.losses import get_loss, list_losses
from hf_prefopt.reference.choose import choose_reference, is_fresh_adapter
from hf_prefopt.reference.live import FrozenTensors
from hf_prefopt.scoring.modes import ModuleTree
from tests.quick import at_least
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import first_batch, make_trainer

ADAPTERS = {
    "LoRA": (lambda: with_lora(tiny_model()), True),
    "DoRA": (lambda: with_lora(tiny_model(), use_dora=True), True),
    "LoRA with modules_to_save": (lambda: with_lora(tiny_model(), modules_to_save=["lm_head"]), True),
    "LoRA on the embedding": (lambda: with_lora(tiny_model(), target_modules=["embed_tokens", "q_proj"]), True),
    "trained LoRA": (lambda: perturbed(with_lora(tiny_model())), False),
    "PiSSA": (lambda: with_lora(tiny_model(), init_lora_weights="pissa"), False),
    "LoRA that trains biases": (lambda: with_lora(tiny_model("qwen2"), bias="lora_only"), False),
    "LoRA beside trained tokens": (lambda: with_lora(tiny_model(), trainable_token_indices=[3, 4]), False),
    "another method": (lambda: get_peft_model(tiny_model(), IA3Config(task_type="CAUSAL_LM")), False),
}


@pytest.mark.parametrize(("make", "fresh"), ADAPTERS.values(), ids=ADAPTERS)
def test_a_fresh_adapter_is_told_from_a_trained_one(make, fresh):
    """An adapter is fresh if its output is zero and nothing else trains: disabling it gives the policy as passed.
    Otherwise the reference is a copy of the trainable weights.
    """
    model = make()
    assert is_fresh_adapter(model) is fresh
    reference = choose_reference("auto", model, None, needed=True)
    assert reference.description.startswith("the base model" if fresh else "a frozen copy")


@pytest.mark.parametrize("setting", ["auto", "copy"])
def test_biases_that_train_do_not_move_the_reference(setting, tmp_path):
    """`bias="lora_only"` trains biases of the base model, which stay changed when the adapter is disabled."""
    trainer = make_trainer(tmp_path, with_lora(tiny_model("qwen2"), bias="lora_only"), reference=setting, max_steps=2)
    batch = first_batch(trainer)
    before = trainer.reference.score(batch).token_logps
    trainer.train()
    assert torch.equal(trainer.reference.score(batch).token_logps, before)


# All losses without a reference, and some losses with a reference for each kind of example.
_OFTEN = [*(name for name in list_losses() if not get_loss(name).needs_reference_model), "dpo", "kto", "tdpo2", "lipo"]


@pytest.mark.parametrize("name", at_least(_OFTEN, list_losses()))
def test_a_loss_without_a_reference_runs_and_copies_none(name, tmp_path):
    """Without a reference, a micro-batch runs the model once, and no reference
    exists; otherwise the model runs twice.
    """
    trainer = make_trainer(tmp_path, loss_type=name, max_steps=1, layout="padded")
    trainer.scorer.settle()  # otherwise, its checks would run the model, too
    calls = []
    trainer.model.register_forward_pre_hook(lambda *_: calls.append(1))
    trainer.train()
    needed = get_loss(name).needs_reference_model
    assert (trainer.reference is not None) == needed
    assert len(calls) == 1 + needed


def test_the_reference_of_reference_free_losses_is_none(tmp_path):
    trainer = make_trainer(tmp_path, loss_type="dpo", reference_free=True, max_steps=1)
    assert trainer.reference is None


def test_the_trained_tensors_alone_are_copied():
    """With LoRA, the frozen copy contains only the adapter, in its own memory, and not the model below it."""
    model = perturbed(with_lora(tiny_model()))
    copies = FrozenTensors(ModuleTree(model)).tensors
    assert copies and all("lora_" in name for name in copies)
    assert all(copies[name].data_ptr() != p.data_ptr() for name, p in model.named_parameters() if name in copies)


def plain():
    return tiny_model()


def adapted():
    return with_lora(tiny_model())


def adapted_with_biases():
    return with_lora(tiny_model("qwen2"), bias="all")


@pytest.mark.parametrize(
    ("make", "setting", "settings", "message"),
    [
        (plain, "adapter_off", {}, "needs a PEFT model"),
        (plain, "adapter:ref", {}, "needs a PEFT model"),
        (adapted, "adapter:ref", {}, "the model's adapters are default"),
        (adapted, "adapter:default", {}, "is the adapter being trained"),
        (adapted_with_biases, "adapter_off", {}, "parameters outside all adapters are also trained"),
        (plain, "model", {}, "pass ref_model"),
        (plain, "none", {}, "but a loss needs a reference"),
        (plain, "copy", {"ref_model": plain}, "drop one of them"),
        (adapted, "adapter_off", {"ref_model": plain}, "drop one of them"),
        (plain, "copy", {"loss_type": "simpo"}, "need no reference"),
        (plain, "auto", {"loss_type": "simpo", "ref_model": plain}, "need no reference"),
        (plain, "copy", {"loss_type": "dpo", "reference_free": True}, "need no reference"),
    ],
)
def test_contradictions_are_refused(make, setting, settings, message, tmp_path):
    given = {name: value() if callable(value) else value for name, value in settings.items()}
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, make(), reference=setting, **given)


def test_the_policy_is_no_reference_of_itself(tmp_path):
    """If ref_model were the same object as the policy, it would train, too, and the margin would stay 0."""
    model = tiny_model()
    with pytest.raises(ValueError, match="is the policy itself"):
        make_trainer(tmp_path, model, ref_model=model)


def test_a_second_adapter_on_an_adapter_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the model already has an adapter"):
        make_trainer(tmp_path, adapted(), peft_config=adapted().peft_config["default"])
