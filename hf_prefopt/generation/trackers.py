"""Log tables and pictures to the experiment trackers of a Trainer: TensorBoard, trackio and Weights & Biases.

The functions write through the Trainer's own callbacks, so tables and pictures are in the same run as the metrics.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

Rows = Sequence[Mapping[str, Any]]


def log_table(trainer: Trainer, name: str, rows: Rows) -> list[str]:
    """Log a table to each active tracker. The rows of the table are dicts with the same keys.

    Returns:
        The names of the trackers that logged the table.
    """
    return _to_each(trainer, TABLES, name, rows) if rows else []


def log_picture(trainer: Trainer, name: str, path: str | Path) -> list[str]:
    """Log a PNG file to each active tracker.

    Returns:
        The names of the trackers that logged the file.
    """
    return _to_each(trainer, PICTURES, name, Path(path))


def _to_each(trainer: Trainer, writers: Mapping[type, Any], name: str, content: Any) -> list[str]:
    """Log the content on the first rank, and return the names of the trackers. Other ranks return an empty list."""
    told: list[str] = []
    if not trainer.is_world_process_zero():
        return told
    for callback in trainer.callback_handler.callbacks:
        for kind, write in writers.items():
            if isinstance(callback, kind) and write(callback, name, content, trainer.state.global_step):
                told.append(kind.__name__.removesuffix("Callback"))
    return told


def markdown_table(rows: Rows) -> str:
    """Return a Markdown table. Line breaks in cells become `<br>`."""
    columns = list(rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in rows]
    lines = [columns, ["---"] * len(columns), *cells]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;").replace("\n", "<br>")


def _tensorboard_table(callback: Any, name: str, rows: Rows, step: int) -> bool:
    if callback.tb_writer is None:
        return False
    callback.tb_writer.add_text(name, markdown_table(rows), step)
    callback.tb_writer.flush()
    return True


def _tensorboard_picture(callback: Any, name: str, path: Path, step: int) -> bool:
    if callback.tb_writer is None:
        return False
    from PIL import Image  # matplotlib, which draws the pictures, requires PIL

    with Image.open(path) as picture:
        import numpy as np

        callback.tb_writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")
    callback.tb_writer.flush()
    return True


def _trackio_table(callback: Any, name: str, rows: Rows, step: int) -> bool:
    if not callback._initialized:
        return False
    import trackio

    trackio.log({name: trackio.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])}, step=step)
    return True


def _trackio_picture(callback: Any, name: str, path: Path, step: int) -> bool:
    if not callback._initialized:
        return False
    import trackio

    trackio.log({name: trackio.Image(str(path))}, step=step)
    return True


def _wandb_table(callback: Any, name: str, rows: Rows, step: int) -> bool:
    if not callback._initialized:
        return False
    table = callback._wandb.Table(columns=list(rows[0]), data=[list(row.values()) for row in rows])
    callback._wandb.log({name: table, "train/global_step": step})
    return True


def _wandb_picture(callback: Any, name: str, path: Path, step: int) -> bool:
    if not callback._initialized:
        return False
    callback._wandb.log({name: callback._wandb.Image(str(path)), "train/global_step": step})
    return True


TABLES = {TensorBoardCallback: _tensorboard_table, TrackioCallback: _trackio_table, WandbCallback: _wandb_table}
PICTURES = {TensorBoardCallback: _tensorboard_picture, TrackioCallback: _trackio_picture, WandbCallback: _wandb_picture}
