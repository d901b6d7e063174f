"""Mixtures: sources with different layouts become one dataset, with the requested number of rows of each source."""

import json
from collections import Counter

import pytest
from datasets import Dataset

from hf_prefopt import Mixture, PreferenceConfig, Source, split_by_prompt
from hf_prefopt.training.preference_data import PreferenceData
from tests.data.helpers import ask, reply
from tests.tokenizers import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def chats(count: int, letter: str = "a") -> Dataset:
    """Return conversations in TRL's columns."""
    rows = [{"prompt": ask(f"{letter} {n}"), "chosen": reply("Yes."), "rejected": reply("No.")} for n in range(count)]
    return Dataset.from_list(rows)


def questions(count: int, letter: str = "b") -> Dataset:
    """Return rows in the layout of Intel/orca_dpo_pairs, with other column names that need a mapping."""
    return Dataset.from_dict(
        {
            "asked": [f"{letter} {n}" for n in range(count)],
            "good": ["Yes."] * count,
            "bad": ["No."] * count,
        }
    )


MAPPING = {"question": "asked", "chosen": "good", "rejected": "bad"}


def test_what_a_stream_holds_is_known_for_the_start_summary(tmp_path):
    data = PreferenceData(PreferenceConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False), TOKENIZER)
    stream = data.prepare(chats(3).to_iterable_dataset(), "train")
    assert data.streams[stream] == "pairs, question (prompt, chosen, rejected)"
    sources = [Source(chats(3).to_iterable_dataset(), "a")]
    sources.append(Source(questions(2).to_iterable_dataset(), "b", column_mapping=MAPPING))
    mixed = data.prepare(Mixture(sources), "train")
    assert data.streams[mixed] == (
        "a: pairs, question (prompt, chosen, rejected), b: pairs, question (prompt = question, chosen, rejected)"
    )
    assert data.prepare(chats(3), "eval") not in data.streams


def labeled(count: int) -> Dataset:
    rows = [{"prompt": ask(f"c {n}"), "completion": reply("Yes."), "label": n % 2 == 0} for n in range(count)]
    return Dataset.from_list(rows)


def prepare(mixture: Mixture, tmp_path, **settings):
    args = PreferenceConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", **settings)
    return PreferenceData(args, TOKENIZER).prepare(mixture, "train")


def asked(rows) -> list[str]:
    """Return the question of each prepared row."""
    texts = [TOKENIZER.decode(row["prompt_ids"]) for row in rows]
    return [text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0] for text in texts]


@pytest.mark.parametrize("streams", [False, True])
def test_sources_of_different_layouts_are_one_data_set(streams, tmp_path):
    """The tokens equal those of each source prepared separately."""
    sources = [("chats", chats(3), {}), ("questions", questions(2), {"column_mapping": MAPPING})]
    given = [
        Source(rows.to_iterable_dataset() if streams else rows, name, **settings) for name, rows, settings in sources
    ]
    mixed = list(prepare(Mixture(given), tmp_path))
    order = ["a 0", "b 0", "a 1", "b 1", "a 2"] if streams else ["a 0", "a 1", "a 2", "b 0", "b 1"]
    assert asked(mixed) == order
    assert [row["row"] for row in mixed] == [0, 1, 2, 3, 4]
    alone = chats(2, "b").add_column("source", ["x"] * 2)
    expected = list(prepare(Mixture([Source(alone, "b")]), tmp_path))
    of_b = [{**row, "row": 0} for row, question in zip(mixed, asked(mixed), strict=True) if question[0] == "b"]
    assert of_b == [{**row, "row": 0} for row in expected]


@pytest.mark.parametrize(
    ("weights", "expected"), [((1, 1), (10, 20)), ((2, 0.5), (20, 10)), ((2.5, 0.05), (25, 1)), ((0.1, 1), (1, 20))]
)
def test_a_weight_is_how_often_each_row_is_there(weights, expected, tmp_path, caplog):
    """A weight of 2.5 on ten rows uses each row twice, and five rows a third time. A message reports the counts."""
    sources = [Source(chats(10), "one", weights[0]), Source(chats(20, "b"), "two", weights[1])]
    first, again = ([*asked(prepare(Mixture(sources, seed), tmp_path))] for seed in (1, 1))
    assert first == again
    counts = Counter(question[0] for question in first)
    assert (counts["a"], counts["b"]) == expected
    times = Counter(first)
    for letter, weight in zip("ab", weights, strict=True):
        assert {count for question, count in times.items() if question[0] == letter} <= {int(weight), int(weight) + 1}
    assert f"a mixture of {sum(expected)} rows: one {expected[0]}" in caplog.text
    if min(weights) < 1:
        assert first != asked(prepare(Mixture(sources, 2), tmp_path))


def test_fractions_are_shares_without_a_row_twice(tmp_path):
    """TRL's semantics: shares of 3/4 and 1/4 of 10 and 20 rows give at most 10 /
    (3/4) = 13.3 rows, 10 and 3 of them.
    """
    sources = [Source(chats(10), "one", fraction=3), Source(chats(20, "b"), "two", fraction=1)]
    questions = asked(prepare(Mixture(sources), tmp_path))
    assert Counter(question[0] for question in questions) == {"a": 10, "b": 3}
    assert len(set(questions)) == 13


def test_streams_by_fractions_end_with_the_first_and_by_whole_weights_repeat(tmp_path):
    def streams(**settings):
        return [
            Source(chats(count, letter).to_iterable_dataset(), letter, **one)
            for letter, count, one in zip("ab", (30, 300), settings["each"], strict=True)
        ]

    shares = asked(prepare(Mixture(streams(each=[{"fraction": 1}, {"fraction": 3}])), tmp_path))
    counts = Counter(question[0] for question in shares)
    # The number of rows of b before the 30th row of a is negative binomial: mean 30 · 3 = 90, standard deviation
    # √(30 · 0.75) / 0.25 = 19.
    assert counts["a"] in (29, 30) and 90 - 4 * 19 < counts["b"] < 90 + 4 * 19
    twice = asked(prepare(Mixture(streams(each=[{"weight": 2}, {}])), tmp_path))
    assert Counter(question[0] for question in twice) == {"a": 60, "b": 300}


def test_a_number_that_only_one_source_has(tmp_path, caplog):
    """If only one source has weights, they are 1 in the other one; scores have no neutral value and are dropped."""
    scored = chats(2).add_column("weight", [3.0, 4.0]).add_column("chosen_score", [1.0, 2.0])
    rows = prepare(Mixture([Source(scored, "one"), Source(chats(1, "b"), "two")]), tmp_path)
    assert rows["weights"][:] == [[3.0], [4.0], [1.0]]
    assert "chosen_scores" not in rows.column_names
    assert "`weights` is set to 1 for two" in caplog.text and "`chosen_scores` is removed, because two" in caplog.text


WRONG = {
    "another kind": (
        lambda: [Source(chats(2), "one"), Source(labeled(2), "two")],
        "one holds pairs, two holds .*one kind of examples",
    ),
    "weight 0": (lambda: [Source(chats(2), "one", weight=0)], "one: weight=0 must be above 0"),
    "no row drawn": (lambda: [Source(chats(2), "one", 0.1), Source(chats(2), "two")], "no row of one is drawn"),
    "fractions of some": (
        lambda: [Source(chats(2), "one", fraction=1), Source(chats(2), "two")],
        "two: fraction=None: set it above 0 for all sources",
    ),
    "both": (lambda: [Source(chats(2), "one", 2, fraction=1)], "one: weight=2 and fraction=1"),
    "a stream beside": (
        lambda: [Source(chats(2), "one"), Source(chats(2).to_iterable_dataset(), "two")],
        "two of the mixture are streams",
    ),
    "half a stream": (
        lambda: [Source(chats(2).to_iterable_dataset(), "one", 0.5)],
        "weight=0.5 must be a whole number",
    ),
    "none": (lambda: [], "at least one source"),
    "a bad row": (
        lambda: [Source(chats(2), "one"), Source([{"prompt": "a", "chosen": "b", "rejected": ""}], "two")],
        r"train \(two\): 1 of 1 row cannot be used\n  row 0: `rejected` is empty",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_mixed_is_named(name, tmp_path):
    sources, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        prepare(Mixture(sources()), tmp_path)


def test_no_prompt_is_in_both_parts():
    """Each prompt has four rows, in two layouts; a text and a single user message are the same prompt."""
    rows = [{"prompt": ask(f"q {n % 25}"), "chosen": reply(f"{n}"), "rejected": reply("No.")} for n in range(100)]
    texts = [{"prompt": f"q {n}", "chosen": " y", "rejected": " n"} for n in range(25)]
    for seed in range(5):
        train, held = Mixture([Source(rows, "one", 2), Source(texts, "two")], seed).hold_out(0.2)
        parts = [
            [
                {json.dumps(row["prompt"]) if at else row["prompt"][0]["content"] for row in one.rows}
                for at, one in pairs
            ]
            for pairs in (list(enumerate(train.sources)), list(enumerate(held.sources)))
        ]
        of_train, of_held = (set(one) | {text.strip('"') for text in other} for one, other in parts)
        assert not of_train & of_held and len(of_train | of_held) == 25
        # 125 rows, 5 per prompt: a fifth is 25 rows.
        assert sum(len(source.rows) for source in held.sources) == 25
        assert [source.weight for source in train.sources] == [2, 1] and held.sources[0].weight == 1


def test_the_held_out_prompts_do_not_depend_on_the_order():
    rows = chats(50)
    _, held = split_by_prompt(rows, 0.3, seed=3)
    _, again = split_by_prompt(rows.select(range(49, -1, -1)), 0.3, seed=3)
    _, other = split_by_prompt(rows, 0.3, seed=4)
    assert len(held) == 15 and sorted(held["prompt"][:], key=str) == sorted(again["prompt"][:], key=str)
    assert held["prompt"][:] != other["prompt"][:]


def test_prompts_that_only_begin_the_texts_are_kept_together():
    begin = [f"\n\nHuman: {n // 2}?\n\nAssistant:" for n in range(20)]
    answers = {"chosen": [f"{text} The {n}" for n, text in enumerate(begin)], "rejected": [f"{t} The x" for t in begin]}
    train, held = split_by_prompt(Dataset.from_dict(answers), 0.5)
    prompts = [{text.split("?")[0] for text in part["chosen"]} for part in (train, held)]
    assert not prompts[0] & prompts[1] and len(held) == 10


def test_what_cannot_be_split_is_named():
    with pytest.raises(ValueError, match="all 3 rows have the same prompt"):
        split_by_prompt(Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3), 0.5)
    for share in (0, 1, 5):
        with pytest.raises(ValueError, match=r"above 0 and below 1"):
            split_by_prompt(chats(3), share)
    with pytest.raises(ValueError, match="a stream has no known length"):
        Mixture([Source(chats(3).to_iterable_dataset(), "one")]).hold_out(0.5)
