import numpy as np
import pytest
import torch

from trimtab.errors import RecipeError
from trimtab.tasks.forecasting.naive import errors, last_season, last_value, measure
from trimtab.tasks.forecasting.windows import windows


def test_the_last_value_and_the_last_season_go_on() -> None:
    x = torch.tensor([[[1.0, 2, 3, 4, 5], [6, 7, 8, 9, 10]]])
    assert last_value(x, 3).tolist() == [[[5, 5, 5], [10, 10, 10]]]
    assert last_season(x, 7, 3).tolist() == [[[3, 4, 5, 3, 4, 5, 3], [8, 9, 10, 8, 9, 10, 8]]]
    assert torch.equal(last_season(x, 4, 1), last_value(x, 4))
    assert last_season(x, 2, 5).tolist() == [[[1, 2], [6, 7]]]
    for season in (0, 6):
        with pytest.raises(RecipeError, match=f"a season must be from 1 step to what is seen, 5; got {season}"):
            last_season(x, 2, season)


def test_a_season_that_repeats_is_forecast_without_an_error() -> None:
    values = torch.randn(2, 6).repeat(1, 20)
    examples = windows(values, 12, 120, 12, 9)
    assert measure(lambda x: last_season(x, 9, 6), examples) == {"mse": 0, "mae": 0}
    assert measure(lambda x: last_value(x, 9), examples)["mse"] > 0.1


def test_errors_are_those_of_all_windows() -> None:
    values = torch.randn(3, 130)
    examples = windows(values, 10, 130, 10, 4)
    assert examples.size == 117  # several batches, the last one shorter
    squared, absolute = [], []
    for start in range(117):
        error = values[:, start + 10 : start + 14].double() - values[:, start + 9 : start + 10].double()
        squared.append((error**2).mean().item())
        absolute.append(error.abs().mean().item())
    found = measure(lambda x: last_value(x, 4), examples)
    assert found["mse"] == pytest.approx(np.mean(squared), rel=1e-6)
    assert found["mae"] == pytest.approx(np.mean(absolute), rel=1e-6)
    each = errors(lambda x: last_value(x, 4), *examples.batch(torch.arange(117), torch.Generator()))
    assert each["mse"].tolist() == pytest.approx(squared, rel=1e-5)
