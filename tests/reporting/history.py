"""The record of a synthetic run that learns: an evaluation on start, ten log records, a last evaluation."""

from hf_prefopt.reporting.record import RunRecord


def made_up_run(name: str = "runs", **changes) -> RunRecord:
    """Return the record. It has six examples of three prompts: five rewards are
    right, and the lengths are right for three.
    """
    margins = [1.0, 2.0, 0.5, 0.25, 3.0, -1.5]
    examples = [
        {
            "set": "eval",
            "row": row,
            "pair": 0,
            "prompt": row // 2,
            "margin": margin,
            "margin_before": 0.0,
            "reference_margin": (-1.0) ** row,
            "lengths": [10.0 + row, 12.5],
            "log_ratios": [0.1, -0.2],
        }
        for row, margin in enumerate(margins)
    ]
    accuracy = {"set": "eval", "step": 20, "value": 5 / 6, "low": 0.4, "high": 0.97, "examples": 6, "prompts": 3}
    tokens = [["Paris", 1.5], [" is", -0.01], ["\n<b>", -2.0]]
    pair = {"row": 4, "margin": 3.0, "is_right": True, "prompt": "<script>alert('prompt')</script>"}
    run = {
        "name": name,
        "base_model": "someone/<i>model</i>",
        "losses": [
            {"name": "dpo", "formula": "ℓ(βh)", "paper": "2305.18290", "weight": 1.0, "hyperparameters": {"beta": 0.1}}
        ],
        "reference": "the base model, the adapter switched off",
        "summary": {"layout": "shared, no padding", "data": "train 6 rows"},
        "events": ["train: rows that cannot be used: 2"],
        "command": "python train.py --name '<script>'",
        "steps": 20,
        "seconds": 200.0,
        "warnings": [],
        "sets": ["eval"],
    }
    return RunRecord(
        {**run, **changes},
        log_history(),
        [{**accuracy, "step": 0, "value": 0.5, "low": 0.2, "high": 0.8}, accuracy],
        examples,
        [{**pair, "responses": [{"name": name, "tokens": tokens} for name in ("chosen", "rejected")]}],
        [{"prompt": "What is <b>2</b>?", "before": "| 5 <script>", "after": "4\u202e"}],
    )


def log_history(steps: int = 20, every: int = 2) -> list[dict[str, float]]:
    records = [{"step": 0, **evaluation(0.0)}]
    for step in range(every, steps + 1, every):
        learned = step / steps
        records.append({"step": step, "grad_norm": 1.5, "learning_rate": 2e-4 * (1 - learned), **training(learned)})
    records += [{"step": steps, **evaluation(1.0)}, {"step": steps, "train_runtime": 200.0, "train_loss": 0.65}]
    return records


def training(learned: float) -> dict[str, float]:
    """Return the metrics of a training batch after a fraction of the learning of the run."""
    return {
        "loss": 0.693 - 0.1 * learned,
        "rewards/accuracies": 0.5 + 0.2 * learned,
        "rewards/chosen": 0.2 * learned,
        "rewards/rejected": -0.25 * learned,
        "rewards/margins": 0.45 * learned,
    }


def evaluation(learned: float) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in training(learned).items()}
