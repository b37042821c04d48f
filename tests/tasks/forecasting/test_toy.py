from pathlib import Path

import numpy as np
import pytest
import torch

from trimtab.errors import DataError
from trimtab.tasks.forecasting.toy import toy_parts

SIZES = (400, 300, 200)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def numbers(data: str, part: str) -> tuple[np.ndarray, np.ndarray]:
    examples = getattr(toy_parts(data, 16, 6, SIZES, channels=5), part)
    x, y = examples.batch(torch.arange(examples.size), torch.Generator())
    return x.double().numpy(), y.double().numpy()


def test_what_least_squares_leaves_is_noise_of_variance_one() -> None:
    x, y = numbers("toy", "train")
    weight = np.linalg.lstsq(x.reshape(-1, 16), y.reshape(-1, 6), rcond=None)[0]
    for part, size in zip(("train", "validation", "test"), SIZES, strict=True):
        x, y = numbers("toy", part)
        assert x.shape == (size, 5, 16)
        assert y.shape == (size, 5, 6)
        error = (y - x @ weight).ravel()
        # of n squares of N(0, 1) the mean has a deviation of sqrt(2 / n); 16 weights of 2,000 rows add 0.8 %
        assert (error**2).mean() == pytest.approx(1, abs=0.01 + 4 * (2 / error.size) ** 0.5)
        assert x.var() == pytest.approx(1, abs=4 * (2 / x.size) ** 0.5)
    # W has 96 numbers of N(0, 1), and so zero an error of about L + 1
    assert (weight**2).mean() == pytest.approx(1, abs=4 * (2 / 96) ** 0.5)
    assert (y**2).mean() == pytest.approx(1 + (weight**2).sum() / 6, rel=0.1)


def test_examples_are_no_windows_of_each_other() -> None:
    x, _ = numbers("toy", "train")
    assert abs(np.corrcoef(x[:-1, :, 1:].ravel(), x[1:, :, :-1].ravel())[0, 1]) < 0.03
    assert len(np.unique(x.astype(np.float32))) > 0.99 * x.size


def test_the_same_seed_draws_the_same_and_another_one_others() -> None:
    first, again, other = (numbers(data, "test") for data in ("toy", "toy:0", "toy:1"))
    assert (first[0] == again[0]).all()
    assert (first[1] == again[1]).all()
    assert abs(np.corrcoef(first[0].ravel(), other[0].ravel())[0, 1]) < 0.05


def test_a_batch_is_what_its_indices_ask_for() -> None:
    parts = toy_parts("toy", 16, 6, SIZES, channels=5)
    x, y = parts.validation.batch(torch.tensor([3, 299, 3]), torch.Generator())
    whole, ahead = numbers("toy", "validation")
    np.testing.assert_array_equal(x.numpy(), whole[[3, 299, 3]].astype(np.float32))
    np.testing.assert_array_equal(y.numpy(), ahead[[3, 299, 3]].astype(np.float32))
    assert parts.facts == {"windows": {"train": 400, "validation": 300, "test": 200}, "bayes_mse": 1.0}


def test_a_seed_is_a_whole_number() -> None:
    with pytest.raises(DataError, match="toy:SEED with a whole number; got 'toy:x'"):
        toy_parts("toy:x", 16, 6)
