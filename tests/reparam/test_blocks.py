"""Which rows get a sigma of their own: judged by which of them reach which query, key or value of which head."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import trimtab as tt
from trimtab.reparam import sigma_gamma
from trimtab.reparam.blocks import block_sizes, places, rows_and_columns
from trimtab.reparam.plan import choose

Blocks = Any


def sizes(model: nn.Module, blocks: Blocks) -> dict[str, tuple[int, ...]]:
    return {site.name: site.sizes for site in choose(model, tt.SigmaReparam(blocks=blocks), None)[0]}


def receivers(
    layer: nn.Module, blocks: tuple[int, ...], heads: Callable[[], list[Tensor]]
) -> list[set[tuple[str, int]]]:
    """Return, for each row block of a layer, the heads of query, key and value that its rows alone reach.

    ``heads`` runs the model and returns q, k and v as they enter the attention, each of shape (B, H, L, D).
    """
    rows, columns = rows_and_columns(layer, layer.weight)

    def reached(block: Tensor) -> set[tuple[str, int]]:
        matrix = torch.zeros(rows, columns)
        matrix[block] = torch.rand(len(block), columns) + 0.5
        with torch.no_grad():
            layer.weight.copy_(matrix if layer.weight.shape == matrix.shape else matrix.t())
            if layer.bias is not None:
                layer.bias.zero_()
        return {
            (name, head)
            for name, tensor in zip("qkv", heads(), strict=True)
            for head in tensor.abs().amax((0, 2, 3)).nonzero().flatten().tolist()
        }

    by_other_layers = reached(torch.arange(0))
    return [reached(block) - by_other_layers for block in torch.arange(rows).split(blocks)]


# --- transformers -------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")

SMALL = {"vocab_size": 20, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
GPT = SMALL | {"n_positions": 8, "n_embd": 24, "n_layer": 1, "n_head": 4}
LLAMA = SMALL | {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
BERT = LLAMA | {"max_position_embeddings": 16}
MODERN = BERT | {"cls_token_id": 0, "sep_token_id": 0, "layer_types": ["full_attention"]}

# model: (class prefix, config, layer, rows under "auto", rows of one head)
MODELS: dict[str, tuple[str, dict[str, Any], str, tuple[int, ...], int]] = {
    "gpt2": ("GPT2", GPT, "h.0.attn.c_attn", (24, 24, 24), 6),
    "multi-query": ("GPTBigCode", GPT | {"multi_query": True}, "h.0.attn.c_attn", (24, 6, 6), 6),
    "bigcode-by-head": ("GPTBigCode", GPT | {"multi_query": False}, "h.0.attn.c_attn", (72,), 6),
    "phi3": ("Phi3", LLAMA | {"num_key_value_heads": 2}, "layers.0.self_attn.qkv_proj", (32, 16, 16), 8),
    "modernbert": ("ModernBert", MODERN, "layers.0.attn.Wqkv", (32, 32, 32), 8),
    "neox-by-head": ("GPTNeoX", BERT, "layers.0.attention.query_key_value", (96,), 8),
    "persimmon-by-head": (
        "Persimmon",
        BERT | {"qk_layernorm": False},
        "layers.0.self_attn.query_key_value",
        (96,),
        8,
    ),
    "llama-query": ("Llama", LLAMA | {"num_key_value_heads": 2}, "layers.0.self_attn.q_proj", (32,), 8),
    "llama-value": ("Llama", LLAMA | {"num_key_value_heads": 2}, "layers.0.self_attn.v_proj", (16,), 8),
    "bert-key": ("Bert", BERT, "encoder.layer.0.attention.self.key", (32,), 8),
}


def spied(prefix: str, options: dict[str, Any]) -> tuple[nn.Module, list[list[Tensor]]]:
    """Return a tiny model of transformers and the list into which its attention writes (q, k, v) at every call."""
    seen: list[list[Tensor]] = []

    def spy(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **rest: Any
    ) -> tuple[Tensor, None]:
        seen.append([query, key, value])
        return query.transpose(1, 2), None

    transformers.AttentionInterface.register("spy", spy)
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**options, attn_implementation="spy")
    return getattr(transformers, f"{prefix}Model")(config).eval(), seen


@pytest.mark.parametrize(("prefix", "options", "name", "auto", "head_dim"), MODELS.values(), ids=MODELS.keys())
def test_rows_of_transformers(
    prefix: str, options: dict[str, Any], name: str, auto: tuple[int, ...], head_dim: int
) -> None:
    model, seen = spied(prefix, options)
    layer = model.get_submodule(name)
    rows = layer.weight.numel() // options.get("n_embd", options.get("hidden_size"))
    by_head = (head_dim,) * (rows // head_dim)
    assert sizes(model, "auto")[f"{name}.weight"] == auto
    assert sizes(model, "heads")[f"{name}.weight"] == by_head
    assert sizes(model, "one")[f"{name}.weight"] == (rows,)

    def heads() -> list[Tensor]:
        seen.clear()
        model(torch.arange(6).reshape(1, 6))
        return seen[0]

    parts = receivers(layer, auto, heads)
    if len(auto) == 3:
        assert ["".join(sorted({kind for kind, _ in part})) for part in parts] == ["q", "k", "v"]
    elif rows == 3 * options.get("n_embd", options.get("hidden_size")):  # a third of these would mix all three
        thirds = receivers(layer, (rows // 3,) * 3, heads)
        assert all({kind for kind, _ in part} == {"q", "k", "v"} for part in thirds)
    single = receivers(layer, by_head, heads)
    assert all(len(reached) == 1 for reached in single)
    assert len(set.union(*single)) == len(by_head)


def test_keys_and_values_of_gpt2_cross_attention() -> None:
    model, _ = spied("GPT2", GPT | {"add_cross_attention": True})
    cross = "h.0.crossattention"
    assert sizes(model, "auto")[f"{cross}.c_attn.weight"] == (24, 24)
    assert sizes(model, "auto")[f"{cross}.q_attn.weight"] == (24,)
    assert sizes(model, "heads")[f"{cross}.c_attn.weight"] == (6,) * 8
    assert sizes(model, "heads")[f"{cross}.q_attn.weight"] == (6,) * 4


def test_models_that_split_by_a_method() -> None:
    """Row numbers sent through the model's own splitting come out as the heads' queries, keys and values."""
    bloom = transformers.BloomModel(transformers.BloomConfig(vocab_size=20, hidden_size=32, n_layer=1, n_head=4))
    falcon = {"vocab_size": 20, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    models = {
        "bloom": (bloom, "_reshape"),
        "falcon-7b": (make_falcon(falcon | {"multi_query": True}), "_split_heads"),
        "falcon-rw": (make_falcon(falcon | {"multi_query": False}), "_split_heads"),
        "falcon-40b": (make_falcon(falcon | {"new_decoder_architecture": True, "num_kv_heads": 2}), "_split_heads"),
    }
    expected = {"bloom": (96,), "falcon-7b": (32, 8, 8), "falcon-rw": (96,), "falcon-40b": (64,)}
    for name, (model, method) in models.items():
        attention = model.get_submodule("h.0.self_attention")
        rows = attention.query_key_value.weight.shape[0]
        where, layer = places(model), attention.query_key_value
        auto, heads = (
            block_sizes(layer, name, (rows, 32), where[id(layer)], tt.SigmaReparam(blocks=blocks))
            for blocks in ("auto", "heads")
        )
        assert auto == expected[name]
        assert heads == (8,) * (rows // 8)
        made = getattr(attention, method)(torch.arange(rows).view(1, 1, rows))  # a head's numbers: the last dimension
        lines = [line.tolist() for part in made for line in part.flatten(0, -2)]
        assert {tuple(line) for line in lines} == {tuple(range(i, i + 8)) for i in range(0, rows, 8)}
        queries = set(made[0].flatten().tolist())
        assert (queries == set(range(len(queries)))) == (len(auto) == 3)


def make_falcon(options: dict[str, Any]) -> nn.Module:
    return transformers.FalconModel(transformers.FalconConfig(**options))


def test_other_models_of_transformers() -> None:
    hidden = {"hidden_size": 32, "num_attention_heads": 4}
    mpt = transformers.MptModel(transformers.MptConfig(vocab_size=20, d_model=32, n_heads=4, n_layers=1))
    assert sizes(mpt, "auto")["blocks.0.attn.Wqkv.weight"] == (32, 32, 32)
    assert sizes(mpt, "heads")["blocks.0.attn.Wqkv.weight"] == (8,) * 12
    codegen = transformers.CodeGenModel(
        transformers.CodeGenConfig(vocab_size=20, n_embd=32, n_layer=1, n_head=4, rotary_dim=8)
    )
    assert sizes(codegen, "auto")["h.0.attn.qkv_proj.weight"] == (96,)
    assert sizes(codegen, "heads")["h.0.attn.qkv_proj.weight"] == (8,) * 12
    t5 = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=20, d_model=16, d_kv=6, num_heads=4, num_layers=1, d_ff=8)
    )
    assert sizes(t5, "heads")["encoder.block.0.layer.0.SelfAttention.k.weight"] == (6,) * 4
    assert sizes(t5, "heads")["encoder.block.0.layer.0.SelfAttention.o.weight"] == (16,)
    latent = transformers.DeepseekV3Model(
        transformers.DeepseekV3Config(
            vocab_size=20,
            **hidden,
            intermediate_size=16,
            num_hidden_layers=1,
            first_k_dense_replace=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_nope_head_dim=4,
            qk_rope_head_dim=2,
            v_head_dim=5,
        )
    )
    by_head = sizes(latent, "heads")
    assert by_head["layers.0.self_attn.q_b_proj.weight"] == (6,) * 4
    assert by_head["layers.0.self_attn.kv_b_proj.weight"] == (4, 5) * 4
    assert by_head["layers.0.self_attn.kv_a_proj_with_mqa.weight"] == (10,)
    assert sizes(latent, "auto")["layers.0.self_attn.kv_b_proj.weight"] == (36,)


def test_gpt2_by_parts_is_the_same_function_and_trains_each_part() -> None:
    """Transposed storage: the rows of a block are columns of the stored weight."""
    torch.manual_seed(0)
    model = transformers.GPT2Model(transformers.GPT2Config(**GPT, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0))
    ids = torch.arange(12).reshape(2, 6)
    before = model(ids).last_hidden_state
    tt.reparametrize_(model, tt.SigmaReparam(blocks="heads"))
    torch.testing.assert_close(model(ids).last_hidden_state, before, rtol=1e-5, atol=1e-5)
    layer = model.h[0].attn.c_attn
    assert layer.gamma.shape == (12,)
    with torch.no_grad():
        layer.gamma.copy_(torch.linspace(0.5, 2.0, 12))
    norms = [torch.linalg.matrix_norm(part, 2) for part in tt.effective_weight(layer).split(6, dim=1)]
    torch.testing.assert_close(torch.stack(norms).detach(), torch.linspace(0.5, 2.0, 12))
    x = torch.randn(5, 24)
    torch.testing.assert_close(layer(x), x @ tt.effective_weight(layer) + layer.bias)


# --- timm and small GPTs, by look-alikes that lay their rows out as those do -----------------------------------------


class TimmAttention(nn.Module):
    """As in timm's VisionTransformer and EVA."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim = 3, 4
        self.qkv = nn.Linear(12, 36)
        self.proj = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4).unbind(0)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SwinAttention(TimmAttention):
    """Tells its number of heads only."""

    def __init__(self) -> None:
        super().__init__()
        del self.head_dim

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class MaxxAttention(nn.Module):
    """As in timm's MaxxViT: a switch says in which order."""

    def __init__(self, head_first: bool) -> None:
        super().__init__()
        self.num_heads, self.dim_head, self.head_first = 3, 4, head_first
        self.qkv = nn.Linear(12, 36)

    def forward(self, x: Tensor) -> Tensor:
        if self.head_first:
            heads = self.qkv(x).view(len(x), -1, self.num_heads, 3 * self.dim_head).transpose(1, 2).chunk(3, dim=3)
        else:
            heads = self.qkv(x).reshape(len(x), -1, 3, self.num_heads, self.dim_head).transpose(1, 3).unbind(2)
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class LevitAttention(nn.Module):
    """As in timm's TinyViT: head by head, with values wider than keys."""

    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.key_dim, self.val_dim = 3, 2, 8
        self.qkv = nn.Linear(12, 36)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(x).view(*x.shape[:2], self.num_heads, -1).transpose(1, 2).split([2, 2, 8], dim=3)
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


class CausalSelfAttention(nn.Module):
    """As in nanoGPT."""

    def __init__(self) -> None:
        super().__init__()
        self.n_head = 3
        self.c_attn = nn.Linear(12, 36, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        heads = (part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.c_attn(x).split(12, dim=2))
        return F.scaled_dot_product_attention(*heads, is_causal=True).transpose(1, 2).flatten(2)


@pytest.fixture
def attended(monkeypatch: pytest.MonkeyPatch) -> list[list[Tensor]]:
    """The (q, k, v) of every call of scaled_dot_product_attention."""
    calls: list[list[Tensor]] = []
    original = F.scaled_dot_product_attention

    def spy(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        calls.append([query, key, value])
        return original(query, key, value, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    return calls


@pytest.mark.parametrize(
    ("make", "name", "auto", "heads"),
    [
        (TimmAttention, "qkv", (12, 12, 12), (4,) * 9),
        (SwinAttention, "qkv", (12, 12, 12), (4,) * 9),
        (lambda: MaxxAttention(True), "qkv", (36,), (4,) * 9),
        (lambda: MaxxAttention(False), "qkv", (12, 12, 12), (4,) * 9),
        (LevitAttention, "qkv", (36,), (2, 2, 8) * 3),
        (CausalSelfAttention, "c_attn", (12, 12, 12), (4,) * 9),
    ],
    ids=["timm", "swin", "maxxvit-by-head", "maxxvit", "tinyvit", "nanogpt"],
)
def test_rows_of_fused_layers(
    make: Callable[[], nn.Module],
    name: str,
    auto: tuple[int, ...],
    heads: tuple[int, ...],
    attended: list[list[Tensor]],
) -> None:
    model = nn.Sequential(make())
    assert sizes(model, "auto")[f"0.{name}.weight"] == auto
    assert sizes(model, "heads")[f"0.{name}.weight"] == heads
    assert sizes(model, "one")[f"0.{name}.weight"] == (36,)

    def run() -> list[Tensor]:
        attended.clear()
        model(torch.rand(1, 5, 12) + 0.5)
        return attended[0]

    layer = model[0].get_submodule(name)
    kinds = [{kind for kind, _ in part} for part in receivers(layer, auto, run)]
    assert kinds == ([{"q"}, {"k"}, {"v"}] if len(auto) == 3 else [{"q", "k", "v"}])
    single = receivers(layer, heads, run)
    assert all(len(reached) == 1 for reached in single)
    assert len(set.union(*single)) == len(heads) == 9


def holder(told: dict[str, int], **layers: nn.Module) -> nn.Module:
    module = nn.Module()
    vars(module).update(told)
    for name, layer in layers.items():
        module.add_module(name, layer)
    return module


@pytest.mark.parametrize(
    ("module", "auto", "heads"),
    [
        (holder({"heads": 2}, to_q=nn.Linear(9, 8), to_kv=nn.Linear(9, 16)), {"to_kv": (8, 8)}, {"to_kv": (4,) * 4}),
        (holder({}, to_kv=nn.Linear(8, 16)), {"to_kv": (8, 8)}, None),
        (holder({}, to_kv=nn.Linear(8, 12)), {"to_kv": (12,)}, None),
        (holder({"n_head": 4, "n_kv_head": 2}, c_attn=nn.Linear(16, 32)), {"c_attn": (16, 8, 8)}, {"c_attn": (4,) * 8}),
        (holder({"num_heads": 4}, qkv=nn.Linear(24, 48)), {"qkv": (48,)}, None),  # (q | k | v) or (k | v)?
        (holder({"num_heads": 2, "head_dim": 4}, qkv=nn.Linear(8, 16)), {"qkv": (8, 8)}, {"qkv": (4,) * 4}),  # GCViT
        (holder({"num_heads": 2, "head_dim": 4}, qkv=nn.Linear(8, 20)), {"qkv": (20,)}, {"qkv": (4,) * 5}),
        (holder({"num_heads": 2}, query_key_value=nn.Linear(8, 24)), {"query_key_value": (24,)}, None),
        (holder({"num_heads": 2}, up=nn.Linear(8, 24)), {"up": (24,)}, None),
        (holder({"num_heads": 3}, query=nn.Linear(8, 8)), {"query": (8,)}, None),
        (
            holder({"n_heads": 4, "n_kv_heads": 2}, wq=nn.Linear(8, 16), wk=nn.Linear(8, 8), wo=nn.Linear(16, 8)),
            {"wq": (16,), "wk": (8,)},
            {"wq": (4,) * 4, "wk": (4, 4), "wo": (8,)},
        ),
        (
            holder({"n_heads": 4}, q_proj=nn.Linear(8, 16), v_proj=nn.Linear(8, 8)),
            {"v_proj": (8,)},
            {"q_proj": (4,) * 4, "v_proj": (4, 4)},
        ),
        (
            holder({"key_dim": 4, "value_dim": 6, "head_k_dim": 2, "head_v_dim": 3}, in_proj_qkv=nn.Linear(5, 14)),
            {"in_proj_qkv": (4, 4, 6)},
            {"in_proj_qkv": (2, 2, 2, 2, 3, 3)},
        ),
        (holder({"num_heads": True, "head_dim": 2.0}, q=nn.Linear(8, 8)), {"q": (8,)}, None),  # no numbers at all
    ],
)
def test_what_the_holder_tells(
    module: nn.Module, auto: dict[str, tuple[int, ...]], heads: dict[str, tuple[int, ...]] | None
) -> None:
    found = sizes(module, "auto")
    assert {name: found[f"{name}.weight"] for name in auto} == auto
    if heads is None:
        with pytest.raises(tt.ConversionError, match='blocks="heads" finds no head'):
            sizes(module, "heads")
    else:
        found = sizes(module, "heads")
        assert {name: found[f"{name}.weight"] for name in heads} == heads


def test_a_layer_wrapped_for_lora_is_still_its_attentions() -> None:
    attention = TimmAttention()
    attention.qkv = holder({}, base_layer=attention.qkv)
    assert sizes(attention, "auto")["qkv.base_layer.weight"] == (12, 12, 12)
    wrapped = holder(
        {"num_heads": 4, "num_key_value_heads": 2},
        q_proj=holder({}, base_layer=nn.Linear(8, 16)),
        k_proj=holder({}, base_layer=nn.Linear(8, 8)),
    )
    assert sizes(wrapped, "heads")["k_proj.base_layer.weight"] == (4, 4)


# --- nn.MultiheadAttention ----------------------------------------------------------------------------------------


def test_multihead_attention() -> None:
    packed, separate = nn.MultiheadAttention(12, 3), nn.MultiheadAttention(12, 3, kdim=5, vdim=7)
    assert sizes(packed, "auto") == {"in_proj_weight": (12,) * 3, "out_proj.weight": (12,)}
    assert sizes(packed, "one") == {"in_proj_weight": (36,), "out_proj.weight": (12,)}
    assert sizes(packed, "heads") == {"in_proj_weight": (4,) * 9, "out_proj.weight": (12,)}
    parts = [f"{part}_proj_weight" for part in "qkv"]
    for blocks, rows in (("auto", (12,)), ("one", (12,)), ("heads", (4, 4, 4)), (lambda m, n: 2, (6, 6))):
        found = sizes(separate, blocks)
        assert [found[part] for part in parts] == [rows] * 3


# --- a function of the user's -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "rows"),
    [(1, (12,)), (3, (4, 4, 4)), (np.int64(2), (6, 6)), ((2, 10), (2, 10)), (np.array([5, 7]), (5, 7)), (None, (12,))],
)
def test_a_function_chooses(answer: Any, rows: tuple[int, ...]) -> None:
    seen: list[tuple[type[nn.Module], str]] = []

    def blocks(module: nn.Module, name: str) -> Any:
        seen.append((type(module), name))
        return answer

    assert sizes(nn.Sequential(nn.Linear(5, 12)), blocks) == {"0.weight": rows}
    assert seen == [(nn.Linear, "0")]


def test_a_function_that_answers_none_leaves_it_to_auto() -> None:
    model = nn.ModuleDict({"attention": TimmAttention(), "other": nn.Linear(4, 6)})
    found = sizes(model, lambda module, name: 2 if name == "other" else None)
    assert found["other.weight"] == (3, 3)
    assert found["attention.qkv.weight"] == (12, 12, 12)


@pytest.mark.parametrize(
    "answer", [0, -1, 5, 13, (6, 7), (12, 0), (14, -2), (), "12", 2.0, (6.0, 6.0), [[12]], {}, True]
)
def test_answers_that_do_not_fit_are_refused(answer: Any) -> None:
    model = nn.Sequential(OrderedDict(good=nn.Linear(5, 5), bad=nn.Linear(5, 12)))
    with pytest.raises(tt.ConversionError, match=r"blocks answered .* for bad, whose weight has 12 rows: expected"):
        tt.reparametrize_(model, tt.SigmaReparam(blocks=lambda module, name: answer if name == "bad" else 1))
    assert type(model.good) is type(model.bad) is nn.Linear


def test_convolutions_have_one_block() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 2))
    assert sizes(model, "auto") == sizes(model, lambda module, name: 1) == {"0.weight": (8,)}
    with pytest.raises(tt.ConversionError, match=r"blocks answered 2 for 0 \(Conv2d\): a convolution has one block"):
        sizes(model, lambda module, name: 2)


def test_blocks_of_a_linear_layer_are_scaled_apart() -> None:
    layer = nn.Linear(5, 12)
    tt.reparametrize_(layer, tt.SigmaReparam("one", blocks=lambda module, name: (2, 3, 7)))
    norms = [torch.linalg.matrix_norm(part, 2) for part in tt.effective_weight(layer).split((2, 3, 7))]
    torch.testing.assert_close(torch.stack(norms).detach(), torch.ones(3))
    x = torch.randn(4, 5)
    torch.testing.assert_close(layer(x), F.linear(x, tt.effective_weight(layer), layer.bias))
    sigma, gamma = sigma_gamma(layer)["weight"]
    assert sigma.shape == gamma.shape == (3,)
