import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import trimtab as tt
from trimtab.watch.signals.eigenvalue import largest_eigenvalue
from trimtab.watch.signals.sharpness import limits, sharpness


def hessian(model: nn.Module, loss_of) -> Tensor:
    """The whole Hessian, (parameters, parameters), from central differences of the gradient in float64."""
    parameters = list(model.parameters())
    start = parameters_to_vector(parameters).detach()

    def gradient(at: Tensor) -> Tensor:
        vector_to_parameters(at, parameters)
        return parameters_to_vector(torch.autograd.grad(loss_of(), parameters))

    step = 1e-5  # errors of its square and of rounding, each near 1e-10
    rows = [gradient(start + step * axis) - gradient(start - step * axis) for axis in torch.eye(len(start)).double()]
    vector_to_parameters(start, parameters)
    return torch.stack(rows) / (2 * step)


@settings(deadline=None, max_examples=20)
@given(eigenvalues=st.lists(st.integers(-20, 20).map(float), min_size=1, max_size=8), seed=st.integers(0, 99))
def test_lanczos_finds_the_largest_eigenvalue_not_the_longest(eigenvalues, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    Q = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64)).Q
    matrix = Q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ Q.mT
    split = n // 2

    def product(vectors: list[Tensor]) -> list[Tensor]:
        return list((matrix @ torch.cat(vectors)).split([split, n - split]))

    like = list(torch.zeros(n, dtype=torch.float64).split([split, n - split]))
    found = largest_eigenvalue(product, like, 3 * n, 1e-10, seed)
    assert found.value == pytest.approx(max(eigenvalues), abs=1e-6)
    assert found.iterations <= n


def test_a_quadratic_and_its_preconditioned_form() -> None:
    """loss = (w^T A w) / 2 has the Hessian A; Adam's P after one step is known by hand."""
    torch.manual_seed(0)
    A = torch.diag(torch.tensor([1.0, 5.0, 3.0, -9.0]))
    w, unused = nn.Parameter(torch.tensor([1.0, 0.1, 0.5, 2.0])), nn.Parameter(torch.ones(3))

    def loss() -> Tensor:
        return w @ A @ w / 2

    found = sharpness(loss, [w, unused], tolerance=1e-6)
    assert found.eigenvalue == pytest.approx(5, rel=1e-5)
    assert (found.preconditioned, found.limit, found.preconditioned_limit) == (None, None, None)
    optimizer = torch.optim.Adam([w, unused], lr=1e-2, eps=1e-3)
    assert sharpness(loss, [w], optimizer=optimizer).preconditioned is None  # no step yet
    loss().backward()
    gradient = w.grad.clone()
    optimizer.step()
    found = sharpness(loss, [w], optimizer=optimizer, tolerance=1e-6)
    expected = (A.diag() / (gradient.abs() + 1e-3)).max().item()  # after one step sqrt(v̂) = |g|
    assert found.preconditioned == pytest.approx(expected, rel=1e-4)
    assert found.preconditioned_limit == pytest.approx(38 / 1e-2)
    assert found.limit is None
    assert found.eigenvalue == pytest.approx(5, rel=1e-5)


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), (20, None)),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), (38, None)),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True), (3.8 / 0.28, None)),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1), betas=(0.8, 0.9)), (None, 180)),
        (lambda p: torch.optim.SGD([{"params": p, "lr": 1.0}, {"params": [nn.Parameter(torch.ones(1))]}], lr=0.1), 0),
        (lambda p: torch.optim.SGD(p, lr=0.0), 0),
        (lambda p: torch.optim.Adagrad(p, lr=0.1), 0),
    ],
)
def test_limits(make, expected) -> None:
    found = limits(make([nn.Parameter(torch.ones(2))]))
    assert found == (pytest.approx(expected) if expected else (None, None))


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.9, False), (0.9, True)])
def test_the_limit_is_where_descent_stops_descending(momentum, nesterov) -> None:
    """On a quadratic of that curvature: 1 % below it falls, 1 % above it grows."""
    for factor, falls in ((0.99, True), (1.01, False)):
        w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=0.1, momentum=momentum, nesterov=nesterov)
        curvature = factor * limits(optimizer)[0]
        for _ in range(3000):
            w.grad = curvature * w.detach()
            optimizer.step()
        assert (abs(w.item()) < 1) == falls


@pytest.mark.parametrize("kind", ["mlp", "attention", "converted", "convolution"])
def test_against_the_whole_hessian(kind) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 5, 4, dtype=torch.float64), torch.randint(3, (6,))
    model = {
        "mlp": lambda: nn.Sequential(nn.Flatten(), nn.Linear(20, 3), nn.Tanh(), nn.Linear(3, 3)),
        "attention": Attention,
        "converted": Attention,
        "convolution": lambda: nn.Sequential(nn.Conv1d(5, 4, 2), nn.GELU(), nn.Flatten(), nn.Linear(12, 3)),
    }[kind]().double()
    if kind == "converted":
        tt.reparametrize_(model)
    expected = torch.linalg.eigvalsh(hessian(model, lambda: F.cross_entropy(model(x), y)))[-1].item()
    found = sharpness(lambda: F.cross_entropy(model(x), y), model.parameters(), tolerance=1e-4, iterations=100)
    assert found.eigenvalue == pytest.approx(expected, rel=1e-5)
    assert found.residual <= 1e-4


class Attention(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.norm, self.head = nn.Linear(4, 12), nn.BatchNorm1d(5), nn.Linear(20, 3)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        mixed = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], dropout_p=self.dropout)[:, 0]
        return self.head(self.norm(mixed).flatten(1))


def test_training_does_not_notice() -> None:
    """Dropout, BatchNorm, gradients on their way and a backward still to come."""
    x, y = torch.randn(6, 5, 4), torch.randint(3, (6,))

    def run(measured: bool) -> tuple:
        torch.manual_seed(0)
        model = Attention(dropout=0.3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        found = []
        for _ in range(3):
            F.cross_entropy(model(x), y).backward()
            loss = F.cross_entropy(model(x), y)
            if measured:
                found.append(
                    sharpness(
                        lambda: F.cross_entropy(model(x), y),
                        model.parameters(),
                        optimizer=optimizer,
                        model=model,
                        iterations=5,
                    )
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        gradients = [p.grad for p in model.parameters()]
        return [*model.state_dict().values(), *gradients, torch.get_rng_state()], found

    (plain, _), (watched, found) = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    assert found[0].preconditioned is None
    assert found[1].preconditioned > 0


def test_the_same_seed_gives_the_same_number_under_dropout() -> None:
    torch.manual_seed(0)
    model, x, y = Attention(dropout=0.5), torch.randn(6, 5, 4), torch.randint(3, (6,))
    found = [
        sharpness(lambda: F.cross_entropy(model(x), y), model.parameters(), model=model, seed=seed).eigenvalue
        for seed in (0, 0, 1)
    ]
    assert found[0] == found[1] != found[2]


class Draws(nn.Module):
    """A weight under numbers drawn by Python and NumPy; keeps count, and what it made last."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.calls, self.seen, self.last = nn.Parameter(torch.ones(3)), 0, torch.zeros(3), None

    def forward(self) -> Tensor:
        self.calls += 1
        self.seen += 1  # in place
        self.last = self.weight * (1 + random.random() + np.random.random())
        self.new = self.last.sum()
        return self.last.pow(4).sum()


def states() -> tuple:
    return random.getstate(), [np.asarray(part).tolist() for part in np.random.get_state()]


def test_training_does_not_notice_draws_of_other_libraries_nor_attributes() -> None:
    model = Draws()
    seen, before = model.seen, states()
    found = [sharpness(model, model.parameters(), model=model, seed=seed).eigenvalue for seed in (0, 0, 1)]
    assert found[0] == found[1] != found[2]
    assert states() == before
    assert (model.calls, model.last, hasattr(model, "new")) == (0, None, False)
    assert model.seen is seen
    assert seen.tolist() == [0, 0, 0]
    assert sharpness(model, model.parameters(), seed=2**40).eigenvalue > 0  # more than NumPy takes


@pytest.mark.parametrize("options", [{"iterations": 0}, {"tolerance": 0.0}, {"tolerance": math.nan}])
def test_no_iterations_and_no_tolerance_are_refused(options) -> None:
    w = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="expected iterations >= 1 and tolerance > 0"):
        sharpness(lambda: w.square().sum(), [w], **options)


def test_the_default_device_is_not_asked() -> None:
    w = nn.Parameter(torch.tensor([1.0, 2.0]))
    with torch.device("meta"):
        found = sharpness(lambda: w.pow(4).sum(), [w], tolerance=1e-6)
    assert found.eigenvalue == pytest.approx(48)  # 12 w²


def test_a_loss_without_curvature_is_flat_and_a_broken_one_is_nan() -> None:
    w = nn.Parameter(torch.ones(3))
    assert sharpness(lambda: w.sum(), [w]).eigenvalue == 0
    assert math.isnan(sharpness(lambda: (w * math.nan).square().sum(), [w]).eigenvalue)


def test_what_is_no_loss_is_refused_and_leaves_gradients_alone() -> None:
    w, other = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    w.grad = gradient = torch.full((3,), 7.0)

    def backward() -> Tensor:
        loss = w.square().sum()
        loss.backward()
        return loss

    cases = [
        (lambda: 1.0, TypeError, "as a tensor"),
        (lambda: w.square(), ValueError, "one number"),
        (lambda: w.detach().sum(), ValueError, "without a graph"),
        (backward, ValueError, "without calling backward"),
        (lambda: other.square().sum(), ValueError, "none of the parameters"),
    ]
    for closure, error, says in cases:
        with pytest.raises(error, match=says):
            sharpness(closure, [w])
        assert w.grad is gradient
        assert gradient.tolist() == [7, 7, 7]
