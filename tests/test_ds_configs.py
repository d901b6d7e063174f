"""accelerate and DeepSpeed accept every key in the configurations of the engines."""

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

FOLDER = Path(__file__).parents[1] / "ds_configs"
YAML_FILES, JSON_FILES = sorted(FOLDER.glob("*.yaml")), sorted(FOLDER.glob("*.json"))
each_yaml = pytest.mark.parametrize("file", YAML_FILES, ids=lambda file: file.name)
each_json = pytest.mark.parametrize("file", JSON_FILES, ids=lambda file: file.name)


def test_there_is_a_file_for_each_engine():
    """There are two sets of files; the YAML files are for `accelerate launch`."""
    assert {file.stem for file in YAML_FILES} == {"ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp2"}
    assert {file.stem for file in JSON_FILES} == {"zero1", "zero2", "zero3", "zero3_offload"}


@each_yaml
def test_accelerate_reads_it(file):
    """accelerate rejects unknown keys at the top level; other keys are options of `accelerate launch`. The DeepSpeed
    file that is named exists, relative to the root of the repository.
    """
    config = load_config_from_file(str(file))
    assert config.num_processes == 8 and config.num_machines == 1
    options = {action.dest for action in launch_command_parser()._actions}
    engine = {**(config.deepspeed_config or {}), **(config.fsdp_config or {})}
    assert engine.keys() <= options
    if "deepspeed_config_file" in engine:
        assert FOLDER.parent / engine["deepspeed_config_file"] == file.with_suffix(".json")
        assert engine["zero3_init_flag"] == file.stem.startswith("zero3")
    assert yaml.safe_load(file.read_text())["distributed_type"] == config.distributed_type.value


@each_json
def test_deepspeed_reads_it(file, monkeypatch):
    """DeepSpeed's own classes check every key below the top level; the stage is that in the file name."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    constants = pytest.importorskip("deepspeed.runtime.constants")
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = json.loads(file.read_text())
    known = {value for value in vars(constants).values() if isinstance(value, str)}
    assert config.keys() <= known | {"zero_optimization", "bf16"}
    assert DeepSpeedZeroConfig(**config["zero_optimization"]).stage == int(file.stem[4])
    assert config["bf16"] == {"enabled": "auto"} and "enabled" in DeepSpeedBF16Config.model_fields
    with pytest.raises(ValueError, match="no_such_key"):
        DeepSpeedZeroConfig(**config["zero_optimization"], no_such_key=1)
