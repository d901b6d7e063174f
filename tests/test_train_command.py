"""`hf_prefopt train`: how YAML files and the command line are combined, the files of a run, and the help."""

import json
from pathlib import Path

import pytest
import yaml

from hf_prefopt import PreferenceConfig, get_loss, list_losses
from hf_prefopt.commands import main, train
from hf_prefopt.commands.parser import parser_of
from hf_prefopt.recipe.kept import FILE, keep_settings, refuse_other_run
from hf_prefopt.recipe.shipped import engines, recipes
from tests.e2e.typed import read
from tests.tiny_models import tiny_model
from tests.tokenizers import tiny_tokenizer

ROOT = Path(__file__).parents[1]
BASE = "model_name_or_path: m\ndataset_name: mine\nuse_peft: true\nlearning_rate: 1e-5\nbeta: 0.3\nloss_type: [dpo]\n"


@pytest.fixture
def desk(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return tmp_path


def test_later_files_win_and_the_command_line_wins_over_all(desk):
    (desk / "more.yaml").write_text("learning_rate: 2.0e-5\nnum_train_epochs: 2\n")
    training = read("--config", "base.yaml", "--config", "more.yaml", "--num_train_epochs", "3").training
    assert (training.learning_rate, training.num_train_epochs, training.beta) == (2e-5, 3.0, 0.3)
    assert read("--config", "more.yaml", "base.yaml").training.learning_rate == 1e-5
    assert read("--num_train_epochs", "3", "--config", "base.yaml", "more.yaml").training.num_train_epochs == 3.0


def test_a_losss_file_goes_on_any_base_with_its_own_hyperparameters(desk, capsys):
    """The loss's file uses the model and data of the first file, but neither the β
    of the first loss nor its own base file.
    """
    recipe = read("--config", "base.yaml", "--config", "simpo")
    assert recipe.training.loss_type == ["simpo"] and recipe.training.beta == 2.0 and recipe.data.dataset_name == "mine"
    assert recipe.training.learning_rate == 1e-5 and recipe.training.per_device_train_batch_size == 8
    assert recipe.training.output_dir == "runs/simpo"
    recipe = read("--config", "base.yaml", "--config", "lipo")
    assert recipe.data.dataset_name == "mine" and "gsm8k_lists in" in capsys.readouterr().out
    assert read("--config", "base.yaml", "--config", "repo").training.beta is None
    assert "beta=0.3 not used: set for the loss dpo; repo has its own" in capsys.readouterr().out


def test_the_model_has_a_short_name(desk):
    """`--model` is `--model_name_or_path`, which is the name in files; `~` is the home, also after `=`."""
    home = Path.home()
    for words in (("--model", "~/m"), ("--model_name_or_path=~/m",), ("--model-name-or-path", "~/m")):
        recipe = read("--config", "base.yaml", *words, "--output_dir=~/runs", "--use_cpu")
        assert recipe.model.model_name_or_path == str(home / "m") and "model" not in recipe.settings
        assert recipe.training.output_dir == str(home / "runs")


@pytest.mark.parametrize("given", ["simpo", "recipes/configs/simpo.yaml", str(ROOT / "recipes/configs/simpo.yaml")])
def test_a_losss_file_alone_begins_with_its_base(given, desk):
    """The file is found by its name, by its path in the repository from any folder, and by an absolute path."""
    recipe = read("--config", given, "--use_cpu")
    assert recipe.training.beta == 2.0 and recipe.training.learning_rate == 1e-4 and recipe.data.train_rows == 160
    written = yaml.safe_load((ROOT / "recipes/configs/base.yaml").read_text())
    assert recipe.settings == {**written, **recipe.settings} and recipe.model.lora_alpha == 32


def test_a_file_of_ones_own_may_name_its_base(desk):
    (desk / "mine.yaml").write_text("base: base.yaml\nbeta: 0.5\n")
    training = read("--config", "mine.yaml").training
    assert training.beta == 0.5 and training.learning_rate == 1e-5


def test_values_of_files_are_read_as_on_the_command_line(desk):
    """`1e-4` is text in YAML; `null` unsets a value; one name is a list of one; environment variables are set."""
    lines = "learning_rate: 1e-4\nmax_length: null\nloss_type: ipo\nlora_target_modules: all-linear\nbf16: no\n"
    (desk / "more.yaml").write_text(lines + "report_to: [tensorboard]\nenv: {SOME_SWITCH: 1}\n")
    recipe = read("--config", "base.yaml", "more.yaml", "--use_cpu")
    training = recipe.training
    assert (training.learning_rate, training.max_length, training.loss_type) == (1e-4, None, ["ipo"])
    assert recipe.model.lora_target_modules == ["all-linear"] and training.bf16 is False
    assert training.report_to == ["tensorboard"] and recipe.environment == ("SOME_SWITCH",)
    assert read("--config", "base.yaml", "--max_length", "none", "--beta", "none").training.beta is None


def test_an_adapter_trains_at_its_own_default_rate(desk, capsys):
    """The rate is that of base.yaml, for a new adapter, a saved adapter, and an
    adapter of a script. A given rate is kept.
    """
    typed = ("--model_name_or_path", "m", "--dataset_name", "mine", "--use_cpu")
    base = yaml.safe_load((ROOT / "recipes/configs/base.yaml").read_text())
    (desk / "saved").mkdir()
    (desk / "saved" / "adapter_config.json").write_text("{}")
    new, script = read(*typed, "--use_peft", "true"), read(*typed, script={"use_peft": True})
    saved = read(*typed, "--model_name_or_path", "saved")
    for recipe in (new, script, saved):
        assert recipe.training.learning_rate == recipe.settings["learning_rate"] == base["learning_rate"] == 1e-4
    assert capsys.readouterr().out.count("learning_rate=0.0001: the default for an adapter") == 3
    assert read(*typed, "--use_peft", "true", "--learning_rate", "1e-6").training.learning_rate == 1e-6
    assert read(*typed).training.learning_rate == PreferenceConfig("x").learning_rate == 1e-6
    assert not capsys.readouterr().out


def test_trls_keys_are_read(desk):
    keys = {"dataset_name": "d", "dataset_train_split": "train", "model_name_or_path": "m", "dtype": "bfloat16"}
    keys |= {"use_peft": True, "lora_r": 8, "learning_rate": "5.0e-6", "loss_type": "sigmoid", "max_length": 512}
    (desk / "trl.yaml").write_text(yaml.safe_dump(keys | {"gradient_checkpointing": True, "env": {"A": 1}}))
    recipe = read("--config", "trl.yaml")
    assert recipe.model.lora_r == 8 and recipe.training.learning_rate == 5e-6
    assert recipe.training.build_objective().terms[0].spec.name == "dpo"


def test_what_is_kept_is_the_same_run_and_has_no_secrets(desk):
    """Reading the file again gives the same settings. It has no tokens and no values of environment variables."""
    (desk / "secret.yaml").write_text("env: {API_KEY: verysecret}\n")
    typed = ["--config", "base.yaml", "secret.yaml", "--loss_type", "simpo", "sft", "--loss_weights", "1", "0.5"]
    typed += ["--loss_params", '{"simpo": {"gamma": 1.0}}', "--hub_token", "hf_abcdefghijk", "--output_dir", "out"]
    recipe = read(*typed, "--model_init_kwargs", '{"token": "verysecret"}', "--use_cpu")
    keep_settings(recipe)
    kept = (desk / "out" / FILE).read_text()
    assert "verysecret" not in kept and "hf_abc" not in kept and "API_KEY" in kept
    assert "# hf_prefopt train --config base.yaml secret.yaml --loss_type simpo sft" in kept
    again = read("--config", f"out/{FILE}")
    for name in ("learning_rate", "loss_type", "loss_weights", "loss_params", "beta", "output_dir", "use_cpu"):
        assert getattr(again.training, name) == getattr(recipe.training, name), name
    assert recipe.training.model_init_kwargs["token"] == "verysecret"
    assert (again.model, again.data) == (recipe.model, recipe.data)


def test_another_runs_folder_is_not_overwritten(desk, capsys):
    """The same run may write again, and so may a run that resumes, or a run with `--overwrite_output_dir`. In the last
    case, records of the earlier run are removed, because they could be mistaken for those of an interrupted new run.
    """
    first = read("--config", "base.yaml", "--output_dir", "out")
    refuse_other_run(first)
    keep_settings(first)
    refuse_other_run(read("--config", "base.yaml", "--output_dir", "out", "--beta", "1"))  # before any training
    (desk / "out" / "README.md").touch()
    refuse_other_run(read("--config", "base.yaml", "--output_dir", "out"))
    assert "out holds this run: its files are replaced" in capsys.readouterr().out
    other = ["--config", "base.yaml", "--output_dir", "out", "--seed", "7"]
    with pytest.raises(ValueError, match=r"holds another run \(seed: default there, 7 here\).*--overwrite_output_dir"):
        refuse_other_run(read(*other))
    (desk / "out" / "record.jsonl").write_text("of the first run")
    refuse_other_run(read(*other, "--resume_from_checkpoint", "true"))
    assert (desk / "out" / "record.jsonl").exists()
    refuse_other_run(read(*other, "--overwrite_output_dir", "true"))
    assert not (desk / "out" / "record.jsonl").exists()


def test_a_run_from_its_own_file_is_the_same_run(desk, capsys):
    """The losses are equal to the last digit, in the same process."""
    tiny_tokenizer().save_pretrained("model")
    tiny_model(vocab_size=len(tiny_tokenizer())).save_pretrained("model")
    rows = [{"prompt": f"Is {n} even? ", "chosen": "I can help you.", "rejected": "I'm sorry."} for n in range(6)]
    (desk / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    typed = ["--config", "simpo", "--model_name_or_path", "model", "--dataset_name", "pairs.jsonl", "--use_cpu"]
    weights = []
    for options in ([*typed, "--max_steps", "2", "--disable_tqdm", "true"], ["--config", f"runs/simpo/{FILE}"]):
        assert main(["train", *options]) == 0
        weights.append((desk / "runs/simpo/adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_the_help_is_short_and_its_commands_are_read(desk, capsys):
    assert main(["train", "--help"]) == 0
    text = capsys.readouterr().out
    assert text.count("\n") <= 50 and max(map(len, text.splitlines())) <= 120
    commands = [line.split()[2:] for line in text.splitlines() if line.startswith("  hf_prefopt train")]
    (desk / "mine.yaml").write_text(BASE)
    (desk / "pairs.jsonl").write_text("")
    assert len(commands) == 3 and all(read(*words, "--use_cpu") for words in commands)
    known = parser_of(train, "hf_prefopt train")._option_string_actions
    named = {word.strip(",;.()") for word in text.split() if word.startswith("--") and word != "--"}
    assert named - {"--help-all", "--traceback"} <= known.keys()


@pytest.mark.parametrize("option", ["--help-all", "--help_all"])
def test_the_full_help_has_every_option(option, capsys):
    with pytest.raises(SystemExit):
        main(["train", option])
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in parser_of(train, "hf_prefopt train").settings())
    assert "\nModel and adapter:" in text and "(default: 16)" in text


def test_what_comes_along_is_listed_and_copied(desk, capsys):
    assert main(["train", "--list"]) == 0
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in [*recipes(), *engines()])
    assert main(["train", "--copy", "simpo", "mine"]) == 0
    assert capsys.readouterr().out.split() == ["mine/simpo.yaml", "mine/base.yaml"]
    assert read("--config", "mine/simpo.yaml").training.beta == 2.0
    assert main(["train", "--copy", "simpo", "mine"]) == 1
    assert "mine/simpo.yaml, mine/base.yaml exists already" in capsys.readouterr().err
    assert main(["train", "--copy", "zero3"]) == 0  # both files, and accelerate finds the second one
    engine = yaml.safe_load((desk / "ds_configs/zero3.yaml").read_text())
    assert (desk / engine["deepspeed_config"]["deepspeed_config_file"]).is_file()


def test_losses_are_listed_and_described(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["losses"]) == 0
    table = capsys.readouterr().out
    ours = [name for name in list_losses() if get_loss(name).function.__module__.startswith("hf_prefopt.")]
    assert len(ours) > 50 and all(f"\n{name} " in table for name in ours)  # because other tests register losses, too
    assert main(["losses", "simpo", "sigmoid"]) == 0
    text = capsys.readouterr().out
    assert "beta=2.0" in text and "https://arxiv.org/abs/2405.14734" in text and "ℓ(β(s̄_w − s̄_l) − γ)" in text
    assert "\ndpo\n" in text and "the aliases" not in text


def test_the_environment_is_printed_without_paths(capsys):
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("hf_prefopt", "torch", "transformers", "peft", "deepspeed", "device"))
    assert "/" not in text.replace(" / ", "")
