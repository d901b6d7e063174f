"""Measure every response independently of the loss: its length, its log-prob and its log-ratio to the reference.

Each step stores only a few small tensors and does not wait for the device. `Responses` computes the metrics from these
tensors at every log. Log-probs and log-ratios are in nats per scored token. Margins are differences of sums
over tokens, in nats.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from hf_prefopt.batch import PreferenceBatch, ResponseScores, join_examples
from hf_prefopt.kinds import ExampleKind

# Prefix of the names that `observe` returns. Because of the word "token" in it, `finite.Seen.of` ignores these entries.
_PREFIX = "token_observed_"
_QUANTILES = {"p10": 0.1, "p50": 0.5, "p90": 0.9}


def observe(
    kind: ExampleKind,
    batch: PreferenceBatch,
    inputs: Mapping[str, Tensor],
    policy: ResponseScores,
    reference: ResponseScores | None,
) -> dict[str, Tensor]:
    """Compute the tensors `[B, K]` that `Responses` needs for the examples of a batch, without gradients.

    Args:
        inputs: Inputs of the losses, keyed by name. They tell which responses are preferred.
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
    """Measurements of the responses of B examples, as float64 arrays `[B, K]`.

    K is the number of responses per example. For pairs, K = 2, and the responses are chosen and rejected.

    Attributes:
        lengths: Number of scored tokens; 0 for padding, which occurs in lists.
        logps: Mean of log π over the tokens, in nats per token.
        preferred: 1 for responses that the data prefer, 0 for other responses and padding.
        log_ratios: Mean of d = log π − log π_ref over the tokens, in nats per token; `None` without a reference.
        kls: Mean of e^d − 1 − d over the tokens, with the same d. It is never negative. If the responses are samples of
            the reference, this mean has the expectation KL(π_ref‖π) per token (J. Schulman, "Approximating KL
            divergence", estimator k3).
    """

    lengths: np.ndarray
    logps: np.ndarray
    preferred: np.ndarray
    log_ratios: np.ndarray | None = None
    kls: np.ndarray | None = None

    @classmethod
    def of(cls, inputs: Mapping[str, Tensor]) -> "Responses | None":
        """Build from a dict with the entries that `observe` or `join` returns; `None` if it has no such entries."""
        present = {field.name: inputs.get(_PREFIX + field.name) for field in fields(cls)}
        if present["lengths"] is None:
            return None
        return cls(**{name: v.double().cpu().numpy() for name, v in present.items() if v is not None})

    def since(self, start: "Responses") -> "Responses":
        """Return the responses with log-ratios to an earlier state of the model.

        Args:
            start: Measurements of the same responses under the earlier state.
        """
        return Responses(self.lengths, self.logps, self.preferred, self.logps - start.logps)

    @cached_property
    def present(self) -> np.ndarray:
        """`[B, K]` bool. True except for padding."""
        return self.lengths > 0

    @cached_property
    def chosen(self) -> np.ndarray:
        """`[B, K]` bool. True for preferred responses."""
        return (self.preferred == 1) & self.present

    @cached_property
    def rejected(self) -> np.ndarray:
        """`[B, K]` bool. True for responses that are neither preferred nor padding."""
        return (self.preferred == 0) & self.present

    @cached_property
    def compares(self) -> np.ndarray:
        """`[B]` bool. True if an example has both chosen and rejected responses."""
        return np.logical_and(self.chosen.any(1), self.rejected.any(1))

    def side(self, values: np.ndarray, which: np.ndarray) -> np.ndarray:
        """Return for each example, `[B]`, the mean of `values` over the responses for which the mask `which` is True.

        The result is NaN for an example without such a response.
        """
        number = which.sum(1)
        sums = np.where(which, values, 0.0).sum(1)
        return np.divide(sums, number, out=np.full(len(sums), np.nan), where=number > 0)

    def difference(self, values: np.ndarray) -> np.ndarray:
        """Return for each example, `[B]`, the mean of `values` over chosen minus their mean over rejected responses.

        The result is NaN for an example without chosen or without rejected responses.
        """
        return self.side(values, self.chosen) - self.side(values, self.rejected)

    @cached_property
    def margins(self) -> np.ndarray | None:
        """`[B]`, in nats. Summed log-ratio of chosen minus rejected responses, as in `difference`.

        `None` if there is no reference.
        """
        return None if self.log_ratios is None else self.difference(self.log_ratios * self.lengths)

    @cached_property
    def reference_margins(self) -> np.ndarray | None:
        """`[B]`, in nats. The reference's summed log-prob of chosen minus rejected responses, as in `difference`.

        `None` if there is no reference.
        """
        if self.log_ratios is None:
            return None
        return self.difference((self.logps - self.log_ratios) * self.lengths)

    @cached_property
    def length_differences(self) -> np.ndarray:
        """`[B]`, in scored tokens. Length of chosen minus rejected responses, as in `difference`."""
        return self.difference(self.lengths)

    def metrics(self, kind: ExampleKind) -> dict[str, float]:
        """Compute the metrics, keyed by their names in the logs. Metrics without examples are omitted."""
        sides = {"chosen": self.chosen, "rejected": self.rejected}
        if not kind.has_preferences:
            sides = {"responses": self.present}
        found: dict[str, float] = {}
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
    """Return 1 for a margin above 0, ½ for a margin of 0 (a tie), and 0 for a margin below 0."""
    return (np.sign(margins) + 1) / 2


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def join(observed: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the outputs of `observe` for several batches. Shorter lists are padded with 0."""
    parts = list(observed)
    return {name: join_examples([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def observed_in(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the entries of `inputs` that `observe` has added, without `pair_in_row`."""
    return {name: values for name, values in inputs.items() if name.startswith(_PREFIX)}
