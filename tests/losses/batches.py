"""One fixed batch of made-up scores for the losses, as named inputs."""

import numpy as np
import torch

PAIRS = 5


def made_up_inputs(dtype=torch.float64, pairs: int = PAIRS, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of `pairs` pairs by every name a loss may ask for: about −1.5 nats a token, log-ratios of a few nats."""
    rng = np.random.default_rng(seed)
    lengths = {side: rng.integers(3, 30, pairs) for side in ("chosen", "rejected")}
    inputs = {f"{side}_lengths": torch.tensor(lengths[side]) for side in lengths}
    for side, n in lengths.items():
        reference = -n * rng.uniform(0.5, 2.5, pairs)
        policy = np.minimum(reference + rng.normal(0, 3, pairs), -0.05 * n)
        inputs[f"ref_{side}_logps"] = torch.tensor(reference, dtype=dtype)
        inputs[f"policy_{side}_logps"] = torch.tensor(policy, dtype=dtype)
        inputs[f"policy_{side}_alignment"] = torch.tensor(rng.normal(-0.2, 0.4, pairs), dtype=dtype)
    return inputs
