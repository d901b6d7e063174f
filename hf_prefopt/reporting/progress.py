"""Progress output in the terminal: the Trainer's progress bars, and one short line per log record.

The complete record is still written to `log_history` and to every `report_to` integration.
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
    """A callback that writes one short line per log record above the progress bar, not the whole record as a dict."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None:
            line = short_line(logs or {}, state.global_step, state.max_steps)
            if line:
                self.training_bar.write(line)


def short_line(logs: Mapping[str, float], step: int, max_steps: int) -> str:
    """Format a record as `step 10/40 · loss 0.6512 · accuracy 0.600 · …`; empty without any metric of `SHOWN`."""
    prefix = "eval_" if "eval_loss" in logs else ""
    numbers = [text.format(float(logs[prefix + key])) for key, text in SHOWN.items() if prefix + key in logs]
    where = f"{'evaluation at ' if prefix else ''}step {step}/{max_steps}"
    return " · ".join([where, *numbers]) if numbers else ""
