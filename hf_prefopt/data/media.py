"""Images, video and audio, told by the names of columns and keys and by their values: only text is trained on."""

import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import date, time, timedelta
from decimal import Decimal
from typing import Any

from datasets import Dataset, IterableDataset

MEDIA_CURE = "images, video and audio are not supported: drop the row, or leave {} out if the text will do alone"
_MEDIA = r"(image|img|picture|photo|screenshot|frame|video|audio|pixel_value)s?"
_FORMS = r"(path|url|uri|file|byte|data|base64|list|\d+)s?"
_NAME = re.compile(rf"(.*[_\-. ])?{_MEDIA}([_\-. ]?{_FORMS})*", re.IGNORECASE)
# What Arrow gives for columns of text, numbers, flags and times.
_PLAIN = (str, int, float, date, time, timedelta, Decimal, type(None))


def find_media(values: Mapping[str, Any]) -> str | None:
    """The first key of a row, a message or a block that holds an image, video or audio; `None` where none does.

    It is told by the key's name, where there is something in it, or by the value: bytes, a stored file, a decoded
    object. A count (`num_images`), an id (`image_id`) and what is empty are none.
    """
    for key, value in values.items():
        if (_NAME.fullmatch(key) and _is_there(value)) or _is_binary(value):
            return key
    return None


def undecoded(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """The data set with images, video and audio as they are stored: none need be decoded to be refused."""
    for column, feature in (dataset.features or {}).items():
        if getattr(feature, "decode", False):
            dataset = dataset.cast_column(column, replace(feature, decode=False))
    return dataset


def _is_there(value: Any) -> bool:
    """Whether there is something where a file should be: a number is a count or a flag."""
    if isinstance(value, dict):
        return any(map(_is_there, value.values()))
    if isinstance(value, list | tuple):
        return any(item is not None and item != "" for item in value)
    return not isinstance(value, int | float | type(None)) and value != ""


def _is_binary(value: Any) -> bool:
    """Whether a value, or anything in it, is bytes, a stored file or a decoded object."""
    if isinstance(value, dict):
        is_file = value.keys() == {"bytes", "path"} and any(item is not None for item in value.values())
        return is_file or any(map(_is_binary, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_is_binary, value))
    return not isinstance(value, _PLAIN)
