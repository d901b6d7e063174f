"""Run TRL's own tests of its offline preference trainers, with TRL and with `hf_prefopt.trl`.

    python -m tests.parity.trl_suite --trl ../trl

`--trl` is a checkout of huggingface/trl at v1.16 (the package does not contain its tests). Each file runs twice, in
separate processes: unchanged, and with TRL's classes replaced by those of `hf_prefopt.trl`. The script prints the
counts, and the tests that pass only with TRL, with their reasons (`trl_expected.py`). If there is no reason for a test,
the script ends with an error. `--only` selects files by a part of their name, and `-k` works as in pytest.

A pass does not prove much: these tests check that training ends and that parameters
change. test_dropin.py compares the numbers.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from tests.parity.trl_expected import expected_reason

FILES = (
    "tests/test_dpo_trainer.py",
    "tests/test_kto_trainer.py",
    "tests/experimental/test_cpo_trainer.py",
    "tests/experimental/test_orpo_trainer.py",
    "tests/experimental/test_tpo_trainer.py",
)
# Training on images is not supported.
TEXT = "not vlm and not vision and not Vision and not image"
ROOT = Path(__file__).parents[2]


def run_file(trl: Path, standins: Path, file: str, is_ours: bool, chosen: str) -> dict[str, str]:
    """Return the outcome of every test of a file: "passed", "skipped", or the error's last line."""
    results = standins / f"{Path(file).stem}-{'ours' if is_ours else 'trl'}.json"
    results.unlink(missing_ok=True)
    environment = os.environ | {
        "HF_HUB_CACHE": str(standins / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(ROOT)]),
        "TRL_SUITE_STANDINS": str(standins),
        "TRL_SUITE_RESULTS": str(results),
        "TRL_SUITE_OURS": str(int(is_ours)),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "trl_plugin", "-k", chosen, str(trl / file)]
    command += ["--rootdir", str(trl), "-c", os.devnull, "--tb=line", "-p", "no:cacheprovider"]
    with (standins / f"{results.stem}.log").open("w") as log:
        subprocess.run(command, cwd=standins, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if not results.exists():
        sys.exit(f"{file} could not be run: see {results.with_suffix('.log')}")
    return json.loads(results.read_text())


def compare(file: str, theirs: dict[str, str], ours: dict[str, str]) -> tuple[str, list[str]]:
    """Return a line of counts, and the tests with an unexpected outcome."""
    passed = [test for test, outcome in theirs.items() if outcome == "passed"]
    failed = {test: ours.get(test, "not run") for test in passed if ours.get(test) != "passed"}
    wrong = [f"{test}: {error}" for test, error in failed.items() if expected_reason(test) is None]
    wrong += [
        f"{test}: passes, and is listed: take it off" for test in passed if test not in failed and expected_reason(test)
    ]
    for test in failed:
        print(f"    {test}: {expected_reason(test) or 'NOT EXPECTED'}")
    line = f"| {Path(file).stem} | {len(passed)} of {len(theirs)} | {len(passed) - len(failed)} | {len(failed)} |"
    return line, wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True)
    parser.add_argument("--standins", type=Path, default=ROOT / "build" / "trl_suite")
    parser.add_argument("--only", default="")
    parser.add_argument("-k", default="", dest="chosen")
    given = parser.parse_args()
    from tests.parity.trl_standins import make_standins

    trl, standins = given.trl.resolve(), given.standins.resolve()
    make_standins(trl, standins)
    lines, wrong = [], []
    for file in FILES:
        if given.only in file:
            chosen = f"({TEXT}) and ({given.chosen})" if given.chosen else TEXT
            outcomes = (run_file(trl, standins, file, is_ours, chosen) for is_ours in (False, True))
            line, others = compare(file, *outcomes)
            print(line, flush=True)
            lines.append(line)
            wrong += others
    print(
        "\n| tests | pass on TRL | of those on hf_prefopt.trl | expected differences |\n|---|---|---|---|",
        *lines,
        sep="\n",
    )
    if wrong:
        sys.exit("\n".join(["", "not as expected:", *wrong]))


if __name__ == "__main__":
    main()
