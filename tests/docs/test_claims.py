"""What the pages name exists: files, tests, commands with their options, and settings files."""

import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from hf_prefopt import get_loss, list_losses
from hf_prefopt.commands import COMMANDS
from hf_prefopt.commands.parser import parser_of
from hf_prefopt.recipe.shipped import engines, recipes

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md")), *sorted((ROOT / "docs").glob("*.md"))]
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
# Folders of this repository, and what looks like a path below them: a folder of the wheel, of a cache, and a stand-in.
PATH = re.compile(r"(?<![\w/.-])(?:tests|hf_prefopt|recipes|ds_configs|benchmarks|docs|LICENSES)/[\w./*-]*[\w/*]")
ELSEWHERE = {"hf_prefopt/shipped/", "hf_prefopt/reference_log_probs", "ds_configs/NAME.yaml"}
OF_OTHERS = {"--no-build-isolation", "--no-deps", "--max-lora-rank"}  # pip's and vLLM's
YOURS = re.compile(r"mine|runs/.*")  # settings files of the reader


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def commands_of(text: str) -> Iterator[list[str]]:
    """The words of each command line in a block or in the text, without comments and the prompt `$`."""
    blocks = re.findall(r"```(?:bash)?\n(.*?)```|((?:^    .*\n)+)", text, flags=re.DOTALL | re.MULTILINE)
    lines = "\n".join(block or indented for block, indented in blocks).replace("\\\n", " ").splitlines()
    for line in (*lines, *inline_code(text)):
        line = re.sub(r"srun bash -c '(.*)'", r"\1", line)
        plain = re.sub(r"^\s*(\$ )?|[\[\]]", "", line)
        if re.match(r"hf_prefopt |accelerate |--\w", plain) and not set("│╭…") & set(plain):
            yield shlex.split(plain, comments=True)


@cache
def options_of(command: str) -> frozenset[str]:
    parser = parser_of(importlib.import_module(f"hf_prefopt.commands.{command}"), command)
    return frozenset(parser._option_string_actions)


@cache
def options_of_accelerate() -> frozenset[str]:
    return frozenset(launch_command_parser()._option_string_actions)


def unknown_options(words: list[str]) -> list[str]:
    """The options of a command line that its command does not have; of a bare option, that no command has."""
    options = [word.partition("=")[0] for word in words if word.startswith("--")]
    scripts = [at for at, word in enumerate(words) if word == "hf_prefopt" or word.startswith("recipes/")]
    if words[0].startswith("--"):  # written alone
        known = options_of_accelerate().union(OF_OTHERS, *map(options_of, COMMANDS))
        return [option for option in options if option not in known]
    if not scripts:
        return []
    before, after = words[: scripts[0]], words[scripts[0] + 1 :]
    command = after[0] if words[scripts[0]] == "hf_prefopt" and after else "train"
    own = [word for word in after if word.startswith("--")]
    return [
        *(option for option in before if option.startswith("--") and option not in options_of_accelerate()),
        *(option for option in own if option not in options_of(command) | {"--version"}),
    ]


@each_page
def test_files_exist(page):
    named = {path for code in inline_code(page.read_text("utf-8")) for path in PATH.findall(code)} - ELSEWHERE
    assert [path for path in named if not any(ROOT.glob(path.rstrip("/")))] == []


@each_page
def test_tests_exist(page):
    """Each test that a page names exists in the file that the page names before it. A file name without a folder
    belongs to the folder of the previous file.
    """
    for line in page.read_text("utf-8").splitlines():
        file = None
        for code in inline_code(line):
            if code.startswith("tests/") and code.endswith(".py"):
                file = ROOT / code
            elif re.fullmatch(r"test_\w+", code):
                assert file is not None and f"def {code}(" in file.read_text("utf-8"), f"{page.name}: {code}"


@each_page
def test_commands_have_their_options(page):
    found = {" ".join(words): unknown_options(words) for words in commands_of(page.read_text("utf-8")) if words}
    assert {command: unknown for command, unknown in found.items() if unknown} == {}


@each_page
def test_settings_files_exist(page):
    for words in commands_of(page.read_text("utf-8")):
        for option, value in pairwise(words):
            if option in ("--config", "--config_file", "--copy") and value not in ("NAME", "ds_configs/NAME.yaml"):
                known = {*recipes(), *engines(), *(engines() if option == "--copy" else ())}
                is_known = value in known or (ROOT / value).is_file() or YOURS.match(value)
                assert is_known, f"{page.name}: {option} {value}"


def test_a_wrong_option_is_found():
    (words,) = commands_of("```\naccelerate launch --nodes 2 recipes/dpo_lora.py --learning-rats 1 --beta 1\n```")
    assert unknown_options(words) == ["--nodes", "--learning-rats"]
    assert unknown_options(["--learning_rats", "1"]) == ["--learning_rats"]


def test_the_readmes_counts():
    """The losses of the package, and the families in the table of docs/models.md."""
    readme, models = ((ROOT / name).read_text("utf-8") for name in ("README.md", "docs/models.md"))
    own = [name for name in list_losses() if get_loss(name).function.__module__.startswith("hf_prefopt.")]
    assert f"{len(own)} losses" in readme
    assert f"{models.count(' | exact | ')} model families that train exactly in a test" in " ".join(readme.split())
