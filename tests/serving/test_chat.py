"""`hf_prefopt chat`: each model answers as it does alone, and the conversation ends with the input."""

import io

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM

from hf_prefopt.commands import main
from hf_prefopt.commands.chat import side_by_side
from hf_prefopt.serving.speakers import answer, load_speakers, sampling_settings
from tests.tiny_models import perturbed, tiny_model
from tests.tokenizers import tiny_tokenizer

PROMPT = "What is the capital of France?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Create folders with a base model, an adapter on it, and a full model that was trained from it."""
    folder = tmp_path_factory.mktemp("chat")
    base = tiny_model(vocab_size=600, eos_token_id=tiny_tokenizer().eos_token_id)
    base.save_pretrained(folder / "base")
    perturbed(tiny_model(vocab_size=600), 0.1).save_pretrained(folder / "full")
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    policy = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    perturbed(policy, 0.1).save_pretrained(folder / "adapter")
    for name in ("base", "full", "adapter"):
        tiny_tokenizer().save_pretrained(folder / name)
    return folder


def alone(model, messages, **settings):
    tokenizer = tiny_tokenizer()
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.eval().generate(**inputs, max_new_tokens=8, **settings)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def user(text):
    return {"role": "user", "content": text}


@pytest.mark.parametrize("run", ["adapter", "full"])
def test_both_answer_as_they_do_alone_also_the_second_time(folders, run):
    """The printed parts form the answer. The second prompt follows the speaker's own first answer."""
    base = AutoModelForCausalLM.from_pretrained(folders / "base")
    speakers, tokenizer = load_speakers(str(folders / run), str(folders / "base") if run == "full" else None)
    plain = AutoModelForCausalLM.from_pretrained(folders / "base")
    trained = (
        PeftModel.from_pretrained(plain, folders / run)
        if run == "adapter"
        else AutoModelForCausalLM.from_pretrained(folders / run)
    )
    assert [speaker.name for speaker in speakers] == ["base", "trained"]
    answers = []
    for speaker, model in zip(speakers, (base, trained), strict=True):
        expected = []
        for prompt in (PROMPT, "And of Italy?"):
            expected.append(user(prompt))
            speaker.messages.append(user(prompt))
            parts = []
            text = answer(speaker, tokenizer, sampling_settings(0.0, 1.0, 0, 8), 0, parts.append)
            assert text == alone(model, expected, do_sample=False) == "".join(parts)
            expected.append({"role": "assistant", "content": text})
        assert speaker.messages == expected
        answers.append(expected[1])
    assert answers[0] != answers[1]


def test_samples_are_those_of_the_seed(folders):
    speakers, tokenizer = load_speakers(str(folders / "adapter"))
    texts = []
    for seed in (1, 1, 2):
        speakers[1].messages = [user(PROMPT)]
        texts.append(answer(speakers[1], tokenizer, sampling_settings(1.0, 0.9, 50, 8), seed))
    assert texts[0] == texts[1] != texts[2]


def test_one_prompt_on_the_command_line(folders, capsys):
    assert main(["chat", str(folders / "adapter"), "--prompt", PROMPT, "--max_new_tokens", "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("base: ") < shown.index("trained: ")


def test_it_ends_where_the_input_ends(folders, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PROMPT}\n\n/new\nAgain?\n"))
    assert main(["chat", str(folders / "adapter"), "--max_new_tokens", "2", "--system", "Be brief."]) == 0
    assert capsys.readouterr().out.count("trained: ") == 2


def test_a_whole_model_without_a_base_answers_alone(folders, capsys):
    assert main(["chat", str(folders / "full"), "--prompt", PROMPT, "--max_new_tokens", "2"]) == 0
    shown = capsys.readouterr().out
    assert "--base MODEL" in shown and "trained: " in shown and "base: " not in shown


def test_the_base_that_the_card_names(folders, tmp_path):
    full = AutoModelForCausalLM.from_pretrained(folders / "full")
    full.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text(f"---\nbase_model: {folders / 'base'}\n---\n")
    assert [speaker.name for speaker in load_speakers(str(tmp_path))[0]] == ["base", "trained"]


@pytest.mark.parametrize(
    ("options", "said"),
    [(["--temperature", "-1"], "--temperature -1.0"), (["--top_p", "0"], "--top_p 0.0"), ([], "cannot be loaded")],
)
def test_mistakes_are_one_line(folders, capsys, options, said):
    run = str(folders / "adapter") if options else str(folders / "nowhere")
    assert main(["chat", run, "--prompt", PROMPT, *options]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(("width", "together"), [(120, True), (60, False)])
def test_answers_stand_side_by_side_where_there_is_room(width, together):
    shown = io.StringIO()
    console = Console(file=shown, width=width)
    console.print(side_by_side({"base": "one", "trained": "two"}, width))
    assert any("one" in line and "two" in line for line in shown.getvalue().splitlines()) == together
