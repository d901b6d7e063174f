"""The lines of a YAML file that limit its demo data: other data on the command line does not take them over."""

from argparse import ArgumentParser
from typing import Any

SHIPPED = "recipes/data/"
LIMITS = ("train_rows", "eval_rows", "longest_row", "max_length")


def without_demo_limits(settings: dict[str, Any], command_line: list[str], max_length: int | None) -> dict[str, Any]:
    """The settings of a YAML file for data that ships with the recipes, without that data's limits where the command
    line names other data; a line says so. Files for other data are returned unchanged.

    Args:
        max_length: what it is without such a line.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--dataset_name")
    parser.add_argument("--datasets", nargs="+")
    parser.add_argument("--max_length")
    asked = parser.parse_known_args(command_line)[0]
    written = settings.get("dataset_name")
    if (
        not str(written).startswith(SHIPPED)
        or not (asked.datasets or asked.dataset_name)
        or asked.dataset_name == written
    ):
        return settings
    kept = {name: value for name, value in settings.items() if name not in LIMITS}
    if asked.datasets and asked.dataset_name is None:
        del kept["dataset_name"]
    dropped = [name for name in LIMITS if name in settings]
    if dropped:
        print(
            f"{', '.join(dropped)} in the YAML file: of {written}, not used for {asked.dataset_name or 'other data'}: "
            f"all rows are taken, max_length is {asked.max_length or max_length}",
            flush=True,
        )
    return kept
