"""Check the structure of prepared rows without stored settings: rows made by hand, and rows of a stream.

The collator relies on this structure. Without the check, a row with one mask entry too few, or with one label too many,
could be trained on without an error.
"""

from collections.abc import Mapping
from itertools import chain
from typing import Any

from hf_prefopt.kinds import ExampleKind, kind_of_columns


class PreparedRowCheck:
    """Filter that keeps every row but raises `ValueError` for an invalid one.

    A row is invalid if it is too long, if the tokenizer lacks one of its token ids, or if its columns do not match each
    other.

    Args:
        max_length: Maximum number of tokens of prompt + response; None for no limit.
        vocabulary: Number of tokens of the tokenizer.
    """

    def __init__(self, max_length: int | None, vocabulary: int):
        self.max_length, self.vocabulary = max_length, vocabulary

    def __call__(self, row: Mapping[str, Any]) -> bool:
        problem = _tokens_fault(row) or _examples_fault(row) or self._limits_fault(row)
        if problem is not None:
            raise ValueError(f"row {row['row']:,} of this prepared dataset {problem}")
        return True

    def _limits_fault(self, row: Mapping[str, Any]) -> str | None:
        length = len(row["prompt_ids"]) + max(map(len, row["response_ids"]))
        if self.max_length is not None and length > self.max_length:
            return f"has {length:,} tokens, but max_length={self.max_length}: prepare it again"
        ids = [*row["prompt_ids"], *chain.from_iterable(row["response_ids"])]
        if max(ids) >= self.vocabulary:
            return (
                f"has token id {max(ids):,}, but the tokenizer has {self.vocabulary:,} tokens: use the tokenizer that "
                "it was prepared with"
            )
        return f"has token id {min(ids)}: token ids are at least 0" if min(ids) < 0 else None


def _tokens_fault(row: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the responses and their masks; None if they are valid."""
    responses, masks = row["response_ids"], row["scored_masks"]
    if not responses:
        return "has no response in `response_ids`"
    if [len(ids) for ids in responses] != [len(mask) for mask in masks]:
        return (
            f"has responses of {[len(ids) for ids in responses]} tokens and `scored_masks` of "
            f"{[len(mask) for mask in masks]} entries: give one entry per response token"
        )
    for place, mask in enumerate(masks):
        if not {*mask} <= {0, 1}:
            return f"has `scored_masks` other than 0 and 1: {sorted({*mask} - {0, 1})}"
        if not any(mask):
            return f"has no scored token in response {place}: `scored_masks` is 0 everywhere"
        if not row["prompt_ids"] and mask[0]:
            return (
                "has no prompt, so nothing predicts the first token of a response: set its entry of `scored_masks` to 0"
            )
    return None


def _examples_fault(row: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the columns that say how the responses are compared; None if they are valid."""
    kind = kind_of_columns(row)
    assert kind is not None, "prepared rows are of a kind"
    responses, examples = len(row["response_ids"]), kind.count_examples(row)
    if not examples:
        return f"has no example in `{kind.columns[0]}`"
    places = [(name, place) for name in ("pairs", "golds") for place in _flat(row.get(name, ()))]
    outside = next(((name, place) for name, place in places if not 0 <= place < responses), None)
    if outside is not None:
        return f"has {outside[1]} in `{outside[0]}`, but its {responses} responses are 0 to {responses - 1}"
    same = next((pair for pair in row.get("pairs", ()) if len(pair) != 2 or pair[0] == pair[1]), None)
    if same is not None:
        return f"has {list(same)} in `pairs`: name two different responses, [chosen, rejected]"
    return _counts_fault(row, kind, responses, examples)


def _counts_fault(row: Mapping[str, Any], kind: ExampleKind, responses: int, examples: int) -> str | None:
    """Return which column has too many or too few entries; None if there is no such column."""
    per_response = [name for name in _PER_RESPONSE if name in row and (row[name] or name != "scores")]
    per_example = [name for name in (*kind.optional_columns, "golds") if name in row]
    for names, count, per in ((per_response, responses, "response"), (per_example, examples, "example")):
        for name in names:
            if len(row[name]) != count:
                return f"has {len(row[name])} entries in `{name}` for {count} {per}s"
    return None


# Columns with one entry per response. In a list that has only ranks, `scores` is empty.
_PER_RESPONSE = ("labels", "quantiles", "ranks", "scores", "token_weights")


def _flat(places: Any) -> list[int]:
    return [place for item in places for place in (item if isinstance(item, list | tuple) else [item])]
