"""Write a YAML file for every registered loss, with the published defaults: `python recipes/configs/write.py`.

A file contains the settings of the loss and includes base.yaml, which has the settings of the model, the adapter, the
data and the training. The script does not change other files in the folder.

    hf_prefopt train --config simpo                      # the loss with base.yaml
    hf_prefopt train --config mine.yaml --config simpo   # the loss with your own file
"""

from itertools import starmap
from pathlib import Path
from typing import Any

import yaml

from hf_prefopt.kinds import LISTS, PAIRS, SCORED, TRIPLES, UNPAIRED
from hf_prefopt.losses import LossSpec, get_loss, list_losses

FOLDER = Path(__file__).parent
BASE = "base.yaml"
# Fields of PreferenceConfig itself; every other hyperparameter of a loss goes into loss_params.
FIELDS = ("beta", "label_smoothing")
# The settings of the data for each kind of examples, if they differ from base.yaml.
DATA: dict[Any, dict[str, Any]] = {
    PAIRS: {},
    TRIPLES: {"dataset_name": "recipes/data/gsm8k_triples"},
    UNPAIRED: {"unpair": True},
    SCORED: {"dataset_name": "recipes/data/gsm8k_quantiles"},
    LISTS: {"dataset_name": "recipes/data/gsm8k_lists"},
}
# Datasets for losses that need additional columns, keyed by the input that needs the column.
DATA_WITH = {
    "chosen_scores": {"dataset_name": "recipes/data/pandalm_pairs"},
    "chosen_win_rates": {"dataset_name": "recipes/data/pandalm_pairs"},
    "chosen_token_weights": {"dataset_name": "recipes/data/gsm8k_weighted_tokens"},
}


def config_of(spec: LossSpec) -> str:
    """Return the text of a loss's file: a comment with its formula and paper, then the settings of loss and data."""
    own = {name: value for name, value in spec.defaults.items() if value is not None}
    loss = {"loss_type": [spec.name], **{name: own.pop(name) for name in FIELDS if name in own}}
    loss |= {"loss_params": own} if own else {}
    needed = (name for name in spec.inputs if name in DATA_WITH and name not in spec.optional_inputs)
    data = next((DATA_WITH[name] for name in needed), DATA[spec.kind])
    source = [f"https://arxiv.org/abs/{spec.paper}"] if spec.paper else []
    head = [f"# {line}\n" for line in (spec.description, *source)]
    return "".join([*head, *starmap(_line, ({"base": BASE} | loss | data).items())])


def _line(name: str, value: Any) -> str:
    """Return a setting as YAML, on one line also if its value is a list or a dict."""
    in_line = None if isinstance(value, list | dict) else False
    return yaml.safe_dump({name: value}, width=1000, default_flow_style=in_line)


def main() -> None:
    for name in list_losses():
        (FOLDER / f"{name}.yaml").write_text(config_of(get_loss(name)))
    others = sorted(file.name for file in FOLDER.glob("*.yaml") if file.stem not in list_losses())
    if others := [name for name in others if name != BASE]:
        print(f"not changed, because they belong to no registered loss: {', '.join(others)}")


if __name__ == "__main__":
    main()
