r"""Read transcripts: conversations written as one text, with a marker before each turn.

\n\nHuman: What color is the sky?\n\nAssistant: Blue.        Anthropic's datasets, and datasets derived from them
What color is the sky?\n<extra_id_1>Assistant\nBlue.         NVIDIA's datasets, in which the first turn has no marker
"""

import re
from collections.abc import Sequence

from hf_prefopt.data.messages import Message
from hf_prefopt.data.rows import shared_length

_ROLES = {"human": "user", "user": "user", "assistant": "assistant", "system": "system"}
# The marker before a turn, in Anthropic's and in NVIDIA's form. The group is the speaker.
_MARKED = re.compile(r"(?:\n\n(?!System)|^)(Human|Assistant|System):(?: |(?=\n)|$)")
_EXTRA = re.compile(r"\n?<extra_id_1>(User|Assistant)\n")


def is_transcript(text: str) -> bool:
    """Return True if the text is a transcript.

    A transcript contains `<extra_id_1>`, or it begins with a marker of Anthropic's form and has an assistant turn.
    """
    if "<extra_id_1>" in text:
        return True
    return "Assistant:" in text and text.lstrip().startswith(("Human:", "System:")) and len(_turns(text)) > 1


def read_transcript(text: str) -> list[Message]:
    """Return the messages of a transcript, each without surrounding white space.

    An empty assistant turn at the end, which marks the place of the response, is removed.
    """
    turns = [{"role": _ROLES[speaker.lower()], "content": words.strip()} for speaker, words in _turns(text)]
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    return turns


def split_transcripts(texts: Sequence[str]) -> int | None:
    """Return the length, in characters, of the prompt that all transcripts share; None if they share no prompt.

    The prompt ends with the last assistant marker of the shared beginning.
    """
    first, *others = texts
    shared = min((shared_length(first, other) for other in others), default=len(first))
    pattern = _EXTRA if "<extra_id_1>" in first else _MARKED
    if pattern is _MARKED and not is_transcript(first):
        return None
    # One character after the speaker, the colon or line end, belongs to the prompt. A space after the colon belongs to
    # the response.
    ends = [found.end(1) + 1 for found in pattern.finditer(first) if found[1] == "Assistant"]
    return max((end for end in ends if end <= shared), default=None)


def has_later_turn(text: str) -> bool:
    """Return True if the text, the part of a transcript after the prompt, contains another user turn."""
    return any(found[1] in ("Human", "User") for pattern in (_MARKED, _EXTRA) for found in pattern.finditer(text, 1))


def _turns(text: str) -> list[tuple[str, str]]:
    """Return the turns in order, as pairs of speaker and text.

    In Anthropic's form, return an empty list if there is text before the first marker.
    """
    if "<extra_id_1>" in text:
        begin, *rest = _EXTRA.split(text)
        return [*([("User", begin)] if begin.strip() else []), *zip(rest[::2], rest[1::2], strict=True)]
    begin, *rest = _MARKED.split(text.strip() if text.lstrip().startswith(("Human:", "System:")) else text)
    return [] if begin.strip() else list(zip(rest[::2], rest[1::2], strict=True))
