"""The paired benchmark: checks that both sides compute the same thing, then times alternating steps.

The machine may be shared, so times are the process's own CPU time on one thread, and the reported ratios are those of
consecutive measurements, not of two averages.
"""

import gc
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from benchmarks.products import flop_counter
from benchmarks.sides import Side
from benchmarks.work import Row, Work, count_pairs, real_tokens

LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


@dataclass
class Agreement:
    """The relative differences of two sides, and the FLOP of their products.

    Attributes:
        loss, gradient, worst_parameter: the differences of the losses, of all gradients as one vector, and of the
            gradient of the parameter with the largest difference.
        flop: the FLOP of "peer" and "ours" in a forward and a backward pass.
    """

    loss: float
    gradient: float
    worst_parameter: float
    flop: dict[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """Raise `AssertionError` if the two sides do not compute the same thing."""
        if self.loss > LOSS_TOLERANCE or self.gradient > GRADIENT_TOLERANCE:
            raise AssertionError(
                f"the two sides do not compute the same: losses differ by {self.loss:.1e} (at most {LOSS_TOLERANCE}), "
                f"gradients by {self.gradient:.1e} (at most {GRADIENT_TOLERANCE})"
            )


@dataclass
class Timing:
    """Seconds per step of two sides, from alternating measurements.

    Attributes:
        peer, ours: seconds of each round.
        system: the operating system's part of them, summed over the rounds (it clears each page at its first access).
        pairs, tokens: pairs and real tokens (2p + c + r) of each round.
        positions: the positions that each side computed, summed over the rounds.
    """

    peer: list[float] = field(default_factory=list)
    ours: list[float] = field(default_factory=list)
    pairs: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    system: dict[str, float] = field(default_factory=lambda: {"peer": 0.0, "ours": 0.0})
    positions: dict[str, int] = field(default_factory=lambda: {"peer": 0, "ours": 0})

    @property
    def ratios(self) -> list[float]:
        """The peer's time divided by ours, for each round."""
        return [peer / ours for peer, ours in zip(self.peer, self.ours, strict=True)]

    def summary(self) -> dict[str, Any]:
        """The reported results."""
        peer, ours = sum(self.peer), sum(self.ours)
        return asdict(self) | {
            "ratios": self.ratios,
            "ratio": statistics.median(self.ratios),
            "peer_pairs_per_second": sum(self.pairs) / peer,
            "our_pairs_per_second": sum(self.pairs) / ours,
            "peer_tokens_per_second": sum(self.tokens) / peer,
            "our_tokens_per_second": sum(self.tokens) / ours,
        }


def agreement(peer: Side, ours: Side, rows: Sequence[Row]) -> Agreement:
    """Compare loss and gradients of both sides on the same rows, and count their FLOP."""
    losses, gradients, flop = [], [], {}
    for role, side in (("peer", peer), ("ours", ours)):
        side.model.zero_grad()
        with flop_counter() as counter:
            losses.append(float(side.backward(rows)))
        flop[role] = counter.get_total_flops()
        gradients.append(side.gradients())
        side.model.zero_grad()
    if gradients[0].keys() != gradients[1].keys():
        raise AssertionError("the two sides have gradients for different parameters")
    apart = {name: _norm(gradient - gradients[1][name]) for name, gradient in gradients[0].items()}
    size = {name: _norm(gradient) for name, gradient in gradients[0].items()}
    return Agreement(
        loss=abs(losses[0] - losses[1]) / abs(losses[0]),
        gradient=sum(x**2 for x in apart.values()) ** 0.5 / sum(x**2 for x in size.values()) ** 0.5,
        worst_parameter=max(apart[name] / size[name] for name in apart if size[name] > 0),
        flop=flop,
    )


def _norm(tensor: Tensor) -> float:
    return float(tensor.double().norm())


def measure(peer: Side, ours: Side, work: Work, rounds: int) -> Timing:
    """Take alternating steps; the peer goes first in every other round, and each round has a new batch."""
    timing = Timing()
    for number in range(rounds):
        rows = work.batch(number)
        order = (peer, ours) if number % 2 == 0 else (ours, peer)
        seconds = {side.name: cpu_seconds(side, rows) for side in order}
        for role, side in (("peer", peer), ("ours", ours)):
            whole, system = seconds[side.name]
            getattr(timing, role).append(whole)
            timing.system[role] += system
            timing.positions[role] += side.positions(rows)
        timing.pairs.append(count_pairs(rows))
        timing.tokens.append(real_tokens(rows))
    return timing


def cpu_seconds(side: Side, rows: Sequence[Row]) -> tuple[float, float]:
    """The CPU time of one step, and the operating system's part of it."""
    gc.collect()
    start, system = time.process_time(), os.times().system
    side.step(rows)
    return time.process_time() - start, os.times().system - system
