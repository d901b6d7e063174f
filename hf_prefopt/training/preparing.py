"""A Trainer that takes preference data, raw or prepared, and counts every row once, on any number of ranks."""

from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import has_length

from hf_prefopt.batch import PreferenceBatch
from hf_prefopt.config import PreferenceConfig
from hf_prefopt.data.check import check_examples
from hf_prefopt.data.collator import pieces_of
from hf_prefopt.data.extras import present_extras
from hf_prefopt.data.group import PromptSampler, prompt_keys
from hf_prefopt.data.mismatched import MismatchedResponses
from hf_prefopt.data.prepare import prepare_dataset, prepared_features
from hf_prefopt.data.repeated_rows import EvenStream, examples_of_first_rows, keep_examples, rows_that_count
from hf_prefopt.kinds import KINDS, kind_of_columns
from hf_prefopt.training.arguments import check_data
from hf_prefopt.training.resuming import ResumingTrainer

Data = Dataset | IterableDataset
DataOrSplits = Data | dict[str, Data]


class PreparingTrainer(ResumingTrainer):
    """Tokenises what it is given, refuses what its losses cannot compare, and draws rows as the settings say.

    Attributes:
        criterion: the objective; the first data set settles which kind of examples it compares.
        tokenizer: with which raw rows are prepared.
    """

    args: PreferenceConfig
    tokenizer: PreTrainedTokenizerBase
    _has_seen_data: bool

    def _prepared(self, dataset: DataOrSplits | None, name: str) -> DataOrSplits | None:
        """The data set tokenised, or each of several."""
        if dataset is None:
            return None
        check_data(dataset, name)
        if isinstance(dataset, dict):
            return {key: self._prepared(split, key) for key, split in dataset.items()}
        with self.args.main_process_first(desc=f"tokenising {name}"):
            prepared = prepare_dataset(
                dataset,
                self.tokenizer,
                max_length=self.args.max_length,
                truncation_mode=self.args.truncation_mode,
                on_bad_rows=self.args.on_bad_rows,
                num_proc=self.args.dataset_num_proc,
                name=name,
                unpair=self.args.unpair,
                kind=self.criterion.kind,
            )
        return self._fitting(prepared, name)

    def _fitting(self, dataset: Data, name: str) -> Data:
        """The data set, unless the losses cannot compare its examples. What the first one holds settles the objective:
        the kind, of losses that take several, and further columns."""
        kind = kind_of_columns(dataset.column_names)
        if not self._has_seen_data:
            self.criterion = self.args.build_objective(kind, present_extras(kind, dataset.column_names))
        self._has_seen_data = True
        losses = ", ".join(self.args.loss_type)
        if not all(map(kind.takes, self.criterion.inputs)):
            raise ValueError(f"{name} holds {kind.name}, and {losses} wants {self.criterion.kind.wanted}")
        is_stream = not isinstance(dataset, Dataset)
        # The rows of a stream are looked at when they are reached, its columns are known.
        first = dict.fromkeys(dataset.column_names, True) if is_stream or not len(dataset) else dataset[0]
        reason = kind.refusal(first, self.criterion.inputs)
        if reason is None and self.criterion.needs_mismatched and is_stream:
            reason = "it draws responses to other prompts from the whole data set, which a stream does not give"
        if reason is not None:
            raise ValueError(f"{name} does not fit {losses}: {reason}")
        return check_examples(dataset, self.criterion, name)

    def _fit_objective(self) -> None:
        """The objective of the settings as they are now, for the data at hand, which must suit it as at the start."""
        self.criterion, self._has_seen_data = self.args.build_objective(), False
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, dataset in {"train": self.train_dataset, **evaluated}.items():
            if dataset is not None:
                self._fitting(dataset, name)

    def get_eval_dataloader(self, eval_dataset: str | Data | None = None):
        """As the Trainer's; a raw data set is prepared first."""
        named = eval_dataset is None or isinstance(eval_dataset, str)
        return super().get_eval_dataloader(eval_dataset if named else self._prepared(eval_dataset, "eval"))

    def get_test_dataloader(self, test_dataset: Data):
        """As the Trainer's; a raw data set is prepared first."""
        return super().get_test_dataloader(self._prepared(test_dataset, "test"))

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        """As the Trainer's, or by prompt where `group_by_prompt` asks for it."""
        dataset = self.train_dataset if train_dataset is None else train_dataset
        dataset = dataset.dataset if isinstance(dataset, MismatchedResponses) else dataset
        if not self.args.group_by_prompt or not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        return PromptSampler(prompt_keys(dataset), self._data_seed)

    @property
    def _data_seed(self) -> int:
        return self.args.data_seed if self.args.data_seed is not None else self.args.seed

    def _get_dataloader(self, dataset: Data, description: str, batch_size: int, **kwargs: Any):
        """As the Trainer's; rows get a mismatched response where a loss asks for it, streams fill up the last batch."""
        if self.criterion.needs_mismatched:
            dataset = MismatchedResponses(dataset, self._data_seed, self.args.max_length)
        world_size = self.accelerator.num_processes
        if isinstance(dataset, IterableDataset) and world_size > 1 and not self.args.dataloader_drop_last:
            dataset = EvenStream(dataset, batch_size * world_size)
        return super()._get_dataloader(dataset, description, batch_size, **kwargs)

    def _prepare_input(self, data: Any) -> Any:
        """As the Trainer's, but tensors are moved and never cast.

        The Trainer casts floats to the model's dtype under DeepSpeed. Those of a batch are scores, margins and weights,
        which the losses read and no model does.
        """
        return data.to(self.args.device) if isinstance(data, Tensor) else super()._prepare_input(data)

    def _set_signature_columns_if_needed(self) -> None:
        columns = dict.fromkeys(column for kind in KINDS for column in prepared_features(kind, extras=kind.extras))
        self._signature_columns = [*columns, "token_weights", "mismatched_ids", "mismatched_masks", "repeated"]

    def _without_repeats(self, batch: PreferenceBatch | dict[str, list[PreferenceBatch]]):
        """A training batch without the examples of rows that are repeated at the end of the data."""
        pieces = pieces_of(batch)
        counted = self._counted(pieces, self._train_batch_size)
        if counted is None:
            return batch
        pieces = [keep_examples(piece, kept) for piece, kept in zip(pieces, counted, strict=True)]
        return {"pieces": pieces} if "pieces" in batch else pieces[0]

    def _counted(self, pieces: list[PreferenceBatch], share: int) -> list[Tensor] | None:
        """For each piece of a batch of `share` rows, which examples count; `None` where all do."""
        if "counted" in pieces[0]:
            return [piece["counted"] for piece in pieces]
        state, world_size = self.accelerator.gradient_state, self.accelerator.num_processes
        if world_size == 1 or not state.end_of_dataloader or self.args.dataloader_drop_last:
            return None
        if not has_length(state.active_dataloader.dataset):
            return None
        rows = len(state.active_dataloader.dataset)
        return examples_of_first_rows(pieces, rows_that_count(rows, share, self.accelerator.process_index, world_size))

    def _idle(self, pieces: list[PreferenceBatch]) -> list[PreferenceBatch]:
        """Pieces without examples, as many as this rank has fewer than the one that has most."""
        if self.accelerator.num_processes == 1:
            return []
        count = self.accelerator.gather(torch.tensor([len(pieces)], device=self.args.device)).max().item()
        idle = keep_examples(pieces[-1], torch.zeros_like(pieces[-1]["rows"], dtype=torch.bool))
        return [{**idle} for _ in range(count - len(pieces))]
