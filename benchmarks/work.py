"""The data of the benchmark, in one form for both trainers.

`hf_prefopt` trains on prepared rows (prompt, responses, pairs). TRL trains on the same token ids, with one row for each
pair. Real rows are tokenized by both, and the token ids must agree.
"""

import gzip
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
ROOT = Path(__file__).resolve().parent.parent
# Random batches that TRL would pad beyond this are drawn again, because TRL needs about 3 MB per position.
LARGEST_PADDED = 5500


@dataclass(frozen=True)
class Work:
    """One line of the benchmark.

    Attributes:
        name: the name in tables.
        batches: prepared rows of successive steps; each round takes the next one.
    """

    name: str
    batches: Sequence[Sequence[Row]]

    def batch(self, step: int) -> Sequence[Row]:
        """The rows of a step."""
        return self.batches[step % len(self.batches)]


def prepared(prompt: Sequence[int], responses: Sequence[Sequence[int]], row: int = 0) -> Row:
    """A prepared row in which the first response is preferred to each other one, and all response tokens are scored."""
    return {
        "prompt_ids": list(prompt),
        "response_ids": [list(response) for response in responses],
        "scored_masks": [[1] * len(response) for response in responses],
        "pairs": [[0, other] for other in range(1, len(responses))],
        "row": row,
    }


def as_pairs(rows: Sequence[Row]) -> list[dict[str, list[int]]]:
    """The same data in TRL's columns: a row for each pair, with its prompt."""
    return [
        {
            "prompt_ids": row["prompt_ids"],
            "chosen_ids": row["response_ids"][chosen],
            "rejected_ids": row["response_ids"][rejected],
        }
        for row in rows
        for chosen, rejected in row["pairs"]
    ]


def as_groups_of_pairs(rows: Sequence[Row]) -> list[Row]:
    """The same data with a separate group for each pair, for comparison with sharing a prompt among pairs."""
    return [
        prepared(pair["prompt_ids"], [pair["chosen_ids"], pair["rejected_ids"]], number)
        for number, pair in enumerate(as_pairs(rows))
    ]


def count_pairs(rows: Sequence[Row]) -> int:
    """The pairs of some rows."""
    return sum(len(row["pairs"]) for row in rows)


def real_tokens(rows: Sequence[Row]) -> int:
    """2p + c + r, summed over the pairs: their real tokens, independent of how they are computed."""
    return sum(2 * len(p["prompt_ids"]) + len(p["chosen_ids"]) + len(p["rejected_ids"]) for p in as_pairs(rows))


def shared_positions(rows: Sequence[Row]) -> int:
    """Positions with each prompt computed once and no padding."""
    return sum(len(row["prompt_ids"]) + sum(map(len, row["response_ids"])) for row in rows)


def padded_positions(rows: Sequence[Row]) -> int:
    """Positions with one sequence (prompt and response) for each response, padded to the longest.

    In rows with several pairs, a response counts once; see `as_groups_of_pairs` for the sequences that TRL computes.
    """
    longest = max(len(row["prompt_ids"]) + max(map(len, row["response_ids"])) for row in rows)
    return sum(len(row["response_ids"]) for row in rows) * longest


def synthetic(
    vocabulary: int,
    pairs: int,
    prompt: int,
    response: int,
    responses: int = 2,
    steps: int = 4,
    text: Sequence[int] = (),
) -> list[list[Row]]:
    """Batches whose groups all have the same lengths, so that no padding is needed.

    The tokens are pieces of `text` if it is given. Otherwise they are random; log-probs are then so negative that
    rounding changes the fourth digit of a log-ratio.
    """
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        if not text:
            return [rng.randrange(3, vocabulary) for _ in range(count)]
        start = rng.randrange(len(text) - count)
        return list(text[start : start + count])

    return [
        [prepared(tokens(prompt), [tokens(response) for _ in range(responses)], row) for row in range(pairs)]
        for _ in range(steps)
    ]


def shuffled_batches(
    rows: Sequence[Row], size: int, steps: int, seed: int = 0, largest: int = LARGEST_PADDED
) -> list[list[Row]]:
    """Random batches, as from a shuffled dataset; batches that TRL would pad beyond `largest` are drawn again."""

    def draws() -> Iterator[list[Row]]:
        rng = random.Random(seed)
        for _ in range(1000):
            batch = rng.sample(list(rows), size)
            if padded_positions(as_groups_of_pairs(batch)) <= largest:
                yield batch

    found = [batch for batch, _ in zip(draws(), range(steps), strict=False)]
    if len(found) < steps:
        raise ValueError(f"only {len(found)} of {steps} random batches of {size} rows fit {largest} padded positions")
    return found


def read_rows(path: str | Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file, gzipped."""
    with gzip.open(ROOT / path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def ranked_as_pairs(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each list of responses, raw pairs of the best response and each of the others."""
    pairs = []
    for row in rows:
        best, *others = sorted(row["responses"], key=lambda response: -response["wins"])
        pairs += [
            {"prompt": row["prompt"], "chosen": [assistant(best)], "rejected": [assistant(other)]} for other in others
        ]
    return pairs


def assistant(response: Mapping[str, Any]) -> dict[str, str]:
    """A response as an assistant message."""
    return {"role": "assistant", "content": response["content"]}


def merged(pairs: Sequence[Row]) -> Row:
    """Merge prepared pairs with the same prompt and the same chosen response into one group."""
    first = pairs[0]
    for pair in pairs:
        if pair["prompt_ids"] != first["prompt_ids"] or pair["response_ids"][0] != first["response_ids"][0]:
            raise ValueError("the pairs of a list have different prompts or different best responses")
    return prepared(first["prompt_ids"], [first["response_ids"][0], *(pair["response_ids"][1] for pair in pairs)])
