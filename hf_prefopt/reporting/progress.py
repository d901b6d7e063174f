"""Show progress in the terminal: the Trainer's progress bars, and one short line per log.

The complete log is still added to `log_history` and sent to every `report_to` integration.
"""

from collections.abc import Mapping

from transformers import ProgressCallback

SHOWN = {
    "loss": "loss {:.4f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "rewards/margins": "margin {:+.4f}",
    "log_ratios/chosen": "Δ log p {:+.3f}",
    "grad_norm": "grad norm {:.2f}",
    "learning_rate": "lr {:.1e}",
    "tokens_per_second": "{:,.0f} tokens/s",
}


class ShortProgressCallback(ProgressCallback):
    """A callback that writes one short line per log above the progress bar, instead of the whole log as a dict."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            line = short_line(logs or {}, state.global_step, state.max_steps)
            if line:
                self.training_bar.write(line)


def short_line(logs: Mapping[str, float], step: int, max_steps: int) -> str:
    """Format a log as `step 10/40 · loss 0.6512 · accuracy 0.600 · …`. Return "" if it has no metric of `SHOWN`."""
    prefix = "eval_" if "eval_loss" in logs else ""
    numbers = [text.format(float(logs[prefix + key])) for key, text in SHOWN.items() if prefix + key in logs]
    where = f"{'evaluation at ' if prefix else ''}step {step}/{max_steps}"
    return " · ".join([where, *numbers]) if numbers else ""
