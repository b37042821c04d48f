"""Hugging Face GPT-2, randomly initialised: tied head, transposed Conv1D layers, its own saving and resizing."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.reparam import sigma_gamma

transformers = pytest.importorskip("transformers")


def gpt2(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=40,
        n_positions=16,
        n_embd=24,
        n_layer=2,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        loss_type="ForCausalLM",
        **options,
    )
    return transformers.GPT2LMHeadModel(config)


IDS = torch.arange(24).reshape(2, 12) % 17


def train_(model: nn.Module, steps: int = 5) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss: Tensor = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_gpt2_is_converted_trains_ties_resizes_saves_folded_and_reloads(tmp_path: Path) -> None:
    model = gpt2()
    before = model(IDS).logits.detach()
    tt.reparametrize_(model)
    torch.testing.assert_close(model(IDS).logits, before, rtol=1e-5, atol=1e-6)
    assert len(sigma_gamma(model)) == 8
    for block in model.transformer.h:  # square and rectangular Conv1D weights alike
        for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
            carried = layer.carried()
            assert len(carried.sizes) == (3 if layer is block.attn.c_attn else 1)  # query | key | value
            sigmas = [torch.linalg.matrix_norm(part, 2) for part in carried.matrix.detach().split(carried.sizes)]
            torch.testing.assert_close(carried.sigma().detach(), torch.stack(sigmas))

    losses = train_(model)
    assert losses[-1] < losses[0]

    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
    model.resize_token_embeddings(50, mean_resizing=False)
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.lm_head.weight.shape == (50, 24)
    train_(model, 1)

    model.eval()
    outputs = model(IDS).logits.detach()
    tt.save_pretrained(model, tmp_path / "folded")
    assert len(sigma_gamma(model)) == 8  # saving left the model converted
    torch.testing.assert_close(model(IDS).logits, outputs, rtol=0, atol=0)
    plain = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "folded").eval()
    assert not any("gamma" in key or "sigma" in key for key in plain.state_dict())
    torch.testing.assert_close(plain(IDS).logits, outputs, rtol=1e-5, atol=1e-5)


def test_gpt2_equals_explicit_gammas() -> None:
    """The forward uses gamma: what it computes is what a plain model with the effective weights computes."""
    model, plain = gpt2(), gpt2()
    tt.reparametrize_(model, tt.SigmaReparam("one"))
    with torch.no_grad():
        for ours, theirs in zip(model.transformer.h, plain.transformer.h, strict=True):
            for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
                ours.get_submodule(part).gamma.mul_(1.3)
                theirs.get_submodule(part).weight.copy_(tt.effective_weight(ours.get_submodule(part)))
    torch.testing.assert_close(model(IDS).logits, plain(IDS).logits, rtol=1e-5, atol=1e-5)


def test_the_tied_head_is_left_and_described() -> None:
    model = tt.reparametrize_(gpt2())
    text = tt.describe(model)
    assert text.startswith("8 of 11 weights converted")
    assert "lm_head.weight" in text
    assert "shares its weight with transformer.wte.weight" in text
    assert "an embedding is read row by row" in text


def test_an_untied_head_is_converted() -> None:
    model = tt.reparametrize_(gpt2(tie_word_embeddings=False))
    assert "lm_head.weight" in sigma_gamma(model)
