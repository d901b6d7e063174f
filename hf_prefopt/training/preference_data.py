"""The data of a trainer: prepared, checked against the losses, and drawn as the settings say."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import PreTrainedTokenizerBase

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.data.by_length import STRATEGIES, LengthSampler, RowLengths
from hf_prefopt.data.check import check_embeddings, check_examples, check_lengths
from hf_prefopt.data.collator import EvenStream
from hf_prefopt.data.columns import describe_layout
from hf_prefopt.data.endings import report_endings
from hf_prefopt.data.group import PromptSampler, prompt_keys
from hf_prefopt.data.mixtures import Mixture
from hf_prefopt.data.notes import count_notes
from hf_prefopt.data.prepare import Prepared, prepare, prepared_features
from hf_prefopt.data.sources import as_dataset, check_rows
from hf_prefopt.data.unpaired import MismatchedResponses
from hf_prefopt.kinds import KINDS, kind_of_columns

Data = Dataset | IterableDataset
DataOrSplits = Data | dict[str, Data]


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
    """The settings that say how rows are read and cut, as arguments of `prepare`."""
    return {"num_proc": args.dataset_num_proc, **{name: getattr(args, name) for name in _OF_ROWS}}


def _layout_of(made: Prepared) -> str:
    return "prepared rows" if made.layout is None else describe_layout(made.layout)


class PreferenceData:
    """Prepares data sets for the losses of a configuration, and draws their rows.

    Args:
        args: the settings, read whenever they are needed.
        tokenizer: tokenizes raw rows.
        embeddings: how many token ids the model knows; None if that is not known yet.
        positions: the most tokens of a sequence that the model can compute; `None` if there is no such number.
        stops: the ids at which the model stops to generate.

    Attributes:
        objective: the losses. The first data set settles it: the kind of examples, for losses that take several kinds,
            and the optional columns.
        counts: for each prepared data set, what happened to the rows given (`notes.count_notes`).
        streams: for each stream, the layout of its rows, or its sources with theirs.
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
        self.objective, self._is_settled = args.build_objective(), False
        self.counts: WeakKeyDictionary[Dataset, dict[str, int]] = WeakKeyDictionary()
        self.streams: WeakKeyDictionary[IterableDataset, str] = WeakKeyDictionary()
        # Prepared and checked for the objective: not again in each evaluation, with all there is to say.
        self._fitting: WeakSet[Data] = WeakSet()

    def prepare(self, dataset: Any, name: str) -> DataOrSplits | None:
        """The data set tokenized, or each of several; it is a `Mixture`, or what `sources.as_dataset` takes.

        Raises:
            ValueError: it is no data set, its rows cannot be read, or the losses cannot compare its examples.
        """
        if dataset is None:
            return None
        if isinstance(dataset, Mixture):
            return self._joined(dataset, name)
        dataset = as_dataset(dataset, name)
        if not isinstance(dataset, dict) and dataset in self._fitting:
            return dataset
        if isinstance(dataset, dict):
            return {key: self.prepare(split, key) for key, split in dataset.items()}
        made = self.read(dataset, name)
        checked = self.checked(made.dataset, name)
        if isinstance(checked, IterableDataset):
            self.streams[checked] = _layout_of(made)
        return checked

    def _joined(self, mixture: Mixture, name: str) -> Data:
        """The rows of a mixture, each source prepared and checked by itself."""
        made = []
        for source in mixture.sources:
            own = {key: getattr(source, key) for key in ("column_mapping", "remove_columns", "text_as")}
            own = {key: value for key, value in own.items() if value is not None}
            made.append(self.read(source.rows, f"{name} ({source.name})", **own))
        aligned = zip(mixture.sources, mixture.align([one.dataset for one in made], name), strict=True)
        joined = mixture.join([self.checked(rows, f"{name} ({source.name})") for source, rows in aligned], name)
        if isinstance(joined, IterableDataset):
            described = zip(mixture.sources, map(_layout_of, made), strict=True)
            self.streams[joined] = ", ".join(f"{source.name}: {layout}" for source, layout in described)
        return joined

    def read(self, dataset: Data, name: str, **own: Any) -> Prepared:
        """The data set tokenized, and how it was made; it is not checked against the losses.

        Args:
            own: settings of this data set that differ from those of the configuration.
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
        """Build the objective from the settings as they are now, and check the prepared data against it.

        Raises:
            ValueError: the losses cannot compare the examples.
        """
        self.objective, self._is_settled = self.args.build_objective(), False
        self._fitting.clear()
        named = evaluation if isinstance(evaluation, dict) else {"eval": evaluation}
        for name, dataset in (("train", train), *named.items()):
            if dataset is not None:
                self.checked(dataset, name)

    def checked(self, dataset: Data, name: str) -> Data:
        """The data set, whose examples the losses can compare; the first one settles the objective."""
        kind = kind_of_columns(dataset.column_names)
        if not self._is_settled:
            columns = [name for name in kind.optional_columns if name in dataset.column_names]
            self.objective, self._is_settled = self.args.build_objective(kind, columns), True
        losses, wanted = ", ".join(self.args.loss_type), self.objective.inputs
        if not all(map(kind.has_input, wanted)):
            raise ValueError(f"the {name} data set holds {kind.name}, but {losses} needs {self.objective.kind.wanted}")
        is_stream = not isinstance(dataset, Dataset)
        # The columns of a stream are known, its rows are checked when they are read.
        first = dict.fromkeys(dataset.column_names, True) if is_stream or not len(dataset) else dataset[0]
        reason = kind.refusal(first, wanted)
        if reason is None and self.objective.needs_mismatched and is_stream:
            reason = "it draws responses to other prompts from the whole data set, which a stream does not give"
        if reason is not None:
            raise ValueError(f"the {name} data set does not fit {losses}: {reason}")
        fitting = check_examples(dataset, self.objective, name)
        self._fitting.add(fitting)
        return fitting

    def sampler(self, dataset: Any, layout: Callable[[], str | None], rows_at_once: int) -> Sampler[int] | None:
        """Draws rows by prompt or by length, where the settings ask for it; `None`: the Trainer's sampler.

        Args:
            layout: gives the layout, once it is settled.
            rows_at_once: the rows that a rank draws at a time.

        Raises:
            ValueError: `length_column_name` names a column that the rows do not have.
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
                f"length_column_name={args.length_column_name!r}: the prepared rows have no such column. Tokens are "
                "counted without one: leave it out, or add the column to rows that prepare_dataset has made"
            )
        micro_batches = args.gradient_accumulation_steps * args.world_size
        lengths = RowLengths(rows, args.length_column_name)
        return LengthSampler(
            args.train_sampling_strategy, lengths, layout, rows_at_once, micro_batches, self._seed, len(rows)
        )

    def to_read(self, dataset: Data, rows_at_once: int) -> Any:
        """The data set as a data loader reads it.

        Rows get a mismatched response where a loss needs one. A stream's last rows are filled up.

        Args:
            rows_at_once: the rows that all ranks together draw at a time.
        """
        if self.objective.needs_mismatched:
            dataset = MismatchedResponses(dataset, self._seed, self.args.max_length)
        may_repeat_rows = self.args.world_size > 1 and not self.args.dataloader_drop_last
        return (
            EvenStream(dataset, rows_at_once) if isinstance(dataset, IterableDataset) and may_repeat_rows else dataset
        )

    @property
    def pad_token_id(self) -> int:
        """An id to fill padded rows with; masks are made from lengths, so it may be the EOS."""
        return next((i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if i is not None), 0)

    @property
    def columns(self) -> list[str]:
        """Every column that the collators or the samplers may read."""
        prepared = [prepared_features(kind.columns, kind.optional_columns) for kind in KINDS]
        columns = dict.fromkeys(column for features in prepared for column in features)
        others = ["token_weights", "mismatched_ids", "mismatched_masks", "repeated", self.args.length_column_name]
        return [*columns, *others]

    @property
    def _seed(self) -> int:
        return self.args.seed if self.args.data_seed is None else self.args.data_seed
