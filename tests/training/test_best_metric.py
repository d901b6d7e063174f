"""`metric_for_best_model` is a metric of the evaluation; otherwise there is an error before the first step."""

import pytest
from transformers import EarlyStoppingCallback, TrainerCallback

from hf_prefopt.reporting.metrics import metric_names
from tests.trainers import examples, make_trainer, pairs, unpaired

BEST = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
BEST |= {"load_best_model_at_end": True, "log_level": "error"}
SETS = {"easy": pairs(3, seed=1), "hard": pairs(3, seed=2)}


class Adds(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics=None, **_):
        metrics["eval_score"] = 1.0


@pytest.mark.parametrize("loss", ["dpo", "simpo", "kto", "plackett_luce", "qrpo", ["dpo", "sft"]])
def test_the_names_are_those_of_an_evaluation(loss, tmp_path):
    trainer = make_trainer(tmp_path, loss_type=loss)
    found = trainer.evaluate(examples(trainer.criterion, 8, seed=1))
    others = ("runtime", "per_second", "preparation_time", "epoch")
    names = {name.removeprefix("eval_") for name in found if not name.endswith(others)}
    assert names == set(metric_names(trainer.criterion))


@pytest.mark.parametrize(
    ("metric", "evaluated", "message"),
    [
        (None, SETS, "'loss' is not a metric .*: choose one of easy_loss, .*hard_loss, "),
        ("rewards/accuracies", SETS, "easy_rewards/accuracies"),
        ("easy_rewards/accuracy", SETS, "easy_rewards/accuracies"),
        ("eval_accuracy", SETS["easy"], "'eval_accuracy' is not a metric .*: choose one of loss, rewards/chosen, "),
        ("loss/sft", SETS["easy"], "'loss/sft' is not a metric"),
    ],
)
def test_an_unknown_metric_is_an_error_before_the_first_step(metric, evaluated, message, tmp_path):
    trainer = make_trainer(tmp_path, eval_dataset=evaluated, metric_for_best_model=metric, **BEST)
    with pytest.raises(ValueError, match=message):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize(
    ("metric", "more"),
    [
        ("eval_hard_loss", {"callbacks": [EarlyStoppingCallback(3)]}),
        ("hard_rewards/margins", {}),
        ("easy_mine", {"compute_metrics": lambda prediction: {"mine": 1.0}}),
        ("score", {"callbacks": [Adds()], "eval_dataset": SETS["easy"]}),
    ],
)
def test_a_metric_of_a_set_a_function_or_a_callback_is_found(metric, more, tmp_path):
    trainer = make_trainer(tmp_path, metric_for_best_model=metric, **{"eval_dataset": SETS, **BEST, **more})
    trainer.train()
    assert trainer.state.best_global_step == 1


@pytest.mark.parametrize(("label", "has_several"), [(True, False), (False, True)])
def test_a_metric_of_the_label_that_an_evaluation_set_lacks_is_an_error(label, has_several, tmp_path):
    """Those of the other label are metrics. The set of both labels beside it has all of them."""
    both, one = unpaired(4), unpaired(4).map(lambda row: {"labels": [label]})
    evaluated, prefix = ({"both": both, "one": one}, "one_") if has_several else (one, "")
    lacking, present = ("rejected", "chosen") if label else ("chosen", "rejected")
    for metric, is_there in ((f"rewards/{lacking}", False), ("rewards/margins", False), (f"rewards/{present}", True)):
        settings = {"loss_type": "bco", "metric_for_best_model": prefix + metric, "greater_is_better": True, **BEST}
        trainer = make_trainer(tmp_path, eval_dataset=evaluated, **settings)
        if is_there:
            trainer.train()
        else:
            with pytest.raises(ValueError, match=f"needs {'un' * label}desirable examples, but all"):
                trainer.train()
        assert trainer.state.global_step == is_there
    if has_several:
        settings["metric_for_best_model"] = "both_rewards/margins"
        make_trainer(tmp_path, eval_dataset=evaluated, **settings).train()


def test_an_unknown_metric_beside_compute_metrics_names_no_set(tmp_path):
    more = {"compute_metrics": lambda prediction: {"mine": 1.0}, "metric_for_best_model": "mine"}
    trainer = make_trainer(tmp_path, eval_dataset=SETS, **BEST, **more)
    with pytest.raises(ValueError, match=r"'mine' is not a metric .* a name from compute_metrics, easy_loss"):
        trainer.train()
