"""What a prompt or a response given as text must not be: messages in writing, or a prompt that is there twice or never.

Texts without a prompt column begin with their prompt. Two answers alone begin alike by chance, in a word or two.
"""

import math
import re
from collections.abc import Mapping, Sequence

from hf_prefopt.data.messages import BadRow

# Letters of scripts that put no blanks between words: two of them count as a word.
UNSPACED = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{UNSPACED}]{{1,2}}|[^\W{UNSPACED}]+")
# As many words in common are no accident; nor is the end of a line, a question, or the name of a speaker.
PROMPT_WORDS = 4
_PROMPT_ENDS = re.compile(r"[\n?:？：]")
# The writing of JSON, of Python and of NumPy.
_MESSAGES = re.compile(
    r"""\[?\s*\{.*["'](role|from)["']\s*:\s*["'](system|developer|user|human|assistant|gpt|model|tool)["'].*\}\s*\]?""",
    re.DOTALL,
)
_CONTENT = re.compile(r"""["'](content|value)["']\s*:""")
_LIST = re.compile(r"""\[\s*(["']).*\1\s*\]""", re.DOTALL)


def check_text(column: str, text: str) -> str:
    """The text. Raises `BadRow` where it is messages, written down as JSON or as Python prints them."""
    stripped = text.strip()
    if _MESSAGES.fullmatch(stripped) and _CONTENT.search(stripped):
        cure = "read them, as in rows.map(lambda row: {'X': json.loads(row['X'])})".replace("X", column)
        raise BadRow(column, "is text that writes down messages, which would be trained on as they are written", cure)
    return text


def check_text_prompt(column: str, text: str) -> str:
    """Like `check_text`, and also reject a prompt that is a list of texts written as a string."""
    if _LIST.fullmatch(text.strip()):
        raise BadRow(column, "is text that writes down a list", "read it, and make each row one prompt: json.loads")
    return check_text(column, text)


def check_text_response(column: str, text: str) -> str:
    """As `check_text`; a response says something."""
    if not text.strip():
        raise BadRow(column, "is empty" if not text else "is only whitespace")
    return check_text(column, text)


def refuse_repeated_prompt(prompt: str, responses: Mapping[str, str]) -> None:
    """Raise `BadRow` where all responses, by column, begin with the prompt: it would be there twice.

    One response may well echo a prompt, and a greeting answers a greeting.
    """
    said = prompt.strip()
    if beginning([said]) >= PROMPT_WORDS and all(text.lstrip().startswith(said) for text in responses.values()):
        cure = "remove the `prompt` column, or take it off the responses"
        raise BadRow(next(iter(responses)), "repeats the text of `prompt`", cure)


def refuse_unlike_beginnings(texts: Mapping[str, str]) -> None:
    """Raise `BadRow` where texts that should begin with one prompt, by column, have no word of it in common."""
    (first, begun), *others = texts.items()
    for column, text in others:
        if not beginning([begun, text]):
            problem = f"and `{first}` do not begin with the same word, so there is no prompt in them"
            raise BadRow(column, problem, "add a `prompt` column (with '' where there is none)")


def beginning(texts: Sequence[str]) -> float:
    """How many words the texts all begin with; infinitely many where these hold the end of a line or a question."""
    first, *others = [text.lstrip()[:400] for text in texts]
    if _PROMPT_ENDS.search(first[: min((shared_length(first, other) for other in others), default=len(first))]):
        return math.inf
    words = _WORD.findall(first)
    return min((shared_length(words, _WORD.findall(other)) for other in others), default=len(words))


def shared_length(left: Sequence, right: Sequence) -> int:
    """The length of the longest common prefix of two texts or lists."""
    shorter = min(len(left), len(right))
    if left[:shorter] == right[:shorter]:  # the ordinary case, at C speed
        return shorter
    return next(at for at in range(shorter) if left[at] != right[at])
