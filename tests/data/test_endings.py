"""A message reports responses that end with a token at which the model does not
stop; ids without embedding are errors.
"""

from types import SimpleNamespace

import pytest
from datasets import Dataset

from hf_prefopt.data.check import check_embeddings
from hf_prefopt.data.endings import report_endings, stop_tokens
from hf_prefopt.data.prepare import prepare_dataset
from tests.data.helpers import chat_pair, text_pair
from tests.tokenizers import CHATML, tiny_tokenizer

TOKENIZER = tiny_tokenizer(eos="<|endoftext|>")
TURN, TEXT = (TOKENIZER.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))


def config(ids) -> SimpleNamespace:
    return SimpleNamespace(eos_token_id=ids)


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (None, set()),
        (SimpleNamespace(config=config(3)), {3}),
        (SimpleNamespace(config=config(3), generation_config=config([4, 5])), {3, 4, 5}),
        (SimpleNamespace(config=config(None), generation_config=config(None)), set()),
    ],
)
def test_a_model_stops_where_its_configs_say(model, expected):
    assert stop_tokens(model) == expected


@pytest.mark.parametrize("rows", [[chat_pair()] * 3, [{**chat_pair(), "rejected": chat_pair()["chosen"]}]])
def test_an_end_of_turn_at_which_the_model_does_not_stop_is_said(rows, caplog):
    """The EOS of a base model is not ChatML's end of turn; there is no message if
    the end of turn is one of its EOS tokens.
    """
    done = prepare_dataset(Dataset.from_list(rows), TOKENIZER)
    caplog.clear()
    report_endings(done, TOKENIZER, frozenset({TEXT}), "train")
    count = 2 * len(rows)
    assert f"train: {count} of {count} responses end with '<|im_end|>', at which the model does not stop" in caplog.text
    assert "it stops at '<|endoftext|>'): add it to model.generation_config.eos_token_id" in caplog.text
    caplog.clear()
    report_endings(done, TOKENIZER, frozenset({TURN}), "train")
    report_endings(prepare_dataset(Dataset.from_list([text_pair()]), TOKENIZER), TOKENIZER, frozenset(), "train")
    report_endings(done, tiny_tokenizer(CHATML), frozenset({TEXT}), "train")  # the EOS is the end of the turn
    assert "does not stop" not in caplog.text


@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "stream"])
def test_ids_without_an_embedding_are_refused_by_the_row(streamed):
    done = prepare_dataset(Dataset.from_list([text_pair(), text_pair(chosen=" Rome.")]), TOKENIZER)
    highest = max(max(ids) for row in done for ids in (row["prompt_ids"], *row["response_ids"]))
    rows = done.to_iterable_dataset() if streamed else done
    assert [row["row"] for row in check_embeddings(rows, highest + 1, "train")] == [0, 1]
    with pytest.raises(
        ValueError, match=f"train: row 0 has token id {highest}, but the model has {highest} embeddings"
    ):
        list(check_embeddings(rows, highest, "train"))
