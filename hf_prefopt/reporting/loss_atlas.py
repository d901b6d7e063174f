"""The loss atlas: one small plot per registered pair loss, with the loss and its gradient as functions of h.

    python -m hf_prefopt.reporting.loss_atlas > docs/images/loss_atlas.svg

h = r_w − r_l is the chosen log-ratio minus the rejected log-ratio, in nats. One pair is evaluated at a time: the chosen
log-ratio is h/2, the rejected log-ratio is −h/2, each response has 20 tokens, the reference log-prob of each response
is −30 nats, and hyperparameters have their defaults.
"""

import io
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_prefopt.kinds import PAIRS
from hf_prefopt.kinds.made_up import made_up_examples
from hf_prefopt.losses.registry import LossSpec, RunningState, get_loss, list_losses

WIDEST = 20.0  # nats
POINTS = 81
TOKENS = 20
REFERENCE = -30.0  # nats
COLUMNS = 6
STEPS = 100  # enough for running means to be close to their limits
LOSS_COLOR, GRADIENT_COLOR, TEXT_COLOR = "#0072b2", "#d55e00", "#808080"  # Okabe and Ito's blue and vermilion
RUN = {"progress": 0.5, "epoch": 0, "training": False}
# Scores and win rates for which the chosen response is better with certainty.
COLUMNS_OF_DATA = {"chosen_scores": 1.0, "rejected_scores": 0.0, "chosen_win_rates": 1.0, "rejected_win_rates": 0.0}


@dataclass(frozen=True)
class Curve:
    """A loss as a function of h.

    Attributes:
        h: `[N]`, nats. losses: `[N]`.
        gradients: `[N]`, dℓ/dh from autograd; values that the loss detaches are constants.
    """

    h: Tensor
    losses: Tensor
    gradients: Tensor


def curve_of(spec: LossSpec, points: int = POINTS) -> Curve:
    """Compute the loss of one pair at each h, in float64."""
    h = torch.linspace(-WIDEST, WIDEST, points, dtype=torch.float64, requires_grad=True)
    run: dict[str, Any] = {name: value for name, value in RUN.items() if name in spec.run_inputs}
    if spec.state is not None:
        run["state"] = _state_after(spec, spec.state, h.detach(), STEPS)
    losses = torch.stack([spec(**_inputs(spec, value[None]), **run).loss for value in h])
    (gradients,) = torch.autograd.grad(losses.sum(), h)
    return Curve(h.detach(), losses.detach(), gradients)


def _state_after(spec: LossSpec, running: RunningState, h: Tensor, steps: int) -> dict[str, Tensor]:
    """Return the state of the loss after `steps` updates, each with the batch of all pairs."""
    state = {name: h.new_tensor(value) for name, value in running.initial.items()}
    for _ in range(steps):
        state = running.update(state, **_inputs(spec, h), **spec.defaults)
    return state


def _inputs(spec: LossSpec, h: Tensor) -> dict[str, Tensor]:
    """Return the inputs of the loss for pairs at h `[N]`: `[N]`, or `[N, TOKENS]` for inputs per token."""
    needed = [name for name in spec.inputs if name not in spec.optional_inputs or name in spec.reference_inputs]
    return {name: _input(name, h) for name in needed}


def _input(name: str, h: Tensor) -> Tensor:
    logps = REFERENCE + (1 if "chosen" in name else -1) * h / 2 * name.startswith("policy")
    if name.endswith(("chosen_token_logps", "rejected_token_logps")):
        return (logps / TOKENS)[:, None].expand(-1, TOKENS)
    if name.endswith(("chosen_logps", "rejected_logps")):
        return logps
    if name.endswith("lengths"):
        return torch.full_like(h, TOKENS, dtype=torch.int64)
    if name in COLUMNS_OF_DATA:
        return torch.full_like(h, COLUMNS_OF_DATA[name])
    made_up = made_up_examples([name], 1, h.dtype)[name].expand(len(h), *[-1] * ("token" in name))
    return made_up[:, :TOKENS] if "token" in name else made_up


def draw_atlas() -> str:
    """Return the atlas as an SVG that is readable on light and dark pages."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    specs = [spec for spec in map(get_loss, list_losses()) if spec.kind is PAIRS]
    rows = -(-len(specs) // COLUMNS)
    figure = Figure(figsize=(2.1 * COLUMNS, 1.55 * rows), layout="constrained")
    figure.patch.set_alpha(0)
    canvas, places = FigureCanvasSVG(figure), figure.subplots(rows, COLUMNS).flat
    for axes, spec in zip(places, specs, strict=False):
        _draw(axes, spec.name, curve_of(spec))
    for axes in places:  # unused axes
        axes.set_axis_off()
    figure.supxlabel("h, nats: from −20 to 20", fontsize=9, color=TEXT_COLOR)
    drawn = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "atlas"}):
        canvas.print_svg(drawn, metadata={"Date": None})
    return drawn.getvalue()


def _draw(axes, name: str, curve: Curve) -> None:
    """Draw a panel: the loss in nats (left axis), and the gradient relative to its largest absolute value (dashed)."""
    axes.plot(curve.h, curve.losses, color=LOSS_COLOR, linewidth=1.5)
    axes.set_title(name, fontsize=9, color=TEXT_COLOR)
    axes.set_xticks([0], [])
    axes.locator_params(axis="y", nbins=3)
    axes.tick_params(labelsize=7, colors=TEXT_COLOR)
    axes.patch.set_alpha(0)
    axes.axvline(0, color=TEXT_COLOR, linewidth=0.5)
    gradients = axes.twinx()
    gradients.plot(curve.h, curve.gradients / curve.gradients.abs().max(), "--", color=GRADIENT_COLOR, linewidth=1)
    gradients.set_ylim(-1.1, 1.1)
    gradients.set_yticks([])
    for spine in (*axes.spines.values(), *gradients.spines.values()):
        spine.set_color(TEXT_COLOR)
        spine.set_linewidth(0.5)


if __name__ == "__main__":
    sys.stdout.write(draw_atlas())
