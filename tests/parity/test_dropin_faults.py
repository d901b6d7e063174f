"""In the cases in which TRL 1.16 has an error, the numbers are those listed in `hf_prefopt.trl.differences`."""

import math

import pytest
import torch

from tests.parity.peers import concatenated_step, dpo_step, policy, reference, rows, tpo_step
from tests.parity.test_dropin import dropin_step
from tests.trainers import triples

pytest.importorskip("trl")

from hf_prefopt.trl.differences import DIFFERENCES

STEPS = {
    "DPO": dpo_step,
    "CPO": lambda *given, **settings: concatenated_step("cpo", *given, **settings),
    "ORPO": lambda *given, **settings: concatenated_step("orpo", *given, **settings),
    "TPO": tpo_step,
}


def uneven(data: list[dict], which: int) -> list[dict]:
    """Return two rows in which the given response has eight tokens and two tokens."""
    for row, response in zip(data, ([5, 6, 7, 8, 9, 10, 11, 2], [12, 2]), strict=True):
        row["response_ids"][which] = response
        row["scored_masks"] = [[1] * len(ids) for ids in row["response_ids"]]
    return data


def greedy() -> list[dict]:
    """Return two rows whose responses are the policy's own greedy responses."""
    model, data = policy(), rows(2)
    for row in data:
        prompt = torch.tensor([row["prompt_ids"]])
        for index, length in enumerate((4, 6)):
            lengths = {"min_new_tokens": length, "max_new_tokens": length, "eos_token_id": 599}
            output = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **lengths
            )
            row["response_ids"][index] = output[0, prompt.shape[1] :].tolist()
        row["scored_masks"] = [[1] * len(response) for response in row["response_ids"]]
    return data


def long() -> list[dict]:
    """Return a row with responses of 60 tokens and log-probs of about −400 nats."""
    (row,), generator = rows(1), torch.Generator().manual_seed(0)
    row["response_ids"] = [torch.randint(3, 300, (60,), generator=generator).tolist() for _ in range(2)]
    return [{**row, "scored_masks": [[1] * 60] * 2}]


ROWS = {
    "three": rows,
    "uneven": lambda: uneven(rows(2), 0),
    "uneven triples": lambda: uneven([*triples(2, seed=5)], 2),
    "greedy": greedy,
    "long": long,
}


def loss_of(step, *given, **settings) -> float | str:
    """Return the loss, or the name of the error, or "nan" if the loss is not a number."""
    try:
        loss = step(*given, **settings).loss
    except (RuntimeError, ValueError) as error:
        return type(error).__name__
    return loss if math.isfinite(loss) else "nan"


def same(listed: float | str):
    """Return whether two losses are equal to five decimals, the precision of the list."""
    return listed if isinstance(listed, str) else pytest.approx(listed, abs=1e-5)


@pytest.mark.parametrize("this", DIFFERENCES, ids=lambda this: f"{this.method} {this.settings} {this.rows}")
def test_the_numbers_of_the_list(this, tmp_path):
    """Both losses are those in the list, and they differ by more than rounding."""
    ref_model = reference() if this.method == "DPO" else None
    theirs = loss_of(STEPS[this.method], tmp_path, ROWS[this.rows](), **this.settings)
    ours = loss_of(dropin_step, this.method, tmp_path, ROWS[this.rows](), ref_model, **this.settings)
    assert [theirs, ours] == [same(this.theirs), same(this.ours)]
    assert theirs != ours if isinstance(theirs, str) or isinstance(ours, str) else abs(theirs - ours) > 0.01
