"""Where in a rendered conversation the assistant speaks: the characters to score.

An assistant's turn is its words, what marks its channel, and its end of turn. Its header is not, which is what the
template's generation prompt ends with, and neither is an empty block of thinking that the template writes by itself.
"""

import re

from hf_prefopt.data.messages import Message, text_of
from hf_prefopt.data.rows import BadRow, shared_length
from hf_prefopt.data.template import THINKING_MARKER, ChatTemplate, Span

_REWRITES = "it rewrites earlier turns, which hides where the assistant's begin: give it {% generation %} markers"
_EMPTY_THINKING = re.compile(
    rf"\s*(?:{THINKING_MARKER.pattern}\s*{THINKING_MARKER.pattern}|<\|channel>thought\s*<channel\|>)\s*", re.IGNORECASE
)
# The maximum length, in characters, of an empty thinking block and of its distance to the response.
_NEAR = 64


def scored_spans(
    column: str, full: str, asked: str, shared: list[Message], response: list[Message], template: ChatTemplate
) -> list[Span]:
    """The character ranges of `full` that the assistant writes.

    Without generation markers in the template, a turn is what rendering one more message adds after the generation
    prompt.

    Args:
        column: of the response, for errors.
        full: the conversation as text.
        asked: the prompt as text, with the generation prompt.
        shared: the messages of the prompt; without the last one if the response continues it.
        response: the messages after them.

    Raises:
        BadRow: thinking beside an empty block of it.
        ValueError: it cannot be told where a turn begins or ends.
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
    """Where the words after the generation prompt begin, or part from it if the template then writes another one."""
    generation = asked if is_first else template.render(before, generation_prompt=True)
    start = shared_length(generation, full)
    if start < len(generation) and before and start < len(template.render(before)):
        raise ValueError(_REWRITES)
    return start


def _turn_end(full: str, start: int, messages: list[Message], at: int, template: ChatTemplate) -> int:
    if at == len(messages) - 1:
        return len(full)
    turn = template.render(messages[: at + 1])[start:]
    # A template may write more in the last turn than in an earlier one (Qwen3: its thinking), with the same end.
    for skipped in range(len(turn.rstrip())):
        if full.startswith(turn[skipped:], start):
            return start + len(turn) - skipped
    raise ValueError(_REWRITES)


def _first_word(column: str, full: str, start: int, message: Message, template: ChatTemplate) -> int:
    """`start`, or the end of what no message says there.

    That is a header which the generation prompt leaves out, as after a tool's result, and an empty block of thinking.
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
        at = full.find(text_of(message), start) if words else -1  # blanks at its beginning are the message's own
        return min(block.end(), at) if at >= 0 else block.end()
    if not _EMPTY_THINKING.match(words) or full.startswith(words[:_NEAR].rstrip(), block.end()):
        problem = "begins with thinking, and the chat template writes an empty block of it before"
        raise BadRow(column, problem, "give the thinking as `reasoning_content` of the message")
    return start
