"""Generation as an evaluation: the answers to GSM8K are read correctly, and model and tokenizer are not changed."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model

from hf_prefopt.callbacks import GenerationEvalCallback
from hf_prefopt.evaluation.gsm8k import exact_match, final_answer, load_gsm8k_problems
from hf_prefopt.generation.answers import pad_left, prompt_ids
from tests.tiny_models import tiny_model
from tests.tokenizers import tiny_tokenizer

PROBLEMS = [{"prompt": "The capital of France?"}, {"prompt": "under the sea"}, {"prompt": "A: 6 or 5? I can help."}]


class StandInTrainer(SimpleNamespace):
    """A stand-in for the trainer with what the callback needs, for a tiny model."""

    def __init__(self, model, tokenizer):
        AcceleratorState._reset_state()  # otherwise, the precision of an earlier trainer in this process would be used
        super().__init__(model=model, processing_class=tokenizer, accelerator=Accelerator(cpu=True), logged=[])
        self.args = SimpleNamespace(disable_tqdm=True)

    def is_world_process_zero(self) -> bool:
        return True

    def log(self, logs: dict[str, float]) -> None:
        self.logged.append(logs)


@pytest.fixture
def trainer() -> StandInTrainer:
    tokenizer = tiny_tokenizer()
    return StandInTrainer(tiny_model(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id), tokenizer)


def evaluate(callback: GenerationEvalCallback) -> dict[str, float]:
    metrics = {"eval_loss": 0.69}
    callback.on_evaluate(args=None, state=None, control=None, metrics=metrics)
    return metrics


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18", "18"),
        ("He pays $1,234.00 in all.\nA: $1,234.00", "1234"),
        ("so it is 70000\n#### 70,000", "70000"),
        ("A: 3\nNo, wait.\nA: 4", "4"),
        ("That leaves 12.50 dollars", "12.5"),
        ("The change is -7", "-7"),
        ("It costs -$7", "-7"),
        ("5-3", "3"),
        ("5 - 3", "3"),
        ("A: none of 40 apples", "40"),
        ("A: 0.0", "0"),
        ("about .5", "0.5"),
        ("10 in 1,000.", "1000"),
        ("I do not know", None),
        ("", None),
    ],
)
def test_final_answer_is_read_in_one_spelling(text, answer):
    assert final_answer(text) == answer


def test_every_shipped_problem_has_a_final_answer_and_matches_itself():
    problems = load_gsm8k_problems()
    assert len(problems) == 200
    assert all(exact_match(problem, problem["answer"]) == 1.0 for problem in problems)


def test_exact_match_is_strict_about_the_number_and_lenient_about_its_form():
    problem = {"answer": "#### 18"}
    assert exact_match(problem, "so $18.00") == 1.0
    assert exact_match(problem, "A: 19 (nearly 18)") == 0.0
    assert exact_match(problem, "no idea") == 0.0


def test_the_mean_score_is_logged_with_its_count_and_returned_by_evaluate(trainer):
    """The score is the index of the problem: 0, 1 and 2 have the mean 1."""
    callback = GenerationEvalCallback(
        trainer, PROBLEMS, lambda problem, text: PROBLEMS.index(problem), name="place/mean", max_new_tokens=2
    )
    metrics = evaluate(callback)
    expected = {"eval_place/mean": 1.0, "eval_place/problems": 3}
    assert trainer.logged == [expected]
    assert metrics == {"eval_loss": 0.69, **expected}


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_answers_do_not_depend_on_the_batch_they_are_generated_in(trainer, batch_size):
    """Left padding has no effect on the model: the answers of any batch size equal those generated one by one."""
    answers = {}

    def keep(problem, text):
        answers[problem["prompt"]] = text
        return 0.0

    evaluate(GenerationEvalCallback(trainer, PROBLEMS, keep, max_new_tokens=8, batch_size=batch_size))
    tokenizer, model = trainer.processing_class, trainer.model
    for problem in PROBLEMS:
        ids = torch.tensor([prompt_ids(problem, tokenizer)])
        alone = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
        assert answers[problem["prompt"]] == tokenizer.decode(alone[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("training", [True, False])
def test_model_and_tokenizer_are_left_as_they_were(trainer, training):
    trainer.model.train(training)
    side = trainer.processing_class.padding_side
    evaluate(GenerationEvalCallback(trainer, PROBLEMS, lambda *_: 0.0, max_new_tokens=2))
    assert trainer.model.training is training
    assert trainer.processing_class.padding_side == side
    assert all(parameter.grad is None for parameter in trainer.model.parameters())


def test_a_model_under_an_adapter_generates(trainer):
    trainer.model = get_peft_model(trainer.model, LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    callback = GenerationEvalCallback(trainer, limit=2, max_new_tokens=2)
    assert evaluate(callback)["eval_gsm8k/problems"] == 2


def test_a_tokenizer_without_chat_template_or_padding_token_serves(trainer):
    trainer.processing_class.chat_template = None
    trainer.processing_class.pad_token = None
    metrics = evaluate(GenerationEvalCallback(trainer, PROBLEMS, lambda *_: 1.0, max_new_tokens=2))
    assert metrics["eval_gsm8k/exact_match"] == 1.0


def test_no_problems_are_refused(trainer):
    with pytest.raises(ValueError, match="no problem"):
        GenerationEvalCallback(trainer, limit=0)


def test_left_padding_by_hand():
    input_ids, mask = pad_left([[5, 6, 7], [8]], pad_id=0)
    assert input_ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
