"""Random rows and mutations of valid rows: prepared rows match the raw row, or a clear error names the column.

The reference implementation is `fuzzing.expected_row`, which renders and tokenizes independently. Every run tests a few
hundred rows, and `make nightly` tests 10,000.
"""

import json
import logging
import re
import traceback
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hf_prefopt.data.prepare import prepare_dataset
from hf_prefopt.data.rows import BadRow, Tie
from hf_prefopt.data.sources import as_dataset
from hf_prefopt.kinds import TRIPLES
from tests.data import fuzzing
from tests.data.fuzzing import HARMFUL, HARMLESS, Meaning, Row, expected_row
from tests.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
WITH_BOS = tiny_tokenizer(bos=True)
OURS = (ValueError, BadRow, Tie)


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    datasets.disable_caching()
    datasets.disable_progress_bars()
    yield
    datasets.enable_caching()
    datasets.enable_progress_bars()


class Said(logging.Handler):
    """A log handler that keeps the messages of the package."""

    def __init__(self):
        super().__init__()
        self.text = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.text += record.getMessage() + "\n"


def prepared(row: Row, tokenizer=TOKENIZER, as_stream: bool = False, **options) -> tuple[list[Row], str]:
    """Return the prepared rows of a dataset of this row, and the log; errors must
    come from our code and name a cause.
    """
    said, logger = Said(), logging.getLogger("hf_prefopt")
    logger.addHandler(said)
    logger.propagate = False
    try:
        rows = as_dataset([row], "train")
        rows = rows.to_iterable_dataset() if as_stream else rows
        return list(prepare_dataset(rows, tokenizer, max_length=None, **options)), said.text
    except Exception as error:
        check_error(error, row)
        raise Rejected(str(error)) from error
    finally:
        logger.removeHandler(said)
        logger.propagate = True


class Rejected(Exception):
    """A clear error."""


def check_error(error: Exception, row: Row) -> None:
    """Check that the error has one of our types, comes from our code, and names the row or a column."""
    assert type(error) in OURS, f"{type(error)}: {error}"
    assert "/hf_prefopt/" in traceback.extract_tb(error.__traceback__)[-1].filename, error
    assert re.search("|".join(["row 0", "columns?", *map(re.escape, row)]), str(error)), error


def fuzz(count: int, nightly: int, *strategies: st.SearchStrategy):
    """Test a property on `count` fixed rows in every run, and on `nightly` random rows in `make nightly`."""

    def tried(check, number: int):
        how = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
        return settings(max_examples=number, derandomize=number == count, **how)(given(*strategies)(check))

    def both(check):
        globals()[f"{check.__name__}_nightly"] = pytest.mark.nightly(tried(check, nightly))
        return tried(check, count)

    return both


@fuzz(100, 2500, fuzzing.right_rows(), st.booleans(), st.booleans())
def test_right_rows_are_read_as_they_are_meant(case, has_bos, as_stream):
    row, meaning = case
    tokenizer = WITH_BOS if has_bos else TOKENIZER
    (found,), _ = prepared(row, tokenizer, as_stream, kind=TRIPLES if "golds" in meaning.columns else None)
    assert found == {**expected_row(meaning, tokenizer), "row": 0}
    for ids in found["response_ids"]:  # no text is lost
        assert tokenizer.decode(found["prompt_ids"] + ids).endswith(_end(meaning, found["response_ids"].index(ids)))


def _end(meaning: Meaning, place: int) -> str:
    response = meaning.responses[place]
    return response + "<|im_end|>" if isinstance(response, str) else response[-1]["content"] + "<|im_end|>\n"


@fuzz(60, 1000, fuzzing.mutated(HARMLESS), st.booleans())
def test_what_changes_nothing_changes_nothing(case, as_stream):
    name, _, mutant, meaning = case
    kind = TRIPLES if "golds" in meaning.columns else None
    (found,), _ = prepared(mutant, as_stream=as_stream, kind=kind)
    assert {column: found[column] for column in meaning.columns} == meaning.columns, name
    assert _tokens(found) == _tokens(expected_row(meaning, TOKENIZER)), name


def _tokens(row: Row) -> Row:
    return {name: row[name] for name in ("prompt_ids", "response_ids", "scored_masks")}


@fuzz(40, 500, fuzzing.right_rows(), st.sampled_from(["<s>", "<s><s>"]), st.booleans())
def test_a_bos_that_the_text_has_already_is_not_doubled(case, bos, everywhere):
    row, meaning = case
    if not isinstance(meaning.prompt, str):
        return
    prompt = bos + row["prompt"]
    sides = [name for name in row if everywhere and name in ("chosen", "rejected", "reference", "completion")]
    try:
        with_bos = {**row, "prompt": prompt, **{name: prompt + row[name] for name in sides}}
        (found,), _ = prepared(with_bos, WITH_BOS, kind=TRIPLES if "golds" in meaning.columns else None)
    except Rejected:
        return
    ids = found["prompt_ids"] + found["response_ids"][0]
    assert ids.count(WITH_BOS.bos_token_id) == 1, WITH_BOS.decode(ids)
    if not sides:
        assert _tokens(found) == _tokens(expected_row(meaning, WITH_BOS))


@fuzz(200, 4000, fuzzing.mutated(HARMFUL), st.booleans())
def test_a_mutated_row_is_read_faithfully_or_is_an_error(case, as_stream):
    _, row, mutant, meaning = case
    try:
        rows, said = prepared(mutant, as_stream=as_stream)
    except Rejected:
        return
    for found in rows:
        check_faithful(found, said, row, mutant, meaning)


def check_faithful(found: Row, said: str, row: Row, mutant: Row, meaning: Meaning) -> None:
    """Check that texts of the original row that are still in the mutated row are shown, in order, and nothing else."""
    full = [TOKENIZER.decode(found["prompt_ids"] + ids) for ids in found["response_ids"]]
    unused = [text for column in _unused(said) for text in _strings({column: mutant.get(column)})]

    def is_kept(text: str) -> bool:
        return _count(text, row) <= _count(text, mutant)

    for text in filter(is_kept, _texts_of(meaning.prompt)):
        assert all(_is_shown(text, whole) for whole in full) or any(text in other for other in unused), text
    sides = [_texts_of(response) for response in meaning.responses]
    if len(full) == len(sides) and all(is_kept(text) for side in sides for text in side):
        # The space that joins a text to its prompt is not part of a message.
        sides = [[text.strip() for text in side] for side in sides]
        in_order = all(text in whole for whole, side in zip(full, sides, strict=True) for text in side)
        # Scores and verdicts that were changed may prefer another response.
        in_any_order = all(any(text in whole for whole in full) for side in sides for text in side)
        assert in_order or (in_any_order and _verdict_changed(row, mutant, meaning))
    check_scored(found, mutant)


def _is_shown(text: str, whole: str) -> bool:
    """Return whether a text is shown as it is, or the turns of a transcript are shown as messages."""
    turns = re.split("\n\n(?:Human|Assistant):", text)
    return text in whole or (len(turns) > 1 and all(turn.strip() in whole for turn in turns))


def check_scored(found: Row, row: Row) -> None:
    """Check that the scored text is in the row, and contains no header and no serialized structure."""
    there = " ".join(_strings(row))
    for ids, mask in zip(found["response_ids"], found["scored_masks"], strict=True):
        scored = TOKENIZER.decode([token for token, is_scored in zip(ids, mask, strict=True) if is_scored])
        words = re.sub(r"<\|im_end\|>\n?", "\0", scored)
        # Without a prompt, the first token is not scored and may end inside a character.
        parts = [_squeezed(part).lstrip("\ufffd") for part in words.split("\0")]
        assert all(part in _squeezed(there) for part in parts), scored
        assert "<|im_start|>" not in scored or "<|im_start|>" in there
        assert not re.search(r"""['"]role['"]: ['"]""", scored)


def _count(text: str, row: Row) -> int:
    """Count the texts of a row that contain this text."""
    return sum(text in other for other in _strings(row))


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _strings(value: Any) -> Iterator[str]:
    """Yield all texts in a value, at any depth, including texts inside JSON."""
    if isinstance(value, dict):
        for key, item in value.items():
            if key not in ("role", "from"):
                yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
    elif isinstance(value, str):
        yield value
        if value.lstrip()[:1] in ("[", "{"):
            try:
                yield from _strings(json.loads(value))
            except ValueError:
                return


def _texts_of(content: Any) -> list[str]:
    return [content] if isinstance(content, str) else [message["content"] for message in content]


def _unused(said: str) -> list[str]:
    """Return the columns that a message reports as not used."""
    found = re.search("columns not used: ([^;\n]*)", said)
    return found[1].split(", ") if found else []


def _verdict_changed(row: Row, mutant: Row, meaning: Meaning) -> bool:
    texts = [text for side in (meaning.prompt, *meaning.responses) for text in _texts_of(side)]
    changed = [name for name in {*row, *mutant} if name not in mutant or name not in row or row[name] != mutant[name]]
    return all(not any(text in other for other in _strings(row.get(name)) for text in texts) for name in changed)


@fuzz(100, 2000, fuzzing.any_rows, st.booleans())
def test_any_row_is_read_or_is_an_error(row, as_stream):
    try:
        rows, _ = prepared(row, as_stream=as_stream)
    except Rejected:
        return
    for found in rows:
        assert len(found["response_ids"]) == len(found["scored_masks"])
        check_scored(found, row)
