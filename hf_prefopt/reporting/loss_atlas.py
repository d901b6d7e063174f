"""Draw the loss atlas: each registered pair loss as a function of h, with its gradient below it.

    python -m hf_prefopt.reporting.loss_atlas > docs/images/loss_atlas.svg

h = r_w − r_l is the chosen log-ratio minus the rejected log-ratio, in nats. The loss is computed for one pair at a
time. The chosen log-ratio is h/2, and the rejected log-ratio is −h/2. Each response has 20 tokens and a reference
log-prob of −30 nats. The hyperparameters have their default values.
"""

import io
import re
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_prefopt.kinds import PAIRS
from hf_prefopt.kinds.made_up import made_up_examples
from hf_prefopt.losses.registry import LossSpec, RunningState, get_loss, list_losses

WIDEST = 25.0  # largest |h|, in nats; above 1/β = 20, the margin from which the hinge loss is 0
POINTS = 101
TOKENS = 20
REFERENCE = -30.0  # nats
COLUMNS = 4
STEPS = 100  # number of updates after which running means are close to their limits
SIZE = (1.9, 2.0)  # width and height of a panel, in inches
# Blue and vermilion as in the palette of Okabe and Ito. The second color of each pair is used on dark pages.
COLORS = {"loss": ("#0072b2", "#56b4e9"), "gradient": ("#c44e00", "#e69f00"), "text": ("#24292f", "#e6edf3")}
LINES = ("#8c959f", "#8c959f")
RUN = {"progress": 0.5, "epoch": 0, "training": False}
# Scores and win rates with which the chosen response is certainly better.
COLUMNS_OF_DATA = {"chosen_scores": 1.0, "rejected_scores": 0.0, "chosen_win_rates": 1.0, "rejected_win_rates": 0.0}


@dataclass(frozen=True)
class Curve:
    """A loss as a function of h.

    Attributes:
        h: `[N]`. Values of h, in nats.
        losses: `[N]`. Loss ℓ at each h.
        gradients: `[N]`. dℓ/dh from autograd. Values that the loss detaches are treated as constants.
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
    """Return the state of the loss after `steps` updates. Each update uses one batch with a pair for each h."""
    state = {name: h.new_tensor(value) for name, value in running.initial.items()}
    for _ in range(steps):
        state = running.update(state, **_inputs(spec, h), **spec.defaults)
    return state


def _inputs(spec: LossSpec, h: Tensor) -> dict[str, Tensor]:
    """Return the inputs of the loss for N pairs, one for each value in h `[N]`.

    Each input is `[N]`, or `[N, TOKENS]` if it has a value per token.
    """
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
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    specs = [spec for spec in map(get_loss, list_losses()) if spec.kind is PAIRS]
    rows = -(-len(specs) // COLUMNS)
    layout = ConstrainedLayoutEngine(h_pad=0.045, hspace=0)
    figure = Figure(figsize=(SIZE[0] * COLUMNS, SIZE[1] * rows), layout=layout)
    figure.patch.set_visible(False)
    canvas = FigureCanvasSVG(figure)
    panels = figure.subfigures(rows, COLUMNS, squeeze=False).flat
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "atlas",
        "font.size": 7,
        "font.sans-serif": ["DejaVu Sans", "Arial"],
    }
    with rc_context(style):
        for number, (panel, spec) in enumerate(zip(panels, specs, strict=False)):
            _draw(panel, spec.name, curve_of(spec), is_leftmost=number % COLUMNS == 0)
        drawn = io.StringIO()
        canvas.print_svg(drawn, metadata={"Date": None})
    # Coordinates (but not labels) are rounded to two decimals, because further decimals differ from run to run.
    svg = re.sub(r"(?<![>−\d.])\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", drawn.getvalue())
    return svg.replace('<style type="text/css">', f'<style type="text/css">{_dark_colors()}', 1)


def _draw(panel: Any, name: str, curve: Curve, is_leftmost: bool) -> None:
    """Draw the loss above its gradient. Both have the same h axis, but each has its own vertical scale.

    Clipping is off, because matplotlib gives clip paths different names in each run.
    """
    above, below = panel.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    panel.patch.set_visible(False)
    above.set_title(name, fontsize=8.5, color=COLORS["text"][0])
    above.plot(curve.h, curve.losses, color=COLORS["loss"][0], linewidth=1.5, clip_on=False)
    below.plot(curve.h, curve.gradients, color=COLORS["gradient"][0], linewidth=1.2, clip_on=False)
    below.axhline(0, color=LINES[0], linewidth=0.5, clip_on=False)
    below.set_xticks([-20, 0, 20])
    if is_leftmost:
        above.set_ylabel("ℓ", color=COLORS["loss"][0])
        below.set_ylabel("dℓ/dh", color=COLORS["gradient"][0])
    below.set_xlabel("h (nats)", color=COLORS["text"][0], labelpad=1)
    for axes in (above, below):
        axes.axvline(0, color=LINES[0], linewidth=0.5, clip_on=False)
        axes.locator_params(axis="y", nbins=3)
        axes.margins(y=0.1)
        axes.tick_params(color=LINES[0], labelcolor=COLORS["text"][0], length=2, pad=1.5)
        axes.patch.set_visible(False)
        axes.spines[:].set(color=LINES[0], linewidth=0.5)


def _dark_colors() -> str:
    """Return the style sheet that replaces matplotlib's inline colors on dark pages."""
    rules = (
        f'[style*="{property}: {light}"]{{{property}:{dark} !important}}'
        for light, dark in COLORS.values()
        for property in ("fill", "stroke")
    )
    return f"@media(prefers-color-scheme:dark){{{''.join(rules)}}}"


if __name__ == "__main__":
    sys.stdout.write(draw_atlas())
