"""Aligns a language model with preference pairs by DPO, training all of its weights.

The reference is a frozen copy of the policy as it was given, kept in memory and never written to a checkpoint; losses
that need none (`--loss_type simpo`, `orpo`, `cpo`) keep no copy. It evaluates before and after, and saves the whole
model. One device wants about 16 bytes per parameter; several share it by the engine that `accelerate` is set up with.

Left out on purpose: adapters (`dpo_lora.py`).

    accelerate launch recipes/dpo_full.py --config recipes/dpo_full.yaml
"""

from common import NEXT_STEPS, load_pairs, parse_arguments, watch

from hf_prefopt import PreferenceTrainer
from hf_prefopt.console import finish_run


def main() -> None:
    script, training, model, recipe = parse_arguments(adapter=False)
    train_pairs, test_pairs = load_pairs(script, recipe, training)

    trainer = PreferenceTrainer(
        model.model_name_or_path, args=training, train_dataset=train_pairs, eval_dataset=test_pairs
    )
    watch(trainer, recipe)

    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if test_pairs is not None:
        trainer.evaluate()
    trainer.save_model()
    finish_run(trainer, script.dataset_name, NEXT_STEPS)


if __name__ == "__main__":
    main()
