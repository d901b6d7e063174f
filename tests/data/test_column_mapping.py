"""Settings for columns: other names, columns to remove, and whether text becomes a conversation."""

import json
import logging

import pytest
from datasets import ClassLabel, Dataset, Features, Value
from transformers import HfArgumentParser

from hf_prefopt import PreferenceConfig
from hf_prefopt.data.prepare import prepare_dataset
from hf_prefopt.training.preference_data import PreferenceData
from tests.data.helpers import ask, chat_pair, reply, text_pair
from tests.tokenizers import tiny_tokenizer
from tests.trainers import make_config

TOKENIZER = tiny_tokenizer()
MAPPING = {"prompt": "ask", "chosen": "yes", "rejected": "no"}
RENAMED = {column: text_pair()[name] for name, column in MAPPING.items()}


def prepare(*rows: dict, **options):
    return prepare_dataset(Dataset.from_list([*rows]), TOKENIZER, max_length=None, **options)


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.WARNING, logger="hf_prefopt")
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("hf_prefopt")]


def test_columns_under_other_names():
    assert prepare(RENAMED, column_mapping=MAPPING)[:] == prepare(text_pair())[:]
    with pytest.raises(ValueError, match=r"columns `.*` are missing \(columns found: ask, yes, no\)"):
        prepare(RENAMED)
    stream = Dataset.from_list([RENAMED]).to_iterable_dataset()
    assert list(prepare_dataset(stream, TOKENIZER, column_mapping=MAPPING)) == list(prepare(text_pair()))


def test_a_mapping_may_swap_columns_and_says_which_verdict_counts():
    swapped = prepare(text_pair(), column_mapping={"chosen": "rejected", "rejected": "chosen"})
    assert swapped["response_ids"][0] == prepare(text_pair())["response_ids"][0][::-1]
    row = {"prompt": "Why?", "response_a": "So.", "response_b": "No.", "better": "a", "safer": "b"}
    better, safer = prepare(row), prepare(row, column_mapping={"winner": "safer"})
    assert better["response_ids"][0] == safer["response_ids"][0][::-1]


MISTAKES = [
    ({"column_mapping": {"prompt": "aks"}}, r"train: column_mapping=.*no column 'aks'; found ask, yes, no"),
    ({"column_mapping": {"no": "yes"}}, r"there is already a column 'no'; remove it with remove_columns=\['no'\]"),
    ({"remove_columns": ["maybe"]}, r"train: remove_columns=\['maybe'\]: no column 'maybe'; found ask, yes, no"),
    ({"text_as": "chat"}, "text_as='chat' is not one of text, messages"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_a_name_that_is_not_there_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prepare(RENAMED, **options)


def test_columns_are_left_out():
    row = {**text_pair(), "margin": 5.0, "persona": "a pirate"}
    left = prepare(row, remove_columns=["margin", "persona"])
    assert left.column_names == prepare(text_pair()).column_names


def test_settings_survive_yaml_and_the_command_line(tmp_path):
    (parsed,) = HfArgumentParser(PreferenceConfig).parse_args_into_dataclasses(
        [
            *f"--output_dir {tmp_path} --remove_columns margin id --text_as messages --column_mapping".split(),
            json.dumps(MAPPING),
        ]
    )
    assert (parsed.column_mapping, parsed.remove_columns, parsed.text_as) == (MAPPING, ["margin", "id"], "messages")
    again = PreferenceConfig(**{name: parsed.to_dict()[name] for name in ("output_dir", "column_mapping", "text_as")})
    assert again.column_mapping == MAPPING
    for wrong in ("prompt=ask", {"prompt": 3}, {"prompt": "a", "chosen": "a"}):
        with pytest.raises(ValueError, match=r"column_mapping=.*must map names to columns"):
            PreferenceConfig(str(tmp_path), column_mapping=wrong)


def test_the_trainers_data_is_read_as_the_settings_say(tmp_path):
    made = PreferenceData(make_config(tmp_path, column_mapping=MAPPING, text_as="messages"), TOKENIZER)
    assert made.prepare([RENAMED], "train")[:] == prepare(text_pair(), text_as="messages")[:]


def test_text_becomes_messages_where_it_is_asked_for(said):
    """By default a message says that text stays text; with the setting, it becomes
    the conversation with the same words.
    """
    row = text_pair("What is the capital of France?", " Paris.", " Rome.")
    prepare(row)
    assert said() == [
        "train: prompt, chosen, rejected are text, which is trained on unchanged, without the chat template; "
        "text_as='messages' converts it to messages"
    ]
    assert prepare(row, text_as="messages")[:] == prepare(chat_pair())[:]
    assert len(said()) == 1
    prepare(text_pair("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"))
    prepare_dataset(Dataset.from_list([row]), tiny_tokenizer(None))
    assert len(said()) == 1


TRANSCRIPT = {
    side: f"\n\nHuman: What is the capital of France?\n\nAssistant: The city of {end}."
    for side, end in (("chosen", "Paris"), ("rejected", "Rome"))
}


def test_a_transcript_is_split_at_the_assistants_marker(said):
    """Both answers begin with "The city of", which belongs to the responses and not to the prompt."""
    row = prepare(TRANSCRIPT)[0]
    assert TOKENIZER.decode(row["prompt_ids"]).endswith("France?\n\nAssistant:")
    assert [TOKENIZER.decode(ids) for ids in row["response_ids"]] == [
        " The city of Paris.<|im_end|>",
        " The city of Rome.<|im_end|>",
    ]
    chat = chat_pair("The city of Paris.", "The city of Rome.")
    assert prepare(TRANSCRIPT, text_as="messages")[:] == prepare(chat)[:]
    assert prepare(TRANSCRIPT, unpair=True)["labels"][:] == [[True], [False]]


def test_words_of_the_human_are_not_trained_on():
    later = {**TRANSCRIPT, "rejected": TRANSCRIPT["rejected"] + "\n\nHuman: Why?\n\nAssistant: So."}
    with pytest.raises(ValueError, match="`rejected` has a user turn after"):
        prepare(later)
    (row,) = prepare(later, text_as="messages")
    scored = [token for token, mask in zip(row["response_ids"][1], row["scored_masks"][1], strict=True) if mask]
    assert TOKENIZER.decode(scored) == "The city of Rome.<|im_end|>\nSo.<|im_end|>\n"


PLAIN = {"chosen": "The capital of France is Paris.", "rejected": "The capital of France is Rome."}


@pytest.mark.parametrize(
    "loss", ["dpo", "hinge", "robust", "ipo", "simpo", "orpo", "apo_zero", "dpo_norm", "dpop", "cpo"]
)
def test_texts_without_a_marker_are_for_losses_that_compare_sums(loss, tmp_path):
    """The position where the prompt ends has no effect on functions of the difference of the log-ratios."""
    made = PreferenceData(make_config(tmp_path, loss_type=loss), TOKENIZER)
    if loss in ("dpo", "hinge", "robust"):
        assert len(made.prepare([PLAIN], "train")) == 1
    else:
        with pytest.raises(ValueError, match="these losses need to know where the prompt ends; add a `prompt` column"):
            made.prepare([PLAIN], "train")


def test_texts_without_a_marker_cannot_be_unpaired_nor_be_messages():
    for options in ({"unpair": True}, {"needs_prompt": True}):
        with pytest.raises(ValueError, match="need to know where the prompt ends"):
            prepare(PLAIN, **options)
    with pytest.raises(ValueError, match="so there is no prompt"):
        prepare(PLAIN, text_as="messages")


def test_classes_are_read_by_their_names():
    features = Features(
        {"prompt": Value("string"), "completion": Value("string"), "label": ClassLabel(names=["good", "bad"])}
    )
    rows = {"prompt": ["Why?", "Why?"], "completion": ["So.", "No."], "label": [0, 1]}
    made = prepare_dataset(Dataset.from_dict(rows, features=features), TOKENIZER)
    assert made["labels"][:] == [[True], [False]]
    features["label"] = ClassLabel(names=["spam", "ham"])
    with pytest.raises(ValueError, match="`label` is 'spam'; make it true"):
        prepare_dataset(Dataset.from_dict(rows, features=features), TOKENIZER)


def test_labels_of_three_values_are_refused():
    rows = [{"prompt": "Why?", "completion": "So.", "label": label} for label in (-1, 0, 1)]
    with pytest.raises(ValueError, match="column `label` contains −1 and 0"):
        prepare(*rows)
    stream = iter(prepare_dataset(Dataset.from_list([rows[2], *rows]).to_iterable_dataset(), TOKENIZER))
    with pytest.raises(ValueError, match="column `label` contains −1 and 0"):
        list(stream)


def test_what_is_not_used_is_named(said):
    prepare(
        {**chat_pair(), "id": 1, "source": "x", "chosen_model": "y", "rating": 5, "verbosity": 3, "answer": "Paris."}
    )
    assert said() == ["train: columns not used: verbosity, answer"]


def test_how_columns_were_read_is_said(said):
    prepare({"question": ask(), "chosen": reply("Paris."), "rejected": reply("Rome."), "id": 3})
    assert said() == ["train: read as pairs, question (prompt = question, chosen, rejected)"]


def test_scores_against_the_pair_are_counted(said):
    prepare(*({**chat_pair(), "chosen_score": score, "rejected_score": 3} for score in (1, 5, None, 2)))
    assert said() == ["train: 2 pairs kept although the chosen response has the lower score"]


def test_columns_that_change_the_loss_are_said_once(said, tmp_path):
    rows = [{**chat_pair(), "margin": 1.0, "chosen_score": 2.0, "rejected_score": 1.0}] * 2
    PreferenceData(make_config(tmp_path), TOKENIZER).prepare(rows, "train")
    assert said() == ["train: the losses read margin; use remove_columns to exclude columns"]
    made = PreferenceData(make_config(tmp_path, remove_columns=["margin"]), TOKENIZER)
    assert "margins" not in made.prepare(rows, "train").column_names and "margins" not in made.objective.inputs
    assert len(said()) == 1


def test_what_the_template_does_not_write_is_named(said):
    """Only one row has `name`, and thinking in an earlier turn. The template writes tool calls, but not these keys."""
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    thought = {"role": "assistant", "content": "Hello.", "reasoning_content": "Think.", "name": "bot"}
    called = {"role": "assistant", "content": "Paris.", "tool_calls": call}
    prepare(chat_pair(), {**chat_pair(prompt=[*ask("Hi"), thought, *ask()]), "chosen": [called]})
    assert said() == [
        "train: the chat template does not write reasoning_content, name of the messages: the model does not see it"
    ]


def test_keys_of_structs_that_are_not_used_are_named(said):
    """UltraFeedback's responses were written for different system prompts; scores and models only describe the row."""
    sides = [
        {"response": text, "overall_score": score, "custom_system_prompt": system, "model": "m", "critique": "Good."}
        for text, score, system in (("Paris.", 5.0, "Be truthful."), ("Rome.", 2.0, "Be helpful."))
    ]
    prepare({"instruction": "Where is it?", "completions": sides})
    (line,) = said()
    assert "keys of completions not used: custom_system_prompt" in line and "model" not in line.split("not used: ")[1]
