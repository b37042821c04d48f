"""An embedding and a head that share one weight: one gamma, one pair of vectors, and both read the same table."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import trimtab as tt
from trimtab.reparam import SigmaReparam, sigma_gamma

IDS = torch.tensor([[1, 4, 4, 0], [7, 2, 4, 3]])
EMBEDDINGS = SigmaReparam(vectors=1, embeddings=True)


class Tied(nn.Module):
    """Ids in, logits out, through one table of 9 x 5."""

    def __init__(self, padding_idx: int | None = None) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 5, padding_idx)
        self.head = nn.Linear(5, 9)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(torch.tanh(self.embed(ids)))
        return logits


def tied(seed: int = 0, padding_idx: int | None = None) -> Any:
    torch.manual_seed(seed)
    model = Tied(padding_idx).double()
    with torch.no_grad():
        model.embed.weight.normal_()  # the padding row too: a head has use for it
    return model


def converted(seed: int = 0, padding_idx: int | None = None) -> Any:
    model = tt.reparametrize_(tied(seed, padding_idx), EMBEDDINGS)
    with torch.no_grad():
        model.head.gamma.mul_(1.5)
    return model


def assert_tied(model: Any) -> None:
    assert model.head.weight is model.embed.weight
    assert model.head.gamma is model.embed.gamma
    for name in ("sigma_u", "sigma_v"):
        assert torch.equal(getattr(model.head, name), getattr(model.embed, name))


def optimize(model: nn.Module, steps: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(IDS).square().mean().backward()
        optimizer.step()


def test_one_weight_gets_one_gamma_and_one_start() -> None:
    model = tied()
    before = model(IDS)
    tt.reparametrize_(model, EMBEDDINGS)
    assert_tied(model)
    assert {name for name, _ in model.named_parameters()} == {"embed.weight", "embed.gamma", "head.bias"}
    sigma = torch.linalg.matrix_norm(model.embed.weight.detach(), 2).view(1)
    for found in sigma_gamma(model).values():
        torch.testing.assert_close(found, (sigma, sigma))
    torch.testing.assert_close(model(IDS), before, rtol=0, atol=0)
    assert tt.describe(model).startswith("2 of 2 weights converted")


@pytest.mark.parametrize("padding_idx", [None, 4])
def test_gradients_are_those_of_one_table_in_use_read_twice(padding_idx: int | None) -> None:
    model = converted(padding_idx=padding_idx)
    c = model.embed.carried()
    weight, gamma = (t.detach().clone().requires_grad_() for t in (c.weight, c.gamma))
    bias = model.head.bias.detach().clone().requires_grad_()

    def in_use(weight: Tensor) -> Tensor:
        return gamma * weight / (c.v @ weight @ c.u[0])

    # To the embedding its padding row is a constant, as in torch; to the head it is a row like any other.
    is_constant = torch.tensor([[row == padding_idx] for row in range(9)])
    looked_up = F.embedding(IDS, in_use(torch.where(is_constant, weight.detach(), weight)), padding_idx)
    theirs = F.linear(torch.tanh(looked_up), in_use(weight), bias)
    ours = model(IDS)
    torch.testing.assert_close(ours, theirs)
    seed = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ours.backward(seed)
    theirs.backward(seed)
    torch.testing.assert_close(model.embed.weight.grad, weight.grad)
    torch.testing.assert_close(model.embed.gamma.grad, gamma.grad)
    torch.testing.assert_close(model.head.bias.grad, bias.grad)


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    pickle.dump(model, file)
    return pickle.loads(file.getvalue())


def reloaded(model: Any) -> Any:
    other = converted(seed=1)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    return other


def cast_and_reloaded(model: Any) -> Any:
    """A cast makes two buffers out of one; loading must fill both."""
    other = converted(seed=1).float().double()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    return other


CARRIED_OVER: dict[str, Callable[[Any], Any]] = {
    "itself": lambda model: model,
    "deepcopy": copy.deepcopy,
    "pickle": pickled,
    "state-dict": reloaded,
    "cast-and-state-dict": cast_and_reloaded,
    "float32": lambda model: model.float(),
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "there-and-back": lambda model: model.bfloat16().double(),
}


@pytest.mark.parametrize("carry_over", CARRIED_OVER.values(), ids=CARRIED_OVER.keys())
def test_vectors_move_once_a_step_and_together(carry_over: Callable[[Any], Any]) -> None:
    original = converted()
    optimize(original)
    expected = original(IDS).detach()
    model = carry_over(original)
    assert_tied(model)
    dtype = model.embed.weight.dtype
    if dtype == torch.float64 and carry_over is not CARRIED_OVER["there-and-back"]:
        torch.testing.assert_close(model(IDS).detach(), expected, rtol=0, atol=0)
    before = model.embed.sigma_u[0, 0].clone()
    optimize(model)
    assert_tied(model)
    weight = model.embed.weight.detach().to(before.dtype)
    v = F.normalize(weight @ before, dim=0)
    assert not torch.equal(model.embed.sigma_u[0, 0], before)
    torch.testing.assert_close(model.embed.sigma_v, v)
    torch.testing.assert_close(model.embed.sigma_u[0, 0], F.normalize(weight.t() @ v, dim=0))
    assert torch.finfo(model.embed.gamma.dtype).bits >= 32


@pytest.mark.parametrize("cast", [False, True], ids=["shared-buffers", "buffers-of-their-own"])
def test_a_plain_checkpoint_loads_into_both(cast: bool) -> None:
    plain, model = tied(seed=2), converted()
    if cast:
        model.float().double()
        assert model.head.sigma_u is not model.embed.sigma_u
    model.load_state_dict(plain.state_dict())
    assert_tied(model)
    torch.testing.assert_close(model(IDS), plain(IDS))
    torch.testing.assert_close(
        model.head.gamma.detach(), torch.linalg.matrix_norm(plain.head.weight.detach(), 2).view(1)
    )


def test_folding_scales_the_table_once() -> None:
    model = converted()
    optimize(model, 3)
    before, table = model(IDS).detach(), tt.effective_weight(model.embed).detach()
    tt.fold_(model)
    assert type(model.embed) is nn.Embedding
    assert type(model.head) is nn.Linear
    assert model.head.weight is model.embed.weight
    torch.testing.assert_close(model.embed.weight.detach(), table, rtol=0, atol=0)
    torch.testing.assert_close(model(IDS).detach(), before)
    assert set(model.state_dict()) == {"embed.weight", "head.weight", "head.bias"}


def test_half_a_pair_is_left_alone() -> None:
    for config, filter_fn in ((SigmaReparam(), None), (EMBEDDINGS, lambda _, name: name == "embed")):
        model = tied()
        with pytest.raises(tt.ConversionError, match=r"every weight chosen is shared with a layer that is not"):
            tt.reparametrize_(model, config, filter_fn)
        assert type(model.embed) is nn.Embedding
        assert type(model.head) is nn.Linear


def gpt2() -> Any:
    transformers = pytest.importorskip("transformers")
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
    )
    return transformers.GPT2LMHeadModel(config).eval()


def test_gpt2_keeps_its_logits_trains_folds_and_loads_plain(tmp_path: Path) -> None:
    ids = torch.arange(24).reshape(2, 12) % 17
    model = gpt2()
    before = model(ids).logits.detach()
    tt.reparametrize_(model, SigmaReparam(embeddings=True))
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-6)
    table = model.transformer.wte
    assert {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"} < set(sigma_gamma(model))
    assert model.lm_head.gamma is table.gamma

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    model.tie_weights()
    assert model.lm_head.weight is table.weight
    assert torch.equal(model.lm_head.sigma_v, table.sigma_v)

    after = model(ids).logits.detach()
    tt.save_pretrained(model, tmp_path)
    plain = type(gpt2()).from_pretrained(tmp_path).eval()
    assert not any("gamma" in key or "sigma" in key for key in plain.state_dict())
    assert plain.lm_head.weight is plain.transformer.wte.weight
    torch.testing.assert_close(plain(ids).logits, after, rtol=1e-5, atol=1e-5)
    tt.fold_(model)
    torch.testing.assert_close(model(ids).logits, after, rtol=1e-5, atol=1e-5)


def test_a_tied_model_writes_and_reties_what_it_carries_under_one_name(tmp_path: Path) -> None:
    model = gpt2()
    own_keys = model.__dict__.get("_tied_weights_keys")
    tt.reparametrize_(model, SigmaReparam(embeddings=True))
    model.save_pretrained(tmp_path)  # converted, as a trainer's checkpoints are
    saved = load_file(tmp_path / "model.safetensors")
    assert "transformer.wte.gamma" in saved
    assert "lm_head.gamma" not in saved

    restored = tt.reparametrize_(gpt2(), SigmaReparam(embeddings=True))
    with torch.no_grad():
        model.transformer.wte.gamma.mul_(1.5)
    state = copy.deepcopy(model.state_dict())
    restored.load_state_dict(state, assign=True)  # torch unties what is assigned ...
    restored.tie_weights()  # ... and the model ties it again: weight, gamma and vectors
    table = restored.transformer.wte
    for name in ("weight", "gamma", "sigma_u", "sigma_v"):
        assert getattr(restored.lm_head, name) is getattr(table, name)
    ids = torch.arange(12).reshape(1, 12) % 17
    torch.testing.assert_close(restored(ids).logits, model(ids).logits)

    tt.fold_(model)
    assert model.__dict__.get("_tied_weights_keys") == own_keys
    model.tie_weights()
    assert model.lm_head.weight is model.transformer.wte.weight
