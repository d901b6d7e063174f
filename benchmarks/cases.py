"""The cases of the comparison: three synthetic shapes, real pairs, chat pairs and ranked lists."""

from collections.abc import Callable, Sequence
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from benchmarks.sides import Side, vocabulary_of
from benchmarks.work import Row, Work, merged, ranked_as_pairs, read_rows, shuffled_batches, synthetic
from hf_prefopt.data.prepare import prepare_dataset

# Prompt tokens, response tokens and pairs per step, chosen so that a TRL step takes less than 40 s on one CPU thread.
SHAPES = {"1:1": (128, 128, 2), "4:1": (512, 128, 1), "10:1": (1280, 128, 1)}
STEPS = 7
PAIRS_A_STEP = 8


def tokenized_alike(raw: Sequence[dict[str, Any]], peer: Side) -> list[Row]:
    """Convert raw pairs to prepared rows, tokenized by TRL's trainer and by `hf_prefopt`.

    Raises:
        AssertionError: the two give different token ids.
        ValueError: the model is random, so its tokenizer knows only three words.
    """
    if peer.trainer.processing_class.chat_template is None:
        raise ValueError(f"real text needs a real model; a random one takes {', '.join(f'equal-{s}' for s in SHAPES)}")
    rows = Dataset.from_list([{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in raw])
    tokenizer = peer.trainer.processing_class
    theirs = peer.trainer._prepare_dataset(rows, tokenizer, peer.trainer.args, "benchmark")
    ours = prepare_dataset(rows, tokenizer, max_length=None, name="benchmark")
    for their_row, our_row in zip(theirs, ours, strict=True):
        same = their_row["prompt_ids"] == our_row["prompt_ids"]
        same &= [their_row["chosen_ids"], their_row["rejected_ids"]] == our_row["response_ids"]
        if not same:
            raise AssertionError(f"row {our_row['row']}: TRL and hf_prefopt tokenize it differently")
    return list(ours)


def equal_lengths(shape: str) -> Callable[[Side, str], Work]:
    """Pairs of one shape, prompt to response: pieces of text, or random tokens for a random model."""
    prompt, response, pairs = SHAPES[shape]

    def build(peer: Side, source: str) -> Work:
        text = [] if source.startswith("random:") else _one_text(peer.trainer.processing_class)
        batches = synthetic(vocabulary_of(source), pairs, prompt, response, steps=STEPS, text=text)
        return Work(f"equal lengths {shape}", batches)

    return build


def _one_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of some GSM8K solutions, concatenated."""
    rows = read_rows("recipes/data/gsm8k_pairs/test.jsonl.gz")
    return tokenizer("\n\n".join(row["chosen"][0]["content"] for row in rows))["input_ids"]


def gsm8k(peer: Side, _: str) -> Work:
    """Pairs of solutions, shuffled."""
    rows = tokenized_alike(read_rows("recipes/data/gsm8k_pairs/train.jsonl.gz")[:800], peer)
    return Work("GSM8K pairs", shuffled_batches(rows, PAIRS_A_STEP, STEPS))


def chat(peer: Side, _: str) -> Work:
    """Instructions of very unequal lengths, shuffled."""
    rows = tokenized_alike(read_rows("benchmarks/data/chat_pairs.jsonl.gz"), peer)
    return Work("chat pairs", shuffled_batches(rows, PAIRS_A_STEP, STEPS))


def ranked(peer: Side, _: str) -> Work:
    """One long prompt per step, its best answer against each of three others: one group here, three pairs in TRL."""
    lists = 24
    pairs = tokenized_alike(ranked_as_pairs(read_rows("benchmarks/data/ranked4.jsonl.gz")[:lists]), peer)
    groups = [merged(pairs[3 * number : 3 * number + 3]) for number in range(lists)]
    return Work("ranked lists, K = 4", shuffled_batches(groups, 1, STEPS))


CASES: dict[str, Callable[[Side, str], Work]] = {
    **{f"equal-{shape}": equal_lengths(shape) for shape in SHAPES},
    "gsm8k": gsm8k,
    "chat": chat,
    "ranked": ranked,
}
