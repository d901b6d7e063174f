"""Training runs that are killed at selected moments and started again, each in its own process.

A moment is the beginning of a micro-batch, the end of a step, or a write of a checkpoint
file. At a write, the process leaves the first half of the file before SIGKILL. Twenty
kills at random moments, each followed by a second kill in the resumed run:

    python -m tests.resume.killed_runs 20
"""

import io
import itertools
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from transformers import TrainerCallback, TrainerState

from hf_prefopt.training.checkpoints import last_complete_checkpoint
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import make_trainer, unpaired, weights


class Moments:
    """A counter of the moments of a run, which ends the process at one of them.

    Attributes:
        names: the moments so far.
    """

    def __init__(self, last: int | None):
        self._last, self.names = last, []

    def pass_one(self, name: str, leave_half: Callable[[], None] = lambda: None) -> None:
        """Count one moment. If it is the last one, call `leave_half`, which writes
        half a file, and kill the process.
        """
        self.names.append(name)
        if len(self.names) - 1 == self._last:
            leave_half()
            os.kill(os.getpid(), signal.SIGKILL)

    def watch_writes(self) -> None:
        """Make every file of a checkpoint a moment."""
        torch_save, save_to_json, write_text = torch.save, TrainerState.save_to_json, Path.write_text
        save_file = safetensors.torch.save_file

        def half_of(path: str | Path, content: bytes) -> Callable[[], Any]:
            return lambda: Path(path).write_bytes(content[: len(content) // 2])

        def saving(obj: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            if isinstance(path, (str, Path)):
                buffer = io.BytesIO()
                torch_save(obj, buffer)
                self.pass_one(f"writing {Path(path).name}", half_of(path, buffer.getvalue()))
            torch_save(obj, path, *args, **kwargs)

        def saving_state(state: TrainerState, path: str) -> None:
            save_to_json(state, path)
            content = Path(path).read_bytes()
            self.pass_one("writing trainer_state.json", half_of(path, content))

        def saving_tensors(tensors: Any, path: Any, *args: Any, **kwargs: Any) -> None:
            content = safetensors.torch.save(tensors)
            self.pass_one(f"writing {Path(path).name}", half_of(path, content))
            save_file(tensors, path, *args, **kwargs)

        def writing(path: Path, text: str, *args: Any, **kwargs: Any) -> int:
            self.pass_one(f"writing {path.name}", half_of(path, text.encode()))
            return write_text(path, text, *args, **kwargs)

        torch.save, TrainerState.save_to_json, Path.write_text = saving, saving_state, writing
        safetensors.torch.save_file = saving_tensors
        sys.modules["peft.peft_model"].safe_save_file = saving_tensors


class MomentsOfTraining(TrainerCallback):
    """A callback for the moments of training: beginnings of micro-batches after the
    first of a step, and ends of steps.
    """

    def __init__(self, moments: Moments):
        self._moments = moments

    def on_substep_end(self, args, state, control, **_):
        """Count the moment between two micro-batches."""
        self._moments.pass_one(f"between the micro-batches of step {state.global_step + 1}")

    def on_step_end(self, args, state, control, **_):
        """Count the moment after the optimizer's step and before its checkpoint."""
        self._moments.pass_one(f"after step {state.global_step}")


def train(folder: Path, last_moment: int | None) -> None:
    """Start or resume a run in `folder`; at its end, write the weights, the state of the loss and the moments.

    The run has an adapter with dropout, BCO with its running mean, two epochs of seven shuffled rows, AdamW, a
    decreasing learning rate, and a checkpoint every second step, of which the newest two are kept.
    """
    torch.set_num_threads(1)
    moments = Moments(last_moment)
    trainer = make_trainer(
        folder,
        perturbed(with_lora(tiny_model(), lora_dropout=0.2), 0.1),
        train_dataset=unpaired(7),
        callbacks=[MomentsOfTraining(moments)],
        loss_type="bco",
        reference="adapter_off",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=0.01,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        log_level="error",
    )
    moments.watch_writes()
    trainer.train(resume_from_checkpoint=last_complete_checkpoint(folder))
    (folder / "state.json").write_bytes(json.dumps(trainer.criterion.state_dict()).encode())
    (folder / "weights").write_bytes(safetensors.torch.save(weights(trainer.model)))
    (folder / "moments.json").write_bytes(json.dumps(moments.names).encode())


def run(folder: Path, last_moment: int | None = None) -> int | None:
    """Run `train` in its own process, and return its exit code, −9 if it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.resume.killed_runs"])
    process = context.Process(target=train, args=(folder, last_moment))
    process.start()
    process.join(120)
    return process.exitcode


def result(folder: Path) -> tuple[bytes, str]:
    """Return the final weights, bit for bit, and the state of the loss."""
    return (folder / "weights").read_bytes(), (folder / "state.json").read_text()


def kill_twice(folder: Path, first: int, generator: random.Random) -> tuple[int | None, int | None]:
    """Kill a run at one moment, resume and kill it at another, and resume it to its end; return the two exit codes."""
    codes = run(folder, first), run(folder, generator.randrange(10))
    for _ in itertools.takewhile(lambda code: code != 0, (run(folder) for _ in range(2))):
        pass
    return codes


def main(count: int, seed: int = 0) -> None:
    generator = random.Random(seed)
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch, "whole")
        assert run(whole) == 0
        moments = json.loads((whole / "moments.json").read_text())
        print(f"{len(moments)} moments in a run")
        same = 0
        for number in range(count):
            folder, moment = Path(scratch, str(number)), generator.randrange(len(moments))
            codes = kill_twice(folder, moment, generator)
            equal = result(folder) == result(whole)
            same += equal
            print(
                f"{moments[moment]}: exit codes {codes}, {'the same to the bit' if equal else 'DIFFERENT'}", flush=True
            )
    print(f"{same} of {count} runs ended as the one that was not killed")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20)
