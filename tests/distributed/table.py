"""Print a Markdown table that compares every engine and every case with one process.

python -m tests.distributed.table [engine …]
"""

import argparse
import contextlib
import sys
import tempfile
from pathlib import Path

from tests.distributed.cases import ALL_OF, CASES
from tests.distributed.engines import ENGINES
from tests.distributed.launch import differences, launch, one_process


def main() -> None:
    options = argparse.ArgumentParser()
    options.add_argument("engines", nargs="*")
    options.add_argument("--all-cases", action="store_true", help="run every case under every engine, which is slow")
    arguments = options.parse_args()
    print("| engine | loss, layout, what trains | losses | weights | metrics |\n|---|---|---|---|---|")
    for engine in arguments.engines or ENGINES:
        cases = list(CASES) if arguments.all_cases else ALL_OF[engine]
        with tempfile.TemporaryDirectory() as folder:
            outcomes = launch([(engine, case) for case in cases], Path(folder))
        for (_, case), ranks in outcomes.items():
            failed = next((outcome["error"].strip().splitlines()[-1] for outcome in ranks if "error" in outcome), None)
            with contextlib.redirect_stdout(sys.stderr):  # the output of the trainers is not part of the table
                found = [] if failed else [differences(outcome, one_process(case)) for outcome in ranks]
            cells = [failed] if failed else [f"{max(d[name] for d in found):.0e}" for name in found[0]]
            print(f"| {engine} | {case} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
