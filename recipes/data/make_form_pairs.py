"""Make `form_pairs` from the answers in `pandalm_pairs`: a pair has one answer in two forms; the prompt asks for one.

There are four kinds of forms with two forms each, so each question is asked eight times. The chosen response has the
form that the prompt asks for, and the rejected response has the other form of the same kind. Each pair of responses
occurs twice, and each of the two responses is chosen once. Therefore neither the length nor the form of a response is
preferred in general: only the prompt determines which response is right.

    python recipes/data/make_form_pairs.py
"""

import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(__file__).parent
FORMS = (
    ("Write in capital letters only.", str.upper, "Write in small letters only.", str.lower),
    ("Begin with: My friend,", "My friend, {}".format, "Begin with: Dear reader,", "Dear reader, {}".format),
    ("Put the answer in brackets.", "[{}]".format, "Put the answer in quotation marks.", '"{}"'.format),
    ("End with: That is all.", "{} That is all.".format, "End with: Ask me more.", "{} Ask me more.".format),
)
LONGEST_QUESTION, LONGEST_ANSWER = 200, 110


def answers(split: str) -> dict[str, str]:
    """Return an answer of one line for each question: the first one that people preferred to another."""
    found: dict[str, str] = {}
    with gzip.open(FOLDER / "pandalm_pairs" / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        for row in map(json.loads, lines):
            question, answer = row["prompt"][-1]["content"].strip(), row["chosen"][-1]["content"].strip()
            is_line = (
                answer.isascii() and answer[0].isupper() and answer[-1] in ".!?" and not set(answer) & set('\n[]"')
            )
            if is_line and len(question) <= LONGEST_QUESTION and 20 <= len(answer) <= LONGEST_ANSWER:
                found.setdefault(question, answer)
    return found


def pairs(question: str, answer: str) -> Iterator[dict]:
    """Yield the eight pairs of a question."""
    for first, in_first, second, in_second in FORMS:
        for request, chosen, rejected in ((first, in_first, in_second), (second, in_second, in_first)):
            yield {
                "prompt": [{"role": "user", "content": f"{question}\n\n{request}"}],
                "chosen": [{"role": "assistant", "content": chosen(answer)}],
                "rejected": [{"role": "assistant", "content": rejected(answer)}],
            }


def main() -> None:
    for split in ("train", "test"):
        rows = [row for question, answer in answers(split).items() for row in pairs(question, answer)]
        random.Random(0).shuffle(rows)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path = FOLDER / "form_pairs" / f"{split}.jsonl.gz"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
        print(f"{path}: {len(rows)} pairs")


if __name__ == "__main__":
    main()
