"""`Scorer` alone: a model, an objective and an accelerator, without a trainer."""

import pytest
import torch
from accelerate import Accelerator
from transformers import DataCollatorWithPadding, default_data_collator

from hf_prefopt.batch import PreferenceBatch
from hf_prefopt.data.layouts import PaddedCollator
from hf_prefopt.training.batch_layout import loader_collator
from hf_prefopt.training.scorer import Scorer
from tests.tiny_models import perturbed, random_rows, tiny_model, with_lora
from tests.tokenizers import tiny_tokenizer
from tests.trainers import make_config


def scorer(folder, model, ref_model=None, custom=None, **settings):
    """Return a scorer with this model attached, and its collator."""
    args = make_config(folder, **settings)
    collator = loader_collator(args, 0, custom)
    made = Scorer(args, collator, ref_model)
    made.attach(model, args.build_objective(), Accelerator(cpu=True))
    return made, collator


def batch_of(collator, count=3) -> PreferenceBatch:
    (piece,) = collator(random_rows(count, longest=8))["pieces"]
    return piece


def plain_logp(model, row, which):
    """Return the summed log-prob of one response, by `model(...)` on its sequence alone."""
    prompt, response, mask = row["prompt_ids"], row["response_ids"][which], row["scored_masks"][which]
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
    logps = logits.log_softmax(-1)[torch.arange(len(response)), response]
    return (logps * torch.tensor(mask)).sum()


@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_policy_and_reference_are_the_plain_models(layout, tmp_path):
    """Each response's summed log-prob is compared with `model(...)` on its sequence
    alone; fp32 sums of at most nine tokens of a few nats: 1e-4.
    """
    base = tiny_model()
    model = perturbed(with_lora(tiny_model()), 0.1)
    made, collator = scorer(tmp_path, model, layout=layout, reference="adapter_off")
    made.settle()
    assert made.layout == collator.layout == layout
    batch = batch_of(collator)
    reference = made.reference_scores(batch)
    policy = made.policy_scores(model.eval(), batch, reference)
    rows = [(row, which) for row in random_rows(3, longest=8) for which in (0, 1)]
    for scores, plain in ((policy, model), (reference, base)):
        expected = [plain_logp(plain, row, which) for row, which in rows]
        torch.testing.assert_close(scores.logps.detach(), torch.stack(expected), rtol=0, atol=1e-4)


def test_a_loss_without_a_reference_has_none(tmp_path):
    made, collator = scorer(tmp_path, tiny_model(), loss_type="simpo")
    made.settle()
    assert made.reference is None and made.reference_scores(batch_of(collator)) is None


def test_collected_inputs_are_those_of_the_step_without_gradients(tmp_path):
    model = perturbed(with_lora(tiny_model()), 0.1)
    made, collator = scorer(tmp_path, model, loss_type="aot")
    made.settle()
    batch = batch_of(collator)
    collected = made.collect(batch)
    reference = batch["reference_scores"]
    assert made.reference_scores(batch) is reference
    live = made.objective.read(batch, made.policy_scores(model.train(), batch, reference), reference)
    assert collected.keys() == live.keys() and live["policy_chosen_logps"].requires_grad
    for name, values in collected.items():
        assert not values.requires_grad
        torch.testing.assert_close(values, live[name].detach(), rtol=0, atol=0)


def test_the_layout_is_settled_once_for_a_model_and_anew_for_another(tmp_path, monkeypatch):
    from hf_prefopt.training import batch_layout as module

    seen, settled_layout = [], module.settled_layout
    monkeypatch.setattr(module, "settled_layout", lambda *args: seen.append(1) or settled_layout(*args))
    made, _ = scorer(tmp_path, tiny_model())
    assert made.layout is None
    made.settle()
    made.settle()
    made.attach(tiny_model(), made.objective, made.accelerator)
    assert made.layout is None
    made.settle()
    assert len(seen) == 2


def test_a_users_own_collator_is_the_layout(tmp_path):
    rows = random_rows(2)
    made, collator = scorer(tmp_path, tiny_model(), custom=PaddedCollator(0))
    made.settle()
    assert made.layout == "the data_collator's"
    assert collator(rows)["pieces"][0]["input_ids"].shape[0] == 4


@pytest.mark.parametrize(
    ("custom", "message"),
    [
        (
            DataCollatorWithPadding(tiny_tokenizer()),
            "=DataCollatorWithPadding failed on .* prompt_ids, .*",
        ),
        (default_data_collator, "=default_data_collator .*"),
        (list, "=list returned a batch without input_ids, scored_rows, .*"),
    ],
    ids=["of tokens", "of tensors", "of rows"],
)
def test_a_collator_of_other_rows_is_an_error_that_says_what_to_do(custom, message, tmp_path):
    _, collator = scorer(tmp_path, tiny_model(), custom=custom)
    with pytest.raises(ValueError, match=f"data_collator{message}: remove it"):
        collator(random_rows(2))


def test_a_reference_that_follows_is_moved_when_it_is_due(tmp_path):
    """With α = 1, every second step: after step 2, the reference is the policy."""
    model = tiny_model()
    settings = {"sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}
    made, collator = scorer(tmp_path, model, **settings)
    made.settle()
    batch = batch_of(collator)
    start = made.reference_scores(batch).token_logps
    perturbed(model, 0.1)
    made.move_reference(1)
    assert torch.equal(made.reference_scores(batch).token_logps, start)
    made.move_reference(2)
    policy = made.policy_scores(model.eval(), batch, None).token_logps.detach()
    torch.testing.assert_close(made.reference_scores(batch).token_logps, policy, rtol=0, atol=0)
