"""Aligns a language model with preference pairs by DPO, training a LoRA adapter: the recipe to start from.

It evaluates the untrained policy, trains, evaluates again, saves the adapter with its model card and training curves,
and prints the comparison. Any model and data set of the Hub (or local folder), any loss of the family and any option
of the Trainer, of PEFT or of the model's loading can be set in the YAML file or on the command line.

Left out on purpose: 4-bit base models (`qlora.py`), training all weights (`dpo_full.py`), merging the adapter.

    accelerate launch recipes/dpo_lora.py --config recipes/dpo_lora.yaml
    accelerate launch recipes/dpo_lora.py --config recipes/dpo_lora.yaml --loss_type simpo --max_steps 5
"""

from common import NEXT_STEPS, load_pairs, parse_arguments, watch
from trl import get_peft_config

from hf_prefopt import PreferenceTrainer
from hf_prefopt.console import finish_run


def main() -> None:
    script, training, model, recipe = parse_arguments(adapter=True)
    train_pairs, test_pairs = load_pairs(script, recipe, training)

    trainer = PreferenceTrainer(
        model.model_name_or_path,
        args=training,
        train_dataset=train_pairs,
        eval_dataset=test_pairs,
        peft_config=get_peft_config(model),
    )
    watch(trainer, recipe)

    # `eval_on_start` in the YAML file makes the evaluation before: inside train(), where every engine is set up.
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if test_pairs is not None:
        trainer.evaluate()
    trainer.save_model()
    finish_run(trainer, script.dataset_name, NEXT_STEPS)


if __name__ == "__main__":
    main()
