"""Generates docs/from_trl.md from the tables of this package: `python -m hf_prefopt.trl.page > docs/from_trl.md`."""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

from hf_prefopt.config import PreferenceConfig
from hf_prefopt.config_docs import default_of
from hf_prefopt.config_names import FOREIGN_ARGUMENTS, FOREIGN_SETTINGS
from hf_prefopt.trl.configs import CPOConfig, DPOConfig, KTOConfig, ORPOConfig, TPOConfig, TRLConfig
from hf_prefopt.trl.differences import DIFFERENCES, OTHER_DEFAULTS
from hf_prefopt.trl.fields import TRL_FIELDS
from hf_prefopt.trl.losses import CPO, KTO, ORPO, TPO, Translation
from hf_prefopt.trl.metrics import LEFT_OUT, LOGGED, OURS

CONFIGS = (DPOConfig, KTOConfig, CPOConfig, ORPOConfig, TPOConfig)
HEAD = """\
# From TRL

Change the import, and keep the script:

```diff
-from trl import DPOConfig, DPOTrainer
+from hf_prefopt.trl import DPOConfig, DPOTrainer
```

`hf_prefopt.trl` has `DPOConfig`, `DPOTrainer`, `KTOConfig`, `KTOTrainer` (from `trl`), `CPOConfig`, `CPOTrainer`,
`ORPOConfig`, `ORPOTrainer`, `TPOConfig` and `TPOTrainer` (from `trl.experimental`), with the field names, defaults,
order of arguments and metric names of TRL 1.16. Losses and gradients equal those of TRL's trainers, except where TRL
has a bug: see [Different numbers](#different-numbers). All fields of `PreferenceConfig` also work, such as `layout`,
`max_tokens_per_batch` and `group_by_prompt` ([settings.md](settings.md)).

The configurations are subclasses of `PreferenceConfig`, and the trainers subclasses of `PreferenceTrainer`. Use these
two classes in new code: they have every loss, with its published defaults. If you use one of TRL's names that they do
not have, the error says what to write instead."""
TESTS = """\
## TRL's own tests and scripts

With a checkout of huggingface/trl, `python -m tests.parity.trl_suite --trl PATH` runs TRL's tests of these five
trainers on TRL and on `hf_prefopt.trl`. `tests/parity/trl_expected.py` lists the tests that do not pass here, and why.
On 2026-11-27, with the tests of TRL's repository at f2cd577, 57 of the 64 tests of KTO passed on TRL, and 41 of these
57 here; the other 16 are in the list.
TRL's scripts `dpo.py` and `kto.py` run after changing the import (`tests/trl/test_scripts.py`)."""


def page() -> str:
    """The page in Markdown."""
    parts = [HEAD, _fields(), _losses(), _metrics(), _differences(), _behavior(), _names(), TESTS]
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def _fields() -> str:
    """The fields that TRL's configurations add to `TrainingArguments`, or whose defaults they change."""
    of_trainer, ours = ({f.name for f in fields(c)} for c in (TrainingArguments, PreferenceConfig))
    own = {name for config in (TRLConfig, *CONFIGS) for name in config.__annotations__} & ours - {"unpair"}
    rows = []
    for name in (*TRL_FIELDS, *sorted(own)):
        having = [config for config in CONFIGS if name in config.__dataclass_fields__]
        defaults = {config.__name__: default_of(config.__dataclass_fields__[name]) for config in having}
        text = TRL_FIELDS[name].text if name in TRL_FIELDS else having[0].__dataclass_fields__[name].metadata["help"]
        rows.append((f"`{name}`", _where(defaults), text))
    same = sorted((ours - of_trainer - own - set(TRL_FIELDS)) & _TRLS)
    other = [(f"`{name}`", f"`{trl!r}`", f"`{here!r}`", why) for name, (trl, here, why) in OTHER_DEFAULTS.items()]
    return "\n\n".join(
        [
            "## Fields",
            "The fields of `transformers.TrainingArguments` are the same. The following fields have the same meaning "
            f"and default as in `PreferenceConfig`: {', '.join(f'`{name}`' for name in same)}.",
            _table(("field", "default", "here"), rows),
            "These defaults differ from TRL's:",
            _table(("field", "TRL", "here", "why"), other),
        ]
    )


# Fields that TRL and PreferenceConfig share, with the same default.
_TRLS = {
    *("dataset_num_proc", "f_alpha_divergence_coef", "f_divergence_type", "ld_alpha", "loss_weights", "max_length"),
    *("model_init_kwargs", "precompute_ref_log_probs", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    *("router_aux_loss_coef", "sync_ref_model", "truncation_mode", "use_weighting"),
}


def _where(defaults: dict[str, Any]) -> str:
    """The default of a field, with the configurations that have it unless all agree."""
    if len(set(map(repr, defaults.values()))) == 1 and len(defaults) == len(CONFIGS):
        return f"`{next(iter(defaults.values()))!r}`"
    by_value: dict[str, list[str]] = {}
    for config, value in defaults.items():
        by_value.setdefault(f"`{value!r}`", []).append(config.removesuffix("Config"))
    return "; ".join(f"{value} ({', '.join(configs)})" for value, configs in by_value.items())


def _losses() -> str:
    tables = {"CPO": CPO, "ORPO": ORPO, "TPO": TPO, "KTO": KTO}
    rows = [(method, f"`{name}`", _meaning(this)) for method, table in tables.items() for name, this in table.items()]
    return (
        "## Losses\n\nThe names of DPO's losses are the same here and in `PreferenceConfig` ([losses.md](losses.md)), "
        "where each loss has the default β of its paper. The losses of the other trainers translate as follows:\n\n"
        + _table(("trainer", "`loss_type`", "here"), rows)
    )


def _meaning(this: Translation) -> str:
    params = ", ".join(f"{ours}={theirs}" for ours, theirs in this.params.items())
    text = f"`{this.loss}`" + (f", {params}" if params else "") + (", reference_free" if this.reference_free else "")
    text += f" + {this.nll_weight} × `{this.nll}`" if this.nll and this.nll_weight else ""
    return text + (f"; `{this.bent}` if alpha is not 0" if this.bent else "")


def _metrics() -> str:
    return "\n\n".join(
        [
            "## Metrics",
            "`hf_prefopt.trl` uses TRL's names and conventions, with the prefix `eval_` in evaluations.",
            _table(("metric", "trainers", "under `PreferenceTrainer`"), LOGGED),
            f"Logged for every loss, and not by TRL: {OURS}",
            "These metrics are not logged:",
            _table(("metric", "why"), LEFT_OUT),
        ]
    )


def _differences() -> str:
    rows = [(f"{this.method}: {this.what}", _number(this.theirs), _number(this.ours)) for this in DIFFERENCES]
    return (
        "## Different numbers\n\nThis table lists all losses that differ from TRL's. The numbers are for one batch and "
        "a tiny model (`tests/parity/test_dropin_faults.py`). All other losses agree to 1e-5, and gradients to 1e-4 of "
        "their largest entry (`tests/parity/test_dropin.py`).\n\n" + _table(("what", "TRL's loss", "here"), rows)
    )


def _number(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:.4f}"


def _behavior() -> str:
    rows = [
        (
            "full fine-tuning without `ref_model`",
            "loads the model again by its name",
            "keeps a frozen copy of the initial trainable weights",
        ),
        ("a PEFT model is passed", "adds an adapter `ref`, which is saved with the model", "adds nothing"),
        ("KTO's mismatched responses", "from the neighbor in the batch", "from the whole data set, new in every epoch"),
        ("KTO's z, AOT's sort", "over a micro-batch", "over the global batch"),
        ("metrics of an evaluation", "means of batch means", "means over the rows"),
        (
            "metrics of several evaluation sets",
            "the loss has the set's name, `eval_NAME_loss`, and the others do not, `eval_rewards/chosen`",
            "all have it, `eval_NAME_rewards/chosen`",
        ),
        ("`logps/*` with `ld_alpha`", "weighted as the loss weights them", "the log-probs of the whole responses"),
        ("a tie of rewards", "counts as an inaccurate pair", "counts half"),
        (
            "end of a conversation in CPO and ORPO",
            "adds an EOS after a template that ends with a line break, as ChatML's does: two ends of turn are scored",
            "scores what the template writes",
        ),
        (
            "truncation to `max_length`",
            "cuts the end of the sequence, including its EOS",
            "cuts the end of the response and keeps its EOS",
        ),
        ("`max_length=None` in CPO and ORPO", "means 512", "means no limit"),
        (
            "texts without a column `prompt`",
            "are split at the first different character",
            "raise an error if the split matters",
        ),
        ("`train_dataset=None`", "an error", "evaluation only"),
        ("encoder-decoder models, images", "supported in CPO and ORPO; in DPO and KTO", "an error"),
        ("`compute_metrics`", "gets logits", "gets rewards, and labels of 1 for preferred responses"),
        ("a streaming data set with KTO's loss", "accepted", "an error, because other prompts are not known"),
        (
            "a mixture of experts' auxiliary loss",
            "added by default in DPO and KTO; in the others if the model's config has `output_router_logits=True`",
            "added by default in all; `router_aux_loss_coef=0.0` turns it off",
        ),
        ("weights or a loss that are not finite", "training continues", "an error that names the step and the row"),
        ("`tpo_alpha=0.0`", "does not compute the gold responses", "computes the gold responses, with weight 0"),
        ("telemetry", "sent, unless disabled", "none"),
    ]
    return "## Different behavior\n\n" + _table(("what", "TRL", "here"), rows)


def _names() -> str:
    settings = [(f"`{name}`", f"`PreferenceConfig`: {text}") for name, text in FOREIGN_SETTINGS.items()]
    arguments = [(f"`{name}`", f"`PreferenceTrainer`: {text}") for name, text in FOREIGN_ARGUMENTS.items()]
    return (
        "## Under PreferenceConfig and PreferenceTrainer\n\nNames from TRL, its earlier versions and other libraries "
        "raise a `TypeError` that says what to do instead:\n\n"
        + _table(("name", "what to do instead"), (*settings, *arguments))
    )


if __name__ == "__main__":
    print(page(), end="")
