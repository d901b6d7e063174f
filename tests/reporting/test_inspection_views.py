"""An inspection in the terminal and as a page: the same facts, readable without colors, with escaped data."""

from html.parser import HTMLParser
from io import StringIO

import pytest
from rich.console import Console

from hf_prefopt import inspect_dataset
from hf_prefopt.reporting.inspected import facts
from hf_prefopt.reporting.inspection_html import inspection_page, write_inspection
from hf_prefopt.reporting.inspection_text import print_inspection
from tests.data.helpers import chat_pair, reply, say
from tests.tokenizers import CHATML, tiny_tokenizer

EVIL = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'></div></mark>&amp; \x1b[31mred \u202e"


def found(**options):
    """Return an inspection with every state of tokens, and with control characters
    and markup in rows, names and template.
    """
    template = CHATML.replace("'<|im_start|>'", "'<|im_start|><script>t()</script>'")
    chosen = [*reply("Hello. " + EVIL), say("user", "And?"), *reply("Paris. " * 200)]
    rows = [{**chat_pair(), "chosen": chosen, "<script>c()</script>": [1]}] * 2
    rows.append({**chat_pair(), "chosen": [], "<script>c()</script>": [1]})
    settings = {"max_length": 300, "name": "</title><script>n()</script>", **options}
    return inspect_dataset(rows, tiny_tokenizer(template), **settings)


class Page(HTMLParser):
    """A parser that collects the elements of a page with their attributes, and its text."""

    def __init__(self, page: str):
        super().__init__()
        self.elements, self.text, self.open = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open += [tag] * (tag not in ("meta",))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))


def test_nothing_from_the_data_is_markup():
    inspection = found()
    page = Page(inspection_page(inspection))
    assert not page.open
    assert {tag for tag, _ in page.elements}.isdisjoint({"script", "img", "link", "iframe", "object", "base", "form"})
    names = {name for _, attributes in page.elements for name in attributes}
    assert not {name for name in names if name.startswith("on") or name in ("src", "href")}
    text = "".join(data for _, data in page.text)
    for said in ("<script>alert('x')</script>", "<script>c()</script>", "<script>t()</script>", "<script>n()</script>"):
        assert said in text
    assert "\x1b" not in text and "␛[31mred <U+202E>" in text


def test_the_page_loads_nothing():
    page = inspection_page(found())
    (policy,) = [a["content"] for tag, a in Page(page).elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"
    style = page.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "http" not in style
    assert "prefers-color-scheme: dark" in style and 'name="viewport"' in page


def test_the_page_has_every_fact_and_every_token():
    inspection = found()
    page = Page(inspection_page(inspection))
    text = "".join(data for _, data in page.text)
    assert all(name in text and value in text for name, value in facts(inspection))
    marked = {tag: "".join(data for at, data in page.text if at == tag) for tag in ("mark", "del")}
    assert "Hello." in marked["mark"] and "Paris." in marked["del"]
    assert "And?" in text and "And?" not in marked["mark"]
    assert "1 of 3 rows cannot be used" in text


def test_the_page_is_written_into_a_new_folder(tmp_path):
    write_inspection(found(rows=0), tmp_path / "a" / "page.html")
    assert (tmp_path / "a" / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def printed(inspection, **console) -> str:
    out = Console(width=100, file=StringIO(), **console)
    print_inspection(inspection, out)
    return out.file.getvalue()


def test_without_colors_brackets_tell_what_is_scored_and_cut():
    text = printed(found())
    assert "\x1b" not in text and "prompt  ⟦scored⟧  response, not scored  ⟪cut by max_length⟫" in text
    scored = " ".join(part.split("⟧")[0] for part in text.split("⟦")[2:])
    cut = " ".join(part.split("⟫")[0] for part in text.split("⟪")[2:])
    assert "Hello." in scored and "Paris." in cut and "And?" not in scored + cut
    assert "Not used" in text and "<script>c()</script>" in text and "1 of 3 rows cannot be used" in text


@pytest.mark.parametrize(("no_color", "is_colored"), [(False, True), (True, False)])
def test_colors_in_a_terminal_that_has_them(no_color, is_colored, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    text = printed(found(), force_terminal=True, color_system="standard", no_color=no_color)
    # 36 is cyan, the color of scored tokens; codes in the data (31) are not printed.
    assert ("\x1b[1;36m" in text) == is_colored and "\x1b[31mred" not in text


def test_long_texts_are_shown_without_their_middle():
    inspection = found()
    out = Console(width=100, file=StringIO())
    print_inspection(inspection, out, characters=60)
    assert " characters … " in out.file.getvalue() and " characters … " not in printed(found(max_length=None, rows=0))
