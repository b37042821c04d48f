import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import trimtab as tt
from trimtab.watch.signals.projections import qk_energies, qk_weights
from trimtab.watch.signals.spectra import qk_energy

SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
TEXT = {**SMALL, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SHORT = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}
# Model, its options, and the number of key heads. All go through scaled_dot_product_attention.
HUGGING_FACE = {
    "GPT2": (SHORT, 4),
    "Bert": (TEXT, 4),
    "ViT": ({**SMALL, "image_size": 16, "patch_size": 8}, 4),
    "Llama": ({**TEXT, "num_key_value_heads": 2}, 2),
    "Phi3": ({**TEXT, "num_key_value_heads": 2}, 2),
    "GPTNeoX": (TEXT, 4),
    "Falcon": ({**TEXT, "new_decoder_architecture": True, "num_kv_heads": 2}, 2),
    "GPTBigCode": (SHORT, 1),
    "DistilBert": ({"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "vocab_size": 50}, 4),
}


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
@pytest.mark.parametrize(
    ("kind", "converted"), [*((kind, False) for kind in HUGGING_FACE), *((kind, True) for kind in ("GPT2", "Llama"))]
)
def test_they_make_the_queries_and_keys_that_attention_gets(kind, converted, monkeypatch) -> None:
    """At the first position, where rotary embeddings do nothing, with biases at zero."""
    import transformers

    torch.manual_seed(0)
    options, key_heads = HUGGING_FACE[kind]
    config = getattr(transformers, f"{kind}Config")(**options, attn_implementation="sdpa")
    model = getattr(transformers, f"{kind}Model")(config).eval()
    if converted:
        tt.reparametrize_(model, tt.SigmaReparam(gamma_init="one"))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    ((name, (query_weight, key_weight)),) = qk_weights(model).items()
    assert query_weight.shape == (4, 8, 32)
    assert key_weight.shape == (key_heads, 8, 32)
    seen = {}
    module = model.get_submodule(name)

    def note_input(_, args, kwargs) -> None:
        seen["input"] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    module.register_forward_pre_hook(note_input, with_kwargs=True)
    attention = F.scaled_dot_product_attention

    def note_query_and_key(query, key, *args, **kwargs):
        seen["query"], seen["key"] = query, key
        return attention(query, key, *args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", note_query_and_key)
    with torch.no_grad():
        model(torch.randn(2, 3, 16, 16) if kind == "ViT" else torch.randint(3, 50, (2, 5)))
    first = seen["input"][:, 0]  # (B, d_model)
    assert torch.allclose(seen["query"][:, :, 0], torch.einsum("hwd,bd->bhw", query_weight, first), atol=1e-5)
    keys = torch.einsum("hwd,bd->bhw", key_weight, first)
    assert torch.allclose(seen["key"][:, :, 0], keys.repeat_interleave(seen["key"].shape[1] // key_heads, 1), atol=1e-5)


@pytest.mark.parametrize("columns", [12, 7], ids=["packed", "separate"])
@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_torch_attention(columns, converted) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, kdim=columns, vdim=columns)
    if converted:
        tt.reparametrize_(attention, tt.SigmaReparam(gamma_init="one", blocks="heads"))
    names = ["in_proj_weight"] if columns == 12 else ["q_proj_weight", "k_proj_weight"]
    rows = torch.cat([tt.effective_weight(attention, name).flatten() for name in names])
    query, key = rows[: 12 * 12].view(3, 4, 12), rows[12 * 12 : 12 * 12 + 12 * columns].view(3, 4, columns)
    ((name, found),) = qk_weights(attention).items()
    assert name == ""
    assert torch.equal(found.query, query)
    assert torch.equal(found.key, key)
    assert not found.query.requires_grad
    assert qk_energies(attention, top=2) == {"": qk_energy(query, key, 2).tolist()}


class Own(nn.Module):
    """Fused, head by head or not, and silent about its heads."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            setattr(self, name, nn.Linear(12, 36 if "qkv" in name or name == "something" else 12))


def test_what_a_module_does_not_tell() -> None:
    """The number of heads may be given; parts that cannot be told apart are left out."""
    model = nn.ModuleDict({"a": Own("qkv"), "b": Own("something"), "c": Own("q_proj", "k_proj"), "d": Own("q_proj")})
    assert qk_weights(model) == {}
    found = qk_weights(model, dict.fromkeys("abcd", 3))
    assert list(found) == ["a", "c"]
    assert torch.equal(found["a"].key, model["a"].qkv.weight[12:24].view(3, 4, 12))
    assert torch.equal(found["c"].query, model["c"].q_proj.weight.view(3, 4, 12))
    assert qk_weights(model, {"a": 5}) == {}  # does not divide 12
