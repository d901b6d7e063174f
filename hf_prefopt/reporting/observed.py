"""What is measured for every loss alike: lengths, log-probs and log-ratios to the reference, of every response.

During a step only a few small tensors are kept, and nothing waits for the device; `Responses` computes the metrics from
them when they are logged. Log-probs and log-ratios are in nats per scored token; margins are sums, in nats.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hf_prefopt.batch import PreferenceBatch, ResponseScores, join_examples
from hf_prefopt.kinds import ExampleKind

# Names of what `observe` returns. With "token" in them: they are no inputs of losses, see `finite.Seen.of`.
_PREFIX = "token_observed_"
_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


def observe(
    kind: ExampleKind,
    batch: PreferenceBatch,
    inputs: Mapping[str, Tensor],
    policy: ResponseScores,
    reference: ResponseScores | None,
) -> dict[str, Tensor]:
    """What `Responses` needs of the examples of a batch, `[B, K]` each, without gradients.

    Args:
        inputs: what the losses were given, by name; it says which responses are preferred.
    """
    wide = torch.float32 if policy.token_logps.device.type == "mps" else torch.float64
    logps = policy.token_logps.detach().to(wide)
    columns = [logps]
    if reference is not None:
        log_ratios = logps - reference.token_logps.detach()
        columns += [log_ratios, torch.expm1(log_ratios) - log_ratios]
    lengths = policy.lengths[:, None]
    means = policy.sum_by_response(torch.stack(columns, 1)) / lengths.clamp(min=1)
    every = torch.cat([lengths.to(wide), means], 1)
    places = [batch[kind.responses[name]] for name in kind.rewarded]  # type: ignore[literal-required]
    measures = every[places[0] if places[0].dim() == 2 else torch.stack(places, 1)].unbind(-1)
    names = ("lengths", "logps", "log_ratios", "kls")
    observed = dict(zip(names, measures, strict=False)) | {"preferred": kind.preferred(measures[0], inputs)}
    if "list_mask" in inputs:
        observed["lengths"] = measures[0] * inputs["list_mask"]
    return {_PREFIX + name: values for name, values in observed.items()} | {"pair_in_row": batch["pair_in_row"]}


@dataclass(frozen=True)
class Responses:
    """The responses of some examples; float64 arrays `[B, K]`, K = 2 for pairs (chosen, rejected).

    Attributes:
        lengths: the number of scored tokens; 0 for the padding of lists.
        logps: mean over the tokens of log π, in nats per token.
        preferred: 1 for responses that the data prefer, 0 for the others (and for padding).
        log_ratios: mean over the tokens of d = log π − log π_ref, in nats per token; `None` without a reference.
        kls: mean over the tokens of e^d − 1 − d ≥ 0, whose expectation is KL(π_ref‖π) per token where the responses
            are samples of the reference (J. Schulman, "Approximating KL divergence", the estimator k3).
    """

    lengths: np.ndarray
    logps: np.ndarray
    preferred: np.ndarray
    log_ratios: np.ndarray | None = None
    kls: np.ndarray | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor]) -> "Responses | None":
        """From what `observe` has returned, or has been joined to; `None` if nothing was observed."""
        present = {field.name: inputs.get(_PREFIX + field.name) for field in fields(cls)}
        if present["lengths"] is None:
            return None
        return cls(**{name: v.double().cpu().numpy() for name, v in present.items() if v is not None})

    def since(self, start: "Responses") -> "Responses":
        """The same with log-ratios to the log-probs of an earlier state of the model, of the same responses."""
        return Responses(self.lengths, self.logps, self.preferred, self.logps - start.logps)

    @cached_property
    def present(self) -> np.ndarray:
        """`[B, K]` bool: all but padding."""
        return self.lengths > 0

    @cached_property
    def chosen(self) -> np.ndarray:
        """`[B, K]` bool: the preferred responses."""
        return (self.preferred == 1) & self.present

    @cached_property
    def rejected(self) -> np.ndarray:
        """`[B, K]` bool: the other ones."""
        return (self.preferred == 0) & self.present

    @cached_property
    def compares(self) -> np.ndarray:
        """`[B]` bool: whether an example has responses of both sides."""
        return self.chosen.any(1) & self.rejected.any(1)

    def side(self, values: np.ndarray, which: np.ndarray) -> np.ndarray:
        """`[B]`: the mean of `[B, K]` over these responses of each example, NaN where there are none."""
        number = which.sum(1)
        sums = np.where(which, values, 0.0).sum(1)
        return np.divide(sums, number, out=np.full(len(sums), np.nan), where=number > 0)

    def difference(self, values: np.ndarray) -> np.ndarray:
        """`[B]`: chosen − rejected, NaN where an example does not compare."""
        return self.side(values, self.chosen) - self.side(values, self.rejected)

    @cached_property
    def margins(self) -> np.ndarray | None:
        """`[B]`: the difference of the summed log-ratios, in nats: chosen − rejected; NaN where nothing is compared."""
        return None if self.log_ratios is None else self.difference(self.log_ratios * self.lengths)

    @cached_property
    def reference_margins(self) -> np.ndarray | None:
        """`[B]`: the difference of the reference's own summed log-probs, in nats."""
        if self.log_ratios is None:
            return None
        return self.difference((self.logps - self.log_ratios) * self.lengths)

    @cached_property
    def length_differences(self) -> np.ndarray:
        """`[B]`: by how many scored tokens chosen responses are longer than rejected ones."""
        return self.difference(self.lengths)

    def metrics(self, kind: ExampleKind) -> dict[str, float]:
        """The metrics, by the names that they are logged under; what no example has is left out."""
        sides = {"chosen": self.chosen, "rejected": self.rejected}
        if not kind.has_preferences:
            sides = {"responses": self.present}
        found = {}
        measures = {"lengths": self.lengths, "logps_per_token": self.logps, "log_ratios": self.log_ratios}
        for name, values in measures.items():
            if values is not None:
                found |= {f"{name}/{side}": _mean(self.side(values, which)) for side, which in sides.items()}
        if self.kls is not None:
            found["ref_kl"] = _mean(self.side(self.kls, self.present))
        if kind.has_preferences and self.margins is not None and self.compares.any():
            margins = self.margins[self.compares]
            found["log_ratios/accuracies"] = _mean(correct(margins))
            found["log_ratios/margins"] = _mean(margins)
            quantiles = np.quantile(margins, list(_QUANTILES.values()))
            found |= {f"log_ratios/margins_{q}": float(v) for q, v in zip(_QUANTILES, quantiles, strict=True)}
        return {name: value for name, value in found.items() if not np.isnan(value)}


def correct(margins: np.ndarray) -> np.ndarray:
    """1 for a margin above 0, ½ for a tie, else 0."""
    return (np.sign(margins) + 1) / 2


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def join(observed: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """What was observed in several batches, as of one; shorter lists are padded with 0."""
    parts = list(observed)
    return {name: join_examples([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def observed_in(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries that `observe` has made, of each response."""
    return {name: values for name, values in inputs.items() if name.startswith(_PREFIX)}
