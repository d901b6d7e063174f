"""GSM8K problems, and the exact-match score of a generated solution, which compares only its final number.

The package includes the first 200 problems of the test set (MIT, see `recipes/data/README.md`).
"""

import gzip
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from importlib.resources import files

# A minus after a digit or a closing parenthesis is not a sign: in "5-3", the last number is 3.
_NUMBER = r"(?:(?<![\d)])-)?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_MARKED = re.compile(rf"(?:####|\bA:)\s*({_NUMBER})")
_ANY = re.compile(_NUMBER)


def load_gsm8k_problems(limit: int | None = None) -> list[dict[str, str]]:
    """Return the first `limit` problems (`None`: all), as dicts with `question` and `answer`.

    The answer is a worked solution that ends with `#### number`.
    """
    packed = files("hf_prefopt") / "evaluation" / "samples" / "gsm8k_problems.jsonl.gz"
    lines = gzip.decompress(packed.read_bytes()).decode("utf-8").splitlines()
    return [json.loads(line) for line in lines[:limit]]


def final_answer(text: str) -> str | None:
    """Return the final number of a solution in normalized form: `$1,234.00`, `1234` and `1,234.0` all give `"1234"`.

    This is the number after the last marker `####` or `A:`. Without a marker, it is the last number in the text. If the
    text has no number, return `None`.
    """
    found = _MARKED.findall(text) or _ANY.findall(text)
    if not found:
        return None
    number = Decimal(re.sub(r"[$,]", "", found[-1]))
    return f"{number.normalize() + 0:f}"


def exact_match(problem: Mapping[str, str], generated: str) -> float:
    """Return 1.0 if the generated text has the same final answer as the problem's `answer`, else 0.0."""
    return float(final_answer(generated) == final_answer(problem["answer"]))
