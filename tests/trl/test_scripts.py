"""TRL's own training scripts with changed imports, from the command line to a saved model."""

import json
from importlib import import_module

import pytest

from hf_prefopt import trl as ours
from tests.tiny_models import tiny_model
from tests.tokenizers import tiny_tokenizer
from tests.trl.test_trainers import PAIRS

trl = pytest.importorskip("trl")

UNPAIRED = [
    {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
    for row in PAIRS
    for side in ("chosen", "rejected")
]
LORA = ["--use_peft", "--lora_r", "4", "--lora_target_modules", "q_proj", "v_proj"]
RUNS = {
    "dpo": ("dpo", PAIRS, []),
    "dpo, adapter": ("dpo", PAIRS, LORA),
    "dpo, evaluation": ("dpo", PAIRS, ["--eval_strategy", "steps", "--eval_steps", "1", "--no_remove_unused_columns"]),
    "kto": ("kto", UNPAIRED, []),
    "kto, pairs": ("kto", PAIRS, []),
    "kto, adapter": ("kto", UNPAIRED, LORA),
}


@pytest.mark.parametrize(("script", "rows", "options"), RUNS.values(), ids=RUNS)
def test_a_script_of_trls(script, rows, options, tmp_path, monkeypatch):
    """In `trl/scripts/dpo.py` and `kto.py`, `from trl import ...` imports our classes."""
    for name in ours.__all__:
        if hasattr(trl, name):
            monkeypatch.setattr(trl, name, getattr(ours, name))
    model = tmp_path / "model"
    tiny_model("qwen2", vocab_size=600).save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    for split in ("train", "test"):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    module = import_module(f"trl.scripts.{script}")
    command = ["--model_name_or_path", str(model), "--dataset_name", str(tmp_path / "data"), *options]
    command += ["--output_dir", str(tmp_path / "out"), "--max_steps", "1", "--report_to", "none", "--use_cpu", "true"]
    arguments = module.make_parser().parse_args_and_config(command, fail_with_unknown_args=False)
    module.main(*arguments)
    assert list((tmp_path / "out").glob("*.safetensors"))


def test_a_yaml_file_of_trls(tmp_path):
    """TRL's parser gets our classes; the file has keys that only TRL has, including those without an effect."""
    file = tmp_path / "cpo.yaml"
    file.write_text(
        f"output_dir: {tmp_path}\nloss_type: simpo\nsimpo_gamma: 1.0\ncpo_alpha: 0.0\nbeta: 2.0\n"
        "max_completion_length: 128\ngenerate_during_eval: false\ntrust_remote_code: false\nuse_cpu: true\n"
    )
    (args,) = trl.TrlParser((ours.CPOConfig,)).parse_args_and_config(["--config", str(file)])
    first, nll = args.build_objective().terms
    assert (first.spec.name, first.params) == ("simpo", {"beta": 2.0, "gamma": 1.0, "label_smoothing": 0.0})
    assert (nll.spec.name, nll.weight) == ("sft", 0.0)
