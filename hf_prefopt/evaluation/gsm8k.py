"""GSM8K's problems and its exact-match score: does a generated solution end in the right number?

The first 200 problems of the test set travel with the package (MIT, see `recipes/data/README.md`).
"""

import gzip
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from importlib.resources import files

# A minus counts as a sign only where no operand stands before it: in "5-3" the last number is 3.
_NUMBER = r"(?:(?<![\d)])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(rf"(?:####|\bA:)\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)


def load_gsm8k_problems(limit: int | None = None) -> list[dict[str, str]]:
    """The problems, each with `question` and `answer` (a worked solution that ends in `#### number`)."""
    packed = files("hf_prefopt") / "evaluation" / "samples" / "gsm8k_problems.jsonl.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").splitlines()
    return [json.loads(line) for line in lines[:limit]]


def final_answer(text: str) -> str | None:
    """The number a solution ends in, in one spelling: `$1,234.00`, `1234` and `1,234.0` are all `"1234"`.

    That is the number after the last `####` or `A:`, and where neither is followed by one, the last number of the
    text; `None` where there is no number.
    """
    found = _MARKED.findall(text) or _ANY.findall(text)
    if not found:
        return None
    number = Decimal(re.sub(r"[$,]", "", found[-1]))
    return f"{number.normalize() + 0:f}"


def exact_match(problem: Mapping[str, str], generated: str) -> float:
    """1.0 where the generated text's final answer is that of the problem's `answer`, else 0.0."""
    return float(final_answer(generated) == final_answer(problem["answer"]))
