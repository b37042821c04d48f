import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from trimtab.tasks.contrast.probe import fit_probe, neighbour_votes


def some(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features of three overlapping classes, of very different lengths, and their labels."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=random)
    features = torch.randn(count, 5, generator=random, dtype=torch.float64) + 1.5 * torch.eye(5)[labels]
    return features * torch.tensor([1e-3, 1.0, 30.0, 1.0, 1.0]) + 7, labels


@pytest.mark.parametrize("decay", [1e-3, 0.1])
def test_the_probe_is_scikit_learns_logistic_regression(decay: float) -> None:
    features, labels = some(300)
    new, _ = some(50, seed=1)
    probe = fit_probe(features, labels, 3, decay)
    scaler = StandardScaler().fit(features.numpy())

    def inputs(features: Tensor) -> np.ndarray:  # the last column has the bias for its weight, so that it decays
        return np.c_[scaler.transform(features.numpy()), np.ones(len(features))]

    model = LogisticRegression(C=1 / (decay * len(labels)), tol=1e-10, max_iter=10_000, fit_intercept=False)
    model.fit(inputs(features), labels.numpy())
    # the gradient of both ends below 1e-6, and the flattest direction is as steep as the decay
    np.testing.assert_allclose(probe.logits(new).softmax(dim=1).numpy(), model.predict_proba(inputs(new)), atol=3e-4)
    np.testing.assert_allclose(torch.cat([probe.weight, probe.bias[:, None]], 1).numpy(), model.coef_, atol=3e-3)


def test_a_class_without_images_has_a_probe_too() -> None:
    features, labels = some(300)
    short, long = (fit_probe(features, labels, 4, 1e-3, steps) for steps in (200, 2000))
    assert (short.logits(features).argmax(dim=1) != 3).all()
    torch.testing.assert_close(short.bias, long.bias, rtol=0, atol=2e-3)  # it does not fall for ever; both below 1e-6


def test_a_feature_that_is_constant_up_to_rounding_is_not_blown_up() -> None:
    features, labels = some(300)
    constant = torch.full((300, 1), 0.1, dtype=torch.float64) * (1 + 1e-15 * features[:, :1])
    found = fit_probe(torch.cat([features, constant], dim=1), labels, 3)
    torch.testing.assert_close(found.weight[:, :5], fit_probe(features, labels, 3).weight, rtol=1e-3, atol=1e-3)
    zeros = fit_probe(torch.zeros(10, 4), torch.arange(10) % 3, 3)
    assert zeros.logits(torch.zeros(2, 4)).isfinite().all()


def test_features_that_are_not_finite_make_no_probe() -> None:
    features, labels = some(20)
    features[3, 2] = torch.inf
    assert fit_probe(features, labels, 3).logits(features[:2]).isnan().all()


def test_neighbours_vote_as_scikit_learns() -> None:
    (bank, labels), (new, _) = some(200), some(60, seed=1)
    votes = neighbour_votes(new, bank, labels, 3, k=20, temperature=0.2)
    model = KNeighborsClassifier(20, metric="cosine", weights=lambda distance: np.exp((1 - distance) / 0.2))
    expected = model.fit(bank.numpy(), labels.numpy()).predict_proba(new.numpy())
    np.testing.assert_allclose((votes / votes.sum(dim=1, keepdim=True)).numpy(), expected, rtol=1e-10, atol=1e-12)


def test_a_small_bank_votes_as_a_whole_and_broken_features_have_no_vote() -> None:
    bank, labels = torch.eye(3), torch.tensor([0, 0, 1])
    votes = neighbour_votes(torch.tensor([[1.0, 0.0, 0.0], [torch.nan, 0.0, 0.0]]), bank, labels, 2, k=200)
    far = torch.tensor(-1 / 0.07).exp()
    torch.testing.assert_close(votes[0], torch.stack([1 + far, far]))
    assert votes[1].isnan().any()
