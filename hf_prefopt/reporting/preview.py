"""Prepared rows for a person to read: what the model sees, and which tokens count.

Scored tokens stand between ⟦ ⟧, and in color where the terminal has any; what is not scored is dim. Tokens are decoded
run by run, since one character may be several tokens.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby, islice
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hf_prefopt.data.tokenize import TokenKinds

_RESPONSE_STYLES = {"chosen": "green", "desirable": "green", "gold": "yellow", "rejected": "red", "undesirable": "red"}
_OTHER_RESPONSE_STYLE = "cyan"


def preview_rows(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, limit: int = 1
) -> RenderableType:
    """The first `limit` groups of a prepared data set as something that rich prints.

    Args:
        rows: prepared rows (`prepare_dataset`).
        tokenizer: the one that they were prepared with.
        limit: the number of groups shown.
    """
    kinds = TokenKinds(tokenizer)
    return Group(*(_show_group(row, kinds) for row in islice(rows, limit)))


def print_preview(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    limit: int = 1,
    console: Console | None = None,
) -> None:
    """Print `preview_rows` to the console given, or to standard output."""
    (console or Console()).print(preview_rows(rows, tokenizer, limit))


def _show_group(row: Mapping[str, Any], kinds: TokenKinds) -> RenderableType:
    prompt = row["prompt_ids"]
    panels = [_panel("prompt", _count(len(prompt), "token"), _show_tokens(prompt, [0] * len(prompt), "", kinds), "dim")]
    names, example_columns = _name_responses(row), _describe_responses(row)
    for name, ids, mask, said in zip(names, row["response_ids"], row["scored_masks"], example_columns, strict=True):
        style = _RESPONSE_STYLES.get(name, _OTHER_RESPONSE_STYLE)
        counts = f"{_count(len(ids), 'token')}, {sum(mask):,} scored{said}"
        panels.append(_panel(name, counts, _show_tokens(ids, mask, style, kinds), style))
    return Group(Text(f"row {row['row']:,}", style="bold"), *panels)


def _panel(name: str, counts: str, body: Text, style: str) -> Panel:
    return Panel(body, title=Text(f"{name}: {counts}"), title_align="left", border_style=style)


def _name_responses(row: Mapping[str, Any]) -> list[str]:
    """The names of a pair's responses, and of a triple's third; by label for unpaired ones, numbers for a list's."""
    if [list(pair) for pair in row.get("pairs", ())] == [[0, 1]]:
        return ["chosen", "rejected", *("gold" for _ in row.get("golds", ()))]
    if "labels" in row:
        return ["desirable" if label else "undesirable" for label in row["labels"]]
    return [f"response {number}" for number in range(len(row["response_ids"]))]


def _describe_responses(row: Mapping[str, Any]) -> list[str]:
    """What a row says of each response: its rank and its score in a list, its quantile."""
    count = len(row["response_ids"])
    ranks = [f", rank {rank:g}" for rank in row.get("ranks", ())] or [""] * count
    scores = [f", score {score:g}" for score in row.get("scores", ())] or [""] * count
    quantiles = [f", quantile {quantile:g}" for quantile in row.get("quantiles", ())] or [""] * count
    return [rank + score + quantile for rank, score, quantile in zip(ranks, scores, quantiles, strict=True)]


def _show_tokens(ids: Sequence[int], mask: Sequence[int], style: str, kinds: TokenKinds) -> Text:
    """The tokens as text: special ones visible, scored ones between ⟦ ⟧ in `style`, the others dim."""
    shown = Text()
    tokens = zip(ids, mask, strict=True)
    for is_scored, run in groupby(tokens, key=lambda token: bool(token[1])):
        base = style if is_scored else "dim"
        shown.append("⟦" if is_scored else "", style="bold")
        for is_special, part in groupby((token for token, _ in run), key=kinds.special.__contains__):
            text = kinds.tokenizer.decode(list(part), skip_special_tokens=False, clean_up_tokenization_spaces=False)
            shown.append(str(text), style=f"{base} italic" if is_special else base)
        shown.append("⟧" if is_scored else "", style="bold")
    return shown


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
