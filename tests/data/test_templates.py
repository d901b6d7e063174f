"""Every chat template that TRL ships, with eleven kinds of rows: exactly the response is scored.

The parameters are the files in TRL's folder, so templates of a new version are tested as well.
The expected result is computed without the package, from the text that the template writes for
the whole conversation and the words of the row. A row must be rejected if the template raises
an error or drops words, or if a turn cannot be found in a text without markers.
"""

import json
import re
from functools import lru_cache
from itertools import takewhile
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from hf_prefopt.data.rows import BadRow
from hf_prefopt.data.tokenize import TokenizedRow, TokenKinds, tokenize_rows
from tests.data.helpers import READ, ask, reply, say
from tests.tokenizers import tiny_tokenizer

FOLDER = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
TEMPLATES = {file.stem: file.read_text(encoding="utf-8") for file in sorted(FOLDER.glob("*.jinja"))}
# Control tokens that the tokenizers of the models do not split.
CONTROL = r"<\|[^|<>' ]+\|>|<｜[^<>']+｜>|<\|\w+>|<\w+\|>|<(?:start|end)_of_\w+>|</?s>"

SEARCH = {
    "name": "search",
    "description": "Looks words up.",
    "parameters": {"type": "object", "properties": {"words": {"type": "string", "description": "what to look up"}}},
}
TOOLS = json.dumps([{"type": "function", "function": SEARCH}])
RESULT = {**say("tool", "It lies on the Seine."), "name": "search"}
ANSWERS = {"chosen": "Paris, certainly.", "rejected": "Rome, maybe."}
CALLED = {"chosen": "Lutetia", "rejected": "Latium"}
MUSING = {"chosen": "Musing on Gaul", "rejected": "Musing on Italy"}


def call(words: str, content: str = "") -> dict:
    function = {"name": "search", "arguments": {"words": words}}
    return {**say("assistant", content), "tool_calls": [{"type": "function", "id": "abcdefghi", "function": function}]}


def row_of(response, prompt: list | None = None, **more) -> dict:
    """Return a row with the responses that `response` makes for each side."""
    return {"prompt": prompt or ask(), **{side: response(side) for side in ANSWERS}, **more}


def answer(side: str) -> list[dict]:
    return reply(ANSWERS[side])


ROWS = {
    "turn": row_of(answer),
    "system": row_of(answer, [say("system", "Be brief."), *ask()]),
    "history": row_of(
        answer, [*ask("Who is there?"), *reply("<think>\nGreet.\n</think>\n\nOnly I."), *ask("Where is it?")]
    ),
    "thinking": row_of(lambda side: reply(f"<think>\n{MUSING[side]}\n</think>\n\n{ANSWERS[side]}")),
    "reasoning": row_of(lambda side: [{**answer(side)[0], "reasoning_content": MUSING[side]}]),
    "blocks": row_of(
        lambda side: [{"role": "assistant", "content": [{"type": "text", "text": ANSWERS[side]}]}],
        [{"role": "user", "content": [{"type": "text", "text": "Where is it?"}]}],
    ),
    "tools": row_of(lambda side: [call(CALLED[side]), RESULT, *answer(side)], tools=TOOLS),
    "result": row_of(answer, [*ask(), call("Gallia"), RESULT], tools=TOOLS),
    "words and call": row_of(lambda side: [call(CALLED[side], ANSWERS[side])], tools=TOOLS),
    "several turns": row_of(lambda side: [*reply(f"Well. {side}!"), *ask("Are you sure?"), *answer(side)]),
    "continued": row_of(lambda side: reply(f" {ANSWERS[side]}"), [*ask(), *reply("The capital is")]),
}


@lru_cache
def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    tokenizer = tiny_tokenizer(TEMPLATES[name])
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    controls = {"<|im_start|>", "<|im_end|>", "<|endoftext|>", *re.findall(CONTROL, TEMPLATES[name])}
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(controls)})
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def prepared(row: dict, tokenizer) -> TokenizedRow | BadRow:
    try:
        (done,) = tokenize_rows([READ["pairs"](row)], tokenizer, TokenKinds(tokenizer))
        return done
    except BadRow as error:
        return error


def write(row: dict, side: str, name: str) -> tuple[str, str]:
    """Return the generation prompt and the text of the whole conversation, with
    content in the form that the template reads.

    Raises any error that the template raises.
    """
    tokenizer = tokenizer_of(name)
    how = {"tokenize": False, "tools": json.loads(row["tools"]) if "tools" in row else None}
    probe = tokenizer.apply_chat_template(ask("Where is it?"), tokenize=False)
    as_text = "Where is it?" in probe

    def contents(messages: list[dict]) -> list[dict]:
        texts = [m["content"] if isinstance(m["content"], str) else m["content"][0]["text"] for m in messages]
        forms = texts if as_text else [[{"type": "text", "text": text}] for text in texts]
        return [{**message, "content": form} for message, form in zip(messages, forms, strict=True)]

    prompt, response = row["prompt"], row[side]
    if prompt[-1]["role"] == "assistant":
        whole = [*prompt[:-1], say("assistant", prompt[-1]["content"] + response[0]["content"])]
        asked = tokenizer.apply_chat_template(contents(prompt), continue_final_message=True, **how)
    else:
        whole = [*prompt, *response]
        asked = tokenizer.apply_chat_template(contents(prompt), add_generation_prompt=True, **how)
    return asked, tokenizer.apply_chat_template(contents(whole), **how)


def pieces(messages: list[dict], by_assistant: bool) -> list[str]:
    """Return the texts of the assistant's messages, or of all other messages, without the markers of thinking."""
    said = []
    for message in messages:
        if (message["role"] == "assistant") == by_assistant:
            content = message["content"] if isinstance(message["content"], str) else message["content"][0]["text"]
            said += [message.get("reasoning_content", ""), *re.split("</?think>", content)]
            said += [tool["function"]["arguments"]["words"] for tool in message.get("tool_calls", [])]
    return [piece.strip() for piece in said if piece.strip()]


def has_all(text: str, words: list[str]) -> bool:
    return all(word in text for word in words)


def scored(done: TokenizedRow, k: int, tokenizer) -> str:
    ids = zip(done.response_ids[k], done.scored_masks[k], strict=True)
    return tokenizer.decode([token for token, is_scored in ids if is_scored])


def part(known: str, text: str) -> str:
    """Return the part of a text after the beginning that it shares with another text."""
    same = takewhile(lambda pair: pair[0] == pair[1], zip(known, text, strict=False))
    return text[len([*same]) :]


def is_marked(name: str) -> bool:
    return re.search(r"{%-?\s*generation\b", TEMPLATES[name]) is not None


def check_scored(text: str, row: dict, side: str, asked: str, full: str, name: str) -> None:
    """Check that the scored text is the answer's words, with markers of channels,
    thinking and calls, and ends of turns.
    """
    spoken = pieces(row[side], by_assistant=True)
    others = pieces([*row["prompt"], *row[side]], by_assistant=False)
    assert has_all(text, spoken), (text, spoken)
    assert not any(word in text for word in others), (text, others)
    question = tokenizer_of(name).apply_chat_template(ROWS["turn"]["prompt"], tokenize=False)
    plain_asked, plain = write(ROWS["turn"], side, name)
    header = part(question, plain_asked)
    if len(row[side]) == 1:
        # One turn: everything after the prompt, except for an empty thinking block, and possibly one header.
        after = part(asked, full).removeprefix(header)
        if not any("Musing" in word for word in spoken):
            after = re.sub(r"^\s*(<think>)?\s*</think>\s*", "", after)
        unscored = after.removeprefix(text) if after.startswith(text) else after
        # Generation markers may exclude the end of turn; a message reports this.
        assert not unscored or (is_marked(name) and re.fullmatch(rf"({CONTROL}|\s)*", unscored)), (text, after)
    elif header.strip():
        # The headers of later turns and empty thinking blocks are not scored.
        lead = part(plain_asked, plain[: plain.rindex(ANSWERS[side])])
        assert header not in text.removeprefix(lead), (text, header)
        assert "</think>" not in text, text


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_scored_is_the_response(name):
    for what, row in ROWS.items():
        done = prepared(row, tokenizer_of(name))
        try:
            written = {side: write(row, side, name) for side in ANSWERS}
        except Exception as error:  # a template may raise any exception
            assert isinstance(done, BadRow) and "rejected by the chat template" in str(done), (what, done, error)
            continue
        missing = [
            side
            for side, (asked, full) in written.items()
            if not has_all(part(asked, full), pieces(row[side], by_assistant=True))
            or not has_all(full, pieces([*row["prompt"], *row[side]], by_assistant=False))
        ]
        if missing:
            causes = ("the chat template does not write", "it rewrites earlier turns")
            assert isinstance(done, BadRow) and any(cause in str(done) for cause in causes), (what, done, written)
        elif isinstance(done, BadRow):
            check_cause(done, row, written, name)
        else:
            for k, (side, (asked, full)) in enumerate(written.items()):
                check_scored(scored(done, k, tokenizer_of(name)), row, side, asked, full, name)
                assert tokenizer_of(name).decode(done.prompt_ids + done.response_ids[k]) == full, what


def check_cause(error: BadRow, row: dict, written: dict[str, tuple[str, str]], name: str) -> None:
    """Rows whose words are all written are rejected for one of two reasons."""
    _, full = written["chosen"]
    if "begins with thinking" in str(error):
        assert full.count("</think>") == 2  # an empty block, followed by the block of the answer
        return
    assert "it rewrites earlier turns" in str(error) and not is_marked(name)
    first = [*row["prompt"], row["chosen"][0]]
    assert len(row["chosen"]) > 1
    assert not full.startswith(tokenizer_of(name).apply_chat_template(first, tokenize=False))
