"""Tests of TRL's that pass on TRL and fail on `hf_prefopt.trl`: a closed list, each with its reason."""

import re

_PREPARED = "internals: it reads TRL's names of prepared columns"
_COLLATOR = "internals: it reads TRL's collator"
_PROMPT = "deliberate: TRL splits two texts at the first character that differs; here the prompt must be said"
_STREAM = "better: a stream's reference log-probs are computed as its rows come"
_TAG = "deliberate: the models' tags name this library"
# A pattern for the test's name, with its class and parameters, and why it is not to pass.
EXPECTED: dict[str, str] = {
    r"test_(orpo|cpo)_trainer\[t5": "deliberate: encoder-decoder models are refused",
    r"test_(orpo|cpo)_trainer\.py.*test_init_with_eval_dataset\[dataset": _PREPARED,
    r"test_(orpo|cpo)_trainer_with_lora\[standard_implicit_prompt": _PROMPT,
    r"test_evaluate_with_eval_dataset\[.*iterable_dataset.*-True\]": _STREAM,
    r"test_precompute_ref_log_probs_raises_for_iterable_dataset": _STREAM,
    r"test_evaluate_precompute_ref_log_probs_after_training_raises": "better: those rows are in the cache",
    r"test_train_with_sync_ref_model": "internals: a reference that moves is tensors, no ref_model",
    r"test_train_model_dtype": "better: the loss of its fp16 weights becomes NaN, which stops here",
    r"TestKTOTrainer::test_train_with_iterable_dataset\[kto\]": "missing: KTO's loss on a stream",
    r"test_train_gpt_oss": "better: `thinking` that the stand-in's chat template drops is an error",
    r"TestKTOTrainer::test_tokenize_and_process_tokens": _PREPARED,
    r"test_train_dataset_required": "better: a trainer without training data evaluates",
    r"test_tag_added": _TAG,
    r"TestTPOTrainer::test_train_implicit_prompt": _PROMPT,
    r"TestTPOTrainer::test_implicit_prompt_mismatched_reference_raises": "the same error in other words",
    r"TestTPOTrainer::test_train_without_nll": _COLLATOR,
}


def expected_reason(test: str) -> str | None:
    """Why a test is expected to fail, or `None`."""
    return next((reason for pattern, reason in EXPECTED.items() if re.search(pattern, test)), None)
