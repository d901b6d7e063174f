"""Datasets are read by Hub name, folder, file or pattern; errors name what is missing or broken."""

import gzip
import json

import pytest
from datasets import Dataset

from hf_prefopt.data.files import load_splits

ROWS = [{"prompt": f"{n}", "chosen": "yes", "rejected": "no"} for n in range(4)]
LINES = "\n".join(map(json.dumps, ROWS))


def write(folder):
    """Write the same rows to a file of each type."""
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
        ("broken.jsonl", "broken.jsonl, line 3, column "),
        ("*.*", "has the file type .csv, .jsonl: use one of .json, "),
        ("notes.txt", "has the file type .txt: use one of .json, "),
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


PARQUET = b"PAR1 and then nothing of the kind"
OTHER = json.dumps({"question": "a", "chosen": "b", "rejected": "c"})
FAULTS = {
    "half a file": ({"a.jsonl.gz": gzip.compress(LINES.encode())[:-9]}, "a.jsonl.gz cannot be read: it is incomplete"),
    "no gzip file": ({"a.jsonl.gz": LINES.encode()}, "a.jsonl.gz cannot be read"),
    "an empty gzip file": ({"a.jsonl.gz": gzip.compress(b"")}, "a.jsonl.gz is empty"),
    "a line of a gzip file": (
        {"a.jsonl.gz": gzip.compress(LINES.replace('"2"', '"2').encode())},
        "gz, line 3, column ",
    ),
    "half a list": ({"a.json": json.dumps(ROWS, indent=1)[:-9].encode()}, "a.json, line 20, column "),
    "an empty list": ({"a.json": b"[]"}, "a.json has no rows"),
    "blank lines": ({"a.jsonl": b"\n \n"}, "a.jsonl is empty"),
    "numbers": ({"a.jsonl": b"1\n2"}, "a.jsonl, line 1 is of type int, not a row"),
    "another encoding": ({"a.jsonl": LINES.replace("yes", "oui, cé").encode("latin-1")}, "line 1 is not UTF-8"),
    "too many fields": ({"a.csv": b"prompt,chosen\n1,2\n1,2,3"}, "a.csv, line 3 has 3 fields, and the header has 2"),
    "a header alone": ({"a.csv": b"prompt,chosen\n"}, "a.csv has a header but no rows"),
    "no Parquet": ({"a.parquet": PARQUET}, "a.parquet is not a Parquet file"),
    "no Arrow": ({"a.arrow": PARQUET}, "a.arrow is not an Arrow file"),
}
# For a stream, these errors are raised when it is read.
FAULTS_OF_SEVERAL = {
    "other columns": (
        {"a.jsonl": LINES.encode(), "b.jsonl": OTHER.encode()},
        "b.jsonl has the columns question, chosen, rejected, and .*a.jsonl has prompt, chosen, rejected",
    ),
    "other types": (
        {"a.jsonl": LINES.encode(), "b.jsonl": json.dumps({**ROWS[0], "prompt": [{"role": "user"}]}).encode()},
        "b.jsonl: `prompt` is of type list, and of type str in .*a.jsonl",
    ),
}


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("as_folder", [False, True])
@pytest.mark.parametrize("name", FAULTS)
def test_a_faulty_file_is_named_with_its_line(name, as_folder, streaming, tmp_path):
    files, message = FAULTS[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path if as_folder else tmp_path / next(iter(files))), streaming=streaming)


@pytest.mark.parametrize("name", FAULTS_OF_SEVERAL)
def test_files_that_do_not_fit_together_are_named(name, tmp_path):
    files, message = FAULTS_OF_SEVERAL[name]
    for file, content in files.items():
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_splits(str(tmp_path / "*.jsonl"))


def test_a_name_that_is_neither_here_nor_on_the_hub(tmp_path):
    with pytest.raises(ValueError, match="nobody/nothing: no such file or folder, and not "):
        load_splits("nobody/nothing")
    with pytest.raises(ValueError, match="doesn't contain any data files"):
        load_splits(str(tmp_path))
