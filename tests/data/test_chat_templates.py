"""Messages about a chat template and its arguments: each appears once, before the first step."""

import json

import pytest
from datasets import Dataset

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.data.prepare import prepare_dataset
from tests.data.helpers import ask, chat_pair, prepare_row, reply, say, scored_text, text_pair
from tests.data.test_templates import TEMPLATES, tokenizer_of
from tests.tokenizers import CHATML, CHATML_THINKING_LAST, tiny_tokenizer

# Like Qwen3's: without thinking, the generation prompt contains an empty thinking block.
SWITCHED = CHATML + "{%- if add_generation_prompt and not enable_thinking -%}{{- '<think></think>' -}}{%- endif -%}"


@pytest.fixture
def said(caplog):
    """Return the messages that this package has logged so far, and forget them."""

    def lines() -> str:
        found = "\n".join(record.getMessage() for record in caplog.records if record.name.startswith("hf_prefopt"))
        caplog.clear()
        return found

    return lines


def test_an_empty_block_of_thinking_is_scored_if_the_answer_holds_it():
    """Qwen3's template writes the same text for both: an empty block by default, or the empty block of the message."""
    tokenizer = tokenizer_of("qwen3")
    written = prepare_row(chat_pair(), tokenizer)
    assert scored_text(written, 0, tokenizer) == "Paris.<|im_end|>\n"
    assert tokenizer.decode(written["prompt_ids"]).endswith("<think>\n\n</think>\n\n")
    own = prepare_row(chat_pair("<think>\n\n</think>\n\nParis.", "<think>\n\n</think>\n\nRome."), tokenizer)
    assert scored_text(own, 0, tokenizer) == "<think>\n\n</think>\n\nParis.<|im_end|>\n"
    assert own["prompt_ids"] + own["response_ids"][0] == written["prompt_ids"] + written["response_ids"][0]


def test_one_answer_with_thinking_and_one_without():
    tokenizer = tokenizer_of("qwen3")
    row = prepare_row(chat_pair("<think>\nMuse.\n</think>\n\nParis."), tokenizer)
    assert scored_text(row, 0, tokenizer) == "<think>\nMuse.\n</think>\n\nParis.<|im_end|>\n"
    assert scored_text(row, 1, tokenizer) == "Rome.<|im_end|>\n"
    assert tokenizer.decode(row["response_ids"][1]) == "<think>\n\n</think>\n\nRome.<|im_end|>\n"


def test_blanks_at_the_beginning_of_an_answer_are_its_own():
    tokenizer = tiny_tokenizer(CHATML_THINKING_LAST)
    assert scored_text(prepare_row(chat_pair("\n  Paris."), tokenizer), 0, tokenizer) == "\n  Paris.<|im_end|>\n"


def test_another_prompt_than_the_one_to_generate_from_is_shown_once(said):
    rows = Dataset.from_list([chat_pair()] * 3)
    prepare_dataset(rows, tokenizer_of("nemotron_3_nano"))
    assert (
        "in 3 rows, the prompt in training differs from the prompt for generation, first: "
        r"'ssistant\n<think>\n' in generation, 'ssistant\n<think></think>Paris.<|i' in training" in said()
    )
    prepare_dataset(rows, tokenizer_of("qwen3"))
    assert "differs from the prompt" not in said()
    prepare_row(text_pair("The capital of un", "believable", "der"), tiny_tokenizer())
    assert "differs from the prompt for generation, first: ' un' in generation, ' unbe' in training" in said()


def test_a_role_that_the_template_leaves_out_is_an_error():
    deaf = CHATML.replace("for message in messages", "for message in messages if message['role'] != 'system'")
    row = chat_pair(prompt=[say("system", "Be brief."), *ask()])
    with pytest.raises(ValueError, match="`prompt` has a message of role 'system', which the chat template does not"):
        prepare_row(row, tiny_tokenizer(deaf))
    talk = {**chat_pair(), "chosen": [*reply("Well."), say("system", "Be brief."), *reply("Paris.")]}
    with pytest.raises(ValueError, match="`chosen` has a message of role 'system'"):
        prepare_row(talk, tiny_tokenizer(deaf))


def test_words_that_the_template_cuts_are_an_error_in_every_turn():
    """DeepSeek's template drops thinking; the other response and earlier turns are checked, too."""
    tokenizer = tokenizer_of("deepseekv3")
    with pytest.raises(
        ValueError, match=r"`rejected` contains '<think>Muse\.</think>Rome\.', but the chat template does"
    ):
        prepare_row(chat_pair(rejected="<think>Muse.</think>Rome."), tokenizer)
    turns = [*reply("<think>Muse.</think>Well."), *ask("And?"), *reply("Paris.")]
    with pytest.raises(ValueError, match=r"`chosen` contains '<think>Muse\.</think>Well\.'"):
        prepare_row({**chat_pair(), "chosen": turns}, tokenizer_of("qwen3"))
    assert (
        len(
            prepare_dataset(
                Dataset.from_list([chat_pair(), {**chat_pair(), "chosen": turns}]),
                tokenizer_of("qwen3"),
                on_bad_rows="drop",
            )
        )
        == 1
    )


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("gptoss", "a chat template with a fixed date"),
        ("llama3_2", "chat_template_kwargs={'date_string': '1 Jan 2025'}"),
        ("muse_glimmer", "chat_template_kwargs={'current_date': '1 Jan 2025'}"),
    ],
)
def test_todays_date_is_said_with_its_cure(name, cure, said):
    prepare_row(chat_pair(), tokenizer_of(name))
    assert (
        f"the chat template writes today's date, so rows and caches change every day; fix the date with {cure}"
        in said()
    )
    if "=" in cure:
        kwargs = json.loads(cure.split("=")[1].replace("'", '"'))
        row = prepare_row(chat_pair(), tokenizer_of(name), chat_template_kwargs=kwargs)
        assert "1 Jan 2025" in tokenizer_of(name).decode(row["prompt_ids"]) and "today's date" not in said()


def test_no_other_template_writes_the_date(said):
    for name in ("qwen3", "llama3", "gemma3", "phi3"):
        prepare_row(chat_pair(), tokenizer_of(name))
        assert "date" not in said()
    assert all("strftime_now" not in TEMPLATES[name] for name in ("qwen3", "llama3", "gemma3", "phi3"))


def test_arguments_of_the_template_are_those_of_the_row_then_those_of_the_settings(tmp_path):
    tokenizer = tiny_tokenizer(SWITCHED)
    args = PreferenceConfig(str(tmp_path), report_to="none", chat_template_kwargs='{"enable_thinking": true}')
    rows = [chat_pair() | {"chat_template_kwargs": json.dumps({"enable_thinking": on})} for on in (True, False)]
    rows.append(chat_pair() | {"chat_template_kwargs": None})
    done = prepare_dataset(Dataset.from_list(rows), tokenizer, chat_template_kwargs=args.chat_template_kwargs)
    assert done[0]["prompt_ids"] == done[2]["prompt_ids"]
    off = prepare_row(chat_pair(), tokenizer)
    assert done[1]["prompt_ids"] == off["prompt_ids"]


def test_arguments_that_nobody_reads_are_refused_or_named(said):
    with pytest.raises(ValueError, match=r"train: chat_template_kwargs=.*: .* does not read 'enable_thinkin'"):
        prepare_row(chat_pair(), tiny_tokenizer(SWITCHED), chat_template_kwargs={"enable_thinkin": True})
    prepare_row({**chat_pair(), "chat_template_kwargs": '{"mood": 1}'}, tiny_tokenizer())
    assert "the chat template does not read mood of chat_template_kwargs" in said()
    prepare_row(text_pair(), tiny_tokenizer(), chat_template_kwargs={"enable_thinking": True})
    assert "chat_template_kwargs are not used: no row contains messages" in said()
    with pytest.raises(ValueError, match="chat_template_kwargs sets 'tools', which is determined by the rows"):
        prepare_row(chat_pair(), tiny_tokenizer(), chat_template_kwargs={"tools": []})
    with pytest.raises(ValueError, match="row 0: `chat_template_kwargs` cannot be used: it sets 'tokenize'"):
        prepare_row({**chat_pair(), "chat_template_kwargs": '{"tokenize": true}'}, tiny_tokenizer())
    with pytest.raises(ValueError, match="chat_template_kwargs='no' must be a dict"):
        prepare_row(chat_pair(), tiny_tokenizer(), chat_template_kwargs="no")


def test_rows_prepared_with_other_arguments_are_refused():
    rows, tokenizer = Dataset.from_list([chat_pair()]), tiny_tokenizer(SWITCHED)
    done = prepare_dataset(rows, tokenizer, chat_template_kwargs={"enable_thinking": True})
    assert prepare_dataset(done, tokenizer, chat_template_kwargs={"enable_thinking": True}) is done
    for other in ({"enable_thinking": False}, None):
        with pytest.raises(ValueError, match="prepared with chat_template_kwargs"):
            prepare_dataset(done, tokenizer, chat_template_kwargs=other)


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_a_response_that_merges_with_the_prompt_is_blamed_for_that(side):
    """The first token is "Th" merged with "e", so only the EOS would be scored."""
    merging = {**text_pair("Th", "x yes", "x no"), side: "e"}
    with pytest.raises(ValueError, match=f"row 0: `{side}` and the prompt merge into one token, the first"):
        prepare_row(merging, tiny_tokenizer())
