"""Output of a finished run for users of its model: rows with which a merge is checked, and commands."""

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel

from hf_prefopt.reporting.serve_command import serve_command
from hf_prefopt.scoring.forward import base_causal_lm
from hf_prefopt.serving.kept_rows import keep_rows
from hf_prefopt.trainer import PreferenceTrainer


def keep_rows_of(trainer: PreferenceTrainer) -> None:
    """Save eight rows in the run's folder.

    `hf_prefopt merge` compares the merged model with the trained model on these rows. They are not pushed to the Hub.
    """
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        quantized = quantization_text(base_causal_lm(model))
        keep_rows(Path(trainer.args.output_dir), trainer.eval_dataset, trainer.train_dataset, quantized)


def serving_steps(trainer: PreferenceTrainer) -> dict[str, str]:
    """Return commands that use a run's model, keyed by their purpose.

    If the model was pushed to the Hub, the command that serves it loads it from there.
    """
    args, model = trainer.args, trainer.accelerator.unwrap_model(trainer.model)
    folder = str(args.output_dir)
    repository = args.hub_model_id if args.push_to_hub and args.hub_model_id else folder
    adapter = model.active_peft_config if isinstance(model, PeftModel) else None
    base = adapter.base_model_name_or_path if adapter else None
    beside = "" if adapter else f" --base {model.config._name_or_path or 'BASE'}"
    serve = " && ".join(serve_command(repository, base or "BASE", adapter).splitlines())
    steps = {"talk to it": f"hf_prefopt chat {folder}{beside}", "serve it": serve}
    if adapter is not None and not serve.startswith("hf_prefopt merge"):
        steps["merge it into its base"] = f"hf_prefopt merge {folder} --to {folder}-merged"
    return steps


def quantization_text(model: PreTrainedModel) -> str | None:
    """Describe the quantization of a model, such as "4 bits (nf4)"; `None` if the model is not quantized."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    settings = config if isinstance(config, dict) else config.to_dict()
    for bits in (4, 8):
        if settings.get(f"load_in_{bits}bit"):
            kind = settings.get("bnb_4bit_quant_type") if bits == 4 else None
            return f"{bits} bits" + (f" ({kind})" if kind else "")
    return str(settings.get("quant_method", "quantized weights"))
