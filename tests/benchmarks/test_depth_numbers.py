"""What the benchmarks about deep language models and TEV rest on."""

import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import pytest

from trimtab.watch.signals import GradientNoise, averaged


def test_models_of_all_depths_have_one_size(bench: Callable[[str], ModuleType]) -> None:
    """Of their blocks' matrices, 12 · depth · width²."""
    depth_lm = bench("depth_lm")
    sizes = [12 * depth * width**2 for depth, width in depth_lm.WIDTHS.items()]
    assert max(sizes) / min(sizes) < 1.005
    for depth, width in depth_lm.WIDTHS.items():
        model = depth_lm.recipe(depth, width, quick=False).model
        assert (model.depth, model.dim) == (depth, width)
        larger = depth_lm.recipe(depth, depth_lm.WIDER * width, gpu=True, quick=False).model
        assert larger.dim // larger.num_heads in (64, 68)


def test_growth_tells_exponential_from_equal_steps(bench: Callable[[str], ModuleType]) -> None:
    growth = bench("depth_lm").growth
    assert growth([0.1 * 1.25**layer for layer in range(12)]) == pytest.approx([0.25, 0.25])
    first, second = growth([0.1 + 0.3 * layer for layer in range(12)])
    assert first > 2 * second > 0
    assert growth([]) == growth([1.0, math.nan, 2.0, 3.0]) == []


def test_which_layers_gradients_are_large(bench: Callable[[str], ModuleType]) -> None:
    """Eight blocks, of which the first two are the shallow quarter."""
    depth_lm = bench("depth_lm")
    by_layer = np.ones((10, 8))
    by_layer[:, :2] = 6.0
    assert depth_lm.shallow_over_deep(by_layer) == pytest.approx(6.0)
    norms = np.ones(10)
    norms[0], norms[7] = 100.0, 9.0  # the first steps do not count
    for block, expected in ((1, True), (5, False)):
        grown = by_layer.copy()
        grown[7, block] *= 50
        assert depth_lm.shallow_grows_most(grown, norms) is expected
    assert depth_lm.shallow_grows_most(np.full((10, 8), np.nan), norms) is None


def test_single_readings_out_of_watchs_moving_average(bench: Callable[[str], ModuleType]) -> None:
    values, average, logged = [5.0, 2.0, 7.0], None, [math.nan] * 6
    for place, value in zip((0, 2, 5), values, strict=True):
        average = averaged(average, GradientNoise(value, 0.0))
        logged[place] = average.variance
    found = bench("tev")._single_readings(np.array(logged))
    assert found[[0, 2, 5]] == pytest.approx(values)
    assert np.isnan(found[[1, 3, 4]]).all()


def test_correlations_over_runs_and_within_their_cells(bench: Callable[[str], ModuleType]) -> None:
    """What follows the learning rate alone correlates over runs, and not among runs of one learning rate."""
    over_runs = bench("tev").over_runs
    orthogonal = [(1, 1), (1, -1), (-1, 1), (-1, -1)] * 2
    runs = [
        {"lr": lr, "depth": 12, "mu": lr + 0.1 * x, "loss": lr + 0.1 * y}
        for lr in (1.0, 2.0, 3.0)
        for x, y in orthogonal
    ]
    rho, low, high = over_runs(runs, "mu", "loss")
    assert low <= rho <= high
    assert rho > 0.8
    rho, low, high = over_runs(runs, "mu", "loss", cells=True)
    assert low < 0 < high
    assert rho == pytest.approx(0.0, abs=1e-12)
    assert all(math.isnan(value) for value in over_runs(runs[:2], "mu", "loss"))
