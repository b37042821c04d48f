import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from trimtab.watch.signals.sigmas import SigmaTracker, iteration
from trimtab.watch.signals.weights import plain_weights, stable_rank


class Zoo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.positions = nn.Parameter(torch.randn(1, 5, 6))
        self.conv = nn.Conv2d(3, 6, 2)
        self.norm = nn.LayerNorm(6)
        self.attention = nn.MultiheadAttention(6, 2)
        self.linear = nn.Linear(6, 4).bfloat16()
        self.head = nn.Linear(6, 9)
        self.head.weight = self.embedding.weight
        self.again = nn.Linear(6, 4)
        self.again.weight = self.linear.weight


def exact(weight: torch.Tensor) -> float:
    return torch.linalg.matrix_norm(weight.detach().double().flatten(1), 2).item()


def test_every_matrix_once() -> None:
    torch.manual_seed(0)
    zoo = Zoo()
    names = ["conv.weight", "attention.in_proj_weight", "attention.out_proj.weight", "linear.weight"]
    weights = plain_weights(zoo)
    assert list(weights) == names
    assert weights["conv.weight"] is zoo.conv.weight
    assert list(plain_weights(zoo, names[:3])) == names[3:]
    random_state = torch.get_rng_state()
    reading = SigmaTracker().read(weights)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert list(reading.sigma) == list(reading.stable_rank) == names
    for name, (sigma,) in reading.sigma.items():
        assert sigma == pytest.approx(exact(weights[name]), rel=1e-5)
        squares = weights[name].detach().double().square().sum().item()
        assert reading.stable_rank[name] == pytest.approx(squares / exact(weights[name]) ** 2, rel=1e-4)
        assert stable_rank(weights[name]) == pytest.approx(reading.stable_rank[name], rel=1e-4)


def moving(sizes: list[tuple[int, int]], steps: int, speed: float):
    """Weights that turn at random, as under sign-like updates of one size."""
    generator = torch.Generator().manual_seed(0)
    weights = {str(i): torch.randn(size, generator=generator) * 0.05 for i, size in enumerate(sizes)}
    for _ in range(steps):
        for weight in weights.values():
            weight += speed * torch.randn(weight.shape, generator=generator).sign()
        yield weights


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_it_follows_weights_that_move_and_is_never_above_the_truth(dtype) -> None:
    """Steps of 2 % of the entries' spread; alone and stacked, longer than wide, wider than long, of one row."""
    tracker, ratios = SigmaTracker(), []
    for weights in moving([(40, 60), (40, 60), (60, 20), (1, 9), (300, 260)], 12, 1e-3):
        cast = {name: weight.to(dtype) for name, weight in weights.items()}
        found = tracker.read(cast).sigma
        ratios += [exact(weight) / found[name][0] for name, weight in cast.items()]
    assert min(ratios) > 1 - 1e-6  # rounding
    assert max(ratios) < 1.05
    assert max(ratios[:5]) < 1 + 1e-5  # the first reading is exact


def test_more_iterations_come_nearer_and_exact_is_exact() -> None:
    far = {}
    for iterations in (1, 4):
        tracker = SigmaTracker(iterations)
        for weights in moving([(64, 96)] * 3, 6, 2e-2):
            found = tracker.read(weights).sigma
        far[iterations] = max(exact(weight) / found[name][0] - 1 for name, weight in weights.items())
    assert far[4] < far[1] / 2
    found = tracker.read(weights, exact=True).sigma
    assert max(abs(exact(weight) / found[name][0] - 1) for name, weight in weights.items()) < 1e-6
    settled = tracker.read(weights).sigma  # and the next reading starts from there
    assert max(abs(exact(weight) / settled[name][0] - 1) for name, weight in weights.items()) < 1e-6


def test_stacking_changes_nothing() -> None:
    together, apart = SigmaTracker(), [SigmaTracker() for _ in range(3)]
    for weights in moving([(30, 20)] * 3, 4, 1e-2):
        found = together.read(weights).sigma
        for (name, weight), tracker in zip(weights.items(), apart, strict=True):
            assert tracker.read({name: weight}).sigma[name] == pytest.approx(found[name], rel=1e-5)


def test_zero_and_broken_weights_and_their_return() -> None:
    torch.manual_seed(0)
    good, start = torch.randn(8, 5), torch.randn(8, 5)
    weights = {"good": good, "zero": torch.zeros(8, 5), "broken": start.clone()}
    tracker = SigmaTracker(iterations=30)
    for broken in (start[0, 0].item(), math.nan, math.inf):
        weights["broken"][0, 0] = broken
        reading = tracker.read(weights)
        assert reading.sigma["good"] == pytest.approx([exact(good)], rel=1e-5)
        assert reading.sigma["zero"] == [0.0]
        assert math.isnan(reading.stable_rank["zero"])
        assert math.isnan(reading.sigma["broken"][0]) == (not math.isfinite(broken))
    weights |= {"zero": torch.randn(8, 5), "broken": start}
    weights["broken"][0, 0] = 0.5
    reading = tracker.read(weights)
    for name, weight in weights.items():
        assert reading.sigma[name] == pytest.approx([exact(weight)], rel=1e-3)
    first = SigmaTracker().read({"bad": torch.full((3, 3), math.nan), "good": good})
    assert math.isnan(first.sigma["bad"][0])
    assert first.sigma["good"] == pytest.approx([exact(good)], rel=1e-5)


def test_weights_that_come_go_and_change_shape() -> None:
    torch.manual_seed(0)
    tracker = SigmaTracker()
    for shapes in ({"a": (5, 4), "b": (5, 4)}, {"b": (5, 4)}, {"b": (7, 3), "c": (5, 4)}, {}):
        weights = {name: torch.randn(shape) for name, shape in shapes.items()}
        tracker.read(weights)
        again = tracker.read(weights).sigma
        assert again == {name: pytest.approx([exact(weight)], rel=1e-5) for name, weight in weights.items()}


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 6),
    k=st.integers(1, 4),
    rank=st.integers(1, 6),
    exponent=st.sampled_from([-25, 0, 25]),
    seed=st.integers(0, 99),
)
def test_an_iteration_is_the_best_of_its_span(rows, columns, k, rank, exponent, seed) -> None:
    """Against its definition in float64: the largest singular value of the part of W that its images span.

    Of any vectors, also where the images depend on each other; the new vectors are orthonormal and span W^T images.
    """
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(2, rows, rank, generator=generator) @ torch.randn(2, rank, columns, generator=generator)
    matrix = matrix * 10.0**exponent
    basis = torch.randn(2, k, columns, generator=generator)
    (moved,), sigma = iteration(
        [basis], lambda vectors: [vectors[0] @ matrix.mT], lambda vectors: [vectors[0] @ matrix]
    )
    left, values, _ = torch.linalg.svd(matrix.double() @ basis.double().mT, full_matrices=False)
    share = values / values[:, :1]
    assume(((share > 0.03) | (share < 1e-6)).all())  # between, it is rounding that tells whether a vector counts
    left = left * (share > 0.03)[:, None]
    expected = torch.linalg.matrix_norm(left.mT @ matrix.double(), 2)
    assert torch.allclose(sigma, expected, rtol=1e-3)  # the ridge, 1e-6, over .03²
    assert (sigma <= torch.linalg.matrix_norm(matrix.double(), 2) * (1 + 1e-6)).all()
    shown = torch.linalg.vector_norm(matrix.double() @ moved[:, 0, :, None].double(), dim=(1, 2))
    assert (shown >= sigma * (1 - 1e-4)).all()  # the first new vector is the best; dependent ones cost it digits
    gram = moved.double() @ moved.double().mT
    both = (share > 0.03)[:, :, None] & (share > 0.03)[:, None]
    unit = torch.eye(gram.shape[1]).expand_as(gram).double()[:, : share.shape[1], : share.shape[1]]
    found = gram[:, : share.shape[1], : share.shape[1]]
    assert torch.allclose(found[both], unit[both], atol=1e-3)  # float32 after two products: 1e-7 / .03²


def test_stable_rank_by_hand() -> None:
    assert stable_rank(torch.eye(5)) == pytest.approx(5)
    assert stable_rank(torch.diag(torch.tensor([2.0, 1.0, 1.0]))) == pytest.approx(6 / 4)
    assert stable_rank(torch.ones(2, 3, 4), sigma=math.sqrt(24)) == pytest.approx(1)
    assert math.isnan(stable_rank(torch.zeros(2, 2)))
