"""Settings of several files and of the command line, put together: the last one wins.

Some lines belong to another one, and go with it:

- hyperparameters to their loss: a later layer that names another loss does not take them over;
- limits, such as `train_rows`, to the data that come with the package: a later layer with other data does not take
  them over, and a later file with such data does not replace data of the user's own.
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
    """The settings of all layers, later ones over earlier ones.

    Args:
        say: is told which lines are not used.
    """
    settings: dict[str, Any] = {}
    for layer in layers:
        given = dict(layer.settings)
        if _data_of(settings) and not _is_demo(settings) and _is_demo(given) and layer.where != COMMAND_LINE:
            say(f"dataset_name={given.pop('dataset_name')} in {layer.where}: not used, {_data_of(settings)} is")
        for names, reason in (_of_another_loss(settings, given), _of_other_data(settings, given)):
            not_used = {name: settings.pop(name) for name in names if name in settings and name not in given}
            if not_used:
                lines = ", ".join(f"{name}={value}" for name, value in not_used.items())
                say(f"{lines} not used: {reason}")
        if _data_of(given):  # one way to name data replaces the other
            settings = {name: value for name, value in settings.items() if name not in ("dataset_name", "datasets")}
        settings |= given
    return settings


def _data_of(settings: Settings) -> Any:
    return settings.get("datasets") or settings.get("dataset_name")


def _is_demo(settings: Settings) -> bool:
    return str(_data_of(settings)).startswith(SHIPPED_DATA)


def _of_another_loss(before: Settings, given: Settings) -> tuple[tuple[str, ...], str]:
    """The settings that do not go with the loss that is given, and why."""
    old, new = before.get("loss_type"), given.get("loss_type")
    if not old or not new or list(map(_own_name, old)) == list(map(_own_name, new)):
        return (), ""
    return OF_A_LOSS, f"of the loss {' + '.join(old)}; {' + '.join(new)} has its own"


def _of_other_data(before: Settings, given: Settings) -> tuple[tuple[str, ...], str]:
    if not _is_demo(before) or not _data_of(given) or _is_demo(given):
        return (), ""
    name = given.get("dataset_name") or "other data"
    return OF_THE_DEMO, f"of {before['dataset_name']}; of {name} all rows are taken"


def _own_name(loss: str) -> str:
    """The name that an alias stands for; losses of a user's own are registered later."""
    try:
        return get_loss(loss).name
    except ValueError:
        return loss
