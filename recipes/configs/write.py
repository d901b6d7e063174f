"""Writes a YAML file for every registered loss, with the loss's published defaults: `python recipes/configs/write.py`.

A file has the loss's own lines and begins with base.yaml, which has the model, the adapter, the data and the training.
Other files in the folder are left as they are.

    hf_prefopt train --config simpo                      on base.yaml
    hf_prefopt train --config mine.yaml --config simpo   on a file of your own
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
# The data of each kind of examples, where they are not those of base.yaml.
DATA: dict[Any, dict[str, Any]] = {
    PAIRS: {},
    TRIPLES: {"dataset_name": "recipes/data/gsm8k_triples"},
    UNPAIRED: {"unpair": True},
    SCORED: {"dataset_name": "recipes/data/gsm8k_quantiles"},
    LISTS: {"dataset_name": "recipes/data/gsm8k_lists"},
}
# The sets that have what some losses ask for besides, by the input that they ask by.
DATA_WITH = {
    "chosen_scores": {"dataset_name": "recipes/data/pandalm_pairs"},
    "chosen_win_rates": {"dataset_name": "recipes/data/pandalm_pairs"},
    "chosen_token_weights": {"dataset_name": "recipes/data/gsm8k_weighted_tokens"},
}


def config_of(spec: LossSpec) -> str:
    """The file of a loss: what it is, in a comment, then the loss, and the data that it needs."""
    own = {name: value for name, value in spec.defaults.items() if value is not None}
    loss = {"loss_type": [spec.name], **{name: own.pop(name) for name in FIELDS if name in own}}
    loss |= {"loss_params": own} if own else {}
    needed = (name for name in spec.inputs if name in DATA_WITH and name not in spec.optional_inputs)
    data = next((DATA_WITH[name] for name in needed), DATA[spec.kind])
    source = [f"https://arxiv.org/abs/{spec.paper}"] if spec.paper else []
    head = [f"# {line}\n" for line in (spec.description, *source)]
    return "".join([*head, *starmap(_line, ({"base": BASE} | loss | data).items())])


def _line(name: str, value: Any) -> str:
    """An entry, what it holds on the same line."""
    in_line = None if isinstance(value, list | dict) else False
    return yaml.safe_dump({name: value}, width=1000, default_flow_style=in_line)


def main() -> None:
    for name in list_losses():
        (FOLDER / f"{name}.yaml").write_text(config_of(get_loss(name)))
    others = sorted(file.name for file in FOLDER.glob("*.yaml") if file.stem not in list_losses())
    if others := [name for name in others if name != BASE]:
        print(f"not written here, and left as they are: {', '.join(others)}")


if __name__ == "__main__":
    main()
