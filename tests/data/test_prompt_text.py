"""The text of a prompt is the text of its messages, for every template that TRL ships, and for plain text."""

import pytest

from hf_prefopt.data.prompt_text import PromptText
from tests.data.helpers import ask, chat_pair, prepare_row, reply, say, text_pair
from tests.data.test_templates import TEMPLATES, tokenizer_of
from tests.tokenizers import tiny_tokenizer

ONE = ask("What is 2 + 2?\nThink  twice.")
SEVERAL = [*ask("Who are you?"), *reply("A model."), *ask("Of which size?")]
SYSTEM = [say("system", "Be brief."), *SEVERAL]


def prompt_of(messages, tokenizer):
    return prepare_row({**chat_pair(), "prompt": messages}, tokenizer)["prompt_ids"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_messages_are_read_back(name):
    tokenizer = tokenizer_of(name)
    text = PromptText(tokenizer)
    assert text(prompt_of(ONE, tokenizer)) == ONE[0]["content"]
    assert text.messages(prompt_of(SEVERAL, tokenizer)) == SEVERAL


def test_several_messages_are_shown_with_their_roles():
    tokenizer = tiny_tokenizer()
    assert PromptText(tokenizer)(prompt_of(SYSTEM, tokenizer)) == (
        "system: Be brief.\n\nuser: Who are you?\n\nassistant: A model.\n\nuser: Of which size?"
    )


def test_what_all_responses_begin_with_is_part_of_the_prompt():
    tokenizer = tiny_tokenizer()
    begun = tokenizer("In", add_special_tokens=False)["input_ids"]
    ids = tokenizer.apply_chat_template(ask("Where?"), add_generation_prompt=True)["input_ids"] + begun
    assert PromptText(tokenizer)(ids) == "user: Where?\n\nassistant: In"


@pytest.mark.parametrize("template", [tiny_tokenizer().chat_template, None])
def test_plain_text_is_only_decoded(template):
    tokenizer = tiny_tokenizer(template, bos=True)
    row = prepare_row(text_pair(), tokenizer)
    assert PromptText(tokenizer)(row["prompt_ids"]) == text_pair()["prompt"].strip()


def test_the_arguments_of_the_template_are_used():
    """A default system prompt that depends on a template argument is not part of the messages."""
    template = "{{ 'system: ' + persona + '\n' }}" + tiny_tokenizer().chat_template
    tokenizer = tiny_tokenizer(template)
    ids = tokenizer.apply_chat_template(ONE, add_generation_prompt=True, persona="a poet")["input_ids"]
    assert PromptText(tokenizer, {"persona": "a poet"})(ids) == ONE[0]["content"]
    assert "a poet" in PromptText(tokenizer, {"persona": "a judge"})(ids)
