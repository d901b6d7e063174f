"""Find the maximum sequence length of a model with learned or tabulated positions."""

from torch import nn
from transformers import PreTrainedModel

from hf_prefopt.scoring.forward import base_causal_lm
from hf_prefopt.scoring.tail import body_of

# Config entries that hold the number of positions. A position embedding may have up to `_UNUSED` more rows than that.
_NUMBERS = ("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "max_seq_len")
_UNUSED = 8


def position_limit(model: nn.Module) -> int | None:
    """Return the maximum length of prompt and response together, in tokens.

    Return `None` if positions are computed instead of stored, as in rotary embeddings. A longer sequence makes the
    forward pass fail, and on a GPU the error is not clear. A position table is recognized by its size, the number of
    positions in the config. It is either an embedding with this number of rows (except the token embedding), or a
    buffer (a mask, sinusoids) with a dimension of this size.
    """
    causal_lm = base_causal_lm(model)
    config = causal_lm.config.get_text_config()
    numbers = (getattr(config, name, None) for name in _NUMBERS)
    number = next((each for each in numbers if isinstance(each, int)), None)
    if number is None or causal_lm.get_output_embeddings() is None:  # not a language model: another check raises
        return None
    body, tokens = body_of(causal_lm), causal_lm.get_input_embeddings()
    tables = [module for module in body.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    rooms = [_room(table, number) for table in tables if number <= table.num_embeddings <= number + _UNUSED]
    rooms += [number for buffer in body.buffers() if buffer.dim() > 1 and number in buffer.shape]
    return min(rooms) - _virtual_tokens(model) if rooms else None


def shortest_limit(*models: nn.Module | None) -> int | None:
    """Return the smallest `position_limit` of several models, or `None` if no model has a limit."""
    limits = [position_limit(model) for model in models if model is not None]
    return min((limit for limit in limits if limit is not None), default=None)


def _room(table: nn.Embedding, number: int) -> int:
    """Return the number of usable positions of a table. If it has a padding index, only positions after it count."""
    return min(number, table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1))


def _virtual_tokens(model: nn.Module) -> int:
    """Return the number of virtual tokens that an adapter puts before each sequence."""
    config = getattr(model, "active_peft_config", None)
    return (getattr(config, "num_virtual_tokens", None) or 0) if not isinstance(model, PreTrainedModel) else 0
