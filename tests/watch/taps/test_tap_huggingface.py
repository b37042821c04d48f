"""Per-head entropies of Hugging Face models against those of the attention weights that they return."""

import pytest
import torch
from torch import Tensor, nn

from trimtab.watch.observe import observe

transformers = pytest.importorskip("transformers")

TOLERANCE = 1e-4  # what is asked for; what is reached is a few 1e-7

SMALL = {"vocab_size": 23, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def tokens(vocabulary: int = 23) -> dict[str, Tensor]:
    torch.manual_seed(1)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[1, 6:] = 0
    return {"input_ids": torch.randint(1, vocabulary, (3, 9)), "attention_mask": mask}


def gpt2(how: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.GPT2Config(vocab_size=23, n_positions=16, n_embd=32, n_layer=2, n_head=4)
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation=how), tokens()


def bert(how: str) -> tuple[nn.Module, dict[str, Tensor]]:
    config = transformers.BertConfig(**SMALL, intermediate_size=64, max_position_embeddings=16)
    return transformers.BertModel._from_config(config, attn_implementation=how), tokens()


def vit(how: str) -> tuple[nn.Module, dict[str, Tensor]]:
    small = {name: value for name, value in SMALL.items() if name != "vocab_size"}
    config = transformers.ViTConfig(**small, intermediate_size=64, image_size=12, patch_size=4)
    model = transformers.ViTModel._from_config(config, attn_implementation=how)
    return model, {"pixel_values": torch.randn(2, 3, 12, 12)}


def llama(how: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Two key heads for four query heads."""
    config = transformers.LlamaConfig(**SMALL, intermediate_size=64, num_key_value_heads=2)
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation=how), tokens()


def mistral(how: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A sliding window of 4 tokens."""
    config = transformers.MistralConfig(**SMALL, intermediate_size=64, num_key_value_heads=2, sliding_window=4)
    return transformers.MistralModel._from_config(config, attn_implementation=how), tokens()


def gemma2(how: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A soft cap, low enough to matter."""
    config = transformers.Gemma2Config(
        **SMALL, intermediate_size=64, num_key_value_heads=2, head_dim=8, attn_logit_softcapping=3.0, sliding_window=4
    )
    return transformers.Gemma2Model._from_config(config, attn_implementation=how), tokens()


def t5(how: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A bias by relative position, and cross attention."""
    config = transformers.T5Config(
        vocab_size=23, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    model = transformers.T5Model._from_config(config, attn_implementation=how)
    return model, tokens() | {"decoder_input_ids": torch.randint(1, 23, (3, 5))}


NAMES = {
    gpt2: ["transformer.h.{}.attn"],
    bert: ["encoder.layer.{}.attention.self"],
    vit: ["layers.{}.attention"],
    llama: ["model.layers.{}.self_attn"],
    mistral: ["layers.{}.self_attn"],
    gemma2: ["layers.{}.self_attn"],
    t5: [
        "encoder.block.{}.layer.0.SelfAttention",
        "decoder.block.{}.layer.0.SelfAttention",
        "decoder.block.{}.layer.1.EncDecAttention",
    ],
}


def enlarged_(model: nn.Module) -> nn.Module:
    """Weights large enough that heads differ and no entropy is close to its maximum."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.35)
    return model


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask:DeprecationWarning")
@pytest.mark.parametrize("how", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("make", list(NAMES), ids=lambda make: make.__name__)
def test_entropies_are_those_of_the_weights_that_the_model_returns(make, how) -> None:
    if make is gemma2 and how == "sdpa":
        pytest.skip("transformers refuses a soft cap with sdpa")
    if how == "flex_attention" and make in (gpt2, t5):
        pytest.skip("transformers has no flex_attention for GPT-2, and its T5 fails with it on a batch")
    reference, inputs = make("eager")
    enlarged_(reference).eval()
    model, _ = make(how)
    model.load_state_dict(reference.state_dict())
    model.eval()
    # transformers compiles flex_attention, which takes a C++ compiler and half a minute; the numbers are the same.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        returned = reference(**inputs, output_attentions=True)
        with observe(model) as seen:
            model(**inputs)
    weights = (
        [*returned.encoder_attentions, *returned.decoder_attentions, *returned.cross_attentions]
        if make is t5
        else returned.attentions
    )
    names = [pattern.format(layer) for pattern in NAMES[make] for layer in range(2)]
    assert sorted(seen.heads) == sorted(names)
    for name, layer in zip(names, weights, strict=True):
        expected = torch.special.entr(layer.double()).sum(-1).mean((0, 2))
        assert seen.heads[name].entropy == pytest.approx(expected.tolist(), abs=TOLERANCE)
        assert seen.heads[name].entropy.std() > 100 * TOLERANCE  # the heads differ: an average would not pass
    assert {row.seen for row in seen.coverage} == {"exact"}


def test_dropout_is_ignored() -> None:
    """In training, eager attention returns weights with dropout in them; the entropy is that before dropout."""
    model, inputs = bert("eager")
    enlarged_(model)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # all dropout but that of the attention weights, which is a number
    for layer in model.encoder.layer:
        layer.attention.self.dropout.p = 0.4
    with observe(model.train()) as seen:
        model(**inputs)
    with observe(model.eval()) as without:
        model(**inputs)
    first = "encoder.layer.0.attention.self"
    assert torch.equal(seen.heads[first].entropy, without.heads[first].entropy)
    assert {row.seen for row in seen.coverage} == {"exact"}


def test_an_eager_function_of_another_kind_is_listed_not_guessed(monkeypatch) -> None:
    model, inputs = llama("eager")
    enlarged_(model).eval()
    file = transformers.models.llama.modeling_llama
    own = file.eager_attention_forward

    def twice_as_sharp(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
        return own(module, 2 * query, key, value, attention_mask, scaling, dropout, **kwargs)

    monkeypatch.setattr(file, "eager_attention_forward", twice_as_sharp)
    with observe(model) as seen:
        model(**inputs)
    assert seen.heads == {}
    assert {row.module: row.seen for row in seen.coverage} == {
        f"model.layers.{layer}.self_attn": "not seen" for layer in range(2)
    }
    assert "softmax" in next(iter(seen.coverage)).why
    assert file.eager_attention_forward is twice_as_sharp


def test_attention_sinks_are_listed_not_guessed() -> None:
    config = transformers.GptOssConfig(
        **SMALL, intermediate_size=16, num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1
    )
    model = transformers.GptOssModel._from_config(config, attn_implementation="eager").eval()
    with observe(model) as seen:
        model(**tokens())
    assert seen.heads == {}
    assert {row.seen for row in seen.coverage} == {"not seen"}
