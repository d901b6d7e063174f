"""Chat with a trained model and its base model: both answer each prompt, side by side.

    hf_prefopt chat runs/dpo_lora
    hf_prefopt chat runs/dpo_lora --prompt "What is 12 times 12?" --temperature 0.7
    hf_prefopt chat runs/dpo_full --base HuggingFaceTB/SmolLM2-135M-Instruct

The base of an adapter is the model with its adapter disabled. Each model sees its own earlier answers. /new starts a
new conversation, Ctrl-C stops an answer, and Ctrl-D ends the chat.
"""

import json
from argparse import ArgumentParser, Namespace

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from hf_prefopt.serving.speakers import Speaker, answer, load_speakers, sampling_settings

_NARROW = 80  # in narrower terminals (columns), answers are printed one below the other


def add_options(parser: ArgumentParser) -> None:
    """Add the options of `chat`."""
    parser.usage = "%(prog)s RUN [options]"
    parser.add_argument("run", metavar="RUN", help="the folder of a run or checkpoint, or a name on the Hub")
    parser.add_argument("--base", metavar="MODEL", help="the base model (default: the one that the run names)")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this prompt, and exit")
    parser.add_argument("--system", metavar="TEXT", help="a system prompt")
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, metavar="N", help="the maximum length of an answer (default: 256)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 takes the most likely token (default: 0)"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        metavar="P",
        help="sample from the most likely tokens with a total probability of P (default: 1)",
    )
    parser.add_argument(
        "--top_k", type=int, default=0, metavar="K", help="sample from the K most likely tokens (default: all)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the random seed, the same for both models (default: 0)"
    )
    parser.add_argument(
        "--dtype", default="auto", metavar="DTYPE", help="the dtype of the models (default: the checkpoint's)"
    )
    parser.add_argument(
        "--chat_template_kwargs",
        type=json.loads,
        default={},
        metavar="JSON",
        help="further arguments of the chat template",
    )
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that comes with the model")


def run(options: Namespace) -> int:
    """Answer prompts until the input ends. Raises `ValueError` if the model cannot be loaded."""
    console = Console(highlight=False)
    sampling = sampling_settings(options.temperature, options.top_p, options.top_k, options.max_new_tokens)
    speakers, tokenizer = load_speakers(options.run, options.base, options.dtype, options.trust_remote_code)
    if len(speakers) == 1:
        console.print("The base model is not known: --base MODEL shows its answers, too.", style="dim")
    _begin(speakers, options.system)
    if options.prompt is not None:
        _reply(console, speakers, tokenizer, options.prompt, sampling, options)
        return 0
    if console.is_terminal:
        console.print("/new starts a new conversation, Ctrl-C stops an answer, Ctrl-D ends the chat.", style="dim")
    while (prompt := _read(console)) is not None:
        if prompt == "/new":
            _begin(speakers, options.system)
        elif prompt:
            _reply(console, speakers, tokenizer, prompt, sampling, options)
    return 0


def _begin(speakers: list[Speaker], system: str | None) -> None:
    for speaker in speakers:
        speaker.messages = [{"role": "system", "content": system}] if system else []


def _read(console: Console) -> str | None:
    """Read the next prompt; return `None` at the end of the input."""
    try:
        return console.input("[bold]> [/bold]").strip()
    except (EOFError, KeyboardInterrupt):
        console.print()
        return None


def _reply(
    console: Console,
    speakers: list[Speaker],
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: dict,
    options: Namespace,
) -> None:
    """Stream the answers in a terminal. Without a terminal, print each answer when it is complete."""
    texts = {speaker.name: "" for speaker in speakers}
    with Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else _Silent() as live:
        for speaker in speakers:
            earlier = list(speaker.messages)
            speaker.messages.append({"role": "user", "content": prompt})

            def show(part: str, name: str = speaker.name) -> None:
                texts[name] += part
                live.update(side_by_side(texts, console.width), refresh=True)

            try:
                answer(speaker, tokenizer, sampling, options.seed, show, options.chat_template_kwargs)
            except KeyboardInterrupt:
                speaker.messages = earlier
    if not console.is_terminal:
        for name, text in texts.items():
            console.print(Text(f"{name}: {text.strip()}"), soft_wrap=True)


def side_by_side(texts: dict[str, str], width: int) -> Columns | Group:
    """Arrange the answers in columns, or one below the other if the terminal is narrow."""
    panels = [Panel(Text(text.strip()), title=name, title_align="left") for name, text in texts.items()]
    if width < _NARROW:
        return Group(*panels)
    for panel in panels:
        panel.width = width // len(panels) - 1
    return Columns(panels)


class _Silent:
    """Replaces the live display if the output is not a terminal."""

    def __enter__(self) -> "_Silent":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def update(self, *_: object, **__: object) -> None:
        """Do nothing: incomplete answers are not shown."""
