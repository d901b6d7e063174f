"""Files shipped with the package: recipes, YAML files of losses, data, and engine configurations.

In a checkout of the repository, the files are in `recipes/` and `ds_configs/`. In a wheel, they are in
`hf_prefopt/shipped/`.
"""

import shutil
from difflib import get_close_matches
from pathlib import Path

from hf_prefopt.folders import check_folder

SHIPPED_DATA = "recipes/data/"
_PACKAGE = Path(__file__).parents[1]


def shipped(path: str) -> Path:
    """Return where a file or folder of the repository, such as "recipes/dpo_lora.yaml", is on this machine."""
    installed = _PACKAGE / "shipped"
    return (installed if installed.is_dir() else _PACKAGE.parent) / path


def recipes() -> dict[str, Path]:
    """Return the YAML files for `train --config`, keyed by name: the recipes, then one file per loss."""
    return _files("recipes") | _files("recipes/configs")


def engines() -> dict[str, Path]:
    """Return the YAML files for `accelerate launch --config_file`, keyed by name."""
    return _files("ds_configs")


def _files(folder: str) -> dict[str, Path]:
    return {file.stem: file for file in sorted(shipped(folder).glob("*.yaml"))}


def purpose(file: Path) -> str:
    """Return the first comment line of a file."""
    return file.read_text().splitlines()[0].lstrip("# ")


def find_config(given: str) -> Path:
    """Find the file for a value of `--config`: a path, or the name or path of a file shipped with the package.

    Raises:
        ValueError: If there is no such file. The message suggests similar names.
    """
    path = Path(given).expanduser()
    if path.is_file() and path.suffix in (".jsonl", ".csv", ".tsv", ".parquet", ".arrow", ".gz"):
        raise ValueError(f"--config {given} is a file of data, not of settings: did you mean --dataset_name {given}?")
    if path.is_file():
        return path
    if path.is_dir():
        raise ValueError(f"--config {given} is a folder: name a YAML file in it")
    named = recipes().get(path.stem) if path.suffix in ("", ".yaml", ".yml") else None
    if named and str(path.parent) in (".", "recipes", "recipes/configs"):
        return named
    near = get_close_matches(path.stem, recipes(), 3)
    meant = f"did you mean {' or '.join(near)}? " if near else ""
    raise ValueError(f"--config {given}: there is no such file or recipe; {meant}`hf_prefopt train --list` names them")


def listing() -> str:
    """List the recipes, the files of the losses and the engine configurations, one per line."""
    parts = {
        "Recipes: hf_prefopt train --config NAME": _files("recipes"),
        "Losses: --config NAME, on base.yaml or after a file of your own": _files("recipes/configs"),
        "Engines: accelerate launch --config_file FILE -m hf_prefopt train ...; --copy NAME writes the file": engines(),
    }
    lines = []
    for heading, files in parts.items():
        lines += ["", heading, *(f"  {name:<22} {purpose(file)}" for name, file in files.items())]
    return "\n".join(lines[1:])


def copy(name: str, folder: str = ".", *others: str) -> list[Path]:
    """Copy a recipe or an engine configuration, together with the files that it refers to, and return the new paths.

    Recipes are copied into the folder. Engine configurations are copied into its subfolder `ds_configs/`, because they
    refer to each other by this path.

    Raises:
        ValueError: If there is no such name, a file already exists, or the folder cannot be written.
    """
    if others:
        raise ValueError(f"--copy takes a name and a folder; {others[0]} is one argument too many")
    found = {**engines(), **recipes()}.get(name.removesuffix(".yaml"))
    if found is None:
        near = get_close_matches(name, [*recipes(), *engines()], 3)
        meant = f"did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(f"--copy {name}: there is no such recipe; {meant}`hf_prefopt train --list` names them")
    sources, to = [found], Path(folder)
    while base := base_of(sources[-1]):
        sources.append(base)
    if found in engines().values():
        sources, to = sorted(found.parent.glob(f"{found.stem}.*")), to / found.parent.name
    there = [str(to / source.name) for source in sources if (to / source.name).exists()]
    if there:
        raise ValueError(f"--copy {name}: {', '.join(there)} exists already; name another folder: --copy {name} FOLDER")
    check_folder("folder", to)
    to.mkdir(parents=True, exist_ok=True)
    return [Path(shutil.copyfile(source, to / source.name)) for source in sources]


def base_of(file: Path) -> Path | None:
    """Return the base file that a YAML file names in its line `base:`; `None` if there is no such line."""
    lines = (line.partition("#")[0].strip() for line in file.read_text().splitlines())
    named = next((line.removeprefix("base:").strip() for line in lines if line.startswith("base:")), None)
    return file.parent / named if named else None
