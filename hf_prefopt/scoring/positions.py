"""The longest sequence that a model can compute: one with learned or tabulated positions has no more of them."""

from torch import nn
from transformers import PreTrainedModel

from hf_prefopt.scoring.forward import base_causal_lm
from hf_prefopt.scoring.tail import body_of

# Names that configs use for the number of positions, and by how many an embedding may have more, which are not used.
_NUMBERS = ("max_position_embeddings", "n_positions", "n_ctx", "max_target_positions", "max_seq_len")
_UNUSED = 8


def position_limit(model: nn.Module) -> int | None:
    """The most tokens of a sequence, prompt and response together; `None` where positions are computed, as rotary ones.

    Beyond it a model's forward fails, on a GPU without a word about the cause. The tables are known by their size: an
    embedding, beside that of the tokens, of as many rows as the config has positions, or a buffer (a mask, sinusoids)
    with a side of that length.
    """
    causal_lm = base_causal_lm(model)
    config = causal_lm.config.get_text_config()
    numbers = (getattr(config, name, None) for name in _NUMBERS)
    number = next((each for each in numbers if isinstance(each, int)), None)
    if number is None or causal_lm.get_output_embeddings() is None:  # no language model, which is refused elsewhere
        return None
    body, tokens = body_of(causal_lm), causal_lm.get_input_embeddings()
    tables = [module for module in body.modules() if isinstance(module, nn.Embedding) and module is not tokens]
    rooms = [_room(table, number) for table in tables if number <= table.num_embeddings <= number + _UNUSED]
    rooms += [number for buffer in body.buffers() if buffer.dim() > 1 and number in buffer.shape]
    return min(rooms) - _virtual_tokens(model) if rooms else None


def shortest_limit(*models: nn.Module | None) -> int | None:
    """The shortest of several models' `position_limit`."""
    limits = [position_limit(model) for model in models if model is not None]
    return min((limit for limit in limits if limit is not None), default=None)


def _room(table: nn.Embedding, number: int) -> int:
    """The positions of a table; where it has one for padding, those after that one."""
    return min(number, table.num_embeddings - (0 if table.padding_idx is None else table.padding_idx + 1))


def _virtual_tokens(model: nn.Module) -> int:
    """The positions that an adapter takes before each sequence."""
    config = getattr(model, "active_peft_config", None)
    return (getattr(config, "num_virtual_tokens", None) or 0) if not isinstance(model, PreTrainedModel) else 0
