"""Warn during training if chosen responses become less likely, or if the model learns only the response length.

There is one alarm for each of these two problems. An alarm divides the training examples into consecutive windows, and
applies a rule to each window. It warns only once, when two consecutive windows break its rule. See
docs/displacement.md.
"""

from dataclasses import dataclass, field

import numpy as np

from hf_prefopt.reporting.observed import Responses

# Minimum number of examples per window. With 100 examples, the standard error of a mean is a tenth of the standard
# deviation (1/√100).
WINDOW = 100
# Smallest decrease of log-probs that counts, in nats per token. It increases the perplexity by 10 %.
FALL = float(np.log(1.1))
# Required distance of a mean from the threshold, in standard errors. By chance, this happens on one side in one of 740
# windows, and in two consecutive windows in about one of 550,000 cases.
ERRORS = 3.0
# Minimum share of the margins' variance that must be explained by length.
EXPLAINED = 0.5

FELL = (
    "step {step}: chosen responses have become less likely: their log-probs are {fall:.3f} nats per token below "
    "{start} (standard error {error:.3f}; {examples} examples), so their perplexity is {share:.0%} higher. Possible "
    "remedies: sft_weight=1.0 with this loss, loss_type=dpop, cal_dpo or nca_pair, a lower learning_rate, or a higher "
    "beta; see docs/displacement.md"
)
LENGTH = (
    "step {step}: margins grow by length alone: the difference in length explains {explained:.0%} of the margins' "
    "variance ({examples} examples). At equal length, the margin is {intercept:+.3f} ± {error:.3f} nats, and the mean "
    "margin is {mean:+.3f} nats. Possible remedies: a loss that compares log-probs per token (loss_type=simpo, "
    "dpo_norm or sampo), r_dpo, ld_alpha below 1, or data whose chosen responses are not longer; see "
    "docs/displacement.md"
)


@dataclass
class Window:
    """A buffer of rows, one per example, with Q values each. It returns the rows when there are at least `WINDOW`."""

    rows: list[np.ndarray] = field(default_factory=list)

    def full(self, values: np.ndarray) -> np.ndarray | None:
        """Add rows. Return all rows since the last full window, or None if they are fewer than `WINDOW`.

        Rows with NaN are ignored.

        Args:
            values: The new rows, `[B, Q]`.
        """
        self.rows.append(values[~np.isnan(values).any(1)])
        if sum(map(len, self.rows)) < WINDOW:
            return None
        joined, self.rows = np.concatenate(self.rows), []
        return joined


class Displacement:
    """The rule for chosen responses that become less likely.

    A window breaks the rule if mean + 3 standard errors < −log 1.1 nats per token. The mean is that of the chosen
    responses' log-ratios to the reference. Without a reference, it is the mean log-prob of the chosen responses minus
    their mean log-prob in the first window. The squared standard error is then the sum of those of both windows.
    """

    def __init__(self):
        self._window, self._start = Window(), None

    def finding(self, responses: Responses) -> dict[str, object] | None:
        """Add the responses of some examples, and check the window if it is full.

        Returns:
            The values for the warning text if the window breaks the rule, `{}` if it does not, and `None` if the
            window is not full yet.
        """
        has_reference = responses.log_ratios is not None
        measured = responses.logps if responses.log_ratios is None else responses.log_ratios
        values = self._window.full(responses.side(measured, responses.chosen)[:, None])
        if values is None:
            return None
        mean, variance = values.mean(), values.var(ddof=1) / len(values)
        if not has_reference:
            if self._start is None:
                self._start = mean, variance
                return {}
            mean, variance = mean - self._start[0], variance + self._start[1]
        error = float(np.sqrt(variance))
        if mean + ERRORS * error >= -FALL:
            return {}
        start = "the reference's" if has_reference else f"those of the first {WINDOW} or more examples"
        return {"fall": -mean, "error": error, "examples": len(values), "start": start, "share": np.expm1(-mean)}


class LengthAlone:
    """The rule for margins that grow only because chosen responses are longer.

    The margins of a window are fitted by the regression margin = a + b · (length of chosen − length of rejected). A
    window breaks the rule if three conditions hold: the regression explains at least half of the margins' variance; the
    mean margin is more than 3 standard errors above 0; and a, the margin at equal length, is at most 3 standard errors
    above 0.
    """

    def __init__(self):
        self._window = Window()

    def finding(self, responses: Responses) -> dict[str, object] | None:
        """Add responses, and check the window if it is full. The return values are those of `Displacement.finding`."""
        if responses.margins is None:
            return None
        values = self._window.full(np.stack([responses.margins, responses.length_differences], 1))
        if values is None:
            return None
        margins, lengths = values.T
        n, mean = len(values), margins.mean()
        spread = ((lengths - lengths.mean()) ** 2).sum()
        total = ((margins - mean) ** 2).sum()
        if spread == 0 or total == 0:
            return {}
        slope = ((lengths - lengths.mean()) * (margins - mean)).sum() / spread
        intercept = mean - slope * lengths.mean()
        residual = ((margins - intercept - slope * lengths) ** 2).sum()
        error = float(np.sqrt(residual / (n - 2) * (1 / n + lengths.mean() ** 2 / spread)))
        explained = 1 - residual / total
        grows = mean > ERRORS * np.sqrt(total / (n - 1) / n)
        if not grows or explained < EXPLAINED or intercept > ERRORS * error:
            return {}
        said = {"explained": explained, "intercept": intercept, "error": error, "mean": mean}
        return {**said, "examples": n}


@dataclass
class _Alarm:
    """A rule and its warning text.

    Attributes:
        raised: True if the last full window broke the rule.
        done: True if the warning was already given.
    """

    rule: Displacement | LengthAlone
    text: str
    raised: bool = False
    done: bool = False

    def look(self, step: int, responses: Responses) -> str | None:
        """Add responses. Return the warning if two consecutive windows broke the rule, otherwise None."""
        found = None if self.done else self.rule.finding(responses)
        if found is None:
            return None
        self.done, self.raised = self.raised and bool(found), bool(found)
        return self.text.format(step=step, **found) if self.done else None


class Alarms:
    """The two alarms of a run.

    Attributes:
        said: Warnings given so far.
    """

    def __init__(self):
        self.said: list[str] = []
        self._alarms = [_Alarm(Displacement(), FELL), _Alarm(LengthAlone(), LENGTH)]

    def look(self, step: int, responses: Responses) -> list[str]:
        """Add the responses since the last training log, and return the new warnings."""
        texts = [text for alarm in self._alarms if (text := alarm.look(step, responses))]
        self.said += texts
        return texts
