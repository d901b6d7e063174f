r"""Conversations that are written down as one text, with a marker before each turn.

\n\nHuman: What color is the sky?\n\nAssistant: Blue.        Anthropic's sets, and those made of them
What color is the sky?\n<extra_id_1>Assistant\nBlue.         NVIDIA's sets; the user begins without a marker
"""

import re
from collections.abc import Sequence

from hf_prefopt.data.messages import Message
from hf_prefopt.data.rows import shared_length

_ROLES = {"human": "user", "user": "user", "assistant": "assistant", "system": "system"}
# What stands before a turn; the last group is the speaker. A transcript of the first kind begins with a marker.
_MARKED = re.compile(r"(?:\n\n(?!System)|^)(Human|Assistant|System):(?: |(?=\n)|$)")
_EXTRA = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def is_transcript(text: str) -> bool:
    """Whether the text is a transcript: it begins with a marker and holds one of the assistant."""
    if "<extra_id_1>" in text:
        return True
    return "Assistant:" in text and text.lstrip().startswith(("Human:", "System:")) and len(_turns(text)) > 1


def read_transcript(text: str) -> list[Message]:
    """The messages of a transcript, each without the white space around it.

    An assistant's turn without words at the end, the place for the response, is left out.
    """
    turns = [{"role": _ROLES[speaker.lower()], "content": words.strip()} for speaker, words in _turns(text)]
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return turns


def split_transcripts(texts: Sequence[str]) -> int | None:
    """The number of characters of the prompt that transcripts begin with: up to the last assistant's marker that all
    share. None if they share none."""
    first, *others = texts
    shared = min((shared_length(first, other) for other in others), default=len(first))
    pattern = _EXTRA if "<extra_id_1>" in first else _MARKED
    if pattern is _MARKED and not is_transcript(first):
        return None
    # The blank after the marker belongs to the response, as in every text.
    ends = [found.end(1) + 1 for found in pattern.finditer(first) if found[1] == "Assistant"]
    return max((end for end in ends if end <= shared), default=None)


def has_later_turn(text: str) -> bool:
    """Whether words of the human follow in the rest of a transcript."""
    return any(found[1] in ("Human", "User") for pattern in (_MARKED, _EXTRA) for found in pattern.finditer(text, 1))


def _turns(text: str) -> list[tuple[str, str]]:
    """Speakers and words in turn."""
    if "<extra_id_1>" in text:
        begin, *rest = _EXTRA.split(text)
        return [*([("User", begin)] if begin.strip() else []), *zip(rest[::2], rest[1::2], strict=True)]
    begin, *rest = _MARKED.split(text.strip() if text.lstrip().startswith(("Human:", "System:")) else text)
    return [] if begin.strip() else list(zip(rest[::2], rest[1::2], strict=True))
