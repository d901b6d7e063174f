"""Two warnings on what a preference loss may do unnoticed: chosen responses become unlikely, or only length is learned.

Both look at the examples of training, in windows one after the other, and warn once, when two windows in a row say the
same. docs/displacement.md explains them.
"""

from dataclasses import dataclass, field

import numpy as np

from hf_prefopt.reporting.observed import Responses

# Examples in a window: a standard error of at most a tenth of what single examples differ by (1/√100).
WINDOW = 100
# A fall that counts: the perplexity of chosen responses is 10 % above that of the start. In nats per token.
FALL = float(np.log(1.1))
# Standard errors that a mean must be away: by chance once in 740 windows on one side, so about once in 550,000 twice.
ERRORS = 3.0
# The share of the variance of margins that length must explain.
EXPLAINED = 0.5

FELL = (
    "step {step}: chosen responses have become less likely: their log-probs are {fall:.3f} nats per token below "
    "{start} (standard error {error:.3f}; {examples} examples), so their perplexity is {share:.0%} higher. The loss "
    "is reduced by lowering the rejected ones further. Try sft_weight=1.0 with this loss, loss_type=dpop, cal_dpo or "
    "nca_pair, a lower learning_rate, or a higher beta; see docs/displacement.md"
)
LENGTH = (
    "step {step}: margins grow by length alone: the difference in length explains {explained:.0%} of the margins' "
    "variance ({examples} examples), and pairs of equal length have a margin of {intercept:+.3f} ± {error:.3f} nats, "
    "of a mean of {mean:+.3f}. Try a loss that compares log-probs per token (loss_type=simpo, dpo_norm or sampo), "
    "r_dpo, or ld_alpha below 1, or data whose chosen responses are not longer; see docs/displacement.md"
)


@dataclass
class Window:
    """Collects numbers of examples, a row each, and hands out `WINDOW` or more of them at a time."""

    rows: list[np.ndarray] = field(default_factory=list)

    def full(self, values: np.ndarray) -> np.ndarray | None:
        """All rows `[n, Q]` since the last full window once there are enough of them; rows with NaN do not count."""
        self.rows.append(values[~np.isnan(values).any(1)])
        if sum(map(len, self.rows)) < WINDOW:
            return None
        joined, self.rows = np.concatenate(self.rows), []
        return joined


class Displacement:
    """Chosen log-probs have fallen: mean + 3 standard errors < −log 1.1 nats per token, in two windows in a row.

    The mean is of log-ratios to the reference; without one, of log-probs, from which that of the first window is
    taken, whose variance counts too.
    """

    def __init__(self):
        self._window, self._start = Window(), None

    def finding(self, responses: Responses) -> dict[str, object] | None:
        """What is to be said of a window that is full now; `{}` if it is as it should be, `None` if none is full."""
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
    """Margins are explained by length: of the line margin = a + b · (difference in length), b explains half of the
    variance, the mean margin is 3 standard errors above 0, and a, the margin at equal length, is not, in two windows in
    a row."""

    def __init__(self):
        self._window = Window()

    def finding(self, responses: Responses) -> dict[str, object] | None:
        """As that of `Displacement`."""
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
    """A rule and its text; it was `raised` if the last full window broke the rule, and is `done` once it has spoken."""

    rule: Displacement | LengthAlone
    text: str
    raised: bool = False
    done: bool = False

    def look(self, step: int, responses: Responses) -> str | None:
        """The warning, if the rule was broken in two windows in a row."""
        found = None if self.done else self.rule.finding(responses)
        if found is None:
            return None
        self.done, self.raised = self.raised and bool(found), bool(found)
        return self.text.format(step=step, **found) if self.done else None


class Alarms:
    """Both warnings.

    Attributes:
        said: the warnings so far.
    """

    def __init__(self):
        self.said: list[str] = []
        self._alarms = [_Alarm(Displacement(), FELL), _Alarm(LengthAlone(), LENGTH)]

    def look(self, step: int, responses: Responses) -> list[str]:
        """The warnings that the examples since the last training log give rise to."""
        texts = [text for alarm in self._alarms if (text := alarm.look(step, responses))]
        self.said += texts
        return texts
