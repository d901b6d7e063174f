"""Find the assistant's turns in a rendered conversation: the characters to score.

An assistant turn consists of its text, its channel markers and its end of turn. The header at the end of the generation
prompt does not belong to the turn, and neither does an empty thinking block that the template adds.
"""

import re

from hf_prefopt.data.messages import Message, text_of
from hf_prefopt.data.rows import BadRow, shared_length
from hf_prefopt.data.template import THINKING_MARKER, ChatTemplate, Span

_REWRITES = (
    "it rewrites earlier turns, so the start of the assistant's turns is unknown: add {% generation %} markers to it"
)
_EMPTY_THINKING = re.compile(
    rf"\s*(?:{THINKING_MARKER.pattern}\s*{THINKING_MARKER.pattern}|<\|channel>thought\s*<channel\|>)\s*", re.IGNORECASE
)
# The maximum length, in characters, of an empty thinking block and of its distance to the response.
_NEAR = 64


def scored_spans(
    column: str, full: str, asked: str, shared: list[Message], response: list[Message], template: ChatTemplate
) -> list[Span]:
    """Return the character ranges of `full` that the assistant writes.

    If the template has no generation markers, the messages before a turn are rendered with the generation prompt. The
    turn is the text that follows when its message is rendered, too.

    Args:
        column: Column of the response, for errors.
        full: The conversation as text.
        asked: The prompt as text, with the generation prompt.
        shared: The messages of the prompt. If the response continues the last of them, it is not in `shared`.
        response: The messages after `shared`. If the response continues a message, the first one has the text of both.
        template: The chat template.

    Raises:
        BadRow: If a message begins with thinking and the template also writes an empty thinking block before it.
        ValueError: If the start or the end of a turn cannot be found.
    """
    messages = shared + response
    turns = [at for at in range(len(shared), len(messages)) if messages[at]["role"] == "assistant"]
    begin = shared_length(asked, full)
    marked = [span for span in template.generated_spans(messages) if span[1] > begin] if template.has_markers else None
    spans = []
    for at in turns:
        is_first = at == len(shared)
        try:
            start = _turn_start(full, asked, messages[:at], template, is_first)
        except ValueError:
            if marked is None or is_first:
                raise
            continue
        start = _first_word(column, full, start, messages[at], template)
        if marked is None:
            spans.append((start, _turn_end(full, start, messages, at, template)))
        else:
            marked = [(start if first < start < end else first, end) for first, end in marked]
    return spans if marked is None else marked


def _turn_start(full: str, asked: str, before: list[Message], template: ChatTemplate, is_first: bool) -> int:
    """Return the position in `full` after the generation prompt, or where `full` first differs from that prompt."""
    generation = asked if is_first else template.render(before, generation_prompt=True)
    start = shared_length(generation, full)
    if start < len(generation) and before and start < len(template.render(before)):
        raise ValueError(_REWRITES)
    return start


def _turn_end(full: str, start: int, messages: list[Message], at: int, template: ChatTemplate) -> int:
    if at == len(messages) - 1:
        return len(full)
    turn = template.render(messages[: at + 1])[start:]
    # A template may write more in the last turn than in earlier turns (Qwen3: thinking), but the same end of turn.
    for skipped in range(len(turn.rstrip())):
        if full.startswith(turn[skipped:], start):
            return start + len(turn) - skipped
    raise ValueError(_REWRITES)


def _first_word(column: str, full: str, start: int, message: Message, template: ChatTemplate) -> int:
    """Return `start`, moved past text that belongs to no message.

    Such text is an empty thinking block, or a header that the generation prompt lacks (for example, after the result of
    a tool).
    """
    if template.header and full.startswith(template.header, start):
        start += len(template.header)
    if not template.knows_thinking:
        return start
    near = _EMPTY_THINKING.finditer(full, max(0, start - _NEAR), start + _NEAR)
    block = next((found for found in near if found.start() <= start < found.end()), None)
    if block is None:
        return start
    words = text_of(message).lstrip()
    if not THINKING_MARKER.match(words):
        at = full.find(text_of(message), start) if words else -1  # spaces at its beginning belong to the message
        return min(block.end(), at) if at >= 0 else block.end()
    if not _EMPTY_THINKING.match(words) or full.startswith(words[:_NEAR].rstrip(), block.end()):
        problem = "begins with thinking, but the chat template writes an empty thinking block before it"
        raise BadRow(column, problem, "give the thinking as `reasoning_content` of the message")
    return start
