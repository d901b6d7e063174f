"""Merge the settings of several files and the command line. Later layers override earlier layers.

Some settings depend on another setting and are dropped when that setting changes:

- Hyperparameters belong to their loss. If a later layer selects another loss, they are dropped.
- Limits such as `train_rows` belong to the data shipped with the package. If a later layer selects other data, they are
  dropped. A later file with shipped data does not replace the user's own data.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hf_prefopt.losses import get_loss
from hf_prefopt.recipe.config_files import COMMAND_LINE, Layer
from hf_prefopt.recipe.shipped import SHIPPED_DATA

OF_A_LOSS = ("beta", "label_smoothing", "loss_params", "loss_weights")
OF_THE_DEMO = ("train_rows", "eval_rows", "longest_row", "max_length")
Settings = Mapping[str, Any]


def merged(layers: Iterable[Layer], say: Callable[[str], None] = print) -> dict[str, Any]:
    """Merge the settings of all layers; later layers override earlier layers.

    Args:
        layers: The settings of each origin, such as a file or the command line.
        say: Function that is called with a message about each setting that is dropped.
    """
    settings: dict[str, Any] = {}
    for layer in layers:
        given = dict(layer.settings)
        if _data_of(settings) and not _is_demo(settings) and _is_demo(given) and layer.where != COMMAND_LINE:
            name = given.pop("dataset_name")
            say(f"dataset_name={name} in {layer.where} is not used, because you chose {_data_of(settings)}")
        for names, reason in (_of_another_loss(settings, given), _of_other_data(settings, given)):
            not_used = {name: settings.pop(name) for name in names if name in settings and name not in given}
            if not_used:
                lines = ", ".join(f"{name}={value}" for name, value in not_used.items())
                say(f"{lines} not used: {reason}")
        if _data_of(given):  # `dataset_name` and `datasets` replace each other
            settings = {name: value for name, value in settings.items() if name not in ("dataset_name", "datasets")}
        settings |= given
    return settings


def _data_of(settings: Settings) -> Any:
    return settings.get("datasets") or settings.get("dataset_name")


def _is_demo(settings: Settings) -> bool:
    return str(_data_of(settings)).startswith(SHIPPED_DATA)


def _of_another_loss(before: Settings, given: Settings) -> tuple[tuple[str, ...], str]:
    """Return the names of settings to drop because `given` selects another loss, and the reason as text."""
    old, new = before.get("loss_type"), given.get("loss_type")
    if not old or not new or list(map(_own_name, old)) == list(map(_own_name, new)):
        return (), ""
    return OF_A_LOSS, f"set for the loss {' + '.join(old)}; {' + '.join(new)} has its own"


def _of_other_data(before: Settings, given: Settings) -> tuple[tuple[str, ...], str]:
    if not _is_demo(before) or not _data_of(given) or _is_demo(given):
        return (), ""
    name = given.get("dataset_name") or "other data"
    return OF_THE_DEMO, f"set for {before['dataset_name']}; all rows of {name} are used"


def _own_name(loss: str) -> str:
    """Return the name of a loss, given its name or an alias.

    The name of a user's own loss is returned unchanged, because the loss is not registered yet.
    """
    try:
        return get_loss(loss).name
    except ValueError:
        return loss
