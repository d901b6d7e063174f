"""Truncation keeps the EOS and one prompt for all responses, and leaves no empty response."""

import pytest
from datasets import Dataset

from hf_prefopt.data.prepare import prepare_dataset
from hf_prefopt.data.tokenize import TokenizedRow, TokenKinds
from hf_prefopt.data.truncate import Cuts, truncate_row
from tests.data.helpers import ask, chat_pair, say, text_pair
from tests.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
KINDS = TokenKinds(TOKENIZER)
EOS = TOKENIZER.eos_token_id
NEWLINE, *_ = TOKENIZER("\n")["input_ids"]
# Ids stand for letters, so that rows can be written by hand.
A, B, C, D, E, P, Q, R = (TOKENIZER.convert_tokens_to_ids(letter) for letter in "abcdepqr")


def row_of(prompt, *responses, masks=None) -> TokenizedRow:
    masks = masks or [[1] * len(ids) for ids in responses]
    return TokenizedRow(list(prompt), [list(ids) for ids in responses], masks, {"pairs": [[0, 1]]})


def test_a_row_that_fits_comes_back_as_it_is():
    """There are 2 prompt tokens and at most 3 response tokens, 5 in total."""
    row = row_of([P, Q], [A, B, EOS], [C, EOS])
    assert truncate_row(row, 5, "keep_start", KINDS) == (row, Cuts(longest=5))
    assert truncate_row(row, None, "keep_start", KINDS) == (row, Cuts(longest=5))


def test_keep_start_cuts_the_end_of_a_response_and_keeps_its_eos_scored():
    """max_length 5 leaves 3 tokens after the prompt: two words and the EOS of the whole response."""
    row, cuts = truncate_row(row_of([P, Q], [A, B, C, D, EOS], [C, EOS]), 5, "keep_start", KINDS)
    assert row.response_ids == [[A, B, EOS], [C, EOS]]
    assert row.scored_masks == [[1, 1, 1], [1, 1]]
    assert cuts == Cuts(responses=1, longest=7)


def test_an_eos_before_the_templates_line_break_counts_as_the_end():
    row, _ = truncate_row(row_of([P], [A, B, C, EOS, NEWLINE], [C, EOS]), 4, "keep_start", KINDS)
    assert row.response_ids[0] == [A, B, EOS]


@pytest.mark.parametrize(("room", "kept"), [(2, 2), (3, 2), (4, 2), (5, 2), (6, 6), (7, 7)])
def test_a_later_turn_is_cut_to_words_or_removed(room, kept):
    """A turn A EOS, an unscored turn P Q, and the turn B C D EOS. Of the last, the first token would be replaced by its
    end, and a turn without words would be left."""
    ids, mask = [A, EOS, P, Q, B, C, D, EOS], [1, 1, 0, 0, 1, 1, 1, 1]
    row, _ = truncate_row(row_of([R], ids, [C, EOS], masks=[mask, [1, 1]]), room + 1, "keep_start", KINDS)
    assert row.response_ids[0] == ([A, EOS] if kept == 2 else [*ids[: kept - 1], EOS])
    assert row.scored_masks[0] == mask[:kept]


def test_an_end_that_is_not_scored_stays_unscored():
    """As with a template whose generation markers exclude the end of the turn."""
    row, _ = truncate_row(row_of([P], [A, B, C, EOS], [C], masks=[[1, 1, 1, 0], [1]]), 4, "keep_start", KINDS)
    assert row.response_ids[0] == [A, B, EOS] and row.scored_masks[0] == [1, 1, 0]


def test_a_response_without_eos_gets_none():
    row, _ = truncate_row(row_of([P], [A, B, C, D], [C, EOS]), 4, "keep_start", KINDS)
    assert row.response_ids[0] == [A, B, C]


@pytest.mark.parametrize("prompt", [[P, Q, R], [P, Q, R, P, Q]])
def test_keep_start_drops_a_row_whose_prompt_leaves_no_word_of_a_response(prompt):
    """max_length 4: a prompt of 3 tokens leaves room only for the EOS, and a prompt of 5 for nothing."""
    kept, cuts = truncate_row(row_of(prompt, [A, B, EOS], [C, D, EOS]), 4, "keep_start", KINDS)
    assert kept is None and cuts.responses == 0


def test_keep_start_keeps_a_full_row_whose_one_token_responses_fit():
    row = row_of([P, Q, R], [A], [B])
    assert truncate_row(row, 4, "keep_start", KINDS)[0] == row


def test_keep_end_cuts_the_start_of_the_prompt_alike_for_all_responses():
    """max_length 5, longest response 3: the last 2 prompt tokens are kept, also for the response with 2 tokens."""
    row, cuts = truncate_row(row_of([P, Q, R], [A, B, EOS], [C, EOS]), 5, "keep_end", KINDS)
    assert (row.prompt_ids, row.response_ids) == ([Q, R], [[A, B, EOS], [C, EOS]])
    assert cuts == Cuts(responses=0, prompt=True, longest=6)


def test_keep_end_keeps_one_prompt_token_and_cuts_the_response_that_is_too_long_alone():
    """max_length 4: one prompt token is kept, which leaves 3 for a response: 2 words and the EOS."""
    row, cuts = truncate_row(row_of([P, Q, R], [A, B, C, D, EOS], [C, EOS]), 4, "keep_end", KINDS)
    assert (row.prompt_ids, row.response_ids) == ([R], [[A, B, EOS], [C, EOS]])
    assert cuts == Cuts(responses=1, prompt=True, longest=8)


def test_a_cut_through_somebody_elses_turn_ends_with_the_assistants_turn_before_it():
    """Scored A B EOS, a user turn Q Q Q, scored C EOS: 5 tokens end inside the user turn, so this turn is removed."""
    ids, mask = [A, B, EOS, Q, Q, Q, C, EOS], [1, 1, 1, 0, 0, 0, 1, 1]
    row, _ = truncate_row(row_of([P], ids, [D, EOS], masks=[mask, [1, 1]]), 6, "keep_start", KINDS)
    assert row.response_ids[0] == [A, B, EOS] and row.scored_masks[0] == [1, 1, 1]


def test_without_a_prompt_nothing_is_kept_for_one():
    row = row_of([], [A, B, C, EOS], [D, EOS], masks=[[0, 1, 1, 1], [0, 1]])
    for mode in ("keep_start", "keep_end"):
        cut, cuts = truncate_row(row, 3, mode, KINDS)
        assert (cut.prompt_ids, cut.response_ids[0]) == ([], [A, B, EOS])
        assert not cuts.prompt


def test_keep_end_keeps_the_bos():
    tokenizer = tiny_tokenizer(bos=True)
    rows = Dataset.from_list([text_pair("The capital of France is " * 9)])
    (row,) = prepare_dataset(rows, tokenizer, max_length=16, truncation_mode="keep_end")
    (whole,) = prepare_dataset(rows, tokenizer, max_length=None)
    room = 16 - max(map(len, whole["response_ids"]))
    assert row["prompt_ids"] == [tokenizer.bos_token_id, *whole["prompt_ids"][1 - room :]]
    assert row["response_ids"] == whole["response_ids"]


def test_keep_end_keeps_the_system_prompt_and_the_users_header():
    prompt = [say("system", "Be brief."), *ask("What is the capital of France? " * 9)]
    rows = Dataset.from_list([chat_pair(prompt=prompt)])
    (row,) = prepare_dataset(rows, TOKENIZER, max_length=48, truncation_mode="keep_end")
    (whole,) = prepare_dataset(rows, TOKENIZER, max_length=None)
    text = TOKENIZER.decode(row["prompt_ids"])
    head = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n"
    assert text.startswith(head) and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert TOKENIZER.decode(whole["prompt_ids"]).endswith(text.removeprefix(head))
    assert len(row["prompt_ids"]) + max(map(len, row["response_ids"])) == 48
    with pytest.raises(ValueError, match="none of 1 row is left"):
        prepare_dataset(rows, TOKENIZER, max_length=8, truncation_mode="keep_end")


def turns(*words: str) -> list[dict]:
    """Return a conversation that begins and ends with a user turn."""
    return [say(("user", "assistant")[at % 2], word) for at, word in enumerate(words)]


LONG = "What is the capital of France? " * 9


@pytest.mark.parametrize("system", [[], [say("system", "Be brief.")]], ids=["no system", "system"])
def test_keep_end_cuts_whole_turns_before_it_cuts_the_last_message(system):
    """Each result is what the template writes for the remaining turns; one token
    less of room removes the next turns.
    """
    talk = turns("Hi", "Hello, who are you?", "Dean", "Oh, Dean.", "And the capital?")
    parts = [[*system, *talk[at:]] for at in (0, 2, 4)]
    wholes = [TOKENIZER.apply_chat_template(part, add_generation_prompt=True, tokenize=False) for part in parts]
    lengths = [len(TOKENIZER(whole)["input_ids"]) for whole in wholes]
    responses = max(len(TOKENIZER(f"{word}<|im_end|>\n")["input_ids"]) for word in ("Paris.", "Rome."))
    rows = Dataset.from_list([chat_pair(prompt=parts[0])])
    for room, expected in ((lengths[0], 0), (lengths[0] - 1, 1), (lengths[1], 1), (lengths[1] - 1, 2), (lengths[2], 2)):
        (row,) = prepare_dataset(rows, TOKENIZER, max_length=room + responses, truncation_mode="keep_end")
        assert TOKENIZER.decode(row["prompt_ids"]) == wholes[expected]
    (row,) = prepare_dataset(rows, TOKENIZER, max_length=lengths[2] - 1 + responses, truncation_mode="keep_end")
    # Within the last message: its first token, "A", is gone.
    header = wholes[2][: wholes[2].index("And")]
    assert TOKENIZER.decode(row["prompt_ids"]) == header + wholes[2][len(header) :].removeprefix("A")


def test_keep_end_drops_a_prompt_that_would_begin_in_the_middle_of_another_turn():
    """The prompt ends with an assistant message that the responses continue, and this message alone is too long."""
    rows = Dataset.from_list([chat_pair(prompt=[*ask("Hi"), say("assistant", LONG)]), chat_pair()])
    done = prepare_dataset(rows, TOKENIZER, max_length=48, truncation_mode="keep_end")
    assert done["row"][:] == [1]


def test_keep_end_looks_at_the_template_of_the_row():
    """A tool result that follows the user's question is not cut in the middle."""
    prompt = [*ask("Hi"), say("assistant", "Well."), say("tool", LONG)]
    rows = Dataset.from_list([chat_pair(prompt=[*ask("Oh"), *prompt]), chat_pair()])
    assert prepare_dataset(rows, TOKENIZER, max_length=48, truncation_mode="keep_end")["row"][:] == [1]
