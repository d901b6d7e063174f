"""Raise an error if a chat template does not write all text of a row: the model would be trained without this text."""

from typing import Any

from hf_prefopt.data.messages import Message, text_of
from hf_prefopt.data.rows import BadRow
from hf_prefopt.data.template import TEMPLATE_ERRORS, THINKING_MARKER, ChatTemplate

# Keys of a message that hold thinking, which the assistant writes in addition to the content.
THINKING_KEYS = ("reasoning_content", "reasoning", "thinking")
# `function_call` is an older key of OpenAI's format that holds one call. `tool_calls` has replaced it.
_CALL_KEYS = ("tool_calls", "function_call")
_CURE = (
    "use a chat template that writes it (tokenizer.chat_template), remove it from the rows, or pass on_bad_rows='drop'"
)


def check_prompt_written(prompt: list[Message], response: list[Message], template: ChatTemplate) -> None:
    """Raise `BadRow` if the template does not write a message of the prompt."""
    _check_messages("prompt", [*prompt, *response], range(len(prompt)), template)


def check_response_written(
    column: str, prompt: list[Message], response: list[Message], text: str, template: ChatTemplate
) -> None:
    """Raise `BadRow` if the template does not write all text of a response.

    Args:
        column: Column of the response, for errors.
        prompt: The messages before the response.
        response: The messages of the response.
        text: The rendered text of the response.
        template: The chat template.
    """
    messages, at = [*prompt, *response], 0
    for place, message in enumerate(messages[len(prompt) :], len(prompt)):
        if message["role"] != "assistant":
            _check_messages(column, messages, range(place, place + 1), template)
            continue
        if len(message) > 2:
            _check_keys(column, messages, place, text, template)
        content = text_of(message)
        found = text.find(content, at)
        if found >= 0:
            at = found + len(content)
        elif not _holds(text[at:], content):
            raise BadRow(column, f"contains {_shown(content)}, but the chat template does not write all of it", _CURE)


def _check_messages(column: str, messages: list[Message], places: range, template: ChatTemplate) -> None:
    for at in sorted(template.unwritten(messages) & {*places}):
        if text_of(messages[at]).strip():
            role = messages[at]["role"]
            raise BadRow(column, f"has a message of role {role!r}, which the chat template does not write", _CURE)


def _check_keys(column: str, messages: list[Message], place: int, text: str, template: ChatTemplate) -> None:
    """Raise `BadRow` if the template does not write the thinking or the tool calls of a message."""
    message = messages[place]
    for key in THINKING_KEYS:
        words = message.get(key)
        if isinstance(words, str) and not _holds(text, words):
            raise BadRow(column, f"contains {_shown(words)} in `{key}`, which the chat template does not write", _CURE)
    for key in filter(message.get, _CALL_KEYS):
        _check_calls(column, messages, place, key, template)


def _check_calls(column: str, messages: list[Message], place: int, key: str, template: ChatTemplate) -> None:
    """Raise `BadRow` if the template does not write all tool calls of a message.

    This is the case if the rendered text stays the same without the calls, without the first or the last call, or
    without the arguments of the calls.
    """
    message, calls = messages[place], messages[place][key]
    whole = template.render(messages)
    changed = {f"`{key}`": {name: value for name, value in message.items() if name != key}}
    if isinstance(calls, list):
        several = {0: calls[1:], len(calls) - 1: calls[:-1]} if len(calls) > 1 else {}
        changed |= {f"`{key}[{at}]`": {**message, key: others} for at, others in several.items()}
        bare = [_without_arguments(call) for call in calls]
        changed |= {f"arguments in `{key}`": {**message, key: bare}} if bare != calls else {}
    for part, other in changed.items():
        try:
            is_written = template.render([*messages[:place], other, *messages[place + 1 :]]) != whole
        except TEMPLATE_ERRORS:
            is_written = True  # the template needs this part
        if not is_written:
            raise BadRow(column, f"has {part}, which the chat template does not write", _CURE)


def _without_arguments(call: Any) -> Any:
    """Return a tool call with empty arguments: an empty dict, or its JSON if the arguments are JSON."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return {**call, "function": _without_arguments(call["function"])}
    arguments = call.get("arguments")
    return {**call, "arguments": "{}" if isinstance(arguments, str) else {}} if arguments else call


def _holds(text: str, words: str) -> bool:
    """Return True if a text contains these words in order, ignoring white space and thinking markers."""
    joined, at = _squeezed(text), 0
    for part in map(_squeezed, THINKING_MARKER.split(words)):
        found = joined.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _shown(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 40 else line[:37] + "…")
