"""Errors of TRL 1.16: each test shows TRL's number and ours for the same model and tokens.

If a test fails because of TRL's number, a later version of TRL has changed, and the comparison in the docs is outdated.
"""

import math

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.parity.peers import (
    concatenated_step,
    dpo_step,
    dpo_trainer,
    kto_step,
    kto_trainer,
    labeled_rows,
    our_step,
    policy,
    reference,
    rows,
    tpo_step,
    trl_rows,
)
from tests.tiny_models import perturbed, tiny_model, with_lora
from tests.trainers import logged, make_trainer, triples, unpaired

pytest.importorskip("trl")
LOG_TWO = math.log(2)


def first_losses(tmp_path, trl_model, our_model, **settings):
    """Return (TRL's, our) loss of the first step, each with the reference that it
    chooses itself; TRL in training mode.
    """
    theirs = dpo_trainer(tmp_path, trl_model, **settings)
    theirs.model.train()
    loss = theirs.compute_loss(theirs.model, theirs.data_collator(trl_rows(rows()))).item()
    return loss, our_step(tmp_path, model=our_model, **settings).loss


def test_label_smoothing_is_ignored_by_sigmoid(tmp_path):
    """TRL's loss does not change with ε; ours is (1 − ε)ℓ(z) + εℓ(−z) = ℓ(z) + εz, so it grows by ε·mean margin."""
    smooth = {"loss_type": "sigmoid", "label_smoothing": 0.3, "beta": 0.5}
    plain = dpo_step(tmp_path, loss_type="sigmoid", beta=0.5)
    assert dpo_step(tmp_path, **smooth).loss == plain.loss
    margin = plain.metrics["rewards/margins"]
    assert abs(margin) > 0.1
    ours = our_step(tmp_path, ref_model=reference(), **smooth)
    assert ours.loss == pytest.approx(plain.loss + 0.3 * margin, rel=1e-5)


def test_an_unknown_loss_passes_the_constructor(tmp_path):
    """TRL raises an error at the first step; we raise it at construction, and suggest the nearest name."""
    trainer = dpo_trainer(tmp_path, ref_model=reference(), loss_type=["sigmoidd"])
    with pytest.raises(ValueError, match="Unknown loss type"):
        trainer.compute_loss(trainer.model, trainer.data_collator(trl_rows(rows())))
    with pytest.raises(ValueError, match="did you mean sigmoid"):
        make_trainer(tmp_path, loss_type="sigmoidd")


def test_a_model_modified_in_memory_is_not_its_own_reference(tmp_path):
    """TRL loads the reference from the folder from which the model was loaded, so the first loss is not log 2."""
    reference().save_pretrained(tmp_path / "base")
    modified = [perturbed(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), scale=0.3) for _ in range(2)]
    theirs, ours = first_losses(tmp_path, *modified, beta=1.0)
    assert abs(theirs - LOG_TWO) > 0.05
    assert ours == pytest.approx(LOG_TWO, abs=1e-6)


def test_a_model_built_from_a_config_has_no_reference(tmp_path):
    """TRL needs a name to load the reference again; we copy the model in memory."""
    with pytest.raises(Exception, match=r"(?i)repo|path|huggingface|identifier"):
        dpo_trainer(tmp_path, policy())
    assert our_step(tmp_path, model=policy()).loss == pytest.approx(LOG_TWO, abs=1e-6)


def test_the_reference_adapter_is_saved_along(tmp_path):
    """For a PeftModel, TRL adds an adapter "ref", which is saved with the trained
    one; we save only the given adapters.
    """
    theirs = dpo_trainer(tmp_path / "theirs", with_lora(policy()))
    theirs.save_model(str(tmp_path / "theirs"))
    ours = make_trainer(tmp_path / "ours", perturbed(with_lora(policy())))
    ours.save_model(str(tmp_path / "ours"))
    saved = {
        name: {str(file.relative_to(tmp_path / name)) for file in (tmp_path / name).rglob("*.safetensors")}
        for name in ("theirs", "ours")
    }
    assert saved["theirs"] == {"adapter_model.safetensors", "ref/adapter_model.safetensors"}
    assert saved["ours"] == {"adapter_model.safetensors"}
    assert not any("ref" in key for key in load_file(tmp_path / "ours" / "adapter_model.safetensors"))


def three_rows_won_lost_won() -> list[dict]:
    """Return three rows, with swapped responses: the policy ranks the first and third right and the second wrong."""
    from hf_prefopt.scoring.forward import install_scoring, score
    from tests.scoring.plain import PaddedCollator

    model, base, data = policy(), reference(), rows(3)
    install_scoring(model), install_scoring(base)
    with torch.no_grad():
        batch = PaddedCollator(0)(data)
        ratios = (score(model, batch).logps - score(base, batch).logps).view(3, 2)
    wins = (ratios[:, 0] > ratios[:, 1]).tolist()
    for row, wins_now, wanted in zip(data, wins, (True, False, True), strict=True):
        if wins_now is not wanted:
            row["response_ids"] = row["response_ids"][::-1]
            row["scored_masks"] = row["scored_masks"][::-1]
    return data


def test_evaluation_averages_batches(tmp_path):
    """Right, wrong | right, in batches of two: TRL reports (½ + 1)/2 = .75, but two of three rows are right."""
    data = three_rows_won_lost_won()
    theirs = dpo_trainer(tmp_path, ref_model=reference(), per_device_eval_batch_size=2)
    theirs.eval_dataset = Dataset.from_list(trl_rows(data))
    theirs.evaluate()
    ours = make_trainer(tmp_path, policy(), ref_model=reference()).evaluate(Dataset.from_list(data))
    assert logged(theirs, "eval_rewards/accuracies") == [0.75]
    assert ours["eval_rewards/accuracies"] == pytest.approx(2 / 3)


def test_a_tie_is_a_loss(tmp_path):
    """The policy is untrained: TRL reports an accuracy of 0, and we report one half."""
    settings = {"model": reference(), "ref_model": reference()}
    theirs = dpo_trainer(tmp_path, settings["model"], settings["ref_model"])
    theirs.compute_loss(theirs.model, theirs.data_collator(trl_rows(rows())))
    (reported,) = [*theirs._metrics["train"]["rewards/accuracies"], *theirs._metrics["eval"]["rewards/accuracies"]]
    assert reported == 0.0
    assert our_step(tmp_path, **settings).metrics["rewards/accuracies"] == 0.5


def test_the_sft_term_changes_with_the_batch(tmp_path):
    """Two pairs have chosen responses of different lengths. TRL's mean over the tokens of both is not the mean of the
    two losses, so splitting the batch changes it. Ours divides each example by its own length, and does not change.
    """
    first, second = rows(2)
    first["response_ids"][0], second["response_ids"][0] = [5, 6, 7, 8, 9, 10, 11, 2], [12, 2]
    for row in (first, second):
        row["scored_masks"] = [[1] * len(response) for response in row["response_ids"]]

    def difference(step, **settings):
        together = step(tmp_path, [first, second], **settings).loss
        return together - (step(tmp_path, [first], **settings).loss + step(tmp_path, [second], **settings).loss) / 2

    both = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0]}
    assert abs(difference(dpo_step, **both)) > 0.05
    assert abs(difference(our_step, ref_model=reference(), **both)) < 1e-5


def test_the_nll_of_tpo_changes_with_the_batch(tmp_path):
    """TRL's NLL is a mean over the tokens of gold responses with eight and two
    tokens, so splitting the batch changes it.
    """
    first, second = triples(2, seed=5)
    first["response_ids"][2], second["response_ids"][2] = [5, 6, 7, 8, 9, 10, 11, 2], [12, 2]
    for row in (first, second):
        row["scored_masks"] = [[1] * len(response) for response in row["response_ids"]]

    def difference(step, **settings):
        together = step(tmp_path, [first, second], **settings).loss
        return together - (step(tmp_path, [first], **settings).loss + step(tmp_path, [second], **settings).loss) / 2

    assert abs(difference(tpo_step, loss_type="sigmoid")) > 0.05
    assert abs(difference(our_step, loss_type="tpo")) < 1e-5


def test_wpo_weights_grow_beyond_one(tmp_path):
    """Greedy responses have p_t ≥ Σp², so w ≥ 1. TRL multiplies by w, but the paper's weight is at most 1."""
    model, data = policy(), rows(2)
    for row in data:
        prompt = torch.tensor([row["prompt_ids"]])
        for index, length in enumerate((4, 6)):
            output = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                min_new_tokens=length,
                max_new_tokens=length,
                eos_token_id=599,
            )
            row["response_ids"][index] = output[0, prompt.shape[1] :].tolist()
        row["scored_masks"] = [[1] * len(response) for response in row["response_ids"]]
    plain = dpo_step(tmp_path, data, loss_type="sigmoid").loss
    theirs = dpo_step(tmp_path, data, loss_type="sigmoid", use_weighting=True).loss
    ours = our_step(tmp_path, data, ref_model=reference(), loss_type="sigmoid", use_weighting=True).loss
    assert theirs > 1.1 * plain
    assert ours == pytest.approx(plain, rel=1e-5)


def test_weighting_with_an_sft_term_crashes(tmp_path):
    """TRL writes into an expanded tensor; ours weights the loss of the pairs and does not change the NLL."""
    settings = {"loss_type": ["sigmoid", "sft"], "use_weighting": True}
    with pytest.raises(RuntimeError):
        dpo_step(tmp_path, **settings)
    one = rows(1)
    parts = (
        dpo_step(tmp_path, one, loss_type="sigmoid", use_weighting=True).loss
        + dpo_step(tmp_path, one, loss_type="sft").loss
    )
    assert our_step(tmp_path, one, ref_model=reference(), **settings).loss == pytest.approx(parts, rel=1e-5)


def test_disabling_dropout_leaves_attention_dropout(tmp_path):
    """Attention dropout is a rate of the attention module, not an nn.Dropout. TRL's policy and its reference (adapter
    off) draw different masks, so the first loss is log 2 plus noise; ours is log 2.
    """
    models = [with_lora(tiny_model("qwen2", vocab_size=600, attention_dropout=0.5)) for _ in range(2)]
    theirs, ours = first_losses(tmp_path, *models, disable_dropout=True)
    assert abs(theirs - LOG_TWO) > 1e-3
    assert ours == pytest.approx(LOG_TWO, abs=1e-6)


def test_an_adapter_on_the_head_is_refused(tmp_path):
    """TRL reads only the head's weight, not its adapter, so TRL raises an error. Our trainer trains the adapter."""
    adapter = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], task_type="CAUSAL_LM")
    with pytest.raises(ValueError, match="lm_head"):
        dpo_trainer(tmp_path, policy(), peft_config=adapter)
    gradients = our_step(tmp_path, model=with_lora(policy(), target_modules=["q_proj", "lm_head"])).gradients
    assert any("lm_head.lora_B" in name and gradient.any() for name, gradient in gradients.items())


def test_evaluating_wants_a_training_set(tmp_path):
    """TRL's constructor raises an error for train_dataset=None; ours can evaluate."""
    with pytest.raises(ValueError, match="train_dataset"):
        dpo_trainer(tmp_path, ref_model=reference(), train_dataset=None)
    trainer = make_trainer(tmp_path, policy(), train_dataset=None)
    assert trainer.evaluate(Dataset.from_list(rows(2)))["eval_loss"] == pytest.approx(LOG_TWO, abs=1e-6)


def test_token_ids_are_refused(tmp_path):
    """Rows of token ids raise a KeyError in TRL, and are accepted here."""
    with pytest.raises(KeyError):
        dpo_trainer(tmp_path, ref_model=reference(), train_dataset=Dataset.from_list(trl_rows(rows())))
    make_trainer(tmp_path, policy(), train_dataset=Dataset.from_list(rows()), max_steps=1).train()


def test_rewards_of_ipo_are_not_its_own(tmp_path):
    """IPO compares log-ratios per token. TRL logs β·(summed log-ratio), and we log β·(log-ratio per token). On one
    pair, the two differ by a factor, the number of tokens.
    """
    one = rows(1)
    theirs = dpo_step(tmp_path, one, loss_type="ipo").metrics["rewards/chosen"]
    ours = our_step(tmp_path, one, ref_model=reference(), loss_type="ipo").metrics["rewards/chosen"]
    assert ours * len(one[0]["response_ids"][0]) == pytest.approx(theirs, rel=1e-5)


def test_simpo_comes_with_an_nll(tmp_path):
    """TRL's SimPO adds cpo_alpha = 1 times the NLL by default; ours is the paper's loss."""
    one, settings = rows(1), {"loss_type": "simpo", "beta": 2.0}
    ours = our_step(tmp_path, one, loss_params={"gamma": 0.5}, **settings)
    theirs = concatenated_step("cpo", tmp_path, one, simpo_gamma=0.5, **settings)
    assert theirs.loss == pytest.approx(ours.loss + theirs.metrics["nll_loss"], rel=1e-5)
    assert theirs.metrics["nll_loss"] > 1


def test_orpo_trains_on_the_prompt(tmp_path):
    """TRL's NLL in ORPO includes the prompt; ours is that of the response, as in all other losses."""
    one = rows(1)
    theirs = concatenated_step("orpo", tmp_path, one).metrics["nll_loss"]
    response = concatenated_step("cpo", tmp_path, one, loss_type="sigmoid").metrics["nll_loss"]
    ours = our_step(tmp_path, one, loss_type="orpo").metrics["loss/orpo_nll"]
    assert ours == pytest.approx(response, rel=1e-5)
    assert abs(theirs - response) > 0.1


def test_kto_is_not_shuffled(tmp_path):
    """TRL only accepts the order of the data, and its conversion of pairs puts all
    desirable rows first. We shuffle the rows.
    """
    with pytest.raises(ValueError, match="train_sampling_strategy"):
        kto_trainer(tmp_path, train_sampling_strategy="random")
    assert type(kto_trainer(tmp_path)._get_train_sampler()).__name__ == "SequentialSampler"
    trainer = make_trainer(tmp_path, loss_type="kto", train_dataset=unpaired(16))
    order = [row for batch in trainer.get_train_dataloader() for row in batch["rows"].tolist()]
    assert sorted(order) == list(range(16)) != order


def test_kto_takes_no_single_row(tmp_path):
    """TRL draws mismatched responses from the batch, so it raises an error for batches of one. We draw from the
    dataset, and 1 × 4 equals 4 × 1 (test_trainer_exactness tests this for every loss).
    """
    with pytest.raises(ValueError, match="batch size must be > 1"):
        kto_trainer(tmp_path, per_device_train_batch_size=1)
    trainer = make_trainer(
        tmp_path, loss_type="kto", train_dataset=unpaired(4), per_device_train_batch_size=1, max_steps=1
    )
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_row_left_over_is_its_own_mismatch(tmp_path):
    """With three rows in TRL's batches of two, the third row is alone in its batch,
    so its "mismatched" response is its own response. Here it never is.
    """
    from datasets import Dataset as Rows

    from tests.tokenizers import tiny_tokenizer

    texts = [("The capital of France is", " Paris."), ("The capital of Italy is", " Rome."), ("Once upon", " a time.")]
    data = Rows.from_list([{"prompt": p, "completion": c, "label": True} for p, c in texts])
    theirs = kto_trainer(tmp_path, per_device_train_batch_size=2)
    prepared = theirs._prepare_dataset(data, theirs.processing_class, theirs.args, "train")
    assert prepared[2]["KL_completion_ids"] == prepared[2]["completion_ids"]
    ours = make_trainer(
        tmp_path, tiny_model(vocab_size=600), loss_type="kto", train_dataset=data, processing_class=tiny_tokenizer()
    )
    for row in ours.get_train_dataloader().dataset:
        assert row["mismatched_ids"] != row["response_ids"]


def test_ktos_baseline_is_of_one_micro_batch(tmp_path):
    """TRL averages and clamps z in each micro-batch, so accumulation changes the loss; ours is over the whole step. In
    the first half, the mismatched responses are the policy's own greedy ones, which are more likely than under the
    reference; the log-ratios of the other half are below 0.
    """
    data, model = labeled_rows((True, False, True, False)), policy()
    for row in data[:2]:
        prompt = torch.tensor([row["prompt_ids"]])
        length = {"min_new_tokens": 8, "max_new_tokens": 8, "eos_token_id": 599}
        output = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, **length)
        row["mismatched_ids"], row["mismatched_masks"] = [output[0, prompt.shape[1] :].tolist()], [[1] * 8]
    settings = {"loss_type": "kto", "beta": 0.5}
    whole = kto_step(tmp_path, data, **settings).loss
    halves = [kto_step(tmp_path, part, **settings).loss for part in (data[:2], data[2:])]
    assert abs(sum(halves) / 2 - whole) > 1e-3
    assert our_step(tmp_path, data, ref_model=reference(), **settings).loss == pytest.approx(whole, rel=1e-5)
