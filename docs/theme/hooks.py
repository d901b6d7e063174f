"""Hooks of MkDocs: each page gets a description, and long names in tables break between words.

The description, which search engines and link previews show, is the first paragraph of the page.
"""

import re
from html import escape
from typing import Any


def on_page_markdown(markdown: str, page: Any, **_: Any) -> None:
    """Set the description of the page."""
    page.meta.setdefault("description", first_paragraph(markdown))


def first_paragraph(markdown: str) -> str:
    """Return the paragraph after the title as text for an attribute; empty if something else follows the title."""
    visible = re.sub(r"<!--.*?-->", "", markdown, flags=re.DOTALL).strip()
    _, text, *_ = [*re.split(r"\n\s*\n", visible, maxsplit=2), ""]
    if re.match(r"#|\||```|!|[-*] |::: |<", text):
        return ""
    plain = re.sub(r"[`*]", "", re.sub(r"\[(.*?)\]\(.*?\)", r"\1", text))
    return escape(" ".join(plain.split()))


def on_page_content(html: str, **_: Any) -> str:
    """In the cells of tables, let long names break between their words, and keep numbers such as 2e-07 in one line."""
    return re.sub(r"<td.*?</td>", lambda cell: re.sub(r"(?<=>)[^<]+", _breakable, cell[0]), html, flags=re.DOTALL)


def _breakable(text: re.Match) -> str:
    between_words = r"(?<=[_./=,])(?=[A-Za-z_])|(?<=[a-z])(?=[A-Z])"
    names = re.sub(r"[\w./=,:-]{12,}", lambda name: re.sub(between_words, "<wbr>", name[0]), text[0])
    return re.sub(r"\b\de-\d\d\b", r'<span class="number">\g<0></span>', names)
