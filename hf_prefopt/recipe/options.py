"""The options of `train` that are not in `PreferenceConfig`. Names and defaults follow TRL.

`ModelOptions` and `DataOptions` have the fields of `trl.ModelConfig` and `trl.ScriptArguments`, so YAML files for TRL
work. TRL itself is not required.
"""

import os
import runpy
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hf_prefopt.recipe.mixture import Entry, read_entries


def _help(text: str, **others: Any) -> dict[str, Any]:
    return {"help": text, **others}


@dataclass
class DataOptions:
    """The training and evaluation data."""

    dataset_name: str | None = field(
        default=None, metadata=_help("A name on the Hub, a folder, a file, or a pattern of files.")
    )
    dataset_config: str | None = field(default=None, metadata=_help("The configuration of a dataset of the Hub."))
    dataset_train_split: str = field(default="train", metadata=_help("The split to train on."))
    dataset_test_split: str = field(
        default="test", metadata=_help("The split to evaluate; test also finds other usual names, such as validation.")
    )
    dataset_streaming: bool = field(default=False, metadata=_help("Read the dataset as a stream."))
    datasets: list[str] | None = field(
        default=None,
        metadata=_help(
            "A mixture instead of dataset_name: paths, or entries with keys such as path and weight; see the README."
        ),
    )
    test_split_size: float | None = field(
        default=None,
        metadata=_help(
            "Hold out this share of the rows (above 0 and below 1) for evaluation instead of using a split. All rows "
            "of a prompt stay together."
        ),
    )
    train_rows: int | None = field(
        default=None, metadata=_help("Train on N rows, drawn at random; all of them if there are fewer.")
    )
    eval_rows: int | None = field(default=None, metadata=_help("Evaluate on N rows, drawn at random."))
    longest_row: int | None = field(
        default=None, metadata=_help("Leave out rows with more than N characters, prompt and responses together.")
    )
    ignore_bias_buffers: bool = field(
        default=False, metadata=_help("Not supported: ddp_broadcast_buffers=false is similar.")
    )

    def __post_init__(self):
        self.datasets = read_entries(self.datasets) if self.datasets else None
        for name in ("train_rows", "eval_rows", "longest_row"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1; without --{name} all rows are used")
        if self.test_split_size is not None and not 0 < self.test_split_size < 1:
            raise ValueError(
                f"test_split_size={self.test_split_size} must be a share above 0 and below 1, such as 0.05"
            )

    @property
    def entries(self) -> list[Entry]:
        """The entries of `datasets`, which `__post_init__` has parsed; [] if `datasets` is not set."""
        return cast("list[Entry]", self.datasets or [])


@dataclass
class ModelOptions:
    """The model and its adapter."""

    model_name_or_path: str | None = field(
        default=None,
        metadata=_help("A name on the Hub or a folder. For an adapter, its training continues.", aliases=["--model"]),
    )
    model_revision: str = field(default="main", metadata=_help("The branch, tag or commit of the model."))
    dtype: str | None = field(
        default="float32",
        metadata=_help(
            "The dtype of the weights; bfloat16 halves the memory of an adapter's base model.",
            choices=["auto", "bfloat16", "float16", "float32"],
        ),
    )
    attn_implementation: str | None = field(
        default=None, metadata=_help("The attention implementation, such as sdpa or flash_attention_2.")
    )
    use_peft: bool = field(default=False, metadata=_help("Train a LoRA adapter instead of all weights."))
    lora_r: int = field(default=16, metadata=_help("The rank of the adapter."))
    lora_alpha: int = field(default=32, metadata=_help("The scale of the adapter is lora_alpha / lora_r."))
    lora_dropout: float = field(default=0.05, metadata=_help("Dropout before the adapter."))
    lora_target_modules: list[str] | None = field(
        default=None, metadata=_help("The layers with an adapter, such as all-linear, or q_proj v_proj.")
    )
    lora_target_parameters: list[str] | None = field(
        default=None, metadata=_help("Parameters with an adapter, such as the weights of experts.")
    )
    lora_modules_to_save: list[str] | None = field(
        default=None, metadata=_help("Layers that are fully trained and saved with the adapter.")
    )
    lora_task_type: str = field(default="CAUSAL_LM", metadata=_help("Must be CAUSAL_LM."))
    use_rslora: bool = field(default=False, metadata=_help("Scale by lora_alpha / √lora_r."))
    use_dora: bool = field(default=False, metadata=_help("Weight-decomposed LoRA."))
    load_in_8bit: bool = field(
        default=False, metadata=_help("Load the adapter's base model in 8 bits (needs bitsandbytes).")
    )
    load_in_4bit: bool = field(
        default=False, metadata=_help("Load the adapter's base model in 4 bits (needs bitsandbytes).")
    )
    bnb_4bit_quant_type: str = field(default="nf4", metadata=_help("The 4-bit data type.", choices=["fp4", "nf4"]))
    use_bnb_nested_quant: bool = field(default=False, metadata=_help("Also quantize the quantization constants."))
    bnb_4bit_quant_storage: str | None = field(
        default=None, metadata=_help("The dtype in which 4-bit weights are stored.")
    )

    def __post_init__(self):
        if self.model_name_or_path and self.model_name_or_path.startswith("~"):
            self.model_name_or_path = os.path.expanduser(self.model_name_or_path)


@dataclass
class RunOptions:
    """The options of `train` that describe neither the data, nor the model, nor the training."""

    gsm8k_problems: int = field(
        default=0, metadata=_help("Solve N GSM8K problems (at most 200) at every evaluation; 0 for none.")
    )
    losses_from: str | None = field(
        default=None, metadata=_help("A Python file that registers losses of your own; it is run first.")
    )
    overwrite_output_dir: bool = field(default=False, metadata=_help("Replace another run in output_dir."))

    def __post_init__(self):
        if self.losses_from and not (self.losses_from.endswith(".py") and Path(self.losses_from).is_file()):
            raise ValueError(f"losses_from={self.losses_from}: there is no such Python file")
        if self.losses_from:
            _run_file(self.losses_from)
        if not 0 <= self.gsm8k_problems <= 200:
            raise ValueError(f"gsm8k_problems={self.gsm8k_problems} must be from 0 to 200")


def _run_file(path: str) -> None:
    """Run a Python file of the user. Raises `ValueError` with the line number for any error in the file."""
    try:
        runpy.run_path(path)
    except SyntaxError as error:
        raise ValueError(
            f"losses_from={path}, line {error.lineno}: {error.msg}: {(error.text or '').strip()}"
        ) from error
    except Exception as error:  # a user's code raises errors of any type
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
        where = f", line {lines[-1]}" if lines else ""
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"losses_from={path}{where}: {kind}{error}") from error
