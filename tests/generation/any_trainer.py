"""The two trainers for tests of the callbacks: transformers' own, and ours."""

from datasets import Dataset
from transformers import Trainer, TrainingArguments, default_data_collator

from tests.tiny_models import tiny_model, with_lora
from tests.tokenizers import tiny_tokenizer
from tests.trainers import QUIET, make_trainer, pairs

PROMPTS = ["The capital of France?", "under the sea", {"prompt": [{"role": "user", "content": "6 or 5?"}]}]


def policy(adapter=True, **settings):
    """Return a tiny model with dropout in its attention, so that training draws random numbers."""
    model = tiny_model(vocab_size=600, attention_dropout=0.2, eos_token_id=tiny_tokenizer().eos_token_id)
    return with_lora(model, lora_dropout=0.2, init_lora_weights=False, **settings) if adapter else model


def plain_trainer(folder, model, **settings):
    """Return transformers' own Trainer, on language modeling of a few tokens."""
    rows = [{"input_ids": [5, 6, 7, 8 + n], "labels": [5, 6, 7, 8 + n]} for n in range(8)]
    args = TrainingArguments(str(folder), **{**QUIET, "learning_rate": 1e-2, "eval_strategy": "steps", **settings})
    data = {"train_dataset": Dataset.from_list(rows), "eval_dataset": Dataset.from_list(rows[:2])}
    tokenizer = tiny_tokenizer()
    return Trainer(model, args, default_data_collator, processing_class=tokenizer, **data)


def preference_trainer(folder, model, **settings):
    """Return our trainer."""
    settings = {"learning_rate": 1e-2, "eval_strategy": "steps", "disable_dropout": False, **settings}
    return make_trainer(folder, model, train_dataset=pairs(8), eval_dataset=pairs(2), **settings)


TRAINERS = {"plain": plain_trainer, "preference": preference_trainer}
