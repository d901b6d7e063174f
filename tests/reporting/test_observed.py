"""The metrics that every loss has equal NumPy computations from plain calls of the model on single sequences."""

import math

import numpy as np
import pytest
import torch

from hf_prefopt.batch import ResponseScores
from hf_prefopt.kinds import LISTS, PAIRS
from hf_prefopt.reporting.observed import Responses, correct, join, observe, observed_in
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import lists, logged, make_trainer, pairs, unpaired

# fp32 log-probs of a tiny model, of tens of nats: relative 1e-7 in each of about a hundred operations.
NATS = 1e-4


def token_logps(model, prompt, response):
    """Return log π of each token of a response, from the logits of its sequence alone."""
    ids = torch.tensor([[*prompt, *response]])
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    scored = range(len(prompt) - 1, ids.shape[1] - 1)
    return np.array([logps[place, ids[0, place + 1]].item() for place in scored])


def by_hand(model, rows):
    """Return, for each pair (chosen, rejected), the log-probs of its tokens under policy and reference."""
    found = []
    for row in rows:
        both = []
        for response in row["response_ids"]:
            policy = token_logps(model, row["prompt_ids"], response)
            with model.disable_adapter():
                both.append((policy, token_logps(model, row["prompt_ids"], response)))
        found.append(both)
    return found


def expected_of_pairs(found):
    sides = {"chosen": [pair[0] for pair in found], "rejected": [pair[1] for pair in found]}
    metrics = {}
    for side, responses in sides.items():
        metrics[f"lengths/{side}"] = np.mean([len(p) for p, _ in responses])
        metrics[f"logps_per_token/{side}"] = np.mean([p.mean() for p, _ in responses])
        metrics[f"log_ratios/{side}"] = np.mean([(p - r).mean() for p, r in responses])
    kls = [[(np.exp(p - r) - 1 - (p - r)).mean() for p, r in pair] for pair in found]
    margins = np.array([(c[0] - c[1]).sum() - (r[0] - r[1]).sum() for c, r in found])
    metrics |= {"ref_kl": np.mean(kls), "log_ratios/margins": margins.mean()}
    metrics["log_ratios/accuracies"] = (margins > 0).mean()
    ordered = np.sort(margins)
    for name, share in (("p10", 0.1), ("p50", 0.5), ("p90", 0.9)):
        place = share * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        metrics[f"log_ratios/margins_{name}"] = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    return metrics


@pytest.mark.parametrize("loss", ["dpo", "ipo", "aot"])
@pytest.mark.parametrize("layout", ["shared", "padded"])
def test_metrics_of_an_evaluation_are_those_of_single_sequences(tmp_path, loss, layout):
    """The metrics are the same for every loss: nine pairs in batches of four; AOT compares the pairs of a batch."""
    model = perturbed(with_lora(tiny_model()), scale=0.1)
    rows = pairs(9)
    options = {"loss_type": loss, "layout": layout, "reference": "adapter_off", "per_device_eval_batch_size": 4}
    found = make_trainer(tmp_path, model, eval_dataset=rows, **options).evaluate()
    expected = expected_of_pairs(by_hand(model, rows))
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected, abs=NATS, rel=NATS)
    assert abs(expected["log_ratios/chosen"]) > 100 * NATS and expected["ref_kl"] > 100 * NATS


def test_metrics_of_a_training_log_are_of_all_examples_since_the_last_one(tmp_path):
    """There are two accumulated micro-batches with a learning rate of 0; a second log starts with no examples."""
    model = perturbed(with_lora(tiny_model()), scale=0.1)
    rows = pairs(8)
    options = {"reference": "adapter_off", "learning_rate": 0.0, "weight_decay": 0.0, "logging_steps": 2}
    trainer = make_trainer(tmp_path, model, train_dataset=rows, gradient_accumulation_steps=2, **options)
    trainer.train()
    expected = expected_of_pairs(by_hand(model, rows))
    for name, value in expected.items():
        assert logged(trainer, name) == pytest.approx([value], abs=NATS, rel=NATS), name


def test_without_a_reference_the_change_is_since_the_evaluation_at_step_0(tmp_path):
    model, rows = tiny_model(), pairs(5)
    trainer = make_trainer(tmp_path, model, loss_type="simpo", eval_dataset=rows, eval_on_start=True, max_steps=3)
    before = [[token_logps(model, row["prompt_ids"], ids).mean() for ids in row["response_ids"]] for row in rows]
    trainer.train()
    after = [[token_logps(model, row["prompt_ids"], ids).mean() for ids in row["response_ids"]] for row in rows]
    found = trainer.evaluate()
    change = np.mean(np.array(after) - np.array(before), axis=0)
    assert [found["eval_log_ratios/chosen"], found["eval_log_ratios/rejected"]] == pytest.approx(change, abs=NATS)
    assert np.abs(change).min() > 10 * NATS
    assert "log_ratios/chosen" not in trainer.state.log_history[1] and not logged(trainer, "ref_kl")


def test_single_responses_count_on_the_side_of_their_label(tmp_path):
    rows, model = unpaired(6), perturbed(with_lora(tiny_model()), scale=0.1)
    trainer = make_trainer(tmp_path, model, loss_type="kto", eval_dataset=rows, reference="adapter_off")
    found = trainer.evaluate()
    for side, label in (("chosen", True), ("rejected", False)):
        mine = [row for row in rows if row["labels"] == [label]]
        assert found[f"eval_lengths/{side}"] == np.mean([len(row["response_ids"][0]) for row in mine])
        logps = [token_logps(model, row["prompt_ids"], row["response_ids"][0]).mean() for row in mine]
        assert found[f"eval_logps_per_token/{side}"] == pytest.approx(np.mean(logps), abs=NATS)
    assert "eval_log_ratios/accuracies" not in found and "eval_ref_kl" in found


def test_quantiles_have_one_side(tmp_path):
    found = make_trainer(tmp_path, loss_type="qrpo", eval_dataset=None).train_dataset
    trainer = make_trainer(tmp_path, loss_type="qrpo", eval_dataset=found)
    metrics = trainer.evaluate()
    lengths = [len(row["response_ids"][0]) for row in found]
    assert metrics["eval_lengths/responses"] == np.mean(lengths) and "eval_lengths/chosen" not in metrics


def test_of_a_list_the_best_is_compared_with_the_mean_of_the_others(tmp_path):
    rows, model = lists(6), perturbed(with_lora(tiny_model()), scale=0.1)
    trainer = make_trainer(tmp_path, model, loss_type="plackett_luce", eval_dataset=rows, reference="adapter_off")
    found = trainer.evaluate()
    margins, kls = [], []
    for row, responses in zip(rows, by_hand(model, rows), strict=True):
        sums = np.array([(p - r).sum() for p, r in responses])
        best = np.array(row["ranks"]) == min(row["ranks"])
        margins.append(sums[best].mean() - sums[~best].mean())
        kls.append(np.mean([(np.exp(p - r) - 1 - (p - r)).mean() for p, r in responses]))
    assert found["eval_log_ratios/margins"] == pytest.approx(np.mean(margins), abs=NATS)
    assert found["eval_ref_kl"] == pytest.approx(np.mean(kls), abs=NATS)


def test_the_kl_estimate_is_the_kl_of_the_vocabulary_on_samples_of_the_reference():
    """40,000 responses of one token, sampled from π_ref over 20 tokens: within 4 standard errors of the exact KL."""
    generator = torch.Generator().manual_seed(0)
    reference, policy = (torch.randn(20, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    exact = (reference.exp() * (reference - policy)).sum().item()
    samples = torch.multinomial(reference.exp(), 40_000, replacement=True, generator=generator)
    ones, places = torch.ones(40_000, dtype=torch.int64), torch.arange(40_000)
    scores = [ResponseScores(logps[samples], places, ones) for logps in (policy, reference)]
    halves = {"chosen": places[::2], "rejected": places[1::2], "pair_in_row": torch.zeros(20_000)}
    found = Responses.of(observe(PAIRS, halves, {}, *scores))
    error = found.kls.std() / math.sqrt(found.kls.size)
    assert abs(found.metrics(PAIRS)["ref_kl"] - exact) < 4 * error < 0.1 * exact


def test_lists_of_other_lengths_are_joined_with_padding_that_does_not_count():
    def part(count):
        scores = ResponseScores(-torch.arange(1.0, count + 1), torch.arange(count), torch.ones(count).long())
        mask = torch.ones(1, count, dtype=torch.bool)
        batch = {"list_responses": torch.arange(count)[None], "pair_in_row": torch.zeros(1)}
        ranks = torch.arange(count)[None].float()
        return observe(LISTS, batch, {"list_mask": mask, "list_ranks": ranks}, scores, None)

    found = Responses.of(join(map(observed_in, (part(2), part(4))))).metrics(LISTS)
    assert found["logps_per_token/chosen"] == -1
    assert found["logps_per_token/rejected"] == pytest.approx((-2 - 3) / 2)  # −2, and the mean of −2, −3, −4


def test_a_tie_counts_half():
    assert correct(np.array([-0.1, 0.0, 2.0])).tolist() == [0.0, 0.5, 1.0]
