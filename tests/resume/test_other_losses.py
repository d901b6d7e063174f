"""A run that is resumed with other losses logs a warning, and trains with the new losses."""

import pytest

from tests.tiny_models import tiny_model
from tests.trainers import logged, make_trainer, pairs

WARNING = "the checkpoint's run had other losses"
RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
RESUMED = {
    "the same": ({}, {}, False),
    "the same by its alias": ({}, {"loss_type": "sigmoid", "beta": 0.1}, False),
    "another loss": ({}, {"loss_type": "ipo"}, True),
    "another beta": ({"beta": 0.1}, {"beta": 0.5}, True),
    "another weight and a modifier": ({"sft_weight": 0.5}, {"sft_weight": 1.0, "ld_alpha": 0.5}, True),
    "one with a state": ({"loss_type": "bco_pair"}, {"loss_type": "bco_pair"}, False),
}


@pytest.mark.parametrize("case", RESUMED)
def test_other_losses_are_noticed(case, tmp_path, caplog):
    """Without a checkpoint, there is no message."""
    first, second, is_other = RESUMED[case]
    make_trainer(tmp_path, tiny_model(), train_dataset=pairs(8), **RUN, **first).train()
    assert WARNING not in caplog.text
    trainer = make_trainer(tmp_path, tiny_model(), train_dataset=pairs(8), **RUN, **second)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (WARNING in caplog.text) == is_other
    assert trainer.state.global_step == 4 and len(logged(trainer, "loss")) == 4


def test_the_warning_names_both(tmp_path, caplog):
    make_trainer(tmp_path, tiny_model(), train_dataset=pairs(8), **RUN).train()
    trainer = make_trainer(tmp_path, tiny_model(), train_dataset=pairs(8), loss_type="hinge", **RUN)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "(1 × dpo, beta=0.1, label_smoothing=0.0)" in caplog.text and "(1 × hinge, beta=0.05)" in caplog.text
