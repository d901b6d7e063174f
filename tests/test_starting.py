"""Importing the package, and commands that need no library, do not import the large libraries, which takes seconds."""

import subprocess
import sys

import pytest

import hf_prefopt
from hf_prefopt.commands import COMMANDS, summary

_HEAVY = ("torch", "transformers", "datasets", "peft", "accelerate")
_RUN = """
import sys
from hf_prefopt.commands import main
code = main(sys.argv[1:])
print("IMPORTED", *(name for name in {heavy!r} if name in sys.modules))
sys.exit(code)
"""


def test_a_reader_that_has_read_enough_ends_the_command_without_a_traceback():
    """For example, `| head` closes the pipe; here, it is closed before the command writes."""
    command = [sys.executable, "-m", "hf_prefopt", "train", "--list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1


def imported(*arguments: str) -> set[str]:
    """Run a command in a new process, and return which of the large libraries it imported."""
    code = _RUN.format(heavy=_HEAVY)
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    return set(found.stdout.rpartition("IMPORTED")[2].split())


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["train", "--list"]])
def test_help_and_lists_import_no_library(words):
    assert imported(*words) == set()


def test_the_losses_need_torch_but_no_trainer():
    """The losses need torch, and the argument parser of transformers, which does not import torch."""
    assert imported("losses", "dpo") == {"torch", "transformers"}


def test_every_public_name_can_be_imported():
    assert set(hf_prefopt.__all__) == {*hf_prefopt._MODULES, "__version__"} <= set(dir(hf_prefopt))
    for name in hf_prefopt.__all__:
        assert getattr(hf_prefopt, name) is not None
    assert hf_prefopt.callbacks.__name__ == "hf_prefopt.callbacks"  # a module that no other module needs
    with pytest.raises(AttributeError, match="module 'hf_prefopt' has no attribute 'nothing'"):
        _ = hf_prefopt.nothing


@pytest.mark.parametrize("name", COMMANDS)
def test_the_overview_has_the_first_line_of_each_docstring(name):
    command = __import__(f"hf_prefopt.commands.{name}", fromlist=["run"])
    assert summary(name) == command.__doc__.splitlines()[0] and callable(command.run)
