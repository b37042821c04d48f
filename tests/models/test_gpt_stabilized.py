"""Every stabilizer, sigma-Reparam and Watch on a GPT."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.errors import ConversionError
from trimtab.models.gpt import GPT, GPTConfig
from trimtab.reparam.layers import Reparametrized
from trimtab.stabilizers import STABILIZERS, fold_, stabilize_
from trimtab.stabilizers.apply import changes_models
from trimtab.stabilizers.registry import parse

CHANGING = [
    name
    for name, cls in STABILIZERS.items()
    if cls.__module__.startswith("trimtab.") and name != "none" and changes_models(*parse(name))
]
TOKENS = torch.randint(0, 11, (3, 9), generator=torch.Generator().manual_seed(5))


def gpt(norm: str = "pre", positions: str = "learned", tied: bool = True) -> GPT:
    torch.manual_seed(0)
    config = GPTConfig(11, 9, 16, 2, 4, norm=norm, positions=positions, tied=tied, init_std=0.3, embedding_std=0.5)
    return GPT(config).double()


@pytest.mark.parametrize("positions", ["learned", "rotary"])
@pytest.mark.parametrize("name", CHANGING)
def test_a_stabilized_gpt_trains_and_generates(name: str, positions: str) -> None:
    model = gpt("post" if name == "deepnorm" else "pre", positions)
    stabilize_(model, name)
    model(TOKENS).logsumexp(-1).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    model.eval()
    with torch.no_grad():
        cache = model.empty_cache()
        parts = [model(TOKENS[:, :4], cache), *(model(TOKENS[:, place : place + 1], cache) for place in range(4, 9))]
        torch.testing.assert_close(torch.cat(parts, dim=1), model(TOKENS), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("norm", ["pre", "none"])
def test_deepnorm_is_for_post_norm(norm: str) -> None:
    with pytest.raises(ConversionError, match=r"blocks\.0\.attention\.out .* post-LN models"):
        stabilize_(gpt(norm), "deepnorm")


@pytest.mark.parametrize("tied", [True, False])
def test_sigma_reaches_every_layer_and_not_a_tied_head(tied: bool) -> None:
    model = gpt(tied=tied)
    before = model(TOKENS)
    stabilize_(model, "sigma")
    torch.testing.assert_close(model(TOKENS), before, rtol=1e-9, atol=1e-9)
    converted = {name for name, module in model.named_modules() if isinstance(module, Reparametrized)}
    layers = ("attention.query", "attention.key", "attention.value", "attention.out", "mlp.up", "mlp.down")
    expected = {f"blocks.{block}.{layer}" for block in range(2) for layer in layers}
    assert converted == expected | (set() if tied else {"head"})


@pytest.mark.parametrize("spec", ["none", "sigma", "sigma+qk-norm", "softcap", "low-rank", "low-rank+sigma"])
def test_watch_sees_every_head(tmp_path: Path, spec: str) -> None:
    model = stabilize_(gpt(positions="rotary").float(), spec)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with tt.Watch(model, tmp_path / "run", every=1) as watch:
        loss = model(TOKENS).logsumexp(-1).mean()
        loss.backward()
        optimizer.step()
        watch.step(loss)
    heads = json.loads((tmp_path / "run" / "heads.json").read_text())["heads"]
    seen = [(head["module"], head["head"]) for head in heads]
    assert seen == [(f"blocks.{block}.attention", head) for block in range(2) for head in range(4)]
    entropy = torch.frombuffer(bytearray((tmp_path / "run" / "heads_entropy.f32").read_bytes()), dtype=torch.float32)
    assert entropy.shape == (8,)
    assert (
        (entropy > 0) & (entropy < torch.arange(1, 10).log().mean())
    ).all()  # causal: the maximum, mean over queries


@pytest.mark.parametrize("spec", ["low-rank:rank=3", "low-rank:rank=3+sigma"])
def test_factors_become_one_layer_again(spec: str) -> None:
    model = stabilize_(gpt(positions="rotary"), spec)
    expected = model(TOKENS)
    fold_(model)
    assert {type(module) for name, module in model.named_modules() if name.endswith(("query", "value"))} == {nn.Linear}
    torch.testing.assert_close(model(TOKENS), expected, rtol=1e-9, atol=1e-9)
