"""A Trainer whose evaluations and logs are of the examples, exactly, and not means of batch means."""

import torch

from hf_prefopt.batch import join_examples
from hf_prefopt.data.collator import pieces_of
from hf_prefopt.reference.cache_fill import FillCache
from hf_prefopt.reporting.finite import ruined_gradient, ruined_weights
from hf_prefopt.reporting.metrics import EvaluationRecord, RunningMeans
from hf_prefopt.training.engines import keep_output_precision
from hf_prefopt.training.preparing import PreparingTrainer


class EvaluatingTrainer(PreparingTrainer):
    """Keeps the loss inputs of every example of an evaluation, and running means of a training log's metrics."""

    _evaluation: EvaluationRecord
    _train_metrics: RunningMeans
    _cache_filler: FillCache | None

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """(mean loss of the batch, rewards `[B, 2]`, labels `[B, 2]`)."""
        with torch.no_grad(), self.compute_loss_context_manager():
            pieces = pieces_of(self._prepare_inputs(inputs))
            counted = self._counted(pieces, self.args.eval_batch_size)
            if counted is not None:
                pieces = [{**piece, "counted": examples} for piece, examples in zip(pieces, counted, strict=True)]
            for idle in self._idle(pieces) if "pieces" in inputs else ():
                self._run_along(model, idle)
            outputs = [self.compute_loss(model, piece, return_outputs=True) for piece in pieces]
        loss = torch.stack([loss for loss, _ in outputs]).mean()
        if prediction_loss_only:
            return loss, None, None
        # The Trainer fills up what is shorter with −100, too.
        names = ("predictions", "labels")
        return loss, *(join_examples([output[name] for _, output in outputs], fill=-100.0) for name in names)

    def evaluation_loop(self, dataloader, description, *args, metric_key_prefix: str = "eval", **kwargs):
        """As the Trainer's, with the loss and every metric taken over the rows and not over the batches.

        Raises:
            FloatingPointError: the loss of a row is not finite, or that of a training step before was not.
        """
        self._finite.check(self.accelerator)
        keep_output_precision(self.accelerator)
        self._settle_layout()
        if self._cache_filler:
            self._cache_filler.fill(dataloader.dataset, description.lower())
        self._evaluation = EvaluationRecord()
        output = super().evaluation_loop(dataloader, description, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        metrics = self._evaluation.metrics(self.criterion, f"evaluation at step {self.state.global_step}")
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in metrics.items()})
        self._evaluation = EvaluationRecord()
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As the Trainer's; a training log also carries the means of the metrics since the last one.

        Raises:
            FloatingPointError: a loss since then, the gradient or, in a run's last log, a weight is not finite.
        """
        if "train_loss" in logs:  # the last log of a run
            self._finite.check(self.accelerator, ruined_weights(self.model))
        if "loss" in logs:
            # fp16's loss scaling leaves out steps whose gradients overflow.
            norm = None if self.accelerator.mixed_precision == "fp16" else logs.get("grad_norm")
            self._finite.check(self.accelerator, ruined_gradient(norm))
            logs.update(self.criterion.kind.conclude(self._train_metrics.pop(self.accelerator)))
        super().log(logs, start_time)
