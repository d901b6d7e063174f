"""Prepare a trainer's datasets, check them against the losses, and build samplers."""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, WeakSet

from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.data.by_length import STRATEGIES, LengthSampler, RowLengths
from hf_prefopt.data.check import advise, check_embeddings, check_examples, check_lengths, without_gradient
from hf_prefopt.data.collator import EvenStream
from hf_prefopt.data.columns import describe_layout
from hf_prefopt.data.endings import report_endings
from hf_prefopt.data.group import PromptSampler, prompt_keys
from hf_prefopt.data.mixtures import Mixture
from hf_prefopt.data.notes import count_notes
from hf_prefopt.data.prepare import Prepared, prepare, prepared_features
from hf_prefopt.data.sources import as_dataset, check_rows
from hf_prefopt.data.unpaired import MismatchedResponses, check_mismatched_lengths
from hf_prefopt.kinds import KINDS, kind_of_columns
from hf_prefopt.reporting.data_texts import data_texts
from hf_prefopt.training.stream_shards import is_split_by_shards, refuse_split_stream, too_few_shards

logger = logging.getLogger(__name__)

Data: TypeAlias = Dataset | IterableDataset
DataOrSplits: TypeAlias = Data | dict[str, Data]


_OF_ROWS = (
    "max_length",
    "truncation_mode",
    "on_bad_rows",
    "unpair",
    "column_mapping",
    "remove_columns",
    "text_as",
    "chat_template_kwargs",
)


def settings_of_rows(args: PreferenceConfig) -> dict[str, Any]:
    """Return the settings for reading and truncating rows, as keyword arguments for `data.prepare.prepare`."""
    return {"num_proc": args.dataset_num_proc, **{name: getattr(args, name) for name in _OF_ROWS}}


def _layout_of(made: Prepared) -> str:
    return "prepared rows" if made.layout is None else describe_layout(made.layout)


class PreferenceData:
    """An object that prepares datasets for the losses of a configuration, and builds samplers for them.

    Args:
        args: Settings. They are read again at each use, so later changes take effect.
        tokenizer: Tokenizer for raw rows.
        embeddings: Number of token embeddings of the model; `None` if the number is not known yet.
        positions: Maximum sequence length of the model in tokens; `None` if there is no maximum.
        stops: Token ids at which the model stops generating.

    Attributes:
        objective: The losses. The first prepared dataset determines which optional columns they read and, if they
            support several kinds of examples, which kind.
        counts: For each prepared dataset, how many raw rows were cut, dropped or changed (`notes.count_notes`).
        streams: For each stream, a description of the columns of its rows; for a stream that is a mixture, of the
            columns of each source.
    """

    def __init__(
        self,
        args: PreferenceConfig,
        tokenizer: PreTrainedTokenizerBase,
        embeddings: int | None = None,
        stops: frozenset[int] = frozenset(),
        positions: int | None = None,
    ):
        self.args, self.tokenizer, self._embeddings, self._stops = args, tokenizer, embeddings, stops
        self._positions = positions
        self.objective, self._is_settled, self._has_warned = args.build_objective(), False, False
        self.counts: WeakKeyDictionary[Dataset, dict[str, int]] = WeakKeyDictionary()
        self.streams: WeakKeyDictionary[IterableDataset, str] = WeakKeyDictionary()
        # Datasets that were already prepared and checked for the current objective, so that this is not repeated.
        self._fitting: WeakSet[Data] = WeakSet()

    def prepare(self, dataset: Any, name: str) -> DataOrSplits | None:
        """Tokenize and check a dataset, or each dataset of a dict.

        Args:
            dataset: A `Mixture`, or an argument of `sources.as_dataset`.
            name: Name of the dataset in messages.

        Raises:
            ValueError: `dataset` is not a dataset, its rows cannot be read, or the losses cannot compare its examples.
        """
        if dataset is None:
            return None
        if isinstance(dataset, Mixture):
            return self._joined(dataset, name)
        dataset = as_dataset(dataset, name)
        if not isinstance(dataset, dict) and dataset in self._fitting:
            return dataset
        if isinstance(dataset, dict) and not dataset:
            raise ValueError(f"{name}_dataset is an empty dict, so nothing would be evaluated: leave it out")
        if isinstance(dataset, dict):
            return {key: self.prepare(split, key) for key, split in dataset.items()}
        made = self.read(dataset, name)
        checked = self.checked(made.dataset, name)
        if isinstance(checked, IterableDataset):
            self.streams[checked] = _layout_of(made)
        return checked

    def prepare_training(self, dataset: Any) -> DataOrSplits | None:
        """Prepare the dataset to train on.

        Raises:
            ValueError: see `prepare`; or all examples have the same label, and the losses have no gradient for it.
        """
        prepared = self.prepare(dataset, "train")
        self._refuse_without_gradient(prepared)
        return prepared

    def _refuse_without_gradient(self, train: Any) -> None:
        if isinstance(train, Dataset) and (reason := without_gradient(train, self.objective)):
            raise ValueError(f"train: {reason}")

    def _joined(self, mixture: Mixture, name: str) -> Data:
        """Prepare and check each source of a mixture separately, then join the prepared rows into one dataset."""
        made = []
        for source in mixture.sources:
            own = {key: getattr(source, key) for key in ("column_mapping", "remove_columns", "text_as")}
            own = {key: value for key, value in own.items() if value is not None}
            made.append(self.read(source.rows, f"{name} ({source.name})", **own))
        aligned = zip(mixture.sources, mixture.align([one.dataset for one in made], name), strict=True)
        joined = mixture.join([self._comparable(rows, f"{name} ({source.name})") for source, rows in aligned], name)
        advise(joined, self.objective, name)
        if isinstance(joined, IterableDataset):
            described = zip(mixture.sources, map(_layout_of, made), strict=True)
            self.streams[joined] = ", ".join(f"{source.name}: {layout}" for source, layout in described)
        self._check_mismatched(joined, name)
        return joined

    def read(self, dataset: Data, name: str, **own: Any) -> Prepared:
        """Tokenize a dataset without checking it against the losses.

        Args:
            own: Settings for this dataset, which override those of the configuration.

        Returns:
            The prepared dataset, with its layout and notes.
        """
        check_rows(dataset, name)
        with self.args.main_process_first(desc=f"tokenizing {name}"):
            made = prepare(
                dataset,
                self.tokenizer,
                **(settings_of_rows(self.args) | own),
                name=name,
                kind=self.objective.kind,
                needs_prompt=not self.objective.ignores_shared_tokens,
            )
        if self._embeddings is not None:
            made = replace(made, dataset=check_embeddings(made.dataset, self._embeddings, name))
            report_endings(made.dataset, self.tokenizer, self._stops, name)
        if self._positions is not None:
            made = replace(made, dataset=check_lengths(made.dataset, self._positions, name))
        if made.noted is not None:
            self.counts[made.dataset] = count_notes(made.noted)
        return made

    def settle_again(self, train: Data | None, evaluation: DataOrSplits | None) -> None:
        """Rebuild the objective from the current settings, and check the prepared data against it.

        Raises:
            ValueError: the losses cannot compare the examples; or all training examples have the same label, and the
                losses have no gradient for it.
        """
        self.objective, self._is_settled = self.args.build_objective(), False
        self._fitting.clear()
        named = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
        for name, dataset in (("train", train), *named.items()):
            if dataset is not None:
                self.checked(dataset, name)
        self._refuse_without_gradient(train)

    def texts(self, train: Data | None, evaluation: DataOrSplits | None) -> list[str]:
        """Describe the prepared data in a line or two; see `reporting.data_texts`."""
        several = evaluation if isinstance(evaluation, dict) else None
        named = {"eval": evaluation} if several is None else {f"eval {name}": rows for name, rows in several.items()}
        return data_texts({"train": train, **named}, self.counts, self.args.group_by_prompt, self.streams)

    def checked(self, dataset: Data, name: str) -> Data:
        """Check the examples of a dataset, and log what the losses advise for these examples.

        The first dataset that is checked determines the objective.
        """
        fitting = self._comparable(dataset, name)
        advise(fitting, self.objective, name)
        return fitting

    def _comparable(self, dataset: Data, name: str) -> Data:
        """Check that the losses can compare the examples of a dataset. The first dataset determines the objective."""
        kind = kind_of_columns(dataset.column_names)
        assert kind is not None, "prepared rows are of a kind"
        if not self._is_settled:
            columns = [name for name in kind.optional_columns if name in dataset.column_names]
            self.objective, self._is_settled = self.args.build_objective(kind, columns), True
        losses, wanted = ", ".join(self.args.loss_type), self.objective.inputs
        if not all(map(kind.has_input, wanted)):
            raise ValueError(f"the {name} dataset holds {kind.name}, but {losses} needs {self.objective.kind.wanted}")
        is_stream = not isinstance(dataset, Dataset)
        # Only the columns of a stream can be checked here; its rows are checked when they are read.
        first = dict.fromkeys(dataset.column_names, True) if is_stream or not len(dataset) else dataset[0]
        reason = kind.refusal(first, wanted)
        if reason is None and self.objective.needs_mismatched and is_stream:
            reason = "it draws responses to other prompts from the whole dataset, which a stream does not support"
        if reason is not None:
            raise ValueError(f"the {name} dataset does not fit {losses}: {reason}")
        fitting = check_examples(dataset, self.objective, name)
        self._check_mismatched(fitting, name)
        self._fitting.add(fitting)
        return fitting

    def _check_mismatched(self, dataset: Data, name: str) -> None:
        if self.objective.needs_mismatched and self._positions is not None and isinstance(dataset, Dataset):
            check_mismatched_lengths(dataset, self.args.max_length, self._positions, name)

    def sampler(self, dataset: Any, layout: Callable[[], str | None], rows_at_once: int) -> Sampler[int] | None:
        """Build the sampler that groups rows by prompt or by length; return `None` to use the Trainer's sampler.

        Args:
            layout: Function that returns the batch layout. It is called only after the layout was chosen.
            rows_at_once: Number of rows that each rank draws for a batch.

        Raises:
            ValueError: the rows have no column with the name `args.length_column_name`.
        """
        args = self.args
        rows = dataset.dataset if isinstance(dataset, MismatchedResponses) else dataset
        if not isinstance(rows, Dataset):
            return None
        if args.group_by_prompt:
            return PromptSampler(prompt_keys(rows), self._seed)
        if args.train_sampling_strategy not in STRATEGIES:
            return None
        if args.length_column_name not in (*rows.column_names, "length"):
            raise ValueError(
                f"length_column_name={args.length_column_name!r}: the prepared rows have no such column. Remove the "
                "setting (tokens are then counted), or add the column to rows from prepare_dataset"
            )
        micro_batches = args.gradient_accumulation_steps * args.world_size
        lengths = RowLengths(rows, args.length_column_name)
        return LengthSampler(
            args.train_sampling_strategy, lengths, layout, rows_at_once, micro_batches, self._seed, len(rows)
        )

    def to_read(self, dataset: Data, rows_at_once: int, is_training: bool = False) -> Any:
        """Return the dataset in the form that a data loader reads.

        If a loss needs mismatched responses (responses to other prompts), they are added to the rows. In training, if a
        stream has enough shards, accelerate splits them across the ranks. Otherwise each rank reads the whole stream
        and uses only its own rows. Such a stream is extended by repeated rows or, with `dataloader_drop_last`, cut, so
        that all ranks get equally many rows.

        Args:
            rows_at_once: Number of rows that all ranks together draw for a batch.

        Raises:
            ValueError: the user has already split the stream across ranks.
        """
        if self.objective.needs_mismatched:
            dataset = MismatchedResponses(dataset, self._seed, self.args.max_length)
        refuse_split_stream(dataset, self.args.world_size)
        is_whole = not is_training or not is_split_by_shards(dataset, self.args)
        if not isinstance(dataset, IterableDataset) or self.args.world_size == 1 or not is_whole:
            return dataset
        if is_training and dataset.num_shards < self.args.world_size and not self._has_warned:
            self._has_warned = True
            if self.args.process_index == 0:
                logger.warning(too_few_shards(dataset.num_shards, self.args.world_size))
        return EvenStream(dataset, rows_at_once, self.args.dataloader_drop_last)

    @property
    def pad_token_id(self) -> int:
        """The token id used for padding. It may be the EOS token, because masks depend on lengths and not on ids."""
        return next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)

    @property
    def columns(self) -> list[str]:
        """All columns that a collator or a sampler may read."""
        prepared = [prepared_features(kind.columns, kind.optional_columns) for kind in KINDS]
        columns = dict.fromkeys(column for features in prepared for column in features)
        others = ["token_weights", "mismatched_ids", "mismatched_masks", "repeated", self.args.length_column_name]
        return [*columns, *others]

    @property
    def _seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed
