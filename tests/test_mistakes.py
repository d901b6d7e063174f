"""Common mistakes on the command line, and their error messages: one line, no traceback, exit code 1.

The exit code is 2 if the command line cannot be parsed. No test here trains.
"""

import json
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
from peft import LoraConfig, get_peft_model
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_prefopt import PreferenceConfig, PreferenceTrainer
from hf_prefopt.commands import main
from tests.tiny_models import tiny_model
from tests.tokenizers import tiny_tokenizer
from tests.trainers import make_config, make_trainer, pairs

PAIRS = [{"prompt": f"Is {n} even? ", "chosen": "I can help you.", "rejected": "I'm sorry."} for n in range(6)]
CHAT = [{name: [{"role": "user" if name == "prompt" else "assistant", "content": text}] for name, text in row.items()}
        for row in PAIRS]  # fmt: skip
DATA: dict[str, list[dict[str, Any]]] = {
    "pairs": PAIRS,
    "chat": CHAT,
    "no_rejected": [{"prompt": row["prompt"], "chosen": row["chosen"]} for row in PAIRS],
    "equal": [{**row, "rejected": row["chosen"]} for row in PAIRS],
    "numbers": [{**row, "chosen": 3} for row in PAIRS],
    "holes": [{**row, "rejected": None if n == 3 else row["rejected"]} for n, row in enumerate(PAIRS)],
    "choosen": [{"prompt": r["prompt"], "choosen": r["chosen"], "rejected": r["rejected"]} for r in PAIRS],
    "context": [{"theme": "Say whether it is even.", **row} for row in PAIRS],
}
FILES = {
    "typo.yaml": "loss_type: [dpo]\nlerning_rate: 2e-4\n",
    "syntax.yaml": "a: [1\nb: 2\n",
    "quote.yaml": "beta: 1\nloss: ['dpo]\n",
    "tab.yaml": "beta:\t0.1\n",
    "word.yaml": "learning_rate: high\n",
    "half.yaml": "max_steps: 2.5\n",
    "no.yaml": "eval_strategy: no\n",
    "list.yaml": "- beta\n",
    "twice.yaml": "beta: 1\nbeta: 2\n",
    "hyphen.yaml": "learning-rate: 1e-4\n",
    "trl.yaml": "rpo_alpha: 1.0\n",
    "nested.yaml": "training:\n  beta: 0.1\n",
    "circle.yaml": "base: circle.yaml\n",
    "orphan.yaml": "base: nowhere.yaml\n",
    "mapping.yaml": "loss_type: {dpo: 1}\n",
    "word_mapping.yaml": "column_mapping: prompt\n",
    "engine.json": "{'zero_optimization': 2}",
    "engine.yaml": "deepspeed: engine.json\n",
    "empty.jsonl": "",
    "broken.jsonl": '{"prompt": "a", "chosen": "b"\n',
    "mean.py": "from hf_prefopt import register_loss\n@register_loss('mean_loss')\n"
    "def f(policy_chosen_logps, policy_rejected_logps, beta=0.1):\n"
    "    return (policy_rejected_logps - policy_chosen_logps).mean()\n",
    "names.py": "from hf_prefopt import register_loss\n@register_loss('l')\ndef f(chosen_logps, beta=0.1): ...\n",
    "syntax.py": "def f(:\n",
}


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """Create a folder with a model, a model without a chat template, and the files."""
    folder = tmp_path_factory.mktemp("desk")
    tokenizer = tiny_tokenizer()
    for name in ("model", "plain"):
        tiny_model(vocab_size=len(tokenizer)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        tokenizer.chat_template = None
    for name, rows in DATA.items():
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "not_a_model").mkdir()
    (folder / "rows").mkdir()
    (folder / "rows" / "pairs.jsonl").write_text((folder / "pairs.jsonl").read_text())
    (folder / "done").mkdir()
    (folder / "done" / "README.md").write_text("Another run.")
    return folder


@pytest.fixture
def typed(desk, monkeypatch, tmp_path, capsys) -> Callable[[str], tuple[int, str]]:
    """Return the exit code of a command line, and the line that begins with "error"."""
    for settings in (huggingface_hub.constants, datasets.config):
        monkeypatch.setattr(settings, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(desk)
    transformers_logging.disable_progress_bar()
    small = {
        "model_name_or_path": "model",
        "dataset_name": "pairs.jsonl",
        "output_dir": str(tmp_path / "out"),
        "max_steps": "1",
    }

    def run(line: str) -> tuple[int, str]:
        words = shlex.split(line)
        if words[:1] == ["train"] and "..." in words:
            missing = [w for name, value in small.items() if f"--{name}" not in words for w in (f"--{name}", value)]
            words = [word for word in words if word != "..."] + [*missing, "--use_cpu", "--disable_tqdm", "true"]
        try:
            code = main(words)
        except SystemExit as ended:
            code = int(ended.code)
        printed = capsys.readouterr().err
        assert "Traceback" not in printed and "usage:" not in printed
        return code, printed[printed.find("error: ") :]

    return run


# The command line ("...": a model, data and a folder), and the message.
READ: dict[str, str] = {
    "trian": "there is no command trian: did you mean train?",
    "train ... --lerning_rate 1e-4": "unknown argument --lerning_rate: did you mean --learning_rate?",
    "train ... --learning-rat 1e-4": "unknown argument --learning-rat: did you mean --learning",
    "train ... --lr 1e-4": "did you mean --learning_rate?",
    "train ... --epochs 3": "did you mean --num_train_epochs?",
    "train ... --batch_size 3": "did you mean --per_device_train_batch_size?",
    "train --model_name m": "did you mean --model_name_or_path?",
    "train --dataset d": "did you mean --dataset_name?",
    "train ... --max_prompt_length 10": "--max_prompt_length: use --max_length N, which limits prompt and response",
    "train ... --padding_free true": "remove it: batches have no padding by default (--layout auto)",
    "train ... --rpo_alpha 1": "unknown argument --rpo_alpha: use --sft_weight 1",
    "train ... --simpo_gamma 1": """use --loss_params '{"gamma": 1}'""",
    "train ... --gamma 1": """use --loss_params '{"gamma": 1}'""",
    "train ... --trust_remote_code true": """use --model_init_kwargs '{"trust_remote_code": true}'""",
    "train ... --beta high": "argument --beta: 'high' is not a number",
    "train ... --max_steps 2.5": "argument --max_steps: '2.5' is not a whole number",
    "train ... --bf16 maybe": "argument --bf16: 'maybe' is not true or false",
    "train ... --eval_strategy epochs": "epochs is not a choice; did you mean epoch?",
    "train ... --lr_scheduler_type cosin": "cosin is not a choice; did you mean cosine?",
    "train ... --dtype fp16": "fp16 is not a choice; did you mean float16?",
    "train ... --dtype int8": "int8 is not a choice; choose from auto, bfloat16, float16, float32",
    "train ... --column_mapping prompt=asked": """object: write one in single quotes, such as '{"prompt": "asked"}'""",
    "train ... --loss_params {gamma": """is not a JSON object: write one in single quotes, such as '{"gamma": 1.0}'""",
    "train ... --deepspeed nowhere.json": "argument --deepspeed: there is no file nowhere.json",
    "train ... --deepspeed engine.json": "--deepspeed: engine.json, line 1, column 2: invalid JSON: expecting property",
    "train pairs.jsonl": "unexpected argument pairs.jsonl: did you mean --dataset_name pairs.jsonl?",
    "train mine.yaml": "unexpected argument mine.yaml: did you mean --config mine.yaml?",
    "train ... --loss_type": "--loss_type: name at least one loss, such as --loss_type dpo; `hf_prefopt losses` lists",
    "chat": "error: RUN is missing; example: hf_prefopt chat runs/dpo_lora\n",
    "merge": "RUN, --to are missing; example: hf_prefopt merge runs/dpo_lora --to runs/dpo_lora-merged\n",
    "merge runs/a": "error: --to is missing; example: hf_prefopt merge runs/dpo_lora --to runs/dpo_lora-merged\n",
    "compare": "error: RUN is missing; example: hf_prefopt compare runs/dpo runs/simpo",
    "losses --kind pair": "pair is not a choice; did you mean pairs?",
}
SAID: dict[str, str] = {
    "train": "the dataset is missing: pass --dataset_name, or set it in a YAML file",
    "train --dataset_name pairs.jsonl": "the model is missing: pass --model_name_or_path, or set it in a YAML file",
    # files of settings
    "train ... --config typo.yaml": "typo.yaml, line 2: there is no setting lerning_rate; did you mean learning_rate?",
    "train ... --config syntax.yaml": "line 1, column 4: the [ here is not closed (expected ',' or ']', but got ':'",
    "train ... --config quote.yaml": "line 2, column 8: the ' here is not closed (",
    "train ... --config tab.yaml": "tab.yaml, line 1, column 6: YAML does not allow a tab here: use spaces",
    "train ... --config word.yaml": "word.yaml, line 1: learning_rate: 'high' is not a number",
    "train ... --config half.yaml": "half.yaml, line 1: max_steps: 2.5 is not a whole number",
    "train ... --config no.yaml": 'YAML reads an unquoted no, off or false as False: write eval_strategy: "no" in',
    "train ... --config list.yaml": "list.yaml: expected lines such as learning_rate: 1e-4, but the file is a list",
    "train ... --config twice.yaml": "twice.yaml, line 2: beta is in line 1 already: leave one out",
    "train ... --config hyphen.yaml": "there is no setting learning-rate; did you mean learning_rate?",
    "train ... --config trl.yaml": "trl.yaml, line 1: there is no setting rpo_alpha: use sft_weight: 1.0",
    "train ... --config nested.yaml": "settings are not nested: write them at the left margin",
    "train ... --config circle.yaml": "1: base: circle.yaml includes itself (circle.yaml -> circle.yaml): remove this",
    "train ... --config orphan.yaml": "orphan.yaml, line 1: base: there is no file nowhere.yaml in /",
    "train ... --config mapping.yaml": "mapping.yaml, line 1: loss_type: {'dpo': 1} must be",
    "train ... --config word_mapping.yaml": "column_mapping: prompt is not a JSON object",
    "train ... --config engine.yaml": "deepspeed: engine.json, line 1",
    "train ... --config pairs.jsonl": "is a file of data, not of settings: did you mean --dataset_name pairs.jsonl?",
    "train ... --config simppo": "--config simppo: there is no such file or recipe; did you mean simpo",
    "train ... --config .": "--config . is a folder: name a YAML file in it",
    "train --copy simpo pairs.jsonl": "folder=pairs.jsonl is a file: name a folder",
    "train --copy dpo_lra": "--copy dpo_lra: there is no such recipe; did you mean dpo_lora",
    # other commands
    "inspect": "the dataset is missing: name a file, a folder or a dataset of the Hub, as in hf_prefopt inspect",
    "inspect pairs.jsonl": "tokens): pass it, as in hf_prefopt inspect pairs.jsonl --model_name_or_path Qwen/",
    "inspect pairs.jsonl --dataset_name chat.jsonl": "pairs.jsonl and --dataset_name chat.jsonl: name one dataset",
    "merge done --to pairs.jsonl": "--to pairs.jsonl is a file: name a folder",
    "merge done --output_dir pairs.jsonl/new": "--to pairs.jsonl/new: pairs.jsonl is a file: name a folder",
    "merge done --to ''": "--to '' is empty: name a folder",
    "report nowhere": "nowhere: there is no such folder: name the output_dir of a run",
    "report done": "done has no record.jsonl, which is written when",
    "compare done model": "done has no record.jsonl, which is written when",
    "chat nowhere": "nowhere cannot be loaded: there is no such folder",
    "chat not_a_model": "not_a_model cannot be loaded: no config.json in it: name the output_dir of a run",
    # losses
    "train ... --loss_type simppo": "no loss simppo; did you mean simpo, sppo or sampo? `hf_prefopt losses` lists",
    "losses simppo": "error: there is no loss simppo; did you mean simpo, sppo or sampo? `hf_prefopt losses` lists all",
    "losses zzz": "error: there is no loss zzz; `hf_prefopt losses` lists all",
    "train ... --loss_type dpo,sft": "--loss_type dpo,sft: separate losses with spaces, --loss_type dpo sft",
    "train ... --beta -1": "--beta -1.0 must be above 0",
    "train ... --beta 0": "--beta 0.0 must be above 0",
    """train ... --loss_type simpo --loss_params '{"gama": 1}'""": """did you mean --loss_params '{"gamma": 1}'?""",
    """train ... --loss_type dpo simpo --loss_params '{"gamma": 1}'""": """--loss_params '{"simpo": {"gamma": 1}}'""",
    "train ... --loss_type dpo sft --loss_weights 1": "weight for each of dpo, sft, such as --loss_weights 1.0 1.0",
    "train ... --loss_type kto": "dataset holds pairs, but kto needs rows with `label`, or pairs with --unpair true",
    "train ... --loss_type odpo": "are missing, `chosen_score`, `rejected_score`: add them, or",
    "train ... --losses_from mean.py --loss_type mean_loss": "remove mean() or sum(): the trainer takes the mean",
    "train ... --losses_from names.py": "2: .*chosen_logps is neither a known input.*mean policy_chosen_logps",
    "train ... --losses_from syntax.py": "--losses_from syntax.py, line 1: invalid syntax",
    "train ... --losses_from nowhere.py": "--losses_from nowhere.py: there is no such Python file",
    # data
    "train ... --dataset_name no_rejected.jsonl": """found: prompt, chosen).*'{"rejected": "<your column>"}'""",
    "train ... --dataset_name equal.jsonl": "chosen and rejected have the same tokens in all of 6 pairs",
    "train ... --dataset_name numbers.jsonl": """or messages.*of the text, --column_mapping '{"chosen": "<""",
    "train ... --dataset_name holes.jsonl": "drop the row or pass --on_bad_rows drop\n  (rows are counted from 0)",
    "train ... --dataset_name choosen.jsonl": """mean choosen? Then pass --column_mapping '{"chosen": "choosen"}'""",
    "train ... --dataset_name nowhere.jsonl": "nowhere.jsonl: there is no such file",
    "train ... --dataset_name data/nowhere": "folder.*HF_HUB_OFFLINE is set: correct the path, or unset HF_HUB_OFFLINE",
    "train ... --dataset_name ./nowhere": "./nowhere: there is no such file or folder",
    "train ... --dataset_name empty.jsonl": "empty.jsonl is empty",
    "train ... --dataset_name broken.jsonl": "broken.jsonl, line 1, column 30: invalid JSON: expected ',' here",
    "train ... --dataset_name chat.jsonl --model_name_or_path plain": """kwargs '{"chat_template": "..."}', or give""",
    "train ... --dataset_test_split tests": "only the split train: to hold out part of it, pass --test_split_size 0.05",
    "train ... --dataset_config easy": "easy: pairs.jsonl is on this machine and has no configurations: leave it out",
    "train ... --test_split_size 5": "--test_split_size 5.0 must be a share above 0 and below 1, such as 0.05",
    "train ... --train_rows 0": "--train_rows 0 must be at least 1",
    "train ... --max_length 3": "3: pass --max_length 16, which all rows fit, or --truncation_mode keep_end\n",
    "train ... --remove_columns nothing": "train: --remove_columns nothing: no column 'nothing'; found prompt, chosen",
    "train ... --datasets pairs.jsonl": """such as --datasets '{"path": "pairs.jsonl"}' '{"path": "b.jsonl"}'""",
    # model and adapter
    "train ... --model_name_or_path models/nowhere": "--model_name_or_path models/nowhere: there is no such folder",
    "train ... --model_name_or_path no/where": "and HF_HUB_OFFLINE is set: correct the name, or unset HF_HUB_OFFLINE",
    "train ... --model_name_or_path not_a_model": "no config.json in this folder: pass the folder of a saved model",
    "train ... --model_name_or_path pairs.jsonl": "is a file: pass the folder of a model",
    "train ... --load_in_4bit true": "quantized weights cannot be trained: add --use_peft true to train an adapter",
    "train ... --lora_r 8": "--lora_r 8 has no effect without an adapter: add --use_peft true, or remove --lora_r 8",
    "train ... --use_peft true --lora_r 0": "--lora_r 0 must be at least 1",
    "train ... --use_peft true --lora_target_modules foo": "are q_proj, k_proj.*--lora_target_modules all-linear",
    """train ... --model_init_kwargs '{"foo": 1}'""": "takes no argument 'foo': remove it from --model_init_kwargs",
    # training
    "train ... --fp16 true": "--fp16 true has no effect on a CPU: leave it out",
    "train ... --layout shraed": "--layout shraed is not one of auto, shared, around, padded; did you mean shared?",
    "train ... --max_steps 0": "--max_steps 0 trains nothing: set a number above 0",
    "train ... --max_steps -1 --num_train_epochs 0": "--num_train_epochs 0 trains nothing: set a number above 0",
    "train ... --max_steps -2": "--max_steps -2 must be at least 1, or -1 to train for --num_train_epochs 3",
    "train ... --reference adapter_off": "adapter_off needs an adapter: pass --use_peft true, or remove --reference",
    "train ... --resume_from_checkpoint true": "--output_dir /.*has no complete checkpoint to resume from: correct it,",
    "train ... --resume_from_checkpoint nowhere": "there is no such folder: pass the folder of a complete checkpoint",
    "train ... --load_best_model_at_end true": "at every save: .*--eval_strategy steps --save_strategy steps",
    "train ... --save_strategy best": "best needs a metric: pass --metric_for_best_model eval_rewards/accuracies",
    "train ... --per_device_train_batch_size 0": "--per_device_train_batch_size 0 must be at least 1",
    "train ... --gradient_accumulation_steps 0": "--gradient_accumulation_steps 0 must be at least 1",
    "train ... --report_to wandbb": "--report_to wandbb: there is no such tracker; choose from ",
    "train ... --logging_steps 0": "--logging_steps 0 must be at least 1; to log nothing: --logging_strategy no",
    "train ... --bf16 true --fp16 true": "--bf16 true: choose one of them",
    "train ... --warmup_steps -5": "--warmup_steps -5.0 must be at least 0 steps",
    "train ... --learning_rate -1": "--learning_rate -1.0 must be at least 0",
    "train ... --output_dir pairs.jsonl": "--output_dir pairs.jsonl is a file: name a folder",
    "train ... --output_dir pairs.jsonl/out": "--output_dir pairs.jsonl/out: pairs.jsonl is a file: name a folder",
    "train ... --output_dir ''": "--output_dir '' is empty: name a folder",
    "train ... --output_dir model": "--output_dir model is the folder of the model, whose files would be replaced",
    "train ... --dataset_name rows --output_dir rows": "--output_dir rows is in the folder of the data, rows, so",
    "train --datasets pairs.jsonl rows --output_dir rows/runs --model model --use_cpu": "rows/runs is in the folder",
    "train ... --precompute_ref_log_probs true --reference_cache_dir pairs.jsonl": "_cache_dir pairs.jsonl is a file",
    "train ... --output_dir done": "--output_dir done holds another run: name another folder, --output_dir done-2, or",
    "train ... --push_to_hub": "true needs https://huggingface.co, but HF_HUB_OFFLINE is set: unset HF_HUB_OFFLINE, or",
}


@pytest.mark.parametrize("line", READ)
def test_a_command_line_that_cannot_be_read(line, typed):
    code, said = typed(line)
    assert code == 2 and READ[line] in said and said.count("\n") == 1


@pytest.mark.parametrize("line", SAID)
def test_a_mistake_is_answered_with_its_sentence(line, typed):
    code, said = typed(line)
    parts = SAID[line].split(".*")
    assert code == 1 and said.startswith("error: ") and all(part in said for part in parts), said


LIBRARIES = {
    "WandbCallback requires wandb to be installed. Run `pip install wandb`.": "report_to=wandb, which is not installed",
    "TensorBoardCallback requires tensorboard to be installed. Either updat": "pip install tensorboard, or --report_to",
    "DeepSpeed is not installed => run `pip3 install deepspeed` or build": 'pip install --no-build-isolation "hf_pre',
    "Couldn't instantiate the backend tokenizer from one of: \n(1) a": "the model has no tokenizer: copy its",
    "No module named 'mpi4py'": "deepspeed needs a launcher: type accelerate launch -m hf_prefopt train",
    "Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip ins": 'pip install "hf_prefopt[quantization]"',
    "the package for FlashAttention2 doesn't seem to be installed.": "remove the setting to use sdpa, or pip install",
}


@pytest.mark.parametrize("theirs", LIBRARIES)
def test_a_missing_library_is_named_with_the_command_that_installs_it(theirs):
    from hf_prefopt.commands.faults import message_of

    assert LIBRARIES[theirs] in message_of(RuntimeError(theirs)) == message_of(ImportError(theirs))


def test_other_errors_are_named_by_their_type_and_place(monkeypatch, capsys):
    """An error in the code is not a `ValueError`: one line says where it is. Other
    ranks than the first wait, and say which rank they are.
    """
    from hf_prefopt.commands import faults

    monkeypatch.setattr(faults, "_SECONDS_BEHIND_THE_FIRST_RANK", 0.0)
    assert faults.reported(lambda: [].pop(), with_traceback=False) == 1
    line = capsys.readouterr().err
    assert line.startswith("error: IndexError: pop from empty list (test_mistakes.py, line ") and line.count("\n") == 1
    monkeypatch.setenv("RANK", "3")
    assert faults.reported(lambda: int("x"), with_traceback=False) == 1
    assert capsys.readouterr().err.startswith("error on rank 3: invalid literal")
    with pytest.raises(IndexError):
        faults.reported(lambda: [].pop(), with_traceback=True)


def _with_adapter() -> Any:
    return get_peft_model(tiny_model(), LoraConfig(target_modules="all-linear"))


# In Python: the mistake, and the error.
IN_PYTHON: dict[str, tuple[Callable[[str], Any], str]] = {
    "another trainer's arguments": (
        lambda folder: PreferenceTrainer(
            tiny_model(), args=TrainingArguments(folder), processing_class=tiny_tokenizer()
        ),
        "has all fields of TrainingArguments",
    ),
    "tokenizer=": (
        lambda folder: PreferenceTrainer(tiny_model(), args=make_config(folder), tokenizer=tiny_tokenizer()),
        "processing_class=tokenizer",
    ),
    "a name of TRL's": (lambda folder: PreferenceConfig(folder, rpo_alpha=1.0), "use sft_weight"),
    "two adapters": (
        lambda folder: make_trainer(folder, _with_adapter(), peft_config=LoraConfig(target_modules="all-linear")),
        "remove peft_config",
    ),
    "a reference for a loss without one": (
        lambda folder: make_trainer(folder, ref_model=tiny_model(), loss_type="simpo"),
        "remove it",
    ),
    "no rows": (
        lambda folder: make_trainer(folder, train_dataset=pairs().select([])),
        "has no rows: check how it was loaded",
    ),
    "no data to evaluate": (lambda folder: make_trainer(folder, eval_strategy="steps", eval_steps=1), "eval_dataset"),
}


@pytest.mark.parametrize("what", IN_PYTHON)
def test_a_mistake_in_python(what, tmp_path):
    attempt, message = IN_PYTHON[what]
    with pytest.raises((ValueError, TypeError), match=message):
        attempt(os.fspath(tmp_path))
