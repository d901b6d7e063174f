"""Writes a YAML file for every registered loss, with the loss's published defaults: `python recipes/configs/write.py`.

Each file stands alone, to be copied and changed, and runs as it is after `make demo` has fetched the model. Other
files in the folder are left as they are.

    accelerate launch recipes/dpo_lora.py --config recipes/configs/simpo.yaml
"""

from itertools import starmap
from pathlib import Path
from typing import Any

import yaml

from hf_prefopt.kinds import LISTS, PAIRS, SCORED, TRIPLES, UNPAIRED
from hf_prefopt.losses import LossSpec, get_loss, list_losses

FOLDER = Path(__file__).parent
# Fields of PreferenceConfig itself; every other hyperparameter of a loss goes into loss_params.
FIELDS = ("beta", "label_smoothing")
DATA = {
    PAIRS: {"dataset_name": "recipes/data/gsm8k_pairs"},
    TRIPLES: {"dataset_name": "recipes/data/gsm8k_triples"},
    UNPAIRED: {"dataset_name": "recipes/data/gsm8k_pairs", "unpair": True},
    SCORED: {"dataset_name": "recipes/data/gsm8k_quantiles"},
    LISTS: {"dataset_name": "recipes/data/gsm8k_lists"},
}
# The sets that have what some losses ask for besides, by the input that they ask by.
DATA_WITH = {
    "chosen_scores": {"dataset_name": "recipes/data/pandalm_pairs"},
    "chosen_win_rates": {"dataset_name": "recipes/data/pandalm_pairs"},
    "chosen_token_weights": {"dataset_name": "recipes/data/gsm8k_weighted_tokens"},
}
MODEL = {
    "model_name_or_path": "models/smollm2-135m-instruct",
    "dtype": "float32",
    "use_peft": True,
    "lora_r": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "lora_target_modules": ["all-linear"],
}
TRAINING = {
    "train_rows": 160,
    "eval_rows": 96,
    "max_length": 512,
    "learning_rate": 1e-4,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 8,
    "eval_on_start": True,
    "logging_steps": 2,
    "save_strategy": "no",
    "report_to": "none",
}


def config_of(spec: LossSpec) -> str:
    """The file of a loss: what it is, in a comment, then the model, the data, the loss, the training."""
    own = {name: value for name, value in spec.defaults.items() if value is not None}
    loss = {"loss_type": [spec.name], **{name: own.pop(name) for name in FIELDS if name in own}}
    loss |= {"loss_params": own} if own else {}
    needed = (name for name in spec.inputs if name in DATA_WITH and name not in spec.optional_inputs)
    data = next((DATA_WITH[name] for name in needed), DATA[spec.kind])
    parts = [MODEL, data, loss, TRAINING, {"output_dir": f"runs/{spec.name}"}]
    command = f"accelerate launch recipes/dpo_lora.py --config recipes/configs/{spec.name}.yaml"
    source = [f"https://arxiv.org/abs/{spec.paper}"] if spec.paper else []
    head = "".join(f"# {line}\n" for line in (spec.description, *source, command))
    return "\n".join([head, *("".join(starmap(_line, part.items())) for part in parts)])


def _line(name: str, value: Any) -> str:
    """An entry, what it holds on the same line."""
    in_line = None if isinstance(value, list | dict) else False
    return yaml.safe_dump({name: value}, width=1000, default_flow_style=in_line)


def main() -> None:
    for name in list_losses():
        (FOLDER / f"{name}.yaml").write_text(config_of(get_loss(name)))
    others = sorted(file.name for file in FOLDER.glob("*.yaml") if file.stem not in list_losses())
    if others:
        print(f"not written here, and left as they are: {', '.join(others)}")


if __name__ == "__main__":
    main()
