"""Names of the folders to which a run writes, and checks of these folders before the run."""

import os
from pathlib import Path


def check_folder(setting: str, folder: str | os.PathLike) -> None:
    """Check that a folder can be written to, or can be created. Nothing is created.

    Args:
        setting: Name of the setting, for the message.
        folder: The folder; `~` stands for the user's home.

    Raises:
        ValueError: The folder's name is empty, the path is a file or inside a file, or there is no permission to write
            to the folder or to create it.
    """
    if not os.fspath(folder).strip():
        raise ValueError(f"{setting}={os.fspath(folder)!r} is empty: name a folder")
    path = Path(os.path.expanduser(folder))
    existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not existing.is_dir():
        inside = "" if existing == path else f": {existing}"
        raise ValueError(f"{setting}={folder}{inside} is a file: name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ValueError(f"{setting}={folder}: no permission to write in {existing}: name another folder")


def name_of(folder: str | os.PathLike) -> str:
    """Return the name of a folder, also for `.`. For a name on the Hub, return the name without its owner."""
    return Path(os.path.abspath(folder)).name


def refuse_same_folder(setting: str, folder: str | os.PathLike, other: object, what: str) -> None:
    """Raise `ValueError` if `folder` and `other` are the same existing folder, because its files would be replaced.

    Args:
        setting: Name of the setting that names `folder`, for the message.
        other: A path, or a name on the Hub. Values of other types are not checked.
        what: Description of `other`, for the message.
    """
    if not isinstance(other, str | os.PathLike):
        return
    path = Path(os.path.expanduser(other))
    if path.is_dir() and path.resolve() == Path(os.path.expanduser(folder)).resolve():
        raise ValueError(f"{setting}={folder} is the folder of {what}, whose files would be replaced: name another one")
