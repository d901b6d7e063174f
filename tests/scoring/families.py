"""Test every family of language models in transformers with a tiny random model: is training exact?

A checkpoint of each family is saved, loaded by name and trained, in full and with LoRA, in the layouts "auto" and
"padded". It is compared with an unmodified copy that transformers loads and that gets each sequence alone: log-probs in
evaluation and training mode, every gradient (also with checkpointing), the losses of two steps of SGD, and the saved
model. Each family runs in its own process, with limits on time and memory.

    python -m tests.scoring.families llama qwen3_next                  # prints the results of some families
    python -m tests.scoring.families --write docs/models.md            # writes the page; an hour on one core
    python -m tests.scoring.families --write docs/models.md youtu      # updates some rows of an existing page
"""

import argparse
import multiprocessing
import resource
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from hf_prefopt import PreferenceTrainer
from hf_prefopt.data.layouts import PaddedCollator
from hf_prefopt.loading import model_class
from hf_prefopt.scoring.forward import score
from tests.scoring.plain import plain_response_logps
from tests.scoring.tiny_configs import text_rows, tiny_config
from tests.tiny_models import perturbed
from tests.tokenizers import tiny_tokenizer
from tests.trainers import logged, make_config

# Families that are used most, and that the layouts and loading treat in different ways.
USED = (
    *("llama", "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "gemma3", "gemma4", "gpt_oss", "llama4_text", "mistral3"),
    *("ministral", "phi3", "olmo3", "smollm3", "granitemoehybrid", "nemotron_h", "lfm2", "glm4", "deepseek_v3"),
    *("kimi_linear", "seed_oss", "cohere2", "qwen3_vl", "hyperclovax"),
)
LAYOUTS = ("auto", "padded")
ADAPTERS = ("full", "LoRA")
SECONDS, BYTES = 300, 8 << 30
BETA, LEARNING_RATE = 0.1, 1e-2
# Models compute norms, softmaxes, routers and recurrences in fp32 whatever their dtype: in float64, what differs is
# some hundred roundings of 2⁻²⁴ there. A sum of log-probs is off by that share, a gradient by that share times the
# ratio of what cancels in it. In fp32, weights and products round as well, in sums of 32 to 300 terms.
TOLERANCES = {torch.float64: (1e-5, 1e-4), torch.float32: (1e-4, 1e-2)}


@dataclass
class Case:
    """The result of a family in one way of training.

    Attributes:
        layout, why: the layout that was used, and the reason.
        off: relative differences, keyed by what was compared.
        dtype: the dtype of the computation.
    """

    adapter: str
    asked: str
    layout: str = ""
    why: str = ""
    dtype: str = ""
    off: dict[str, float] = field(default_factory=dict)
    refused: str = ""

    @property
    def verdict(self) -> str:
        """exact, wrong or refused."""
        if self.refused:
            return "refused"
        logps, gradients = TOLERANCES[getattr(torch, self.dtype)]
        limits = {name: gradients if "gradient" in name or "step" in name else logps for name in self.off}
        return "exact" if all(off <= limits[name] for name, off in self.off.items()) else "wrong"


@dataclass
class Family:
    """A family and its results.

    Attributes:
        not_built: the reason why there is no tiny model of it.
    """

    model_type: str
    kind: str = ""
    cases: list[Case] = field(default_factory=list)
    not_built: str = ""

    @property
    def verdict(self) -> str:
        """The worst verdict of all cases."""
        found = {case.verdict for case in self.cases}
        return "not tried" if self.not_built else next((v for v in ("wrong", "refused", "exact") if v in found), "")


def all_families() -> list[str]:
    """Return the types of text models and of image-text models, which are trained on
    text; the most used types come first.
    """
    return list(dict.fromkeys([*USED, *MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES]))


def build(model_type: str) -> PreTrainedModel:
    """Return a tiny random model of the class that the family's own checkpoints name."""
    config = tiny_config(model_type)
    both = (MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING)
    known = both if config.get_text_config(decoder=True) is not config else both[::-1]
    cls = next((mapping[type(config)] for mapping in known if type(config) in mapping), None)
    if cls is None:
        raise ValueError(f"transformers has no class of language models for {type(config).__name__}")
    torch.manual_seed(0)
    # Noise, so that no weight is 0 or 1, such as biases and the scales of norms.
    return perturbed(cls._from_config(config), scale=0.05).eval()


def examine(model_type: str, adapters: Iterable[str] = ADAPTERS, layouts: Iterable[str] = LAYOUTS) -> Family:
    """Test a family in this process."""
    family = Family(model_type)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder, "base")
        try:
            model = build(model_type)
            ids = torch.tensor([[5, 6, 7, 8, 9]])
            if not model.config.is_encoder_decoder:  # encoder-decoder models raise an error
                model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
            model.save_pretrained(base)
            tokenizer = tiny_tokenizer()
            tokenizer.pad_token = "<|endoftext|>"  # id 0: the Trainer writes it to the config
            tokenizer.save_pretrained(base)
        except Exception as error:
            family.not_built = _words(error)
            return family
        family.kind = type(model).__name__
        del model
        for adapter in adapters:
            for asked in layouts:
                family.cases.append(_tried(base, Path(folder, f"{adapter} {asked}"), adapter, asked))
    return family


def _tried(base: Path, output: Path, adapter: str, asked: str) -> Case:
    """Test one way of training, in float64 or, if the model cannot compute in float64, in fp32."""
    for dtype in (torch.float64, torch.float32):
        case = Case(adapter, asked, dtype=str(dtype).removeprefix("torch."))
        try:
            _compare(case, base, output, dtype)
            return case
        except Exception as error:
            case.refused = _words(error).replace(str(base), "the checkpoint")
    return case


def _compare(case: Case, base: Path, output: Path, dtype: torch.dtype) -> None:
    rows = text_rows(4, longest=14)
    trainer = _trainer(case, base, output, rows, dtype)
    trainer.scorer.settle()
    said = trainer.summary.as_dict()
    case.layout, _, case.why = said["layout"].partition(", ")
    if "own forward" in said["model"]:
        case.why += "; by the model's own logits"
    plain = _untouched(base, dtype)
    reference = _plain_logps(plain, rows).detach()
    if case.adapter == "LoRA":
        perturbed(trainer.model, scale=0.05)
        trainer.save_model()
        plain = PeftModel.from_pretrained(plain, output, is_trainable=True).eval()

    (batch,) = trainer._prepare_inputs(trainer.data_collator(rows))["pieces"]
    expected = _plain_logps(plain, rows)
    if case.layout == "padded":
        with torch.no_grad():
            off = _off(plain_response_logps(plain, PaddedCollator(0)(rows)), expected)
        if off > TOLERANCES[dtype][0]:
            case.why += f"; transformers' own forward of padded sequences is off by {off:.0e}"
    signs = torch.linspace(-1, 1, len(expected), dtype=dtype)
    wanted = _gradients((expected * signs).sum(), plain)
    with torch.no_grad():
        case.off["log-probs"] = _off(score(trainer.model.eval(), batch).logps, expected)
    for name, checkpointing in (("", False), (" with checkpointing", True)):
        if checkpointing:
            if not trainer.model.supports_gradient_checkpointing:
                continue
            trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        logps = score(trainer.model.train(), batch).logps
        case.off[f"log-probs in training{name}"] = _off(logps, expected)
        case.off[f"gradients{name}"] = _gradients_off(_gradients((logps * signs).sum(), trainer.model), wanted)
    trainer.model.gradient_checkpointing_disable()

    trainer.train()
    losses = _plain_steps(plain, rows, reference)
    case.off["losses of two steps"] = _off(torch.tensor(logged(trainer, "loss")), torch.tensor(losses))
    with torch.no_grad():
        stepped = _plain_logps(plain, rows)
        case.off["log-probs after two steps"] = _off(score(trainer.model.eval(), batch).logps, stepped)
        trainer.save_model()
        again = _untouched(output if case.adapter == "full" else base, dtype)
        if case.adapter == "LoRA":
            again = PeftModel.from_pretrained(again, output).eval()
        elif _restore_padding(again, trainer.model):
            case.why += "; transformers zeroes the padding token's embedding when it loads a checkpoint"
        trained = score(trainer.model.eval(), batch).logps
        case.off["log-probs of the saved model"] = _off(trained, _plain_logps(again, rows))


def _trainer(case: Case, base: Path, output: Path, rows: list[dict[str, Any]], dtype: torch.dtype) -> PreferenceTrainer:
    settings = make_config(
        output,
        layout=case.asked,
        per_device_train_batch_size=len(rows),
        max_steps=2,
        optim="sgd",
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        beta=BETA,
        # Each forward has its own auxiliary loss, so it is not a sum over sequences; tests/training/test_router.py
        # tests it.
        router_aux_loss_coef=0.0,
        model_init_kwargs={"dtype": str(dtype).removeprefix("torch.")},
    )
    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM") if case.adapter == "LoRA" else None
    trainer = PreferenceTrainer(str(base), args=settings, train_dataset=Dataset.from_list(rows), peft_config=adapter)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def _untouched(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(folder)
    return model_class(config).from_pretrained(folder, dtype=dtype).eval()


def _restore_padding(loaded: PreTrainedModel, saved: PreTrainedModel) -> bool:
    """Give a padding token's embedding its saved value if transformers has zeroed it, and return whether it has.

    Some classes (Youtu) zero this row after loading. If the head is tied to the
    embedding, the row is one of the logits.
    """
    table, row = loaded.get_input_embeddings(), getattr(loaded.get_input_embeddings(), "padding_idx", None)
    if row is None or table.weight[row].any() or not saved.get_input_embeddings().weight[row].any():
        return False
    table.weight[row] = saved.get_input_embeddings().weight[row]
    return True


def _plain_logps(model: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
    """Return the summed log-prob of each response, `[R]`, from the logits of its sequence alone."""
    sums = []
    for row in rows:
        for response in row["response_ids"]:
            ids = torch.tensor([row["prompt_ids"] + response])
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
            logps = logits[0, len(row["prompt_ids"]) - 1 : -1].log_softmax(-1)
            sums.append(logps.gather(-1, torch.tensor(response)[:, None]).sum())
    return torch.stack(sums)


def _plain_steps(model: nn.Module, rows: list[dict[str, Any]], reference: Tensor) -> list[float]:
    """Return the losses of two steps of SGD on DPO's loss."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = []
    for _ in range(2):
        log_ratios = _plain_logps(model, rows) - reference
        loss = nn.functional.softplus(-BETA * (log_ratios[0::2] - log_ratios[1::2])).mean()
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, trained, allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(trained, gradients, strict=True):
                if gradient is not None:
                    parameter -= LEARNING_RATE * gradient
    return losses


def _gradients(value: Tensor, model: nn.Module) -> dict[str, Tensor]:
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(value, list(trained.values()), allow_unused=True)
    return {
        name: torch.zeros_like(trained[name]) if gradient is None else gradient
        for name, gradient in zip(trained, found, strict=True)
    }


def _gradients_off(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Return the largest difference of a gradient, relative to the largest entry of its tensor.

    The divisor is at least 10⁻³ of the largest entry of all tensors, because some gradients are only rounding errors,
    such as those of the biases of keys.
    """
    if found.keys() != wanted.keys():
        return float("inf")
    least = 1e-3 * max(float(gradient.abs().max()) for gradient in wanted.values())
    return max(
        float((found[name] - gradient).abs().max()) / max(float(gradient.abs().max()), least)
        for name, gradient in wanted.items()
    )


def _off(found: Tensor, expected: Tensor) -> float:
    """Return the largest relative difference."""
    share = (found.detach().double() - expected.detach().double()).abs() / expected.detach().double().abs()
    return float(share.max()) if not share.isnan().any() else float("inf")


def _words(error: BaseException) -> str:
    line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {line[:200]}"


# -- many families ------------------------------------------------------------------------------------------------


def examined(
    model_types: Iterable[str], adapters: Iterable[str] = ADAPTERS, layouts: Iterable[str] = LAYOUTS
) -> Iterable[Family]:
    """Test families one after the other, each in its own process."""
    for model_type in model_types:
        yield _bounded(model_type, tuple(adapters), tuple(layouts))


def _bounded(model_type: str, adapters: tuple[str, ...], layouts: tuple[str, ...]) -> Family:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(theirs, model_type, adapters, layouts))
    process.start()
    theirs.close()
    try:
        return ours.recv() if ours.poll(SECONDS) else Family(model_type, not_built=f"it takes more than {SECONDS} s")
    except EOFError:
        return Family(model_type, not_built=f"it takes more than {BYTES >> 30} GiB, or its process is lost")
    finally:
        process.kill()
        process.join()


def _child(pipe: Any, model_type: str, adapters: tuple[str, ...], layouts: tuple[str, ...]) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (BYTES, BYTES))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    pipe.send(examine(model_type, adapters, layouts))


def page(rows: Iterable[str], layouts: Iterable[str] = LAYOUTS) -> str:
    """Return the text of docs/models.md for the rows of its table."""
    rows, options = list(rows), "" if tuple(layouts) == LAYOUTS else f" --layouts {' '.join(layouts)}"
    verdicts = [row.split(" | ")[2] for row in rows]
    lines = [
        "# Model families",
        "",
        "This page lists which families of models train, in which layout, and how exactly. Look for the `model_type` "
        "in your model's `config.json`.",
        "",
        f"Tiny random models of {len(rows)} types in transformers {transformers.__version__} were each trained "
        f"in full and under LoRA (`all-linear`), with layout={' and '.join(layouts)}, and compared with "
        "transformers' own forward of each sequence alone: log-probs, gradients (also with checkpointing), the losses "
        "of two steps, and the saved model. The test runs on one CPU core, in float64, or in fp32 if a model cannot "
        f"compute in float64. `python -m tests.scoring.families --write docs/models.md{options}` writes this page.",
        "",
        ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in VERDICTS) + ".",
        "",
        "*exact*: rounding explains all differences; the column of log-probs and gradients has the largest relative "
        "differences. *wrong*: a difference is larger. *refused*: the trainer raises an error before the first step. "
        "*not tried*: the test could not build a tiny model of this type.",
        "",
        "*shared*: each prompt is computed once, and padding is not computed. *around*: the same, except for the token "
        "mixers, which compute padded sequences. *padded*: each response is computed as a padded sequence with its "
        "prompt.",
        "",
        "| type | class | result | layout | precision | log-probs, gradients | why |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *rows]) + "\n"


def rows_of(text: str, layouts: Iterable[str]) -> dict[str, str]:
    """Return the rows of a page, keyed by model type.

    Raises:
        ValueError: the page was written with other layouts.
    """
    if f"with layout={' and '.join(layouts)}, and" not in text:
        raise ValueError("the page was written with other --layouts: write all of it, or name the same layouts")
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]  # without the header
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows}


VERDICTS = ("exact", "wrong", "refused", "not tried")
# What a user of a family should know.
REMARKS = {
    "doge": "beyond keep_window_size tokens, each query keeps only the keys with the best scores, which is not "
    "continuous: of keys with equal scores (equal tokens, in the first layer) the kernel chooses, and may choose "
    "differently in another batch; the sequences here have no token twice",
}


def _row(family: Family) -> str:
    auto = [case for case in family.cases if case.asked == "auto"]
    worst = next((case for case in family.cases if case.verdict == family.verdict), None)
    compared = [case for case in family.cases if not case.refused]
    logps, gradients = (
        max((off for case in compared for name, off in case.off.items() if ("gradient" in name) is of), default=None)
        for of in (False, True)
    )
    off = "" if logps is None or gradients is None else f"{logps:.0e}, {gradients:.0e}"
    why = family.not_built or (worst.refused or worst.why or auto[0].why if worst and auto else "")
    why = "; ".join(filter(None, (why, REMARKS.get(family.model_type))))
    dtypes = " and ".join(sorted({case.dtype for case in compared}))
    layouts = " and ".join(sorted({case.layout for case in auto if case.layout}))
    cells = (family.model_type, family.kind, family.verdict, layouts, dtypes, off, why.replace("|", "/"))
    return f"| {' | '.join(cells)} |"


def _said(family: Family) -> str:
    lines = [f"{family.model_type} ({family.kind}): {family.verdict} {family.not_built}"]
    for case in family.cases:
        said = case.refused or ", ".join(f"{name} {off:.1e}" for name, off in case.off.items())
        lines += [
            f"    {case.verdict} {case.adapter} {case.asked}: {case.layout} ({case.why}) {case.dtype}",
            f"      {said}",
        ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model_types", nargs="*", help="the types to test; default: all")
    parser.add_argument("--write", type=Path, help="the page to write; with model types, only their rows change")
    parser.add_argument("--layouts", nargs="+", default=LAYOUTS, choices=LAYOUTS)
    arguments = parser.parse_args()
    is_part = arguments.write and arguments.model_types
    rows = rows_of(arguments.write.read_text(), arguments.layouts) if is_part else {}
    for family in examined(arguments.model_types or all_families(), layouts=arguments.layouts):
        print(_said(family), flush=True)
        rows[family.model_type] = _row(family)
        if arguments.write:
            arguments.write.write_text(page(rows.values(), arguments.layouts))


if __name__ == "__main__":
    main()
