"""Rows as text: each token is shown once, as prompt, scored, not scored or cut."""

from itertools import product

import pytest

from hf_prefopt.data.beginnings import Beginning
from hf_prefopt.data.tokenize import TokenizedRow, TokenKinds
from hf_prefopt.data.truncate import truncate_row
from hf_prefopt.reporting.shown_rows import kept_places, show_row
from tests.data.helpers import chat_pair, prepare_row, reply, say
from tests.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
KINDS = TokenKinds(TOKENIZER)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", range(4, 20))
def test_what_truncation_keeps_is_found_in_what_it_was_given(mode, max_length):
    """Tokens repeat, the response ends with EOS and a line break, and the beginning of the prompt is never cut."""
    word, other, newline = (TOKENIZER(text)["input_ids"][0] for text in ("a", "b", "\n"))
    ends = ([], [TOKENIZER.eos_token_id], [TOKENIZER.eos_token_id, newline])
    for length, end in product((1, 3, 9), ends):
        responses = [[word] * length + end, [other, word] * 2 + end]
        prompt = [word, other, other, word, word]
        row = TokenizedRow(prompt, responses, [[1] * len(ids) for ids in responses], {})
        kept, _ = truncate_row(row, max_length, mode, KINDS, lambda: Beginning(2))
        if kept is None:
            continue
        for full, part in zip((prompt, *responses), (kept.prompt_ids, *kept.response_ids), strict=True):
            places = kept_places(full, part)
            assert [full[at] for at, place in enumerate(places) if place is not None] == part
            assert [place for place in places if place is not None] == list(range(len(part)))


def test_tokens_that_were_not_cut_from_these():
    with pytest.raises(ValueError, match="is not a truncation"):
        kept_places([1, 2, 3], [1, 4])


def test_the_pieces_are_the_text_and_say_what_counts():
    """A user turn in a response is not scored; max_length cuts the end and keeps the EOS."""
    chosen = [*reply("Hello."), say("user", "And?"), *reply("Paris is the capital of France.")]
    raw = {**chat_pair(), "chosen": chosen}
    whole = prepare_row(raw, TOKENIZER)
    length = len(whole["prompt_ids"]) + len(whole["response_ids"][0]) - 5
    row = show_row(prepare_row(raw, TOKENIZER, max_length=length), KINDS, whole)
    shown = row.responses[0]
    assert [text.name for text in (row.prompt, *row.responses)] == ["prompt", "chosen", "rejected"]
    assert "".join(piece.text for piece in shown.pieces) == TOKENIZER.decode(whole["response_ids"][0])
    assert {piece.state for piece in row.prompt.pieces} == {"prompt"}
    of_state = {
        state: "".join(p.text for p in shown.pieces if p.state == state) for state in ("scored", "masked", "cut")
    }
    assert "And?" in of_state["masked"] and "And?" not in of_state["scored"] and "France" in of_state["cut"]
    assert of_state["scored"].endswith("<|im_end|>") and shown.pieces[-2].is_special
    assert (shown.tokens, shown.cut) == (len(whole["response_ids"][0]) - 5, 5)
    assert shown.counts == [f"{shown.tokens} tokens", f"{shown.scored} scored", "5 cut"]


def test_lists_say_rank_and_score():
    row = prepare_row({"prompt": "Q: ", "responses": ["a", "b"], "scores": [0.5, 2]}, TOKENIZER)
    assert [text.about for text in show_row(row, KINDS).responses] == ["rank 2, score 0.5", "rank 1, score 2"]
