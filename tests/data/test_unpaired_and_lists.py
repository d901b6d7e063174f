"""Labeled responses and lists become prepared rows, and pairs become unpaired rows on request.

If a loss needs mismatched responses, each row gets a response to another prompt.
"""

from collections import Counter
from io import StringIO

import numpy as np
import pytest
from datasets import Dataset
from rich.console import Console

from hf_prefopt.data.prepare import prepare_dataset
from hf_prefopt.data.rows import BadRow
from hf_prefopt.data.unpaired import MismatchedResponses
from hf_prefopt.reporting.preview import preview_rows
from tests.data.helpers import READ, ask, chat_pair, prepare_row, real_rows, reply, scored_text, text_pair
from tests.tiny_models import random_rows
from tests.tokenizers import tiny_tokenizer
from tests.trainers import unpaired

TOKENIZER = tiny_tokenizer()
CAPITAL = "The capital of France is"


def labeled(label=True, completion=" Paris.") -> dict:
    return {"prompt": CAPITAL, "completion": completion, "label": label}


def listed(column: str, values: list, responses=(" Paris.", " Rome.", " Berlin.")) -> dict:
    return {"prompt": CAPITAL, "responses": list(responses), column: values}


@pytest.mark.parametrize("label", [True, False, 1, 0])
def test_a_labeled_text_is_one_response_and_its_label(label):
    row = prepare_row(labeled(label), TOKENIZER)
    assert row["labels"] == [bool(label)]
    assert len(row["response_ids"]) == 1 and scored_text(row, 0, TOKENIZER) == " Paris.<|im_end|>"
    assert "pairs" not in row and "ranks" not in row


def test_a_labeled_message_has_the_tokens_of_the_same_pair():
    """A labeled chat row has the same prompt and response tokens as the chosen response of a pair."""
    row = prepare_row({"prompt": ask(), "completion": reply("Paris."), "label": False}, TOKENIZER)
    pair = prepare_row(chat_pair(), TOKENIZER)
    assert row["prompt_ids"] == pair["prompt_ids"] and row["response_ids"][0] == pair["response_ids"][0]
    assert row["labels"] == [False]


def test_ranks_are_kept_and_scores_give_ranks_too():
    """Scores (2, 5, 2): the second response is the best; the others have rank 2, because one response is better."""
    ranked, scored = (prepare_row(listed(*given), TOKENIZER) for given in (("ranks", [2, 1, 3]), ("scores", [2, 5, 2])))
    assert (ranked["ranks"], ranked["scores"]) == ([2.0, 1.0, 3.0], [])
    assert (scored["ranks"], scored["scores"]) == ([2.0, 1.0, 2.0], [2.0, 5.0, 2.0])
    assert [scored_text(scored, k, TOKENIZER) for k in range(3)] == [
        f" {city}.<|im_end|>" for city in ("Paris", "Rome", "Berlin")
    ]


def test_a_list_may_be_of_messages():
    responses = [reply("Paris."), reply("Rome.")]
    row = prepare_row({"prompt": ask(), "responses": responses, "scores": [1.0, 0.0]}, TOKENIZER)
    pair = prepare_row(chat_pair(), TOKENIZER)
    assert [row[key] for key in ("prompt_ids", "response_ids")] == [pair[key] for key in ("prompt_ids", "response_ids")]


BAD_ROWS = {
    "no label": ("labeled responses", labeled(None), "`label` is None"),
    "a label of words": ("labeled responses", labeled("fair"), "`label` is 'fair'; make it true"),
    "a rating for a label": ("labeled responses", labeled(4), "`label` is 4"),
    "an empty completion": ("labeled responses", labeled(completion=""), "`completion` is empty"),
    "a label that is none": ("labeled responses", labeled(None), "`label` is None; make it true"),
    "no responses": ("ranked lists", {**listed("ranks", []), "responses": None}, "`responses` is missing"),
    "one response": (
        "ranked lists",
        listed("ranks", [1], [" Paris."]),
        "holds 1 responses; give every prompt",
    ),
    "too few ranks": ("ranked lists", listed("ranks", [1, 2]), "`ranks` has 2 numbers for 3 responses; give one"),
    "a rank of words": ("ranked lists", listed("ranks", [1, 2, "last"]), "`ranks` contains 'last'"),
    "a score that is none": ("scored lists", listed("scores", [1, 2, None]), "`scores` contains None"),
    "a score of nan": ("scored lists", listed("scores", [1.0, 2.0, float("nan")]), "`scores` contains nan"),
    "a score of -inf": (
        "scored lists",
        listed("scores", [1.0, -float("inf"), 2.0]),
        "`scores` contains -inf at",
    ),
    "an empty response": ("scored lists", listed("scores", [1, 2], [" Paris.", ""]), r"`responses\[1\]` is empty"),
    "a response that is a number": (
        "scored lists",
        {**listed("scores", [1, 2]), "responses": [" a", 4]},
        r"`responses\[1\]` is of type int",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_row_names_its_column_and_a_cure(case):
    row_format, row, expected = BAD_ROWS[case]
    with pytest.raises(BadRow, match=expected) as caught:
        READ[row_format](row)
    assert "; " in str(caught.value)


def test_bad_rows_are_counted_and_named_or_dropped():
    rows = Dataset.from_list([labeled(), labeled(completion=" "), labeled(False)])
    with pytest.raises(ValueError, match=r"1 of 3 rows cannot be used\n  row 1: `completion` is only whitespace"):
        prepare_dataset(rows, TOKENIZER)
    assert prepare_dataset(rows, TOKENIZER, on_bad_rows="drop")["labels"][:] == [[True], [False]]


def test_a_list_is_cut_as_a_whole():
    """Responses longer than max_length are truncated separately; the prompt and the ranks do not change."""
    long = " Paris, the capital of France, once upon a time, under the sea"
    rows = Dataset.from_list([listed("ranks", [2, 1], [" Rome.", long])])
    whole = prepare_dataset(rows, TOKENIZER, max_length=None)[0]
    room = len(whole["prompt_ids"]) + 6
    cut = prepare_dataset(rows, TOKENIZER, max_length=room)[0]
    assert cut["prompt_ids"] == whole["prompt_ids"] and cut["ranks"] == [2.0, 1.0]
    assert cut["response_ids"][0] == whole["response_ids"][0]
    assert len(cut["response_ids"][1]) == 6 and cut["response_ids"][1][-1] == TOKENIZER.eos_token_id


def test_real_labeled_answers():
    """The rows are eight GSM8K answers: a correct and a wrong one for each of four
    problems, with equal prompt tokens.
    """
    rows = real_rows("gsm8k")
    prepared = prepare_dataset(Dataset.from_list(rows), TOKENIZER, max_length=None)
    assert prepared["labels"][:] == [[row["label"]] for row in rows] == [[True], [False]] * 4
    for number, row in enumerate(rows):
        assert scored_text(prepared[number], 0, TOKENIZER).startswith(row["completion"][0]["content"])
    assert all(prepared[n]["prompt_ids"] == prepared[n + 1]["prompt_ids"] for n in range(0, 8, 2))


def test_real_lists():
    """The rows are four answers with the number of comparisons that each has won (2½, 2½, ½, ½), and a four-way tie."""
    rows = [
        {
            "prompt": row["prompt"],
            "responses": [reply(response["content"]) for response in row["responses"]],
            "scores": [response["wins"] for response in row["responses"]],
        }
        for row in real_rows("qa_feedback")
    ]
    prepared = prepare_dataset(Dataset.from_list(rows), TOKENIZER, max_length=None)
    assert prepared["ranks"][:] == [[1, 1, 3, 3], [1, 1, 1, 1]]
    assert scored_text(prepared[0], 2, TOKENIZER).startswith("In ww2, the uk declared war on Germany.")


def test_the_preview_names_labels_and_numbers_responses():
    def printed(row) -> str:
        console = Console(width=100, file=StringIO())
        console.print(preview_rows([prepare_row(row, TOKENIZER)], TOKENIZER))
        return console.file.getvalue()

    assert "undesirable: " in printed(labeled(False)) and "undesirable" not in printed(labeled(True))
    assert "desirable: " in printed(labeled(True))
    text = printed(listed("scores", [0.5, 1.0, 0.0]))
    assert all(f"response {number}: " in text for number in range(3))
    assert "score 0.5" in text and "rank 2" in text


def test_unpairing_makes_two_rows_of_a_pair():
    prepared = prepare_dataset(Dataset.from_list([text_pair(), text_pair(chosen=" A.", rejected=" B.")]), TOKENIZER)
    rows = prepare_dataset(prepared, TOKENIZER, unpair=True)
    assert rows["labels"][:] == [[True], [False]] * 2 and rows["row"][:] == [0, 1, 2, 3]
    assert rows["prompt_ids"][:] == [ids for ids in prepared["prompt_ids"] for _ in range(2)]
    assert rows["response_ids"][:] == [[ids] for pair in prepared["response_ids"] for ids in pair]


def test_unpairing_leaves_labeled_rows_alone_and_refuses_rows_of_several_pairs():
    rows = prepare_dataset(Dataset.from_list([labeled()]), TOKENIZER)
    assert prepare_dataset(rows, TOKENIZER, unpair=True) is rows
    several = Dataset.from_list([{**random_rows(1)[0], "pairs": [[0, 1], [1, 0]]}])
    with pytest.raises(ValueError, match="row 0 has 2 pairs, but unpair=True needs one pair per row"):
        prepare_dataset(several, TOKENIZER, unpair=True)


def test_an_unpaired_stream_mixes_its_labels():
    """Streams are shuffled while they are read, so the two responses of a pair are not adjacent."""
    rows = [text_pair(chosen=f" {n}.", rejected=f" {-n}.") for n in range(1, 65)]
    stream = prepare_dataset(Dataset.from_list(rows).to_iterable_dataset(), TOKENIZER, unpair=True)
    found = [(row["row"], row["labels"][0]) for row in stream]
    assert sorted(found) == [(n, n % 2 == 0) for n in range(128)]
    labels = [label for _, label in found]
    assert labels != [True, False] * 64 and 20 < sum(labels[:64]) < 44


# -- mismatched responses ---------------------------------------------------------------------------------------------


def same_prompts(counts: list[int]) -> Dataset:
    """Return unpaired rows in random order, with `counts[p]` rows of prompt p; the response of a row is its number."""
    prompts = np.random.default_rng(0).permutation(np.repeat(np.arange(len(counts)), counts))
    return Dataset.from_list(
        [
            {
                "prompt_ids": [10 + int(prompt)],
                "response_ids": [[100 + number, 2]],
                "scored_masks": [[1, 1]],
                "labels": [number % 2 == 0],
                "row": number,
            }
            for number, prompt in enumerate(prompts)
        ]
    )


def test_no_mismatched_response_answers_the_own_prompt():
    """One prompt has 12 rows, and three have fewer. In 120 epochs, no row gets a response to its own prompt.

    All other rows are drawn equally often (χ² of 12 rows exceeds 40 once in 10,000).
    """
    data = same_prompts([12, 4, 3, 1])
    prompt_of = {row["response_ids"][0][0]: row["prompt_ids"][0] for row in data}
    rows = MismatchedResponses(data, seed=3)
    drawn = Counter()
    for epoch in range(120):
        rows.set_epoch(epoch)
        for row in rows.__getitems__(range(len(rows))):
            (ids,) = row["mismatched_ids"]
            assert prompt_of[ids[0]] != row["prompt_ids"][0]
            if row["prompt_ids"] == [13]:  # the prompt with a single row: the 19 other rows are possible
                drawn[ids[0]] += 1
    counts = np.array([drawn[number] for number in prompt_of if prompt_of[number] == 10])
    assert ((counts - 120 / 19) ** 2 / (120 / 19)).sum() < 40
    assert len(drawn) == 19


def test_a_draw_is_of_the_seed_the_epoch_and_the_row():
    """The drawn response of a row is the same for any order or batch of rows; another epoch has another one."""
    data = unpaired(16)

    def draws(seed=0, epoch=0):
        rows = MismatchedResponses(data, seed)
        rows.set_epoch(epoch)
        return [row["mismatched_ids"] for row in rows.__getitems__(range(16))]

    one_by_one = MismatchedResponses(data, 0)
    assert [one_by_one[place]["mismatched_ids"] for place in reversed(range(16))] == draws()[::-1]
    assert draws() == draws() != draws(epoch=1)
    assert draws() != draws(seed=1)


def test_a_mismatched_response_is_cut_to_the_room_behind_the_prompt():
    data = unpaired(16)
    rows = MismatchedResponses(data, seed=0, max_length=12).__getitems__(range(16))
    lengths = [len(row["prompt_ids"]) + len(row["mismatched_ids"][0]) for row in rows if len(row["prompt_ids"]) < 12]
    assert max(lengths) <= 12
    assert all(len(row["mismatched_ids"][0]) == len(row["mismatched_masks"][0]) >= 1 for row in rows)


def test_rows_of_one_prompt_have_no_mismatch():
    with pytest.raises(ValueError, match=r"all 3 rows have the same prompt, .*pass rows with at least two prompts"):
        MismatchedResponses(same_prompts([3]), seed=0)
