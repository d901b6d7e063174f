"""Data sets are read by a Hub name, a folder, a file or a pattern; errors name what is missing or broken."""

import gzip
import json

import pytest
from datasets import Dataset

from hf_prefopt.data.files import load_splits

ROWS = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(4)]
LINES = "\n".join(map(json.dumps, ROWS))


def write(folder):
    """A file of each kind with the same rows."""
    (folder / "rows.jsonl").write_text(LINES)
    (folder / "rows.json").write_text(json.dumps(ROWS))
    (folder / "rows.jsonl.gz").write_bytes(gzip.compress(LINES.encode()))
    data = Dataset.from_list(ROWS)
    data.to_csv(folder / "rows.csv")
    data.to_csv(folder / "rows.tsv", sep="\t")
    data.to_parquet(folder / "rows.parquet")


@pytest.mark.parametrize("name", ["jsonl", "json", "jsonl.gz", "csv", "tsv", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_files_of_every_kind(name, streaming, tmp_path):
    write(tmp_path)
    splits = load_splits(str(tmp_path / f"rows.{name}"), streaming=streaming)
    assert list(splits) == ["train"]
    assert [{key: str(value) for key, value in row.items()} for row in splits["train"]] == ROWS


def test_several_files_by_a_pattern(tmp_path):
    for number in (2, 1):
        (tmp_path / f"part{number}.jsonl").write_text(json.dumps({"prompt": str(number)}))
    assert load_splits(str(tmp_path / "part*.jsonl"))["train"]["prompt"] == ["1", "2"]


def test_a_folder_has_its_splits(tmp_path):
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(LINES)
    assert set(load_splits(str(tmp_path))) == {"train", "test"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "missing.jsonl: there is no such file$"),
        ("missing", "missing: there is no such file or folder$"),
        ("*.parquet", "parquet: there is no such file$"),
        ("empty.jsonl", "empty.jsonl is empty$"),
        ("broken.jsonl", "broken.jsonl, line 3 is no JSON: "),
        ("*.*", "is of .csv, .jsonl: give one of .json, "),
        ("notes.txt", "is of .txt: give one of .json, "),
    ],
)
def test_what_cannot_be_read_is_named(name, message, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text(LINES.replace('"2"', '"2'))
    (tmp_path / "rows.csv").write_text("prompt,chosen\n")
    if name == "notes.txt":
        (tmp_path / "notes.txt").write_text("some text")
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path / name))
