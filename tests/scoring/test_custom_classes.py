"""Custom model classes, as in remote code: the results are exact, or an error says what is missing."""

import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, LlamaForCausalLM, PreTrainedConfig
from transformers import PreTrainedModel as Model
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from hf_prefopt.scoring.forward import base_causal_lm, score
from tests.scoring.plain import assert_same_gradients, gradients
from tests.tiny_models import perturbed, random_rows, tiny_model, with_lora
from tests.trainers import logged, make_trainer


class OwnConfig(PreTrainedConfig):
    model_type = "own_decoder"
    vocab_size: int = 300
    hidden_size: int = 32
    num_hidden_layers: int = 2


class OwnLayer(nn.Module):
    """Attention that does not use transformers' interface, with a mask that the body computes."""

    def __init__(self, config):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), nn.MultiheadAttention(32, 4, batch_first=True)
        self.mlp = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x, mask):
        normed = self.norm(x)
        x = x + self.attention(normed, normed, normed, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(x)


class OwnBody(Model):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        self.tokens, self.positions = nn.Embedding(300, 32), nn.Embedding(256, 32)
        self.layers = nn.ModuleList([OwnLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def hidden(self, input_ids):
        length = input_ids.shape[1]  # padding is on the right, so causal attention needs no other mask
        mask = torch.ones(length, length, dtype=torch.bool).triu(1)
        x = self.tokens(input_ids) + self.positions(torch.arange(length))
        for layer in self.layers:
            x = layer(x, mask)
        return x

    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None):
        return BaseModelOutput(last_hidden_state=self.hidden(input_ids))


class OwnModel(Model, GenerationMixin):
    """A model without position_ids, logits_to_keep, and **kwargs."""

    config_class = OwnConfig
    base_model_prefix = "transformer"
    body = OwnBody

    def __init__(self, config):
        super().__init__(config)
        self.transformer, self.lm_head = self.body(config), nn.Linear(32, 300, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.transformer.tokens

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None):
        return CausalLMOutput(logits=self.lm_head(self.transformer(input_ids).last_hidden_state))


class Scaled(OwnModel):
    """A model that scales its logits, although its config does not mention a scale."""

    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None):
        return CausalLMOutput(logits=3 * super().forward(input_ids).logits)


class Deeper(LlamaForCausalLM):
    """A model with a layer between base model and head."""

    def __init__(self, config):
        super().__init__(config)
        self.extra = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, input_ids=None, attention_mask=None, use_cache=None, return_dict=None, **kwargs):
        hidden = self.model(input_ids, attention_mask, use_cache=use_cache, **kwargs).last_hidden_state
        return CausalLMOutput(logits=self.lm_head(torch.tanh(self.extra(hidden))))


class Tuples(OwnModel):
    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None):
        return (super().forward(input_ids).logits,)


class Dicts(OwnModel):
    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None):
        return {"logits": super().forward(input_ids).logits}


class NoArguments(OwnModel):
    def forward(self, input_ids, attention_mask=None):
        return super().forward(input_ids)


class BodyOfTuples(OwnModel):
    class body(OwnBody):
        def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None):
            return (self.hidden(input_ids),)

    def forward(self, input_ids, attention_mask=None, use_cache=None, return_dict=None):
        return CausalLMOutput(logits=self.lm_head(self.transformer(input_ids)[0]))


def made(cls):
    torch.manual_seed(0)
    config = tiny_model().config if cls is Deeper else OwnConfig(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return perturbed(cls(config), 0.3).eval()


@pytest.mark.parametrize("cls", [OwnModel, Scaled, Deeper])
def test_a_class_of_ones_own_is_exact(cls, tmp_path):
    """Log-probs and gradients equal those of each sequence alone, from the model's own logits.

    Sums of at most 60 terms in fp32, through about ten products: a hundred roundings of 6e-8 each are 6e-6. In
    gradients, cancellation increases this tenfold.
    """
    rows, plain = random_rows(3), made(cls)
    trainer = make_trainer(tmp_path, made(cls), train_dataset=Dataset.from_list(rows), max_steps=1)
    trainer.scorer.settle()
    (batch,) = trainer._prepare_inputs(trainer.data_collator(rows))["pieces"]
    expected = torch.stack([alone(plain, row["prompt_ids"], ids) for row in rows for ids in row["response_ids"]])
    found = score(trainer.model.train(), batch).logps
    torch.testing.assert_close(found, expected, rtol=6e-6, atol=0)
    signs = torch.linspace(-1, 1, len(expected))
    assert_same_gradients(
        gradients((found * signs).sum(), trainer.model), gradients((expected * signs).sum(), plain), rtol=6e-5
    )
    trainer.train()
    # β = 0.1 times log-ratios of log-probs of up to 2,000 nats, with a unit in the last place of 1.2e-4.
    assert logged(trainer, "loss") == [pytest.approx(0.693147, abs=1e-4)]
    assert trainer.layout == ("shared" if cls is Deeper else "padded")


def alone(model, prompt, response):
    ids = torch.tensor([prompt + response])
    logps = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(response)[:, None]).sum()


def test_a_registered_class_is_loaded_by_name(tmp_path):
    AutoConfig.register("own_decoder", OwnConfig, exist_ok=True)
    AutoModelForCausalLM.register(OwnConfig, OwnModel, exist_ok=True)
    made(OwnModel).save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "run", str(tmp_path / "base"), max_steps=1)
    trainer.train()
    assert isinstance(trainer.model, OwnModel) and len(logged(trainer, "loss")) == 1


@pytest.mark.parametrize(
    ("cls", "missing"),
    [
        (Tuples, "'tuple' object has no attribute 'logits'"),
        (Dicts, "'dict' object has no attribute 'logits'"),
        (NoArguments, "unexpected keyword argument 'use_cache'"),
        (BodyOfTuples, "'tuple' object has no attribute 'last_hidden_state'"),
    ],
)
def test_what_a_class_lacks_is_named(cls, missing, tmp_path):
    with pytest.raises(
        TypeError, match=rf"{cls.__name__} does not follow the conventions .*{missing}.* return a Model"
    ):
        make_trainer(tmp_path, made(cls), max_steps=1).train()


@pytest.mark.parametrize("name", ["model", "ref_model"])
def test_a_compiled_model_is_refused(name, tmp_path):
    models = {"model": tiny_model(), "ref_model": tiny_model(), name: torch.compile(tiny_model(), backend="eager")}
    with pytest.raises(ValueError, match=rf"{name} is wrapped by torch.compile: pass the model itself \({name}._orig"):
        make_trainer(tmp_path, **models)
    for make in (tiny_model, lambda: with_lora(tiny_model())):
        models[name] = make()
        base_causal_lm(models[name]).compile(backend="eager")
        with pytest.raises(
            ValueError, match=rf"{name} was compiled in place by compile\(\): .* set torch_compile=True"
        ):
            make_trainer(tmp_path, **models)
    models[name] = nn.DataParallel(tiny_model())
    with pytest.raises(ValueError, match=rf"{name} is wrapped by DataParallel: pass the model itself \({name}.module"):
        make_trainer(tmp_path, **models)
