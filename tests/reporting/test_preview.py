"""The preview shows what the model gets: counts, special tokens, and which tokens are scored."""

from io import StringIO

from rich.console import Console

from hf_prefopt.reporting.preview import preview_rows, print_preview
from tests.data.helpers import chat_pair, prepare_row, reply, say
from tests.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def printed(rows, **options) -> str:
    console = Console(width=100, file=StringIO())
    console.print(preview_rows(rows, TOKENIZER, **options))
    return console.file.getvalue()


def test_special_tokens_and_counts_are_shown():
    row = prepare_row(chat_pair(), TOKENIZER)
    text = printed([row])
    assert "<|im_start|>assistant" in text and "⟦Paris.<|im_end|>" in text
    assert f"prompt: {len(row['prompt_ids'])} tokens" in text
    assert f"chosen: {len(row['response_ids'][0])} tokens, {sum(row['scored_masks'][0])} scored" in text


def test_only_scored_tokens_stand_in_the_brackets():
    chosen = [*reply("Hello."), say("user", "And?"), *reply("Paris.")]
    text = printed([prepare_row({**chat_pair(), "chosen": chosen}, TOKENIZER)])
    inside = [part.split("⟧")[0] for part in text.split("⟦")[1:]]
    assert len(inside) == 3 and not any("And?" in part for part in inside)


def test_brackets_in_the_text_are_no_markup():
    assert "[bold]Paris[/bold]" in printed([prepare_row(chat_pair("[bold]Paris[/bold]"), TOKENIZER)])


def test_no_more_groups_than_asked_for_are_shown():
    rows = [{**prepare_row(chat_pair(), TOKENIZER), "row": number} for number in range(3)]
    assert printed(rows, limit=2).count("prompt:") == 2


def test_a_preview_prints_to_the_console_given(capsys):
    print_preview([prepare_row(chat_pair(), TOKENIZER)], TOKENIZER, console=Console(width=80))
    assert "rejected:" in capsys.readouterr().out
