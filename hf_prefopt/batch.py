"""The data passed from the collator to the losses: the batch, and the scores of its responses.

A *group* is one prompt with its K ≥ 1 responses. A batch has R responses, which are the responses of all its groups. It
has N scored tokens, which are those of all responses in the same order, and B examples. For pairs, an example defines
which response is chosen and which is rejected (see `kinds`). Only the collator knows how the tokens are arranged in the
model's input.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor


class PreferenceBatch(TypedDict, total=False):
    """A micro-batch: a plain dict of tensors, which accelerate, the Trainer and worker processes can handle.

    Inputs of the model, whose shapes depend on the layout:
        input_ids, position_ids, attention_mask: arguments of the model's forward with these names.
        segment_queries, segment_keys, segment_key_index, segment_longest, segment_lengths: describe to which positions
            each response of a row attends. Present only in the layout "shared" (see `scoring.attention`).
        around_places: `[T]` int64. Present only in the layout "around" (see `scoring.around`). In this layout, most
            layers compute one packed row of T tokens, which contains every prompt once, and token mixers such as
            attention compute padded sequences `[R, L]`. Entry t is the index of token t in the padded sequences after
            these are flattened.
        around_tokens: `[R, L]` int64. For each position of the padded sequences, the index of its token in the packed
            row. Present only in the layout "around".

    N scored tokens, in the order of the responses:
        scored_rows: `[N]` int64. The position that predicts the token, as an index into the hidden states after these
            are flattened to `[positions, H]`, where H is the hidden size.
        targets: `[N]` int64. The token's id.
        response_index: `[N]` int64. Index of the response to which the token belongs.

    R responses, with indices from 0 to R − 1, and B examples:
        response_lengths: `[R]` int64. Number of scored tokens of each response, ≥ 1.
        longest_response: The largest response length as a Python number, so that the width of tensors `[R, T]` is known
            without waiting for the device.
        response_keys: R `bytes` objects, the cache keys of the responses. Present only if reference log-probs are
            cached.
        chosen, rejected: `[B]` int64. Indices of the two responses of each pair. A response may belong to several
            pairs.
        prompts: `[B]` int64. Index of each pair's prompt. Scored prompts have the indices after those of the
            responses (see `data.prompts`). Present only if a loss needs log-probs of prompts.
        gold: `[B]` int64. Index of the third response of each triple (see `kinds.triples`).
        responses, mismatched: `[B]` int64. Indices of the responses of unpaired examples (see `kinds.unpaired`).
        labels: `[B]` bool. Labels of unpaired examples.
        quantiles: `[B]` float32. Quantiles of scored responses (see `kinds.scored`).
        list_responses, list_mask, list_ranks, list_scores: `[B, K]`, for lists of up to K responses. For each response
            its index, False if it is padding, its rank, and its score (see `kinds.lists`).
        chosen_token_weights, rejected_token_weights: `[B, T]` fp32. Weights of the tokens of pairs, padded with 0.
        weights, margins, chosen_scores, ...: `[B]` float32. Optional columns, present only if the rows have them (see
            `ExampleKind.optional_columns`).
        rows, pair_in_row: `[B]` int64. Number of each example's row in its dataset, and index of the example in this
            row.
        counted: `[B]` bool. False for examples that repeat earlier examples and are excluded from the loss (see
            `data.collator`). Present only if there are such examples.

    Set during a step that needs the global batch (see `training.global_batch`):
        place_in_step: Index of this piece (see `LoaderBatch`) among all pieces of the step on this rank.
        reference_scores: The `ResponseScores` of the reference, after they were computed.
    """

    input_ids: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    segment_queries: Tensor
    segment_keys: Tensor
    segment_key_index: Tensor
    segment_longest: tuple[int, int]
    segment_lengths: "SegmentLengths"
    around_places: Tensor
    around_tokens: Tensor
    scored_rows: Tensor
    targets: Tensor
    response_index: Tensor
    response_lengths: Tensor
    longest_response: int
    response_keys: tuple[bytes, ...]
    chosen: Tensor
    rejected: Tensor
    prompts: Tensor
    gold: Tensor
    chosen_token_weights: Tensor
    rejected_token_weights: Tensor
    responses: Tensor
    mismatched: Tensor
    labels: Tensor
    quantiles: Tensor
    list_responses: Tensor
    list_mask: Tensor
    list_ranks: Tensor
    list_scores: Tensor
    weights: Tensor
    margins: Tensor
    chosen_scores: Tensor
    rejected_scores: Tensor
    chosen_win_rates: Tensor
    rejected_win_rates: Tensor
    rows: Tensor
    pair_in_row: Tensor
    counted: Tensor
    place_in_step: int
    reference_scores: "ResponseScores"


class LoaderBatch(TypedDict):
    """The output of the data loader: the rows of one micro-batch, in one or more pieces.

    A *piece* is a part of the rows with its own forward and backward pass. There is one piece, unless
    `max_tokens_per_batch` splits the rows. transformers' Trainer reads only `rows`, `input_ids` and `attention_mask`.

    Attributes:
        rows: `[B]` int64. Number of each example's row in the dataset.
        input_ids: `[1, T]`. Token ids at all positions of all pieces.
        attention_mask: `[1, T]`. 0 for padding, 1 for all other positions.
        pieces: The pieces, each as a `PreferenceBatch`.
        sequence_tokens: Number of tokens in all sequences [prompt | response].
        padded_positions: Number of positions in a right-padded batch of these sequences. This entry and
            `sequence_tokens` are absent if the rows have no token ids, which only a user's collator allows.
    """

    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    pieces: list[PreferenceBatch]
    sequence_tokens: NotRequired[int]
    padded_positions: NotRequired[int]


@dataclass(frozen=True)
class SegmentLengths:
    """The numbers of queries and keys of the S segments of a row, on the CPU.

    This is a class, because compiled graphs would specialize on the values of a tuple.

    Attributes:
        queries, keys: S numbers each.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]


@dataclass
class ResponseScores:
    """The scores of the responses of a batch under one model.

    Attributes:
        token_logps: `[N]` fp32. Log-prob of each scored token, in nats.
        response_index: `[N]`. Index of the response to which each token belongs.
        lengths: `[R]`. Number of scored tokens of each response.
        token_stats: Other statistics of each token that were requested, keyed by name. Each is `[N]` fp32, except
            `hidden`, which is the input of the head, `[N, H]`, where H is the hidden size.
        aux_loss: `[]`. Load-balancing loss of the routers of a mixture of experts, over the sequences of the batch and
            without its coefficient; `None` if it was not requested.
        lower_states: Recorded outputs of the layers that reference and policy share; see `scoring.lower_states`.
    """

    token_logps: Tensor
    response_index: Tensor
    lengths: Tensor
    token_stats: dict[str, Tensor] = field(default_factory=dict)
    aux_loss: Tensor | None = None
    lower_states: Any = None

    def sum_by_response(self, per_token: Tensor) -> Tensor:
        """Sum a per-token quantity `[N]`, or Q quantities `[N, Q]`, over each response. Return `[R]` or `[R, Q]`."""
        # index_add adds one token after the other. In fp32, a log-ratio would lose two digits over hundreds of tokens.
        wide = per_token.dtype if per_token.device.type == "mps" else torch.float64
        sums = torch.zeros(self.lengths.shape[0], *per_token.shape[1:], dtype=wide, device=per_token.device)
        return sums.index_add(0, self.response_index, per_token.to(wide)).to(per_token.dtype)

    def by_response(self, per_token: Tensor, width: int) -> Tensor:
        """Arrange a per-token quantity `[N]` in one row per response, padded with 0. Return `[R, width]`."""
        starts = self.lengths.cumsum(0) - self.lengths
        places = torch.arange(len(per_token), device=per_token.device) - starts[self.response_index]
        rows = per_token.new_zeros(len(self.lengths), width)
        return rows.index_put((self.response_index, places), per_token)

    def mean_by_response(self, per_token: Tensor) -> Tensor:
        """Average a per-token quantity `[N]` over each response. Return `[R]`."""
        return self.sum_by_response(per_token) / self.lengths.clamp(min=1)

    @property
    def logps(self) -> Tensor:
        """`[R]`. Sum of the log-probs of each response's scored tokens, in nats."""
        return self.sum_by_response(self.token_logps)

    @property
    def alignment(self) -> Tensor:
        """`[R]`. Log of WPO's weight: the mean over tokens t of log π_t − log Σ_v π_v², in nats per token. Detached.

        π_t is the probability of token t, and π_v the probability of the vocabulary's token v at the same position.
        """
        return self.mean_by_response((self.token_logps - self.token_stats["log_sum_sq_probs"]).detach())

    @property
    def entropy(self) -> Tensor:
        """`[R]`. Mean over the tokens of the entropy of the model's prediction, in nats per token."""
        return self.mean_by_response(self.token_stats["entropy"])

    @property
    def normalized_entropy(self) -> Tensor:
        """`[R]`, in [0, 1]. Mean over the tokens of the entropy divided by its maximum, log(size of the vocabulary)."""
        return self.mean_by_response(self.token_stats["normalized_entropy"])

    @property
    def kl(self) -> Tensor:
        """`[R]`. Sum over the tokens of KL(π_ref ‖ π) between the predictions over the whole vocabulary, in nats."""
        return self.sum_by_response(self.token_stats["vocabulary_kl"])


def join_examples(parts: Sequence[Tensor], fill: float = 0.0) -> Tensor:
    """Concatenate tensors `[B_i]` or `[B_i, K_i]` along the first dimension. Shorter rows are padded with `fill`."""
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts])
