"""Checkpoints pushed to a stand-in for the Hub load elsewhere, and training resumes from them."""

import json
import logging
import os
import subprocess
import sys

import pytest
from peft import LoraConfig

from hf_prefopt import PreferenceTrainer
from tests.hub import hub
from tests.serving.pushing import BASE, STRATEGIES
from tests.tiny_models import tiny_model
from tests.tokenizers import tiny_tokenizer
from tests.trainers import make_config, pairs


@pytest.fixture(scope="module")
def pushed(tmp_path_factory):
    """Return the stand-in after the runs of `pushing.py`, and the output of the script."""
    folder = tmp_path_factory.mktemp("pushed")
    tiny_model().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    with hub() as server:
        online = {"HF_ENDPOINT": server.address, "HF_TOKEN": "hf_none", "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, "-m", "tests.serving.pushing", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **online})
        assert done.returncode == 0, done.stderr[-3000:]
        yield server, folder, json.loads(done.stdout.splitlines()[-1])


def folders(server, strategy):
    return {name.partition("/")[0] for name in server.contents[f"an-organization/{strategy}"] if "/" in name}


def test_repositories_of_an_organization_are_made_private(pushed):
    server, _, _ = pushed
    assert server.private == {f"an-organization/{strategy}" for strategy in STRATEGIES}


def test_each_strategy_pushes_its_checkpoints(pushed):
    server, _, _ = pushed
    assert folders(server, "every_save") == set()
    assert folders(server, "checkpoint") == {"last-checkpoint"}
    assert folders(server, "all_checkpoints") == {"checkpoint-2", "checkpoint-4"}
    for strategy in STRATEGIES:
        assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= set(
            server.contents[f"an-organization/{strategy}"]
        )


def test_no_pushed_adapter_names_a_folder_of_this_machine(pushed):
    server, folder, _ = pushed
    configs = [
        json.loads(content)
        for files in server.contents.values()
        for name, content in files.items()
        if name.endswith("adapter_config.json")
    ]
    assert len(configs) == 3 + 1 + 2 and {config["base_model_name_or_path"] for config in configs} == {BASE}
    for files in server.contents.values():
        assert not any(str(folder / "base").encode() in content for n, content in files.items() if n.endswith("json"))


def test_training_goes_on_from_a_pushed_checkpoint(pushed):
    _, _, printed = pushed
    assert printed == {"equal": True, "steps": [8, 8]}


@pytest.mark.parametrize(("name", "said"), [(None, True), ("an-organization/base", False)])
def test_a_base_in_a_folder_is_said_with_what_to_do(name, said, tmp_path, caplog):
    tiny_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    trainer = PreferenceTrainer(
        str(tmp_path / "base"),
        args=make_config(tmp_path / "run", max_steps=1, hub_base_model=name),
        train_dataset=pairs(2),
        peft_config=LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    with caplog.at_level(logging.WARNING):
        trainer.train()
    lines = [record.getMessage() for record in caplog.records if "hub_base_model" in record.getMessage()]
    assert len(lines) == said and all(str(tmp_path / "base") in line for line in lines)
    trainer.save_model()
    saved = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == (name or str(tmp_path / "base"))
    trainer.create_model_card()
    assert ("base_model: an-organization/base" in (tmp_path / "run" / "README.md").read_text()) == (name is not None)
