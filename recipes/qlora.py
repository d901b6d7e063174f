"""Aligns a language model held in 4 bits with preference pairs, training a LoRA adapter on top (QLoRA).

The base model is quantized by bitsandbytes (nf4) as it is loaded, a quarter of its size in bf16; the reference is that
same quantized model with the adapter switched off, so there is no second one. It evaluates before and after, and saves
the adapter. On a CPU the 4-bit layers are slow: there it is a way to try the recipe out, with few rows.

Left out on purpose: merging the adapter, which a model in 4 bits would round away.

    accelerate launch recipes/qlora.py --config recipes/qlora.yaml
"""

from common import NEXT_STEPS, load_pairs, parse_arguments, watch
from trl import get_peft_config, get_quantization_config

from hf_prefopt import PreferenceTrainer
from hf_prefopt.console import finish_run


def main() -> None:
    script, training, model, recipe = parse_arguments(adapter=True, quantized=True)
    train_pairs, test_pairs = load_pairs(script, recipe, training)

    trainer = PreferenceTrainer(
        model.model_name_or_path,
        args=training,
        train_dataset=train_pairs,
        eval_dataset=test_pairs,
        peft_config=get_peft_config(model),
        quantization_config=get_quantization_config(model),
    )
    watch(trainer, recipe)

    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if test_pairs is not None:
        trainer.evaluate()
    trainer.save_model()
    finish_run(trainer, script.dataset_name, NEXT_STEPS)


if __name__ == "__main__":
    main()
