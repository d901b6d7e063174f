"""A made-up `log_history` of a run that learns: evaluation on start, ten log records, a last evaluation."""


def log_history(steps: int = 20, every: int = 2) -> list[dict[str, float]]:
    records = [{"step": 0, **evaluation(0.0)}]
    for step in range(every, steps + 1, every):
        learned = step / steps
        records.append({"step": step, "grad_norm": 1.5, "learning_rate": 2e-4 * (1 - learned), **training(learned)})
    records += [{"step": steps, **evaluation(1.0)}, {"step": steps, "train_runtime": 200.0, "train_loss": 0.65}]
    return records


def training(learned: float) -> dict[str, float]:
    """The metrics of a training batch after a share of what the run will learn."""
    return {
        "loss": 0.693 - 0.1 * learned,
        "rewards/accuracies": 0.5 + 0.2 * learned,
        "rewards/chosen": 0.2 * learned,
        "rewards/rejected": -0.25 * learned,
        "rewards/margins": 0.45 * learned,
    }


def evaluation(learned: float) -> dict[str, float]:
    return {f"eval_{name}": value for name, value in training(learned).items()}
