"""Reference log-probs as columns: exporting, writing to files, importing, and errors if the model is another one."""

import pytest
import torch
from datasets import Dataset, load_dataset

from hf_prefopt.reference.live import LiveReference
from hf_prefopt.training.reference_columns import export_reference, import_reference
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import logged, make_trainer, pairs, unpaired

STEPS = {"max_steps": 3, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}


def cached(folder, model=None, rows=None, **settings):
    settings = {"precompute_ref_log_probs": True, "reference_cache_dir": str(folder / "cache"), **STEPS, **settings}
    model = with_lora(tiny_model()) if model is None else model
    return make_trainer(folder / "run", model, train_dataset=pairs(6) if rows is None else rows, **settings)


def plain_sum(row, which):
    """Return Σ log p of a response's tokens, from the base model's own logits of this sequence alone."""
    response = row["response_ids"][which]
    ids = torch.tensor([row["prompt_ids"] + response])
    with torch.no_grad():
        logps = tiny_model()(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
    return float(logps[-len(response) :].double().sum())


def test_exported_sums_are_those_of_the_plain_model(tmp_path):
    """The tolerance is float32's rounding of a sum of at most 10 log-probs from
    logits up to 20: 10 · 128 · 2⁻²⁴ · 40.
    """
    rows = pairs(6)
    exported = export_reference(cached(tmp_path), rows)
    for row, out in zip(rows, exported, strict=True):
        for which, name in enumerate(("ref_chosen_logps", "ref_rejected_logps")):
            assert out[name] == pytest.approx(plain_sum(row, which), abs=10 * 128 * 2.0**-24 * 40)
            assert len(out["ref_token_logps"][which]) == len(row["response_ids"][which])
    assert set(rows.column_names) < set(exported.column_names)


def test_single_responses(tmp_path):
    rows = unpaired(6)
    exported = export_reference(cached(tmp_path, rows=rows, loss_type="bco"), rows)
    assert exported["ref_logps"] == pytest.approx([plain_sum(row, 0) for row in rows], abs=10 * 128 * 2.0**-24 * 40)


@pytest.mark.parametrize("kind", ["memory", "json", "parquet"])
def test_a_run_on_imported_log_probs_is_the_same_and_never_runs_the_reference(tmp_path, kind, monkeypatch):
    first = cached(tmp_path / "first")
    exported = export_reference(first, pairs(6))
    first.train()
    if kind != "memory":
        getattr(exported, f"to_{kind}")(tmp_path / f"rows.{kind}")
        exported = load_dataset(kind, data_files=str(tmp_path / f"rows.{kind}"), split="train")
    second = cached(tmp_path / "second", with_lora(tiny_model()))
    assert import_reference(second, exported) == 12 and import_reference(second, exported) == 0

    def never(self, batch, *_):
        assert "rows" not in batch, "the reference was run on the data"
        return score(self, batch, *_)

    score = LiveReference.score
    monkeypatch.setattr(LiveReference, "score", never)
    second.train()
    if kind == "json":  # `datasets` writes ten digits
        assert logged(second, "loss") == pytest.approx(logged(first, "loss"), abs=1e-9 * 10 + 2.0**-23)
    else:
        assert logged(second, "loss") == logged(first, "loss")


def test_another_model_or_temperature_is_refused(tmp_path):
    exported = export_reference(cached(tmp_path), pairs(6))
    for other in (
        cached(tmp_path / "model", with_lora(perturbed(tiny_model()))),
        cached(tmp_path / "temperature", temperature=0.5),
    ):
        with pytest.raises(ValueError, match=r"row 0: .* another model"):
            import_reference(other, exported)
        assert not list(other.reference.store.folder.glob("*.safetensors"))


def test_columns_without_a_fingerprint_or_changed_ones_are_refused(tmp_path):
    exported = export_reference(cached(tmp_path), pairs(6))
    other = cached(tmp_path / "other")
    with pytest.raises(ValueError, match="no column ref_model"):
        import_reference(other, exported.remove_columns("ref_model"))
    changed = Dataset.from_list([{**row, "ref_chosen_logps": row["ref_chosen_logps"] - 0.1} for row in exported])
    with pytest.raises(ValueError, match=r"row 0: ref_chosen_logps is .* one of the columns was changed"):
        import_reference(other, changed)


def test_a_trainer_without_a_cache_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, train_dataset=pairs(2))
    for call in (lambda: export_reference(trainer, pairs(2)), lambda: import_reference(trainer, pairs(2))):
        with pytest.raises(ValueError, match="precompute_ref_log_probs=True"):
            call()


def test_other_tokens_get_no_imported_log_probs(tmp_path):
    """The import has six pairs and the run has eight: the missing log-probs are
    computed, and the first loss is log 2.
    """
    exported = export_reference(cached(tmp_path), pairs(6))
    trainer = cached(tmp_path / "other", rows=pairs(8, seed=3))
    assert import_reference(trainer, exported) == 12
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-5)
