"""What names tell, on the checkpoints that transformers writes: layers, roles, and each head's q/k energy."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.inspect import inspect_checkpoint
from trimtab.inspect.names import Heads, layer_of, role_of, split_of
from trimtab.inspect.page import report_page
from trimtab.models.encoder_decoder import EncoderDecoder, EncoderDecoderConfig
from trimtab.models.gpt import GPT, GPTConfig
from trimtab.stabilizers.low_rank_layers import low_rank_

SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
ROLES = {"query", "key", "value", "output", "mlp in", "mlp out"}


def llama() -> nn.Module:
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, intermediate_size=24)
    return transformers.LlamaForCausalLM(config)


def gpt2() -> nn.Module:
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=40, n_positions=8, n_embd=16, n_layer=2, n_head=4, **ids)
    )


def neox() -> nn.Module:
    ids = {"bos_token_id": 0, "eos_token_id": 0}
    return transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SMALL, intermediate_size=24, **ids))


def bert() -> nn.Module:
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=24))


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=6, d_ff=24, num_layers=2, num_heads=4)
    )


def vit() -> nn.Module:
    config = transformers.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, intermediate_size=24)
    config.image_size, config.patch_size = 8, 4
    return transformers.ViTForImageClassification(config)


def halves(model: nn.Module, kind: str) -> dict[str, tuple[Tensor, Tensor]]:
    """W_q and W_k of each attention module as (heads, head_dim, width), by hand from the modules."""
    found = {}
    for name, module in model.named_modules():
        if kind == "gpt2" and name.endswith(".attn"):
            query, key, _ = module.c_attn.weight.t().split(16)
        elif kind == "neox" and name.endswith("attention"):
            query, key, _ = module.query_key_value.weight.view(4, 3, 4, 16).unbind(1)
        elif kind == "llama" and name.endswith("self_attn"):
            query, key = module.q_proj.weight, module.k_proj.weight.view(2, 4, 16).repeat_interleave(2, 0)
        elif kind == "t5" and name.endswith("Attention"):
            query, key = module.q.weight, module.k.weight
        elif kind == "bert" and hasattr(module, "query"):
            query, key = module.query.weight, module.key.weight
        elif kind == "vit" and hasattr(module, "q_proj"):
            query, key = module.q_proj.weight, module.k_proj.weight
        else:
            continue
        found[name] = (query.reshape(4, -1, 16), key.reshape(4, -1, 16))
    return found


@pytest.mark.parametrize("kind", ["gpt2", "llama", "neox", "bert", "t5", "vit"])
def test_heads_of_well_known_models_are_found(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = {"gpt2": gpt2, "llama": llama, "neox": neox, "bert": bert, "t5": t5, "vit": vit}[kind]()
    options = {"max_shard_size": "4KB"} if kind == "llama" else {}
    model.save_pretrained(tmp_path, **options)
    report = inspect_checkpoint(tmp_path, top=2)
    assert report.num_heads == 4
    assert report.kind.startswith("safetensors in" if kind == "llama" else "safetensors")
    roles = {matrix.role for matrix in report.matrices if layer_of(matrix.name).layer}
    assert roles - {"mlp gate", "position"} == ROLES
    assert "fused" not in roles
    assert {matrix.cross for matrix in report.matrices} == ({True, False} if kind == "t5" else {False})
    assert len(report.embeddings) == (0 if kind == "vit" else 1)

    pairs = halves(model, kind)
    if kind != "vit":  # which transformers saves under other names than its modules have
        assert {pair.name for pair in report.attention} == set(pairs)
    expected = []
    for query, key in pairs.values():
        energy = torch.linalg.svdvals(query.double().mT @ key.double()).square()
        expected.append((energy[:, :2].sum(1) / energy.sum(1)).tolist())
    found = [list(pair.energy) for pair in report.attention]
    # 16 × 16 products of float32 factors against float64 ones
    assert torch.allclose(torch.tensor(sorted(found)), torch.tensor(sorted(expected)), atol=1e-5, rtol=0)


def test_packed_attention_of_torch_is_split(tmp_path: Path) -> None:
    layer = nn.TransformerDecoderLayer(16, 4, 24)
    apart = nn.MultiheadAttention(16, 4, kdim=10, vdim=12)
    state = {f"decoder.layers.0.{name}": value for name, value in layer.state_dict().items()}
    state |= {f"decoder.layers.1.self_attn.{name}": value for name, value in apart.state_dict().items()}
    torch.save(state, tmp_path / "decoder.pt")
    report = inspect_checkpoint(tmp_path / "decoder.pt", num_heads=4)
    packed = {
        "decoder.layers.0.self_attn": layer.self_attn.in_proj_weight,
        "decoder.layers.0.multihead_attn": layer.multihead_attn.in_proj_weight,
    }
    halves = {name: (weight[:16], weight[16:32]) for name, weight in packed.items()}
    halves["decoder.layers.1.self_attn"] = (apart.q_proj_weight, apart.k_proj_weight)
    assert {pair.name for pair in report.attention} == set(halves)
    for pair in report.attention:
        query, key = (weight.detach().double().unflatten(0, (4, 4)) for weight in halves[pair.name])
        energy = torch.linalg.svdvals(query.mT @ key).square()
        assert list(pair.energy) == pytest.approx((energy[:, 0] / energy.sum(1)).tolist(), abs=1e-5)


def test_cross_attention_of_gpt2_is_stored_transposed(tmp_path: Path) -> None:
    model = transformers.models.gpt2.modeling_gpt2.GPT2Block(
        transformers.GPT2Config(n_embd=16, n_head=4, add_cross_attention=True), layer_idx=0
    )
    torch.save({f"h.0.{name}": value for name, value in model.state_dict().items()}, tmp_path / "cross.pt")
    report = inspect_checkpoint(tmp_path / "cross.pt", num_heads=4)
    cross = model.crossattention
    query, key = cross.q_attn.weight.t().detach().double(), cross.c_attn.weight.t()[:16].detach().double()
    energy = torch.linalg.svdvals(query.unflatten(0, (4, 4)).mT @ key.unflatten(0, (4, 4))).square()
    (pair,) = (pair for pair in report.attention if "cross" in pair.name)
    assert pair.energy == pytest.approx((energy[:, 0] / energy.sum(1)).tolist(), abs=1e-5)


def test_both_embeddings_of_a_translation_model_have_their_variability(tmp_path: Path) -> None:
    config = EncoderDecoderConfig(20, 30, 8, encoder_depth=1, decoder_depth=1, num_heads=2, tied="none")
    model = EncoderDecoder(config)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    found = {each.name: each.tev_mean for each in inspect_checkpoint(tmp_path / "model.safetensors").embeddings}
    rows = {f"{name}.weight": getattr(model, name).weight for name in ("source_embedding", "target_embedding")}
    expected = {name: weight.std(dim=1, correction=0).mean().item() for name, weight in rows.items()}
    assert found == pytest.approx(expected, rel=1e-5)


def test_factors_of_low_rank_belong_to_their_projections(tmp_path: Path) -> None:
    model = GPT(GPTConfig(vocab_size=11, context=8, dim=8, depth=2, num_heads=2))
    for each, kind in ((model, "own"), (gpt2(), "gpt2")):
        low_rank_(each, rank=3)
        state = {name: weight for name, weight in each.state_dict().items() if "lm_head" not in name}
        torch.save(state, tmp_path / f"{kind}.pt")
        report = inspect_checkpoint(tmp_path / f"{kind}.pt", num_heads=2)
        found = [(matrix.name, matrix.role) for matrix in report.matrices if matrix.role.endswith("factor")]
        assert len(found) == 2 * 3 * 2  # layers, projections, factors
        for name, role in found:
            assert name.split(".")[-3] == role.removesuffix(" factor")
        assert "other" not in {matrix.role for matrix in report.matrices}
        assert not report.attention
        assert report.notes[0].startswith("12 factors")
        assert "▲</b>query factor" in report_page(report)


def test_energy_without_the_number_of_heads(tmp_path: Path) -> None:
    weights = {"a.q_proj.weight": torch.randn(8, 8), "a.k_proj.weight": torch.randn(8, 8)}
    weights |= {"b.q_proj.weight": torch.randn(8, 8), "b.k_proj.weight": torch.randn(4, 8)}
    torch.save(weights, tmp_path / "unknown.pt")
    report = inspect_checkpoint(tmp_path / "unknown.pt")
    (pair,) = report.attention
    energy = torch.linalg.svdvals(weights["a.q_proj.weight"].double().t() @ weights["a.k_proj.weight"].double()) ** 2
    assert (pair.name, pair.num_heads) == ("a", 0)
    assert pair.energy == pytest.approx((float(energy[0] / energy.sum()),), abs=1e-5)
    assert "1 of 2 attention modules is left out" in report.notes[0]
    assert "--num-heads" in report.notes[0]
    grouped = inspect_checkpoint(tmp_path / "unknown.pt", num_heads=4)
    assert [len(pair.energy) for pair in grouped.attention] == [4, 4]
    assert not grouped.notes
    odd = inspect_checkpoint(tmp_path / "unknown.pt", num_heads=3)
    assert not odd.attention
    assert "2 of 2 attention modules is left out: 3 heads do not fit" in odd.notes[0]


def test_a_fused_weight_of_unknown_order_is_measured_whole(tmp_path: Path) -> None:
    torch.save({"h.0.attn.query_key_value.weight": torch.randn(24, 8)}, tmp_path / "fused.pt")
    report = inspect_checkpoint(tmp_path / "fused.pt", num_heads=2)
    (matrix,) = report.matrices
    assert (matrix.role, matrix.part) == ("fused", "")
    assert "cannot be told" in report.notes[0]


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("transformer.h.3.attn.c_attn.weight", ("transformer.h", 3, "transformer.h.3", "attn.c_attn.weight")),
        ("stages.1.blocks.2.mlp.0.weight", ("stages.1.blocks", 2, "stages.1.blocks.2", "mlp.0.weight")),
        ("decoder.block.0.layer.1.x.q.weight", ("decoder.block", 0, "decoder.block.0", "layer.1.x.q.weight")),
        ("lm_head.weight", ("", -1, "", "lm_head.weight")),
        ("0.weight", ("layers", 0, "0", "weight")),
        ("list.0", ("", -1, "", "list.0")),
    ],
)
def test_the_layer_of_a_name(name: str, layer: tuple[str, int, str, str]) -> None:
    assert tuple(layer_of(name)) == layer


@pytest.mark.parametrize(
    ("name", "shape", "role"),
    [
        ("blocks.0.attn.qkv.weight", (24, 8), "fused"),
        ("blocks.0.attn.proj.weight", (8, 8), "output"),
        ("blocks.0.mlp.0.weight", (32, 8), "mlp in"),
        ("blocks.0.mlp.2.weight", (8, 32), "mlp out"),
        ("patch_embed.proj.weight", (8, 3, 2, 2), "patch"),
        ("pos_embed", (1, 5, 8), "position"),
        ("h.0.attn.c_proj.weight", (8, 8), "output"),
        ("h.0.mlp.c_proj.weight", (8, 32), "mlp out"),
        ("layers.0.feed_forward.w1.weight", (32, 8), "mlp gate"),
        ("layers.0.attention.wq.weight", (8, 8), "query"),
        ("layers.0.q_proj.lora_A.default.weight", (2, 8), "other"),
        ("layers.0.mixer.in_proj.weight", (64, 8), "other"),
        ("layers.0.mlp.gate.weight", (4, 8), "other"),
        ("conv1.weight", (8, 3, 2, 2), "other"),
        ("blocks.0.attention.query.down.weight", (4, 8), "query factor"),
        ("h.0.attn.c_attn.key.up.weight", (8, 4), "key factor"),
        ("layers.0.self_attn.v_proj.up.weight", (8, 4), "value factor"),
        ("down.weight", (4, 8), "other"),
        ("blocks.0.mlp.up.weight", (32, 8), "mlp in"),
        ("blocks.0.mlp.down.weight", (8, 32), "mlp out"),
    ],
)
def test_the_role_of_a_name(name: str, shape: tuple[int, ...], role: str) -> None:
    assert role_of(name, shape) == role


@pytest.mark.parametrize(
    ("name", "rows", "heads", "sizes"),
    [
        ("Wqkv", 16, Heads(4, 2), (8, 4, 4)),
        ("Wqkv", 16, None, None),
        ("qkv", 24, None, (8, 8, 8)),
        ("to_kv", 10, None, (5, 5)),
        ("query_key_value", 24, None, None),
        ("query_key_value", 24, Heads(4, 4, "gpt_neox"), "by head"),
        ("query_key_value", 12, Heads(4, 1, "falcon"), (8, 2, 2)),
        ("query_key_value", 16, Heads(4, 2, "falcon"), None),
        ("c_attn", 24, Heads(4, 4, "gpt_bigcode"), "by head"),
        ("c_attn", 12, Heads(4, 1, "gpt_bigcode"), (8, 2, 2)),
        ("qkv_proj", 24, Heads(4, 4, "codegen"), None),
        ("qkv_proj", 16, Heads(4, 2, "phi3"), (8, 4, 4)),
    ],
)
def test_the_parts_of_a_fused_weight(
    name: str, rows: int, heads: Heads | None, sizes: tuple[int, ...] | str | None
) -> None:
    """Of 8 columns, under the names and in the orders of transformers' modelling code."""
    split = split_of(f"h.0.attn.{name}.weight", rows, 8, heads)
    if sizes is None:
        assert split is None
        return
    assert split is not None
    assert split.by_head == (sizes == "by head")
    assert tuple(size for _, size in split.sizes) == ((8, 8, 8) if split.by_head else sizes)
    assert [role for role, _ in split.sizes] == ["query", "key", "value"][-len(split.sizes) :]
