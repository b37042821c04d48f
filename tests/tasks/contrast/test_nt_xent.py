import pytest
import torch
from gloo_processes import in_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trimtab.tasks.contrast.nt_xent import gathered, nt_xent
from trimtab.tasks.contrast.reference import nt_xent_reference

# float64 sums of a few dozen terms, in another order
EXACT = {"rtol": 1e-11, "atol": 1e-13}


def pair(pairs: int, features: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    drawn = torch.randn(2, pairs, features, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    first, second = drawn.to(dtype).unbind()
    return first.clone().requires_grad_(), second.clone().requires_grad_()


def loss_and_gradients(loss: object, first: Tensor, second: Tensor, temperature: float) -> tuple[Tensor, ...]:
    value = loss(first, second, temperature)
    return value.detach(), *torch.autograd.grad(value, (first, second))


@pytest.mark.parametrize(("pairs", "features"), [(2, 3), (5, 4), (7, 1)])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 3.0])
def test_loss_and_gradient_are_those_of_the_definition(pairs: int, features: int, temperature: float) -> None:
    views = pair(pairs, features)
    found = loss_and_gradients(nt_xent, *views, temperature)
    expected = loss_and_gradients(nt_xent_reference, *views, temperature)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, **EXACT)


def test_values_known_in_closed_form() -> None:
    same = torch.ones(4, 3)
    assert nt_xent(same, same).item() == pytest.approx(torch.tensor(7.0).log().item())  # nothing to tell them by
    apart = torch.eye(4)
    chance = torch.tensor(0.5).exp() / (torch.tensor(0.5).exp() + 6)  # partner at cosine 1, six others at 0
    assert nt_xent(apart, apart, 2.0).item() == pytest.approx(-chance.log().item())


sizes = st.tuples(st.integers(2, 9), st.integers(2, 6), st.integers(0, 10**6))


@given(sizes, st.sampled_from([0.07, 0.5]))
@settings(max_examples=30, deadline=None)
def test_order_and_roles_do_not_matter(size: tuple[int, int, int], temperature: float) -> None:
    first, second = (view.detach() for view in pair(*size))
    order = torch.randperm(size[0], generator=torch.Generator().manual_seed(size[2]))
    expected = nt_xent(first, second, temperature)
    torch.testing.assert_close(nt_xent(second, first, temperature), expected, **EXACT)
    torch.testing.assert_close(nt_xent(first[order], second[order], temperature), expected, **EXACT)


@given(sizes, st.floats(-37, 37), st.floats(-37, 37))
@settings(max_examples=30, deadline=None)
def test_the_length_of_embeddings_does_not_matter(size: tuple[int, int, int], one: float, other: float) -> None:
    first, second = pair(*size, dtype=torch.float32)
    scaled = nt_xent(first * 10**one, second * 10**other, 0.1)  # to where squares overflow and vanish in float32
    # a factor rounds each entry by 6e-8, a cosine by a few of these; over temperature 0.1
    torch.testing.assert_close(scaled, nt_xent(first, second, 0.1), rtol=1e-5, atol=1e-5)


def test_it_is_float32_under_autocast_and_for_half_precision() -> None:
    first, second = pair(6, 8, dtype=torch.bfloat16)
    expected = nt_xent_reference(first.double(), second.double(), 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        found = nt_xent(first, second, 0.05)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_large_logits_stay_finite() -> None:
    first, second = pair(6, 8, dtype=torch.float32)
    found = loss_and_gradients(nt_xent, first, second, 1e-3)  # exp(1000) is no float
    assert all(bool(part.isfinite().all()) for part in found)


@pytest.mark.parametrize("bad", [0.0, torch.nan, torch.inf])
def test_an_embedding_without_a_direction_shows_in_the_loss(bad: float) -> None:
    first, second = (view.detach() for view in pair(4, 3))
    second[1] = bad
    assert nt_xent(first, second).isnan()


def test_what_has_no_loss_is_refused() -> None:
    one = torch.ones(1, 3)
    with pytest.raises(ValueError, match="at least 2 pairs, got 1: the negatives of a pair are the others of its"):
        nt_xent(one, one)
    with pytest.raises(ValueError, match=r"the same shape \(B, D\), got \(2, 3\) and \(3, 3\)"):
        nt_xent(torch.ones(2, 3), torch.ones(3, 3))
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        nt_xent(torch.eye(3), torch.eye(3), 0.0)


def check_processes(rank: int) -> None:
    """Each process has three of the six pairs; the mean over processes is what DDP takes."""
    first, second = pair(6, 4)
    own = slice(3 * rank, 3 * rank + 3)
    expected, *gradients = loss_and_gradients(nt_xent_reference, first, second, 0.2)
    mine = [view.detach()[own].clone().requires_grad_() for view in (first, second)]
    loss = nt_xent(*mine, 0.2)
    loss.backward()
    total = loss.detach().clone()
    torch.distributed.all_reduce(total)
    torch.testing.assert_close(total / 2, expected, **EXACT)
    for view, gradient in zip(mine, gradients, strict=True):
        torch.testing.assert_close(view.grad / 2, gradient[own], **EXACT)
    alone = torch.ones(1, 2, requires_grad=True) + rank  # one pair each: the other process has the negatives
    assert nt_xent(alone, alone, 1.0).isfinite()
    assert torch.equal(gathered(torch.tensor([[rank], [rank + 2]]), dim=1), torch.tensor([[0, 1], [2, 3]]))


def test_two_processes_have_the_loss_and_gradient_of_one() -> None:
    in_processes(2, check_processes)
