"""Offline replacements for the models and data that TRL's tests load from the Hub.

The models are tiny, have random weights, and are saved in a folder with the structure of the Hub's cache, so that their
names work. The tokenizers are those of our tests. The data come from the generators in TRL's repository.
"""

import importlib.util
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from tests.tokenizers import tiny_tokenizer

OWNER = "trl-internal-testing"
SNAPSHOT = "0" * 40  # code of a model is only found if there is a commit
_SIZES: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
    "initializer_range": 0.3,
    "pad_token_id": 4,
    "bos_token_id": 3,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "output_router_logits": False}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny-Qwen2ForCausalLM-2.5": ("qwen2", {}),
    "tiny-Cohere2ForCausalLM": ("cohere2", {"logit_scale": 1.0}),
    "tiny-Olmo3ForCausalLM": ("olmo3", {}),
    "tiny-Lfm2ForCausalLM": ("lfm2", {"full_attn_idxs": [1], "block_multiple_of": 8}),
    "tiny-Lfm2ForCausalLM-2.5": (
        "lfm2",
        {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    ),
    "tiny-Qwen3MoeForCausalLM": ("qwen3_moe", {"num_experts": 4, "head_dim": 8, **_EXPERTS}),
    "tiny-Glm4MoeForCausalLM": (
        "glm4_moe",
        {"n_routed_experts": 4, "num_experts_per_tok": 2, "head_dim": 4, "moe_intermediate_size": 32},
    ),
    "tiny-GptOssForCausalLM": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}),
    "tiny-NemotronHForCausalLM-nano": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 4,
            "mamba_n_groups": 1,
            "ssm_state_size": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "moe_shared_expert_intermediate_size": 32,
            "use_mamba_kernels": False,
        },
    ),
    "tiny-T5ForConditionalGeneration": (
        "t5",
        {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 4},
    ),
}
DATA = {
    "zen": "generate_zen_dataset.py",
    "harmony": "generate_harmony_dataset.py",
    "toolcall": "generate_toolcall_dataset.py",
}
REMOTE = "tiny-RemoteForCausalLM"


def make_standins(trl: Path, folder: Path) -> None:
    """Create what is missing in a folder: `hub`, the cache of models, and `data`.

    Args:
        trl: a checkout of TRL's repository.
    """
    for name, (model_type, config) in MODELS.items():
        snapshot = folder / "hub" / f"models--{OWNER}--{name}" / "snapshots" / SNAPSHOT
        if not snapshot.exists():
            _save_model(model_type, config, snapshot)
            _name_snapshot(snapshot)
    _make_remote(trl, folder / "hub" / f"models--{OWNER}--{REMOTE}" / "snapshots" / SNAPSHOT)
    for name, script in DATA.items():
        if not (folder / "data" / name).exists():
            _make_data(trl / "scripts" / script, folder / "data" / name)


def _save_model(model_type: str, config: dict[str, Any], snapshot: Path) -> None:
    torch.manual_seed(0)
    made = AutoConfig.for_model(model_type, **{**_SIZES, **config})
    loader = AutoModelForSeq2SeqLM if made.is_encoder_decoder else AutoModelForCausalLM
    loader.from_config(made).float().save_pretrained(snapshot)
    tiny_tokenizer().save_pretrained(snapshot)


def _name_snapshot(snapshot: Path) -> None:
    """Write the file with which the Hub's cache maps a branch to a snapshot."""
    refs = snapshot.parents[1] / "refs"
    refs.mkdir(exist_ok=True)
    (refs / "main").write_text(snapshot.name)


def _make_remote(trl: Path, snapshot: Path) -> None:
    """Save a model with its code next to the weights."""
    if snapshot.exists():
        return
    code = trl / "scripts" / "generate_tiny_models" / "for_causal_lm" / "_remote_code"
    package = _imported(code / "modeling_remote.py", "_remote_code")
    sizes = {name: value for name, value in _SIZES.items() if name != "initializer_range"}
    config = sys.modules["_remote_code.configuration_remote"].RemoteConfig(**sizes)
    package.RemoteForCausalLM(config).save_pretrained(snapshot)
    for file in code.glob("*_remote.py"):
        shutil.copy(file, snapshot)
    config.auto_map = {
        "AutoConfig": "configuration_remote.RemoteConfig",
        "AutoModelForCausalLM": "modeling_remote.RemoteForCausalLM",
    }
    config.save_pretrained(snapshot)
    tiny_tokenizer().save_pretrained(snapshot)
    _name_snapshot(snapshot)


def _imported(file: Path, package: str) -> Any:
    """Import a module of a folder as part of a package with this name."""
    spec = importlib.machinery.ModuleSpec(package, None, is_package=True)
    spec.submodule_search_locations = [str(file.parent)]
    sys.modules[package] = importlib.util.module_from_spec(spec)
    return importlib.import_module(f"{package}.{file.stem}")


def _make_data(script: Path, folder: Path) -> None:
    """Run a generator, and save what it would push, with a folder for each configuration."""
    namespace: dict[str, Any] = {"__name__": "generator"}

    def save(data: Dataset | DatasetDict, repo_id: str, config_name: str = "default") -> None:
        data.save_to_disk(folder / config_name)

    exec(compile(script.read_text(), script, "exec"), namespace)
    with patch.object(Dataset, "push_to_hub", save), patch.object(DatasetDict, "push_to_hub", save):
        namespace["main"](test_size=0.1, push_to_hub=True, repo_id=script.stem)
