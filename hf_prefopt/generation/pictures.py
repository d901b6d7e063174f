"""A callback that sends a picture to the trackers at every evaluation."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import Trainer, TrainerCallback

from hf_prefopt.generation.trackers import log_picture


class PictureCallback(TrainerCallback):
    """A callback that draws a picture at every evaluation and logs it to TensorBoard, trackio or Weights & Biases.

    Example:
        ```python
        trainer.add_callback(PictureCallback(trainer, lambda path: plot_training(trainer.state.log_history, path)))
        ```

    Args:
        trainer: Trainer that the callback is added to.
        draw: Function that takes a path and writes a PNG file to it.
        name: Name of the picture in the trackers.
    """

    def __init__(self, trainer: Trainer, draw: Callable[[Path], Any], name: str = "curves"):
        self._trainer, self._draw, self._name = trainer, draw, name

    def on_evaluate(self, args, state, control, **_):
        """Draw and log the picture on the first rank."""
        if not self._trainer.is_world_process_zero():
            return
        with TemporaryDirectory() as folder:
            path = Path(folder, "picture.png")
            self._draw(path)
            if not path.is_file():
                raise ValueError(f"draw wrote no file to {path}: it must write a PNG file to the path that it gets")
            log_picture(self._trainer, self._name, path)
