"""The data passed from the collator to the losses: the batch, and the scores of its responses.

A *group* is one prompt with its K ≥ 1 responses. A batch holds the responses of all its groups in one flat order (index
R), the scored tokens of all responses in one flat order (index N), and its examples (index B). For pairs, an example
defines which response is chosen and which is rejected (see `kinds`). Only the collator knows how the tokens are laid
out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NotRequired, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor


class PreferenceBatch(TypedDict, total=False):
    """A micro-batch: a plain dict of tensors, which accelerate, the Trainer and worker processes can handle.

    Model inputs, whose shapes depend on the layout:
        input_ids, position_ids, attention_mask: as the model takes them.
        segment_queries, segment_keys, segment_key_index, segment_longest, segment_lengths: the positions that each
            response of a row attends to, in the layout "shared" (see `scoring.attention`).
        around_places: `[T]` int64, only in the layout "around" (see `scoring.around`). This layout has a packed row of
            T tokens, which contains every prompt once, and padded sequences `[R, L]`. Entry t is the position of token
            t when the padded sequences are flattened.
        around_tokens: `[R, L]` int64, for each position of the padded sequences, the index of its token in the packed
            row.

    Scored tokens (N of them, in the order of the responses):
        scored_rows: `[N]` int64, the position that predicts the token, as an index into the hidden states flattened to
            `[rows, H]`.
        targets: `[N]` int64, the token's id.
        response_index: `[N]` int64, the response that the token belongs to.

    Responses (R) and examples (B):
        response_lengths: `[R]` int64, the number of scored tokens, ≥ 1.
        longest_response: the largest response length, as a Python number, so that the width of tensors `[R, T]` is
            known without waiting for the device.
        response_keys: R `bytes` objects, the cache keys of the responses' reference log-probs, if a cache is used.
        chosen, rejected: `[B]` int64, each pair's responses, as indices into R. A response may belong to several pairs.
        prompts: `[B]` int64, each pair's prompt, if prompts are scored (see `data.prompts`).
        gold: `[B]` int64, each triple's third response (see `kinds.triples`).
        responses, mismatched: `[B]` int64, and labels: `[B]` bool, for unpaired examples (see `kinds.unpaired`).
        quantiles: `[B]` float32, for scored responses (see `kinds.scored`).
        list_responses, list_mask, list_ranks, list_scores: `[B, K]`, for lists (see `kinds.lists`).
        chosen_token_weights, rejected_token_weights: `[B, T]` fp32, for pairs with token weights, padded with 0.
        weights, margins, chosen_scores, ...: `[B]` float32, if rows have them (see `ExampleKind.optional_columns`).
        rows, pair_in_row: `[B]` int64, the example's row in its dataset, and its index among that row's pairs.
        counted: `[B]` bool, False for examples that repeat earlier examples and are excluded from the loss (see
            `data.collator`). The entry exists only if there are such examples.

    Set during a step that needs the global batch (see `training.global_batch`):
        place_in_step: the index of this piece among the pieces of the step.
        reference_scores: the reference's `ResponseScores`, once they are known.
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
    """The output of the data loader: the rows of one micro-batch, in pieces that are computed one after the other.

    There is one piece, unless `max_tokens_per_batch` cuts the rows into several. transformers' Trainer reads only
    `rows`, `input_ids` and `attention_mask`.

    Attributes:
        rows: `[B]` int64, each example's row in the dataset.
        input_ids, attention_mask: `[1, T]`, all positions of all pieces, and which of them are not padding.
        pieces: the micro-batches.
        sequence_tokens, padded_positions: the number of tokens in all sequences [prompt | response], and the number of
            positions in a right-padded batch of these sequences. Absent if the rows have no token ids, which only a
            user's collator allows.
    """

    rows: Tensor
    input_ids: Tensor
    attention_mask: Tensor
    pieces: list[PreferenceBatch]
    sequence_tokens: NotRequired[int]
    padded_positions: NotRequired[int]


@dataclass(frozen=True)
class SegmentLengths:
    """The lengths of the S segments of a row, on the CPU; a class, because compiled graphs would specialize on tuples.

    Attributes:
        queries, keys: S numbers each.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]


@dataclass
class ResponseScores:
    """The scores of the responses of a batch under one model.

    Attributes:
        token_logps: `[N]` fp32, log-prob (nats) of each scored token.
        response_index: `[N]`, the response of each token.
        lengths: `[R]`, scored tokens per response.
        token_stats: other requested per-token statistics, keyed by name, each `[N]` fp32; `hidden`, `[N, H]`, is the
            input of the head.
        aux_loss: `[]`, the load-balancing loss of the routers of a mixture of experts, over the sequences of the batch
            and without its coefficient; `None` if the loss was not requested.
        lower_states: the recorded output of the layers that reference and policy share; see `scoring.lower_states`.
    """

    token_logps: Tensor
    response_index: Tensor
    lengths: Tensor
    token_stats: dict[str, Tensor] = field(default_factory=dict)
    aux_loss: Tensor | None = None
    lower_states: Any = None

    def sum_by_response(self, per_token: Tensor) -> Tensor:
        """Return `[R]` or `[R, Q]`: each response's sum of a per-token quantity `[N]`, or of several `[N, Q]`."""
        # index_add adds sequentially; in fp32, a log-ratio would lose two digits over hundreds of tokens.
        wide = per_token.dtype if per_token.device.type == "mps" else torch.float64
        sums = torch.zeros(self.lengths.shape[0], *per_token.shape[1:], dtype=wide, device=per_token.device)
        return sums.index_add(0, self.response_index, per_token.to(wide)).to(per_token.dtype)

    def by_response(self, per_token: Tensor, width: int) -> Tensor:
        """Return `[R, width]`: a per-token quantity `[N]` with one row for each response, padded with 0."""
        starts = self.lengths.cumsum(0) - self.lengths
        places = torch.arange(len(per_token), device=per_token.device) - starts[self.response_index]
        rows = per_token.new_zeros(len(self.lengths), width)
        return rows.index_put((self.response_index, places), per_token)

    def mean_by_response(self, per_token: Tensor) -> Tensor:
        """Return `[R]`: the mean of a per-token quantity `[N]` over each response."""
        return self.sum_by_response(per_token) / self.lengths.clamp(min=1)

    @property
    def logps(self) -> Tensor:
        """`[R]`: summed log-prob of each response (nats)."""
        return self.sum_by_response(self.token_logps)

    @property
    def alignment(self) -> Tensor:
        """`[R]`: mean over the tokens of log π_t − log Σ_v π_v² (nats per token), detached: WPO's log weight."""
        return self.mean_by_response((self.token_logps - self.token_stats["log_sum_sq_probs"]).detach())

    @property
    def entropy(self) -> Tensor:
        """`[R]`: mean over the tokens of the entropy of the model's prediction (nats per token)."""
        return self.mean_by_response(self.token_stats["entropy"])

    @property
    def normalized_entropy(self) -> Tensor:
        """`[R]`: the entropy divided by log V, its maximum for a vocabulary of V tokens; in [0, 1]."""
        return self.mean_by_response(self.token_stats["normalized_entropy"])

    @property
    def kl(self) -> Tensor:
        """`[R]`: sum over the tokens of KL(π_ref(·|·) ‖ π(·|·)) over the whole vocabulary (nats)."""
        return self.sum_by_response(self.token_stats["vocabulary_kl"])


def join_examples(parts: Sequence[Tensor], fill: float = 0.0) -> Tensor:
    """Concatenate tensors `[B_i]`, or `[B_i, K_i]` for lists; shorter lists are padded with `fill`."""
    if parts[0].dim() == 1:
        return torch.cat(list(parts))
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, longest - part.shape[1]), value=fill) for part in parts])
