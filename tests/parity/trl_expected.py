"""Tests of TRL that pass with TRL and fail with `hf_prefopt.trl`: a complete list, with the reason of each."""

import re

_PREPARED = "internals: the test reads TRL's names of prepared columns"
_COLLATOR = "internals: the test reads TRL's collator"
_PROMPT = "deliberate: TRL splits two texts at the first different character; here, the prompt must be given"
_STREAM = "better: a stream's reference log-probs are computed while its rows are read"
_TAG = "deliberate: the models' tags name this library"
# A pattern for the test's name (with its class and parameters), and the reason why it does not pass.
EXPECTED: dict[str, str] = {
    r"test_(orpo|cpo)_trainer\[t5": "deliberate: encoder-decoder models raise an error",
    r"test_(orpo|cpo)_trainer\.py.*test_init_with_eval_dataset\[dataset": _PREPARED,
    r"test_(orpo|cpo)_trainer_with_lora\[standard_implicit_prompt": _PROMPT,
    r"test_evaluate_with_eval_dataset\[.*iterable_dataset.*-True\]": _STREAM,
    r"test_precompute_ref_log_probs_raises_for_iterable_dataset": _STREAM,
    r"test_evaluate_precompute_ref_log_probs_after_training_raises": "better: the cache has these log-probs",
    r"test_train_with_sync_ref_model": "internals: a moving reference is a set of tensors, not a ref_model",
    r"test_train_model_dtype": "better: with its fp16 weights the loss becomes NaN, which stops training here",
    r"TestKTOTrainer::test_train_with_iterable_dataset\[kto\]": "missing: KTO's loss on a stream",
    r"test_train_gpt_oss": "better: `thinking` that the stand-in's chat template drops is an error",
    r"TestKTOTrainer::test_tokenize_and_process_tokens": _PREPARED,
    r"test_train_dataset_required": "better: a trainer without training data can evaluate",
    r"test_tag_added": _TAG,
    r"TestTPOTrainer::test_train_implicit_prompt": _PROMPT,
    r"TestTPOTrainer::test_implicit_prompt_mismatched_reference_raises": "the same error in other words",
    r"TestTPOTrainer::test_train_without_nll": _COLLATOR,
}


def expected_reason(test: str) -> str | None:
    """Return the reason why a test is expected to fail, or `None`."""
    return next((reason for pattern, reason in EXPECTED.items() if re.search(pattern, test)), None)
