"""The Python blocks of every page, and the cells of the notebook, run from first to last, as one program.

Names on the Hub refer to a tiny random model and ten pairs, so the blocks train for seconds and need no network.
"""

import json
from contextlib import suppress
from pathlib import Path
from unittest import SkipTest

import datasets
import huggingface_hub.constants
import pytest
from sybil import Document
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

from tests.tiny_models import tiny_model
from tests.tokenizers import tiny_tokenizer

ROOT = Path(__file__).parents[2]
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    if "```python" in page.read_text(encoding="utf-8")
]
MODELS = ["HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-0.6B"]
COMMIT = "0" * 40


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    """Create a Hub cache with the models that the pages name."""
    cache = tmp_path_factory.mktemp("hub")
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    for name in MODELS:
        folder = cache / f"models--{name.replace('/', '--')}"
        for part in (model, tokenizer):
            part.save_pretrained(folder / "snapshots" / COMMIT)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(COMMIT)
    return cache


def ten_pairs(
    name: str, split: str | None = None, data_files: str | None = None
) -> datasets.Dataset | datasets.DatasetDict:
    """Return pairs of messages, for any dataset name or file."""
    rows = datasets.Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"Is {number} even?"}],
                "chosen": [{"role": "assistant", "content": "I can help you."}],
                "rejected": [{"role": "assistant", "content": f"Sorry, {number}."}],
            }
            for number in range(10)
        ]
    )
    return datasets.DatasetDict(train=rows, test=rows) if split is None else rows


@pytest.fixture
def stand_ins(cache, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(datasets, "load_dataset", ten_pairs)


@pytest.mark.usefixtures("stand_ins")
def test_the_cells_of_the_notebook_run():
    cells = json.loads((ROOT / "docs" / "notebooks" / "dpo_on_a_t4.ipynb").read_text(encoding="utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {}
    for source in sources:
        if not source.startswith("%"):  # a shell command of the notebook, not Python
            exec(compile(source, "the notebook", "exec"), names)
    assert names["trainer"].state.global_step > 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
@pytest.mark.usefixtures("stand_ins")
def test_blocks_run(page):
    document = Document.parse(str(page), PythonCodeBlockParser(), SkipParser())
    examples = list(document.examples())
    assert len(examples) >= page.read_text(encoding="utf-8").count("```python")
    for example in examples:
        with suppress(SkipTest):  # a block after `<!-- skip: next "the reason" -->`
            example.evaluate()
