"""The rows that the recipes train on if they use only a part of the dataset."""

from datasets import Dataset

from hf_prefopt.recipe.draw import characters, draw, draw_prompts

ROWS = Dataset.from_dict(
    {"prompt": [[{"role": "user", "content": c}] for c in "aabbbcddde"], "chosen": list("0123456789")}
)


def test_rows_are_drawn_at_random_and_stay_in_their_order():
    drawn = draw(ROWS, 4, seed=1)["chosen"]
    assert len(drawn) == 4 and drawn == sorted(drawn)
    assert drawn == draw(ROWS, 4, seed=1)["chosen"] != draw(ROWS, 4, seed=2)["chosen"]
    assert len(draw(ROWS, None, seed=1)) == len(draw(ROWS, 99, seed=1)) == 10


def test_prompts_are_drawn_with_all_their_rows():
    """For all drawn prompts except the last one, every row is used."""
    for seed in range(20):
        prompts = [row["prompt"][0]["content"] for row in draw_prompts(ROWS, 6, seed)]
        assert len(prompts) == 6
        cut = [name for name in set(prompts) if prompts.count(name) < "aabbbcddde".count(name)]
        assert len(cut) <= 1


def test_rows_that_begin_with_their_prompt_are_drawn_one_by_one():
    rows = ROWS.remove_columns("prompt")
    assert draw_prompts(rows, 4, seed=1)["chosen"] == draw(rows, 4, seed=1)["chosen"]


def test_of_a_stream_the_first_rows_are_taken():
    stream = ROWS.to_iterable_dataset()
    for drawn in (draw, draw_prompts):
        assert [row["chosen"] for row in drawn(stream, 3, seed=1)] == ["0", "1", "2"]


def test_the_length_of_a_row_is_that_of_its_texts():
    assert characters({"prompt": [{"role": "user", "content": "ab"}], "chosen": "cde", "score": 1.5}) == 9
