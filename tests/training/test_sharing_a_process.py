"""Trainers that share a process, a model or a configuration: each one computes as if it were alone.

The comparison is a new model and a trainer created at once, so equal losses are
bit-equal. A loss in bf16 differs from one in fp32 from the second step on.
"""

import functools
import math
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from transformers import Trainer, TrainingArguments

from hf_prefopt import PreferenceTrainer
from hf_prefopt.training.engines import compute_in, refuse_early_evaluation, refuse_first_fsdp
from tests.tiny_models import tiny_model, with_lora
from tests.tokenizers import tiny_tokenizer
from tests.trainers import logged, make_config, make_trainer, pairs

SETTINGS = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 3}
MODELS = {"full": tiny_model, "lora": lambda: with_lora(tiny_model())}


def losses(trainer):
    trainer.train()
    return logged(trainer, "loss")


@functools.cache
def alone(kind, bf16):
    """Return the losses of a trainer that shares nothing."""
    return losses(make_trainer("unused", MODELS[kind](), bf16=bf16, train_dataset=pairs(7), **SETTINGS))


def trainer_of(model, folder, bf16, **settings):
    return make_trainer(folder, model, bf16=bf16, train_dataset=pairs(7), **{**SETTINGS, **settings})


def test_the_precisions_differ():
    for kind in MODELS:
        assert alone(kind, False)[1:] != alone(kind, True)[1:]


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_that_another_trainer_has_used_is_trained_in_the_precision_asked_for(kind, bf16, tmp_path):
    """For example, a cell of a notebook is run again with another value of bf16."""
    model = MODELS[kind]()
    trainer_of(model, tmp_path, not bf16, learning_rate=0.0).train()
    assert losses(trainer_of(model, tmp_path, bf16)) == alone(kind, bf16)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("sft_bf16", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_may_come_from_transformers_own_trainer(kind, sft_bf16, bf16, tmp_path):
    """SFT and then preference training on one object: accelerate has marked it, and
    wrapped the forward that we replace.
    """
    model = MODELS[kind]()
    ids = list(range(3, 12))
    rows = [{"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}] * 2
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, bf16=sft_bf16, learning_rate=0.0, max_steps=1, report_to="none", save_strategy="no"
    )
    Trainer(model, args, train_dataset=rows).train()
    found = losses(trainer_of(model, tmp_path, bf16))
    assert found == alone(kind, bf16)
    assert found[0] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("first", [False, True])
def test_trainers_that_are_made_together_keep_their_precisions(first, tmp_path):
    """Each trainer sets accelerate's shared state during its training, because
    autocast takes its dtype from it on GPUs.
    """
    models = tiny_model(), tiny_model()
    one, other = (trainer_of(model, tmp_path, bf16) for model, bf16 in zip(models, (first, not first), strict=True))
    for trainer, bf16 in ((one, first), (other, not first), (one, first)):
        batch_samples, seen = trainer.get_batch_samples, []

        def watched(*arguments, batch_samples=batch_samples, seen=seen):
            batches = batch_samples(*arguments)
            seen.append(AcceleratorState().mixed_precision)
            return batches

        trainer.get_batch_samples = watched
        trainer.train()
        assert set(seen) == {"bf16" if bf16 else "no"}
    assert logged(other, "loss") == alone("full", not first)


def test_an_evaluation_after_another_trainer_has_used_the_model(tmp_path):
    """The model has the first trainer's precision again, whatever the precision of the other trainer."""
    model, evaluated = tiny_model(), pairs(5, seed=1)
    one = trainer_of(model, tmp_path, False, eval_dataset=evaluated, learning_rate=0.0)
    one.train()
    expected = one.evaluate()["eval_logps/chosen"]
    other = trainer_of(model, tmp_path, True, eval_dataset=evaluated, learning_rate=0.0)
    other.train()
    assert other.evaluate()["eval_logps/chosen"] != expected == one.evaluate()["eval_logps/chosen"]


def test_another_precision_in_the_middle_of_training_is_an_error(tmp_path):
    from transformers import TrainerCallback

    model = tiny_model()

    class Evaluates(TrainerCallback):
        def on_step_end(self, *_, **__):
            trainer_of(model, tmp_path, True, eval_dataset=pairs(2)).evaluate()

    trainer = trainer_of(model, tmp_path, False, callbacks=[Evaluates()])
    with pytest.raises(RuntimeError, match="another trainer has used this model in a precision other than"):
        trainer.train()


def test_configurations_may_be_made_before_any_trainer(tmp_path):
    """Without our fix, accelerate would say that its state cannot be changed, and
    that the process has to be restarted.
    """
    configs = {bf16: make_config(tmp_path, bf16=bf16, **SETTINGS) for bf16 in (True, False)}
    for bf16 in (True, False, True):
        trainer = PreferenceTrainer(
            tiny_model(), args=configs[bf16], train_dataset=pairs(7), processing_class=tiny_tokenizer()
        )
        assert losses(trainer) == alone("full", bf16)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_engines_that_cannot_evaluate_before_training_say_so(stage):
    """DeepSpeed's own error would say that its configuration is wrong."""
    plugin = SimpleNamespace(zero_stage=stage)
    accelerator = SimpleNamespace(
        _models=[], distributed_type=DistributedType.DEEPSPEED, state=SimpleNamespace(deepspeed_plugin=plugin)
    )
    if stage == 3:
        refuse_early_evaluation(accelerator)
        return
    with pytest.raises(ValueError, match=f"ZeRO-{stage} cannot evaluate .* set eval_on_start=True"):
        refuse_early_evaluation(accelerator)


def test_under_fsdp2_trainers_have_one_precision():
    """accelerate's plugin has the precision, and a process has only one plugin."""
    state = SimpleNamespace(mixed_precision="bf16")
    accelerator = SimpleNamespace(distributed_type=DistributedType.FSDP, state=state)
    with pytest.raises(ValueError, match="mixed_precision='no', but a trainer created later has 'bf16'"):
        compute_in("no", accelerator, tiny_model())


@pytest.mark.parametrize("version", [1, 2])
def test_fsdp_of_the_first_version_is_refused(version):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
    accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))
    if version == 2:
        refuse_first_fsdp(accelerator)
    else:
        with pytest.raises(ValueError, match=r"FSDP version 1 .* fsdp_version: 2"):
            refuse_first_fsdp(accelerator)
    refuse_first_fsdp(Accelerator(cpu=True))
