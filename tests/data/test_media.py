"""Images, video and audio raise an error that names them; content blocks of text are text under every template."""

import numpy as np
import pytest
from datasets import Dataset, Features, Image, IterableDataset, List, Value

from hf_prefopt.data.prepare import prepare_dataset
from tests.data.helpers import ask, chat_pair, reply, say, text_pair
from tests.tokenizers import CHATML, CHATML_WITH_MARKERS, tiny_tokenizer

BLOCKS_ONLY = CHATML.replace(
    "(message['content'] or '')",
    "(message['content'] | selectattr('type', 'equalto', 'text') | map(attribute='text') | join)",
)
BOTH = CHATML.replace(
    "(message['content'] or '')",
    "(message['content'] if message['content'] is string else message['content'] | map(attribute='text') | join)",
)
PRINTED = CHATML.replace("(message['content'] or '')", "(message['content'] | string)")
TEMPLATES = {"text": CHATML, "markers": CHATML_WITH_MARKERS, "blocks": BLOCKS_ONLY, "both": BOTH, "printed": PRINTED}


def prepare(*rows: dict, template: str = CHATML, **options):
    return prepare_dataset(Dataset.from_list([*rows]), tiny_tokenizer(template), max_length=None, **options)


def blocks(*texts: str, kind: str = "text") -> list[dict]:
    return [{"type": kind, "text": text} for text in texts]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_blocks_of_text_are_the_text_under_every_template(template):
    """Text blocks give the same tokens as plain text: in prompt or response, one or
    several, also mixed with plain text.
    """
    plain = {"prompt": ask("Why?"), "chosen": reply("So it is."), "rejected": reply("No.")}
    written = {
        "prompt": [say("user", blocks("Why?"))],
        "chosen": [say("assistant", blocks("So ", "it is.", kind="output_text"))],
        "rejected": [say("assistant", blocks("No.", ""))],
    }
    (one,), (other,) = prepare(plain, template=template), prepare(written, template=template)
    assert one == other
    tokenizer = tiny_tokenizer()
    assert tokenizer.decode(one["prompt_ids"]) == "<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    assert [tokenizer.decode(ids) for ids in one["response_ids"]] == ["So it is.<|im_end|>\n", "No.<|im_end|>\n"]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_a_begun_answer_goes_on_whatever_it_is_written_in(template):
    row = {
        "prompt": [*ask("Why?"), say("assistant", blocks("So"))],
        "chosen": reply(" it is."),
        "rejected": [say("assistant", blocks(" what?"))],
    }
    texts = {"prompt": [*ask("Why?"), *reply("So")], "chosen": reply(" it is."), "rejected": reply(" what?")}
    tokenizer = tiny_tokenizer(template)
    # From a generator, because Arrow does not allow text and blocks in one column.
    mixed, plain = (
        prepare_dataset(IterableDataset.from_generator(lambda given=given: iter([given])), tokenizer)
        for given in (row, texts)
    )
    assert list(mixed) == list(plain)


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "https://example.org/a.png"}},
        {"type": "text", "text": "Look", "image": "a.png"},
        {"type": "input_audio", "input_audio": {"data": "UklG"}},
        {"type": "thinking", "thinking": "Hm."},
        {"temperature": 20.5},
    ],
    ids=lambda block: str(block.get("type")),
)
@pytest.mark.parametrize("column", ["prompt", "chosen"])
def test_a_block_of_anything_else_is_refused(block, column):
    role = "user" if column == "prompt" else "assistant"
    row = {**chat_pair(), column: [{"role": role, "content": [{"type": "text", "text": "See"}, block]}]}
    with pytest.raises(
        ValueError, match=rf"row 0: `{column}` has a content block of type .* in message 0 .*not supported"
    ):
        prepare(row)


FULL = {
    "image": "cat.png",
    "images": [{"bytes": b"x", "path": None}],
    "video": {"path": "cat.mp4"},
    "videos": ["cat.mp4"],
    "audio": {"array": [0.0, 0.1], "sampling_rate": 16000},
    "audios": [[0.0, 0.1]],
    "image_url": "https://example.org/cat.png",
    "input_image": "cat.png",
    "pixel_values": [[0.5]],
    "anything": b"\x89PNG",
    "deep": {"inside": [b"\x89PNG"]},
}
EMPTY = {
    "image": None,
    "images": [],
    "video": "",
    "audio": {"array": None, "path": None},
    "image_id": "coco_123",
    "num_images": 2,
    "has_image": False,
    "image_size": [2, 3],
    "created": np.datetime64("2024-01-01T00:00:00").item(),
}
KINDS = {
    "text": text_pair(),
    "messages": chat_pair(),
    "unpaired": {"prompt": "Why?", "completion": "So.", "label": True},
    "list": {"prompt": "Why?", "responses": ["So.", "No."], "scores": [1, 0]},
    "tokens": {"prompt_ids": [1], "chosen_ids": [2], "rejected_ids": [3]},
}


@pytest.mark.parametrize("column", FULL)
@pytest.mark.parametrize("row", KINDS.values(), ids=KINDS)
def test_a_column_of_media_is_refused(row, column):
    with pytest.raises(ValueError, match=rf"row 1: `{column}` contains data that is not text; images, video and audio"):
        prepare({**row, column: None}, {**row, column: FULL[column]})


@pytest.mark.parametrize("column", EMPTY)
def test_columns_without_media_are_left_aside(column):
    assert len(prepare({**text_pair(), column: EMPTY[column]})) == 1


@pytest.mark.parametrize("feature", [Image(), List(Image())], ids=["image", "list"])
@pytest.mark.parametrize("streamed", [False, True])
def test_images_of_datasets_are_found_whatever_the_column_is_called(feature, streamed):
    pixels = np.zeros((2, 2, 3), dtype=np.uint8)
    shown = pixels if isinstance(feature, Image) else [pixels]
    features = Features({**dict.fromkeys(text_pair(), Value("string")), "screen": feature})
    rows = Dataset.from_list([{**text_pair(), "screen": None}, {**text_pair(), "screen": shown}], features=features)
    rows = rows.to_iterable_dataset() if streamed else rows
    with pytest.raises(ValueError, match="row 1: `screen` contains data that is not text"):
        list(prepare_dataset(rows, tiny_tokenizer()))


def test_an_image_that_nobody_can_read_is_refused_and_not_opened():
    features = Features({**dict.fromkeys(text_pair(), Value("string")), "image": Image()})
    rows = Dataset.from_list([{**text_pair(), "image": {"bytes": b"no image", "path": None}}], features=features)
    for given in (rows, rows.to_iterable_dataset()):
        with pytest.raises(ValueError, match="row 0: `image` contains data"):
            list(prepare_dataset(given, tiny_tokenizer()))


def test_an_image_in_a_message_is_refused():
    row = chat_pair(prompt=[{"role": "user", "content": "What is this?", "images": ["cat.png"]}])
    with pytest.raises(ValueError, match=r"`prompt` has data that is not text in `images` of message 0 \(user\)"):
        prepare(row)
    assert len(prepare(chat_pair(prompt=[{"role": "user", "content": "What is this?", "images": []}]))) == 1
