"""Reference log-probs are computed once, and reused whenever the reference and the tokens are the same."""

import gc
import logging
import shutil
import weakref

import pytest
import torch
from datasets import Dataset

from hf_prefopt import PreferenceConfig, register_loss
from hf_prefopt.losses import registry
from hf_prefopt.reference.cache import MissingLogProbs
from hf_prefopt.reference.cache_store import read_shard
from hf_prefopt.reference.live import LiveReference
from hf_prefopt.training.scorer_events import ScorerEvents
from tests.data.helpers import text_pair
from tests.tiny_models import perturbed, random_rows, tiny_model, with_lora
from tests.tokenizers import tiny_tokenizer
from tests.trainers import first_batch, lists, logged, make_config, make_trainer, pairs, unpaired, values_read

DESCENT = {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant"}


@pytest.fixture
def runs(monkeypatch):
    """Record the number of responses of every batch of rows that a reference runs on."""
    seen, score = [], LiveReference.score

    def counted(self, batch, *token_stats):
        if "rows" in batch:
            seen.append(len(batch["response_lengths"]))
        return score(self, batch, *token_stats)

    monkeypatch.setattr(LiveReference, "score", counted)
    return seen


def cached(folder, model=None, **settings):
    """Return a trainer with its cache in a folder next to its output."""
    if settings.get("precompute_ref_log_probs", True):
        settings = {"reference_cache_dir": str(folder / "cache"), "precompute_ref_log_probs": True, **settings}
    model = with_lora(tiny_model()) if model is None and "model_init" not in settings else model
    return make_trainer(folder / "run", model, **settings)


def before_training(trainer):
    """Do what `train()` does to the cache before its first step."""
    loader = trainer.get_train_dataloader()
    trainer.scorer.settle()
    (events,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ScorerEvents))
    events.on_train_begin(trainer.args, trainer.state, trainer.control, train_dataloader=loader)


def stored(folder):
    """Return (fingerprint, key) of every response in the caches below a folder."""
    shards = {path: read_shard(path) for path in (folder / "cache").rglob("*.safetensors")}
    return [(path.parent.name, key.tobytes()) for path, shard in shards.items() for key in shard.keys]


def off_reference(**settings):
    """Return a policy that differs from its reference, the base model below its adapter."""
    return perturbed(with_lora(tiny_model(), **settings), scale=0.1)


@pytest.mark.parametrize(
    ("loss", "layout", "batches"),
    [(loss, layout, {}) for loss in ("dpo", "kto_pair", "plackett_luce", "kto") for layout in ("padded", "shared")]
    + [("dpo", "shared", {"group_by_prompt": True}), ("kto", "padded", {"group_by_prompt": True})]
    + [("dpo", "padded", {"max_tokens_per_batch": 60}), ("kto", "shared", {"max_tokens_per_batch": 60})],
)
def test_a_cached_run_is_the_live_run(loss, layout, batches, runs, tmp_path):
    """In two epochs, evaluated after each, losses, gradient norms and evaluations agree with those of a live reference.

    The reference runs once on each of the two sets, and for KTO once more on the mismatched responses
    of the second epoch; in another run, it never runs. The pass uses other batches, so the last bits
    of the sums in the model differ: about 1e-6 of a log-prob of −4, hence 1e-5 on the sums of ten
    tokens. Times β = 0.1, the loss differs by 1e-6; the tolerance of 1e-5 is enough for six steps.
    """
    rows = {"dpo": pairs, "kto_pair": pairs, "plackett_luce": lists, "kto": unpaired}[loss]
    settings = {"loss_type": loss, "layout": layout, "num_train_epochs": 2, "eval_strategy": "epoch", **DESCENT}
    settings |= {"train_dataset": rows(6), "eval_dataset": rows(5, seed=3), "reference": "adapter_off", **batches}
    live = cached(tmp_path, off_reference(), **settings, precompute_ref_log_probs=False)
    live.train()
    runs.clear()
    fresh = cached(tmp_path, off_reference(), **settings)
    fresh.train()
    if not batches:
        assert len(runs) == (3 if loss == "kto" else 2)
    again = cached(tmp_path, off_reference(), **settings)
    runs.clear()
    again.train()
    assert runs == []
    for trainer in (fresh, again):
        for name in ("loss", "grad_norm", "eval_loss", "eval_rewards/chosen"):
            assert logged(trainer, name) == pytest.approx(logged(live, name), rel=1e-5, abs=1e-6), name
    assert len(set(stored(tmp_path))) == len(stored(tmp_path))


ROWS = random_rows(6)
BASE = {"loss_type": "dpo", "reference": "adapter_off", "max_steps": 1, "layout": "padded"}
EXTRA = [{**row, "row": 6 + row["row"]} for row in random_rows(2, seed=5)]

# Changes of the trainer's settings after which nothing is computed again.
HITS = {
    "the same again": {},
    "another loss": {"loss_type": "ipo"},
    "another beta": {"beta": 0.3},
    "another seed": {"seed": 1, "data_seed": 2},
    "another rate": {"learning_rate": 1e-5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 3},
    "another layout": {"layout": "shared"},
    "another implementation of attention": {"model": lambda: with_lora(tiny_model(attn_implementation="eager"))},
    "another batching": {"group_by_prompt": True, "max_tokens_per_batch": 40},
    "another rank": {"model": lambda: with_lora(tiny_model(), r=8, seed=3)},
    "another kind of adapter": {"model": lambda: with_lora(tiny_model(), use_dora=True, modules_to_save=["lm_head"])},
    "a trained adapter": {"model": off_reference},
    "no adapter": {"model": tiny_model, "reference": "auto"},
    "the reference as a model": {"model": lambda: tiny_model(seed=1), "reference": "auto", "ref_model": tiny_model},
    "rows in another order": {"train_dataset": Dataset.from_list(ROWS[::-1])},
    "fewer rows": {"train_dataset": Dataset.from_list(ROWS[:3])},
    "as evaluation rows": {"eval_dataset": Dataset.from_list(ROWS)},
    "as lists": {
        "loss_type": "plackett_luce",
        "train_dataset": Dataset.from_list(ROWS)
        .remove_columns("pairs")
        .map(lambda _: {"ranks": [1.0, 2.0], "scores": [1.0, 0.0]}),
    },
}


def changed(row, **entries):
    return Dataset.from_list([{**ROWS[0], **entries}, *ROWS[1:]] if row == 0 else ROWS)


def one_element_away():
    model = with_lora(tiny_model())
    with torch.no_grad():
        model.get_base_model().model.layers[1].mlp.up_proj.base_layer.weight[3, 5] += 1e-6
    return model


# Changes, and the number of the 12 responses that are computed again.
MISSES = {
    "a weight by one element": ({"model": one_element_away}, 12),
    "the dtype of the weights": ({"model": lambda: with_lora(tiny_model(dtype=torch.bfloat16))}, 12),
    "autocast": ({"bf16": True}, 12),
    "the temperature": ({"temperature": 0.9}, 12),
    "the model's configuration": ({"model": lambda: with_lora(tiny_model(rms_norm_eps=1e-3))}, 12),
    "an adapter that acts": ({"model": off_reference, "reference": "copy"}, 12),
    "a token of a response": (
        {"train_dataset": changed(0, response_ids=[[7, *ROWS[0]["response_ids"][0][1:]], ROWS[0]["response_ids"][1]])},
        1,
    ),
    "a token of a prompt": ({"train_dataset": changed(0, prompt_ids=[7, *ROWS[0]["prompt_ids"]])}, 2),
    "what is scored": (
        {"train_dataset": changed(0, scored_masks=[ROWS[0]["scored_masks"][0], [0, *ROWS[0]["scored_masks"][1][1:]]])},
        1,
    ),
    "appended rows": ({"train_dataset": Dataset.from_list(ROWS + EXTRA)}, 4),
    "a new evaluation set": ({"eval_dataset": Dataset.from_list(EXTRA[:1])}, 2),
}
MATRIX = {**{name: (change, 0) for name, change in HITS.items()}, **MISSES}


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """Return a folder with the cache of the base run."""
    folder = tmp_path_factory.mktemp("filled")
    cached(folder, **BASE, train_dataset=Dataset.from_list(ROWS)).train()
    assert len(stored(folder)) == 12
    return folder


@pytest.mark.parametrize(("change", "count"), MATRIX.values(), ids=MATRIX)
def test_what_is_found_and_what_is_computed(change, count, filled, tmp_path):
    """Another run follows one with 6 rows and 12 responses: it computes exactly the
    responses that its change affects.
    """
    shutil.copytree(filled / "cache", tmp_path / "cache")
    settings = {**BASE, "train_dataset": Dataset.from_list(ROWS), **change}
    settings |= {name: settings[name]() for name in ("model", "ref_model") if name in settings}
    before_training(cached(tmp_path, **settings))
    assert len(stored(tmp_path)) - 12 == len(set(stored(tmp_path)) - set(stored(filled))) == count


@pytest.mark.parametrize(("precision", "count"), [("ieee", 0), ("tf32", 12), ("bf16", 12)])
def test_the_precision_of_fp32_products_is_part_of_the_key(precision, count, filled, tmp_path):
    """The base run has PyTorch's default, "none", which is full precision. With a
    lower precision of fp32 products, all 12 responses are computed again.
    """
    shutil.copytree(filled / "cache", tmp_path / "cache")
    before, torch.backends.mkldnn.matmul.fp32_precision = torch.backends.mkldnn.matmul.fp32_precision, precision
    try:
        before_training(cached(tmp_path, **BASE, train_dataset=Dataset.from_list(ROWS)))
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
    assert len(set(stored(tmp_path)) - set(stored(filled))) == count


def test_a_cut_is_another_response(tmp_path):
    """If a `max_length` cuts some rows, only the responses that it changed are computed. If another truncation mode
    cuts nothing, the tokens are the same, so nothing is computed.
    """
    texts = [text_pair(), text_pair(chosen=" Paris it is, as everybody knows."), text_pair(rejected=" Berlin.")]
    settings = {"train_dataset": Dataset.from_list(texts), "processing_class": tiny_tokenizer(), "max_steps": 1}
    seen, counts = set(), []
    for cut in (
        {},
        {"truncation_mode": "keep_end"},
        {"max_length": 12},
        {"max_length": 12, "truncation_mode": "keep_end"},
    ):
        trainer = cached(tmp_path, with_lora(tiny_model(vocab_size=600)), **settings, **cut)
        before_training(trainer)
        for row in trainer.train_dataset:
            for ids, mask in zip(row["response_ids"], row["scored_masks"], strict=True):
                seen.add((tuple(row["prompt_ids"]), tuple(ids), tuple(mask)))
        counts.append(len(seen))
        assert len(stored(tmp_path)) == len(seen)
    assert counts[0] == counts[1] < counts[2] < counts[3]


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (tiny_model, {"ref_model": lambda: tiny_model(seed=1)}),
        (tiny_model, {}),
        (off_reference, {}),
    ],
    ids=["ref_model", "frozen copy", "frozen adapter"],
)
def test_a_reference_with_memory_of_its_own_is_let_go(make, settings, tmp_path):
    """The trainer holds no reference to it during training. A later dataset can then not be scored, and the error says
    how many responses are missing: one of the two responses of each of three new rows.
    """
    settings = {name: make() for name, make in settings.items()}
    trainer = cached(tmp_path, make(), eval_dataset=pairs(3, seed=3), **settings)
    live = weakref.ref(trainer.reference.live)
    model = weakref.ref(settings.pop("ref_model")) if settings else None
    trainer.train()
    gc.collect()
    assert live() is None and (model is None or model() is None)
    trainer.evaluate()
    rows = [
        {**row, "response_ids": [row["response_ids"][0], [5, 2]], "scored_masks": [row["scored_masks"][0], [1, 1]]}
        for row in random_rows(3, seed=3, longest=10)
    ]
    with pytest.raises(MissingLogProbs, match=r"3 of 6 responses of the dataset 'evaluation' .* precompute"):
        trainer.evaluate(Dataset.from_list(rows))
    (batch,) = trainer._prepare_inputs(trainer.data_collator(rows))["pieces"]
    with pytest.raises(MissingLogProbs, match=r"3 of 6 responses of the batch of rows \[0, 1, 2\]"):
        trainer.reference.score(batch)


def test_an_adapter_that_is_off_stays_at_hand(runs, tmp_path):
    """A disabled adapter has no memory of its own to free, so another dataset is computed whenever it is passed."""
    trainer = cached(tmp_path, max_steps=1)
    trainer.train()
    trainer.evaluate(pairs(3, seed=3))
    assert len(runs) == 2
    trainer.evaluate(pairs(3, seed=3))
    trainer.predict(pairs(3, seed=3))
    assert len(runs) == 2


def test_a_stream_is_cached_as_it_comes(runs, tmp_path):
    """Four steps of two rows over a stream of four rows: the reference runs in the
    first two steps, and never in another run.
    """
    stream = pairs(4).to_iterable_dataset()
    live = cached(tmp_path, train_dataset=stream, max_steps=4, precompute_ref_log_probs=False)
    live.train()
    for expected in ([4, 4], []):
        runs.clear()
        trainer = cached(tmp_path, train_dataset=stream, max_steps=4)
        trainer.train()
        assert runs == expected
        assert logged(trainer, "loss") == pytest.approx(logged(live, "loss"), rel=1e-5)
    assert len(stored(tmp_path)) == 8


def test_every_trial_of_a_model_init_has_its_cache(runs, tmp_path):
    """A second train() starts from a new policy and a new reference with the same
    weights, whose log-probs are cached.
    """
    trainer = cached(tmp_path, model_init=lambda: with_lora(tiny_model()), max_steps=1)
    trainer.train()
    trainer.train()
    assert len(runs) == 1


def flip_a_byte(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


DAMAGES = {
    "a flipped bit": flip_a_byte,
    "half of it": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "nothing in it": lambda path: path.write_bytes(b""),
    "something else": lambda path: path.write_bytes(b"not a shard" * 100),
    "another's name": lambda path: path.rename(path.with_name("0" * 32 + ".safetensors")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_shard_is_computed_again_and_said_once(damage, runs, tmp_path, caplog):
    """The damaged file is renamed, and one warning names it; the next run reuses everything."""
    trainer = cached(tmp_path)
    before_training(trainer)
    keys = [key for _, key in sorted(stored(tmp_path))]
    values = [value.clone() for value in trainer.reference.store.get(keys)]
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    damage(path)
    runs.clear()
    said = []
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "hf_prefopt"):
            again = cached(tmp_path)
            before_training(again)
        said.append([record.getMessage() for record in caplog.records if "computed again" in record.getMessage()])
        assert len(runs) == 1
    assert len(said[0]) == 1 and said[1] == []
    assert all(torch.equal(a, b) for a, b in zip(again.reference.store.get(keys), values, strict=True))


@pytest.fixture
def with_reference_alignment():
    """Register a loss that reads Σp² of the reference."""

    @register_loss("reads_reference_statistics")
    def loss(policy_chosen_logps, policy_rejected_logps, ref_chosen_alignment, beta=0.1):
        return -beta * (policy_chosen_logps - policy_rejected_logps) + ref_chosen_alignment

    yield
    del registry._LOSSES["reads_reference_statistics"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": "simpo"}, "simpo needs no reference"),
        ({"reference_free": True}, "dpo needs no reference"),
        ({"loss_type": "reads_reference_statistics"}, "also reads the reference's log_sum_sq_probs at every token"),
    ],
)
def test_what_a_cache_cannot_serve_is_refused(settings, message, with_reference_alignment, tmp_path):
    """Settings that need the reference model raise an error at construction, with the reason."""
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, precompute_ref_log_probs=True, **settings)


def test_batches_without_keys_are_refused(tmp_path):
    with pytest.raises(ValueError, match="cache keys, which a custom data_collator does not compute"):
        cached(tmp_path, data_collator=lambda rows: rows)


def test_reference_cache_is_auto_with_a_cache(tmp_path):
    """The two settings are equivalent, and a dict of the settings gives the same configuration."""
    config = make_config(tmp_path, reference="cache")
    assert (config.reference, config.precompute_ref_log_probs) == ("auto", True)
    again = PreferenceConfig(
        **{name: config.to_dict()[name] for name in ("output_dir", "use_cpu", "reference", "precompute_ref_log_probs")}
    )
    assert (again.reference, again.precompute_ref_log_probs) == ("auto", True)


def test_the_pass_shows_its_speed(tmp_path, capfd):
    """The progress bar counts tokens: those of all different responses and their prompts."""
    rows = random_rows(4)
    trainer = cached(tmp_path, train_dataset=Dataset.from_list(rows), max_steps=1, disable_tqdm=False)
    trainer.train()
    tokens = sum(len(row["prompt_ids"]) + len(ids) for row in rows for ids in row["response_ids"])
    assert f"{tokens}/{tokens}" in capfd.readouterr().err.replace(".00", "")


def test_a_cached_step_waits_for_no_device(tmp_path, monkeypatch):
    """As in `test_no_step_waits_for_the_device`, but with all log-probs from the
    cache: no value is read from a tensor.
    """
    trainer = cached(tmp_path, max_steps=2, logging_steps=100, layout="padded")
    before_training(trainer)
    monkeypatch.setattr(trainer, "log", lambda *_, **__: None)
    seen = values_read(monkeypatch)
    trainer.train()
    assert trainer.state.global_step == 2 and seen == []


def test_ranks_that_must_run_together_do(runs, tmp_path):
    """If another rank misses some log-probs, this rank runs the reference, too. Its
    results do not change, and nothing is stored twice.
    """
    trainer = cached(tmp_path)
    before_training(trainer)
    batch = first_batch(trainer)
    found, count = trainer.reference.score(batch).token_logps, len(runs)
    trainer.reference.any_rank = lambda here: True
    computed = trainer.reference.score(batch).token_logps
    assert len(runs) == count + 1
    torch.testing.assert_close(found, computed, rtol=1e-5, atol=1e-5)
    trainer.reference.store.flush()
    assert len(stored(tmp_path)) == 16
