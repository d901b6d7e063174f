"""Show rows in the terminal: the text that the model sees, and which tokens are scored.

Scored tokens are enclosed in ⟦ ⟧ and truncated tokens in ⟪ ⟫, so that they can be recognized without colors.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby, islice
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hf_prefopt.data.tokenize import TokenKinds
from hf_prefopt.reporting.shown_rows import Piece, ShownRow, ShownText, State, show_row

_BORDERS = {"chosen": "green", "desirable": "green", "gold": "yellow", "rejected": "red", "undesirable": "red"}
_OTHER_BORDER = "cyan"
STYLES: dict[State, str] = {"prompt": "dim", "scored": "bold cyan", "masked": "yellow", "cut": "red strike"}
BRACKETS: dict[State, tuple[str, str]] = {"scored": ("⟦", "⟧"), "cut": ("⟪", "⟫")}


def preview_rows(
    rows: Iterable[Mapping[str, Any]], tokenizer: PreTrainedTokenizerBase, limit: int = 1
) -> RenderableType:
    """Render the first `limit` rows of a prepared dataset for rich.

    Args:
        rows: Prepared rows (`prepare_dataset`).
        tokenizer: The tokenizer with which the rows were prepared.
        limit: Number of rows to show.
    """
    kinds = TokenKinds(tokenizer)
    return Group(*(render_row(show_row(row, kinds)) for row in islice(rows, limit)))


def print_preview(
    rows: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    limit: int = 1,
    console: Console | None = None,
) -> None:
    """Print the result of `preview_rows` to the given console. Default: standard output."""
    (console or Console()).print(preview_rows(rows, tokenizer, limit))


def render_row(row: ShownRow, characters: int | None = None) -> RenderableType:
    """Render a row for rich, with one panel for the prompt and one for each response.

    Args:
        row: The row.
        characters: Maximum number of characters that are shown of the prompt and of each response. The middle of a
            longer text is left out. None shows all characters.
    """
    panels = [_panel(text, characters) for text in (row.prompt, *row.responses)]
    return Group(Text(f"row {row.number:,}", style="bold"), *panels)


def legend() -> Text:
    """Return the legend of the brackets and colors."""
    names: dict[State, str] = {"prompt": "prompt", "scored": "scored", "masked": "response, not scored"}
    names["cut"] = "cut by max_length"
    shown = Text()
    for state, name in names.items():
        begin, end = BRACKETS.get(state, ("", ""))
        shown.append("  " * bool(shown)).append(f"{begin}{name}{end}", style=STYLES[state])
    return shown


def _panel(text: ShownText, characters: int | None) -> Panel:
    style = "dim" if text.name == "prompt" else _BORDERS.get(text.name, _OTHER_BORDER)
    title = Text(visible(f"{text.name}: {', '.join(text.counts)}"))
    return Panel(_render(_shortened(text.pieces, characters)), title=title, title_align="left", border_style=style)


def _render(pieces: Iterable[Piece]) -> Text:
    """Render a text, with special tokens in italics, and with brackets around scored and around truncated tokens."""
    shown = Text()
    for state, run in groupby(pieces, key=lambda piece: piece.state):
        begin, end = BRACKETS.get(state, ("", ""))
        shown.append(begin, style="bold")
        for piece in run:
            shown.append(visible(piece.text), style=STYLES[state] + " italic" * piece.is_special)
        shown.append(end, style="bold")
    return shown


def visible(text: str) -> str:
    """Replace control characters by visible symbols, because they could control the terminal or reverse the text."""
    return text.translate(_SIGNS)


_SIGNS: dict[int, str] = {code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"}
_SIGNS |= {code: f"<U+{code:04X}>" for code in (*range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def _shortened(pieces: Sequence[Piece], characters: int | None) -> list[Piece]:
    """Return the pieces of a text, without its middle if it has more than `characters` characters.

    Two thirds of `characters` are kept at the start of the text, and one third at its end.
    """
    total = sum(len(piece.text) for piece in pieces)
    if characters is None or total <= characters:
        return list(pieces)
    begin = list(_first(pieces, characters * 2 // 3, lambda text, room: text[:room]))
    end = list(_first(reversed(pieces), characters // 3, lambda text, room: text[-room:]))
    left_out = total - sum(len(piece.text) for piece in (*begin, *end))
    return [*begin, replace(begin[-1], text=f" … {left_out:,} characters … ", is_special=True), *reversed(end)]


def _first(pieces: Iterable[Piece], room: int, cut: Callable[[str, int], str]) -> Iterator[Piece]:
    """Yield the first pieces, up to `room` characters in total. The function `cut` shortens the last one if needed."""
    for piece in pieces:
        if room > 0:
            yield replace(piece, text=cut(piece.text, room))
        room -= len(piece.text)
