"""The auxiliary loss of a mixture of experts: part of the objective if the config says so, and exact in every layout.

The loss of routers is E · Σ_e f_e · P_e, over all layers at once: f_e is the share of tokens that choose expert e,
times the number of choices, and P_e the mean probability of e. Both are means over the tokens of a forward, in which a
prompt counts once for each of its responses.
"""

import math

import pytest
import torch
from peft import LoraConfig

from hf_prefopt.data.layouts import AroundCollator, PaddedCollator, SharedCollator
from hf_prefopt.scoring.around import install_around
from hf_prefopt.scoring.attention import install_segment_attention
from hf_prefopt.scoring.forward import install_scoring, score
from hf_prefopt.scoring.tail import body_of
from tests.parity.peers import dpo_trainer, step_of, trl_rows
from tests.scoring.plain import assert_same_gradients, gradients
from tests.tiny_models import perturbed, random_rows, tiny_model, with_lora
from tests.trainers import logged, make_trainer, pairs

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "qwen3_moe": EXPERTS,
    "mixtral": {"num_local_experts": 4},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 16},
}

LAYOUTS = {
    "padded": (lambda model: None, PaddedCollator(0)),
    "shared": (install_segment_attention, SharedCollator()),
    "around": (lambda model: install_around(model, body_of(model)), AroundCollator(PaddedCollator(0))),
}


def moe(name="qwen3_moe", **settings):
    return tiny_model(name, **{**FAMILIES[name], **settings})


def by_hand(model, rows):
    """Return the auxiliary loss, from the routers' logits of each sequence alone, in float64."""
    logits = [[] for _ in range(model.config.num_hidden_layers)]
    for row in rows:
        for response in row["response_ids"]:
            output = model(input_ids=torch.tensor([row["prompt_ids"] + response]), output_router_logits=True)
            for layer, found in zip(logits, output.router_logits, strict=True):
                layer.append(found.double())
    logits = torch.cat([torch.cat(layer) for layer in logits])
    probabilities = logits.softmax(-1)
    chosen = torch.nn.functional.one_hot(probabilities.topk(2).indices, 4).double().sum(1)
    return 4 * (chosen.mean(0) * probabilities.mean(0)).sum()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_prompt_counts_once_for_each_response(layout, name):
    """fp32 logits of single sequences and of the batch differ by roundings of 6e-8 · 30, and so do probabilities; a
    mean over 200 of them agrees to 1e-5. The gradient is compared as in test_forward.
    """
    model, rows = moe(name), random_rows(3)
    expected = by_hand(model, rows)
    wanted = gradients(expected.float(), model)
    install_scoring(model)
    install, collator = LAYOUTS[layout]
    install(model)
    scores = score(model, collator(rows), with_aux_loss=True)
    torch.testing.assert_close(scores.aux_loss.double(), expected, rtol=1e-5, atol=0)
    assert_same_gradients(gradients(scores.aux_loss, model), wanted, rtol=1e-3)


@pytest.mark.parametrize("coefficient", [None, 0.5, 0.0])
def test_loss_and_gradients_are_trls(coefficient, tmp_path):
    """TRL 1.16's DPOTrainer gets the same batch; by default, both use the config's coefficient, which is 10 here."""
    pytest.importorskip("trl")
    rows, settings = random_rows(3), {"router_aux_loss_coef": coefficient}

    def policy():
        return perturbed(moe(vocab_size=600, router_aux_loss_coef=10.0), scale=0.05)

    def reference():
        return moe(vocab_size=600)

    theirs = dpo_trainer(tmp_path / "trl", policy(), reference(), **settings)
    theirs.model.train()
    expected = step_of(theirs.compute_loss(theirs.model, theirs.data_collator(trl_rows(rows))), theirs.model, {})
    for layout in ("padded", "shared"):
        ours = make_trainer(tmp_path / layout, policy(), ref_model=reference(), layout=layout, **settings)
        ours.scorer.settle()
        ours.model.train()
        (batch,) = ours.data_collator(rows)["pieces"]
        found = step_of(ours.compute_loss(ours.model, batch), ours.model, {})
        assert found.loss == pytest.approx(expected.loss, rel=1e-5)
        assert_same_gradients(found.gradients, expected.gradients, rtol=1e-4)
        metrics = ours.record.pop_means(ours.accelerator)
        if coefficient == 0.0:
            assert "aux_loss" not in metrics
        else:
            assert metrics["aux_loss"] == pytest.approx(theirs._metrics["train"]["aux_loss"][0], rel=1e-5)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"loss_type": "aot"}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_steps_by_hand(layout, settings, tmp_path):
    """The logged loss includes it, and `aux_loss` is logged without its coefficient:
    DPO's first loss is log 2 + 3 · aux.

    The second step starts from weights after plain SGD on the same loss. AOT's loss is collected over the whole step.
    """
    train = pairs(4)
    trainer = make_trainer(
        tmp_path,
        moe(router_aux_loss_coef=3.0),
        layout=layout,
        train_dataset=train,
        eval_dataset=train,
        per_device_train_batch_size=4,
        max_steps=2,
        optim="sgd",
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        **settings,
    )
    plain = moe()
    first = by_hand(plain, list(train))
    before = trainer.evaluate()
    assert before["eval_aux_loss"] == pytest.approx(first.item(), rel=1e-2)  # the mean of the two batches' own losses
    trainer.train()
    assert logged(trainer, "aux_loss")[0] == pytest.approx(first.item(), rel=1e-5)
    assert logged(trainer, "loss")[0] == pytest.approx(math.log(2) + 3 * first.item(), rel=1e-5)
    (3 * first).backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter -= 1e-3 * (0 if parameter.grad is None else parameter.grad)
    # DPO's own gradient changes the routers, too, but only by 1e-3 of a gradient of order β, in the third digit.
    assert logged(trainer, "aux_loss")[1] == pytest.approx(by_hand(plain, list(train)).item(), rel=1e-2)
    assert logged(trainer, "aux_loss")[1] < logged(trainer, "aux_loss")[0]


def test_forwards_count_by_their_examples(tmp_path):
    """Six pairs in batches of 4 and 2, in one step: 4/6 of the first forward's
    auxiliary loss and 2/6 of the second's.
    """
    train = pairs(6)
    settings = {"per_device_train_batch_size": 4, "train_sampling_strategy": "sequential", "num_train_epochs": 1}
    trainer = make_trainer(
        tmp_path, moe(router_aux_loss_coef=1.0), train_dataset=train, gradient_accumulation_steps=2, **settings
    )
    plain = moe()
    expected = (4 * by_hand(plain, list(train)[:4]) + 2 * by_hand(plain, list(train)[4:])) / 6
    trainer.train()
    assert logged(trainer, "aux_loss") == [pytest.approx(expected.item(), rel=1e-5)]
    assert logged(trainer, "loss") == [pytest.approx(math.log(2) + expected.item(), rel=1e-5)]


def test_reentrant_checkpointing_is_refused(tmp_path):
    """Reentrant checkpointing runs the layers without a graph, so the routers' logits have no gradient."""
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}
    trainer = make_trainer(tmp_path, moe(), max_steps=1, **settings)
    with pytest.raises(RuntimeError, match=r"'use_reentrant': False.*router_aux_loss_coef=0"):
        trainer.train()


class TestWhatIsSaid:
    def said(self, folder, model, **settings):
        trainer = make_trainer(folder, model, **settings)
        trainer.scorer.settle()
        return trainer.summary.as_dict()["model"]

    def test_the_coefficient(self, tmp_path):
        assert "plus 0.001 × the auxiliary router loss (aux_loss)" in self.said(tmp_path, moe())

    def test_a_constant(self, tmp_path):
        """Only the last layer's experts train, and no router follows them."""
        model = moe().requires_grad_(False)
        model.model.layers[1].mlp.experts.requires_grad_(True)
        assert "a constant, because no trained parameter comes before a router" in self.said(tmp_path, model)

    def test_adapters_before_frozen_routers_are_moved(self, tmp_path):
        """The routers' logits depend on hidden states that adapters change, although the routers are frozen."""
        adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
        model = with_lora(moe(), target_modules=["q_proj", "v_proj"])
        assert "whose gradient reaches the adapters" in self.said(tmp_path, model)
        trainer = make_trainer(tmp_path, moe(), peft_config=adapter)
        trainer.scorer.settle()
        (batch,) = trainer.data_collator(random_rows(3))["pieces"]
        aux = score(trainer.model, batch, with_aux_loss=True).aux_loss
        assert any(gradient.abs().max() > 0 for gradient in gradients(aux, trainer.model).values())

    def test_what_has_none(self, tmp_path):
        assert "auxiliary" not in self.said(tmp_path, tiny_model())
        assert "no auxiliary router loss: router_aux_loss_coef is 0" in self.said(
            tmp_path, moe(router_aux_loss_coef=0.0)
        )
        with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.5: LlamaForCausalLM has no auxiliary loss"):
            make_trainer(tmp_path, tiny_model(), router_aux_loss_coef=0.5)
        with pytest.raises(ValueError, match=r"router_aux_loss_coef=-1\.0"):
            make_trainer(tmp_path, moe(), router_aux_loss_coef=-1.0)
