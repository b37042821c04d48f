import os
from dataclasses import replace

import pytest
import torch

from trimtab.errors import RecipeError
from trimtab.models.generation import generate
from trimtab.models.gpt import GPT, GPTConfig, rotate

TOKENS = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(5))


def config(**changes: object) -> GPTConfig:
    return replace(GPTConfig(11, context=9, dim=16, depth=2, num_heads=4), **changes)


def gpt(**changes: object) -> GPT:
    torch.manual_seed(0)
    return GPT(config(init_std=0.3, embedding_std=0.5, position_std=0.5, **changes)).double().eval()


def huggingface(model: GPT) -> torch.nn.Module:
    """The same weights in transformers' GPT-2."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import GPT2Config, GPT2LMHeadModel

    own = model.config
    other = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=own.vocab_size, n_positions=own.context, n_embd=own.dim, n_layer=own.depth, n_head=own.num_heads,
            activation_function="gelu", tie_word_embeddings=own.tied, bos_token_id=None, eos_token_id=None,
        )
    ).double().eval()  # fmt: skip
    state = model.state_dict()
    names = {"attention_norm": "ln_1", "mlp_norm": "ln_2", "attention.out": "attn.c_proj"}
    names |= {"mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
    made = {"transformer.wte.weight": state["embedding.weight"], "transformer.wpe.weight": state["position"]}
    made |= {"lm_head.weight": state["head.weight"]}
    for kind in ("weight", "bias"):
        made[f"transformer.ln_f.{kind}"] = state[f"norm.{kind}"]
        for block in range(own.depth):
            old, new = f"blocks.{block}", f"transformer.h.{block}"
            parts = [state[f"{old}.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            made[f"{new}.attn.c_attn.{kind}"] = torch.cat(parts)
            made |= {f"{new}.{theirs}.{kind}": state[f"{old}.{name}.{kind}"] for name, theirs in names.items()}
    conv1d = ("c_attn.weight", "c_proj.weight", "c_fc.weight")  # stored (in, out)
    made = {name: value.T if name.endswith(conv1d) else value for name, value in made.items()}
    other.load_state_dict(made)
    return other


@pytest.mark.parametrize("tied", [True, False])
def test_outputs_and_gradients_are_those_of_transformers_gpt2(tied: bool) -> None:
    model = gpt(tied=tied)
    other = huggingface(model)
    found, expected = model(TOKENS), other(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for logits in (found, expected):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).backward()
    theirs = other.transformer
    pairs = [(model.embedding.weight.grad, theirs.wte.weight.grad), (model.position.grad, theirs.wpe.weight.grad)]
    pairs += [(model.head.weight.grad, other.lm_head.weight.grad), (model.norm.bias.grad, theirs.ln_f.bias.grad)]
    for own, there in zip(model.blocks, theirs.h, strict=True):
        pairs.append((own.attention.key.weight.grad, there.attn.c_attn.weight.grad.T[16:32]))
        pairs.append((own.attention.out.weight.grad, there.attn.c_proj.weight.grad.T))
        pairs.append((own.mlp.down.weight.grad, there.mlp.c_proj.weight.grad.T))
        pairs.append((own.attention_norm.weight.grad, there.ln_1.weight.grad))
    for found, expected in pairs:
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_greedy_generation_is_that_of_transformers_gpt2() -> None:
    model = gpt(context=40)
    prompt = TOKENS[:, :4]
    found = huggingface(model).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False, pad_token_id=0
    )
    assert torch.equal(generate(model, prompt, 30, temperature=0), found[:, 4:])


def slow_rotary(model: GPT, tokens: torch.Tensor) -> torch.Tensor:
    """The forward with rotary positions, one head at a time: pairs of features are complex numbers that turn."""
    heads, width = model.config.num_heads, model.config.dim // model.config.num_heads
    frequency = 10000.0 ** (-torch.arange(width // 2, dtype=torch.float64) * 2 / width)
    angle = torch.arange(tokens.shape[1], dtype=torch.float64)[:, None] * frequency
    turn = torch.polar(torch.ones_like(angle), angle)
    future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool).triu(1)
    x = model.embedding.weight[tokens]
    for block in model.blocks:
        y = block.attention_norm(x)
        query, key, value = (getattr(block.attention, name)(y).split(width, -1) for name in ("query", "key", "value"))
        mixed = []
        for head in range(heads):
            q, k = (torch.complex(*each[head].chunk(2, -1)) * turn for each in (query, key))
            logits = (q @ k.conj().transpose(1, 2)).real / width**0.5
            mixed.append(logits.masked_fill(future, -float("inf")).softmax(dim=-1) @ value[head])
        x = x + block.attention.out(torch.cat(mixed, dim=-1))
        x = x + block.mlp.down(torch.nn.functional.gelu(block.mlp.up(block.mlp_norm(x))))
    return model.norm(x) @ model.head.weight.T


def test_rotary_positions_are_turns_of_complex_numbers() -> None:
    model = gpt(positions="rotary", tied=False)
    assert model.position is None
    torch.testing.assert_close(model(TOKENS), slow_rotary(model, TOKENS), rtol=1e-9, atol=1e-9)


def test_rotary_logits_know_only_how_far_apart_two_positions_are() -> None:
    query, key = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    near = (rotate(query, 3) * rotate(key, 1)).sum()
    far = (rotate(query, 1003) * rotate(key, 1001)).sum()
    torch.testing.assert_close(near, far)
    assert not torch.isclose(near, (rotate(query, 4) * rotate(key, 1)).sum())


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
@pytest.mark.parametrize("positions", ["learned", "rotary"])
def test_a_token_at_a_time_from_the_cache_is_the_whole_sequence(norm: str, positions: str) -> None:
    model = gpt(norm=norm, positions=positions)
    whole = model(TOKENS)
    cache = model.empty_cache()
    parts = [model(TOKENS[:, :4], cache), *(model(TOKENS[:, place : place + 1], cache) for place in range(4, 9))]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match=r"T from 1 to 0; got \(3, 1\)"):
        model(TOKENS[:, :1], cache)


def test_no_token_sees_what_comes_after_it() -> None:
    model = gpt()
    changed = TOKENS.clone()
    changed[:, 5] = (changed[:, 5] + 1) % 11
    before, after = model(TOKENS), model(changed)
    assert torch.equal(before[:, :5], after[:, :5])
    assert not torch.isclose(before[:, 5:], after[:, 5:]).all()


@pytest.mark.parametrize("norm", ["pre", "post", "none"])
def test_norms_stand_where_the_config_puts_them(norm: str) -> None:
    model = GPT(config(norm=norm))
    norms = [name for name, module in model.named_modules() if isinstance(module, torch.nn.LayerNorm)]
    inside = [f"blocks.{block}.{name}_norm" for block in range(2) for name in ("attention", "mlp")]
    assert norms == {"pre": [*inside, "norm"], "post": inside, "none": []}[norm]


def test_post_norm_normalises_what_leaves_a_block() -> None:
    x = gpt(norm="post").blocks[0](torch.randn(4, 9, 16, dtype=torch.float64) * 100)
    torch.testing.assert_close(x.std(dim=-1, correction=0), torch.ones(4, 9, dtype=torch.float64), rtol=1e-3, atol=1e-3)


def test_weights_start_where_the_config_says() -> None:
    torch.manual_seed(0)
    model = GPT(
        config(dim=64, vocab_size=200, context=64, tied=False, init_std=0.4, embedding_std=0.1, position_std=0.3,
               residual_gain=0.5)
    )  # fmt: skip
    block = model.blocks[1]
    stds = {
        "embedding": (model.embedding.weight, 0.1),
        "position": (model.position, 0.3),
        "head": (model.head.weight, 0.4),
        "query": (block.attention.query.weight, 0.4),
        "out": (block.attention.out.weight, 0.2),
        "up": (block.mlp.up.weight, 0.4),
        "down": (block.mlp.down.weight, 0.2),
    }
    for name, (weight, std) in stds.items():  # 4,096 numbers or more: their deviation is good to about 1 %
        assert weight.std().item() == pytest.approx(std, rel=0.05), name
    assert all(not parameter.any() for name, parameter in model.named_parameters() if name.endswith("bias"))
    cut = GPT(config(init="trunc_normal", init_std=0.4, tied=False))
    assert 0.6 < cut.blocks[0].mlp.up.weight.abs().max() <= 0.8
    glorot = GPT(config(init="xavier")).blocks[0].mlp.up.weight
    assert 0.9 * (6 / 80) ** 0.5 < glorot.abs().max() <= (6 / 80) ** 0.5
    assert GPT(config(init="torch")).blocks[0].mlp.up.bias.abs().max() > 0


def test_a_tied_head_is_the_embedding() -> None:
    tied, apart = GPT(config()), GPT(config(tied=False))
    assert tied.head.weight is tied.embedding.weight
    assert apart.head.weight is not apart.embedding.weight


def test_the_same_seed_gives_the_same_model() -> None:
    for first, second in zip(gpt().parameters(), gpt().parameters(), strict=True):
        assert torch.equal(first, second)


def test_dropout_is_for_training_alone() -> None:
    model = gpt(dropout=0.5)
    assert torch.equal(model(TOKENS), model(TOKENS))
    model.train()
    assert not torch.equal(model(TOKENS), model(TOKENS))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 18}, "dim 18 is not a multiple of num_heads 4"),
        ({"vocab_size": 0}, "vocab_size must be at least 1, got 0"),
        ({"norm": "rms"}, "norm must be one of pre, post, none; got 'rms'"),
        ({"positions": "sine"}, "positions must be one of learned, rotary; got 'sine'"),
        ({"embedding_std": 0.0}, "embedding_std must be a positive number"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"dim": 12, "positions": "rotary"}, "dim / num_heads must be even, got 12 / 4"),
    ],
)
def test_a_config_that_fits_no_model_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        config(**changes)


def test_a_model_without_a_vocabulary_is_refused() -> None:
    with pytest.raises(RecipeError, match="needs a vocab_size"):
        GPT(config(vocab_size=None))


def test_tokens_that_do_not_fit_are_refused() -> None:
    model = gpt()
    with pytest.raises(ValueError, match=r"T from 1 to 9; got \(1, 10\)"):
        model(torch.zeros(1, 10, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got \(4,\)"):
        model(torch.zeros(4, dtype=torch.int64))
    cache = model.empty_cache()
    model(TOKENS[:, :3], cache)
    with pytest.raises(ValueError, match="one token at a time may follow those in the cache, got 2"):
        model(TOKENS[:, 3:5], cache)
