"""State dicts both ways, converted and plain; copies and pickles."""

import copy
import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.reparam import sigma_gamma

MakeMixed = Callable[..., tuple[Any, Tensor]]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def train_some_steps(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_round_trip(mixed: MakeMixed, assign: bool) -> None:
    model, x = mixed()
    tt.reparametrize_(model)
    train_some_steps(model, x)
    other = tt.reparametrize_(mixed(seed=1)[0])
    other.load_state_dict(model.state_dict(), strict=True, assign=assign)
    assert torch.equal(other(x), model(x))
    before = other.head.sigma_u.clone()
    train_some_steps(other, x)  # a replaced Parameter is still followed
    assert not torch.equal(other.head.sigma_u, before)


def test_a_converted_checkpoint_does_not_load_into_a_plain_model(mixed: MakeMixed) -> None:
    model, _ = mixed()
    tt.reparametrize_(model)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*gamma"):
        mixed(seed=1)[0].load_state_dict(model.state_dict())


@pytest.mark.parametrize("assign", [False, True])
def test_a_plain_checkpoint_loads_into_a_converted_model(mixed: MakeMixed, assign: bool) -> None:
    plain, x = mixed()
    other = tt.reparametrize_(mixed(seed=1)[0], tt.SigmaReparam("one"))
    other.load_state_dict(plain.state_dict(), strict=True, assign=assign)
    assert relative(other(x), plain(x)) < 1e-5
    sigma, gamma = sigma_gamma(other)["head.weight"]
    assert float(sigma) == pytest.approx(float(torch.linalg.matrix_norm(plain.head.weight.detach(), 2)), rel=1e-5)
    assert float(gamma) == pytest.approx(float(sigma))


def test_a_broken_plain_checkpoint_is_reported(mixed: MakeMixed) -> None:
    plain, _ = mixed()
    nn.init.zeros_(plain.head.weight)
    with pytest.raises(RuntimeError, match=r"head\.weight comes from a plain checkpoint: it, or .* is zero"):
        tt.reparametrize_(mixed(seed=1)[0]).load_state_dict(plain.state_dict())


def test_a_checkpoint_with_part_of_what_is_carried_is_incomplete(mixed: MakeMixed) -> None:
    model, _ = mixed()
    tt.reparametrize_(model)
    state = model.state_dict()
    del state["head.sigma_u"]
    with pytest.raises(RuntimeError, match=r"Missing key.*head\.sigma_u"):
        tt.reparametrize_(mixed(seed=1)[0]).load_state_dict(state)


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_compute_the_same_and_are_followed(mixed: MakeMixed, how: str) -> None:
    model, x = mixed()
    tt.reparametrize_(model)
    train_some_steps(model, x)
    if how == "deepcopy":
        twin = copy.deepcopy(model)
    elif how == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(x), model(x))
    before = twin.head.sigma_u.clone()
    train_some_steps(twin, x)
    assert not torch.equal(twin.head.sigma_u, before)
    tt.fold_(twin)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("assign", [False, True])
def test_a_half_precision_file_leaves_gamma_and_vectors_in_float32(
    mixed: MakeMixed, assign: bool, dtype: torch.dtype
) -> None:
    model, x = mixed()
    tt.reparametrize_(model)
    y = model(x)
    other = tt.reparametrize_(mixed(seed=1)[0])
    other.load_state_dict({key: value.to(dtype) for key, value in model.state_dict().items()}, assign=assign)
    assert other.head.weight.dtype == (dtype if assign else torch.float32)
    for name, tensor in other.state_dict().items():
        if "gamma" in name or "sigma" in name:
            assert tensor.dtype == torch.float32
    assert isinstance(other.head.gamma, nn.Parameter)
    # Every number in the file is off by up to eps / 2; what that does to the output adds up over six layers.
    assert relative(other.float()(x), y) < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("assign", [False, True])
def test_a_float64_file_gets_float64_vectors_where_it_is_assigned(assign: bool) -> None:
    plain, layer = nn.Linear(6, 5).double(), tt.reparametrize_(nn.Linear(6, 5))
    layer.load_state_dict(plain.state_dict(), assign=assign)
    dtype = torch.float64 if assign else torch.float32
    assert {tensor.dtype for tensor in layer.state_dict().values()} == {dtype}
    exact = torch.linalg.matrix_norm(plain.weight.detach(), 2).to(dtype).view(1)
    torch.testing.assert_close(sigma_gamma(layer)["weight"], (exact, exact))


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("blank", [False, True], ids=["a-model-with-values", "a-model-from-meta"])
@pytest.mark.parametrize(("saved", "live"), [(1, 4), (4, 1), (2, 3)])
def test_a_checkpoint_with_another_number_of_vectors(
    mixed: MakeMixed, saved: int, live: int, blank: bool, assign: bool
) -> None:
    model, x = mixed()
    tt.reparametrize_(model, tt.SigmaReparam(vectors=saved))
    train_some_steps(model, x)
    other = tt.reparametrize_(mixed(seed=1)[0], tt.SigmaReparam(vectors=live))
    if blank:
        other = other.to("meta") if assign else other.to("meta").to_empty(device="cpu")
    other.load_state_dict(model.state_dict(), assign=assign)
    assert torch.equal(other(x), model(x))
    assert other.head.sigma_u.shape == (1, live, 16)
    for basis in (other.head.sigma_u[0], *other.attention.in_proj_sigma_u):
        torch.testing.assert_close(basis @ basis.t(), torch.eye(live), rtol=0, atol=1e-3)  # a trained one: nearly
    for _ in range(30):
        tt.refresh_(other)
    assert all(float(error.abs().max()) < 1e-3 for error in tt.sigma_error(other).values())


def test_a_checkpoint_of_other_blocks_is_a_size_mismatch(mixed: MakeMixed) -> None:
    state = tt.reparametrize_(mixed()[0], tt.SigmaReparam(blocks="heads")).state_dict()
    with pytest.raises(RuntimeError, match=r"size mismatch for attention\.in_proj_gamma"):
        tt.reparametrize_(mixed()[0]).load_state_dict(state)


def test_a_folded_checkpoint_is_a_plain_one(mixed: MakeMixed) -> None:
    model, x = mixed()
    tt.reparametrize_(model, tt.SigmaReparam("one"))
    train_some_steps(model, x)
    y = model(x)
    plain = mixed(seed=1)[0]
    plain.load_state_dict(tt.fold_(copy.deepcopy(model)).state_dict(), strict=True)
    assert relative(plain(x), y) < 1e-5
    assert torch.equal(model(x), y)


class Quiet(nn.Linear):
    """A subclass that leaves forward alone."""

    tag = "none"


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_subclass_without_a_forward_of_its_own_keeps_its_class(copied: Callable[[Quiet], Quiet]) -> None:
    layer = Quiet(3, 2)
    layer.tag = "own"
    tt.reparametrize_(layer)
    assert isinstance(layer, Quiet)
    twin = copied(layer)
    assert type(twin) is type(layer)
    assert twin.tag == "own"
    torch.testing.assert_close(twin.state_dict(), layer.state_dict(), rtol=0, atol=0)
    assert type(tt.fold_(twin)) is Quiet
    assert type(tt.fold_(layer)) is Quiet


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_of_parameters_alone_has_its_vectors_computed(strict: bool) -> None:
    torch.manual_seed(0)
    saved, other = (tt.reparametrize_(nn.Linear(6, 5).double(), tt.SigmaReparam(vectors=2)) for _ in range(2))
    with torch.no_grad():
        saved.gamma.mul_(1.5)
    other.load_state_dict(dict(saved.named_parameters()), strict=strict)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(other(x), saved(x))
    assert float(tt.sigma_error(other)["weight"]) == pytest.approx(0, abs=1e-12)


def test_a_model_whose_blocks_a_lambda_chose_can_be_pickled() -> None:
    model = tt.reparametrize_(nn.Sequential(nn.Linear(6, 8)), tt.SigmaReparam(blocks=lambda module, name: 2))
    twin = pickle.loads(pickle.dumps(model))
    x = torch.randn(3, 6)
    assert torch.equal(twin(x), model(x))
    assert twin[0].gamma.shape == (2,)


class WithLock(nn.Linear):
    """A subclass that says itself what of it is copied."""

    def __init__(self) -> None:
        super().__init__(3, 2)
        self.lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "lock"}


def test_a_subclass_decides_what_is_copied_of_it() -> None:
    layer = tt.reparametrize_(WithLock())
    twin = copy.deepcopy(layer)
    assert not hasattr(twin, "lock")
    assert torch.equal(twin.weight, layer.weight)
