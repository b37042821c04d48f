import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import DataError, RecipeError
from trimtab.tasks.forecasting.parts import parts_of
from trimtab.tasks.forecasting.series import Series
from trimtab.tasks.forecasting.splits import Split, ends_of, fit_scaler
from trimtab.tasks.forecasting.windows import window_view, windows
from trimtab.tasks.task import Examples


def all_of(examples: Examples) -> tuple[torch.Tensor, torch.Tensor]:
    return examples.batch(torch.arange(examples.size), torch.Generator())


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 12), st.integers(0, 12), st.integers(1, 3))
def test_every_window_is_there_once(lookback: int, horizon: int, before: int, more: int, channels: int) -> None:
    begin, end = lookback + before, lookback + before + horizon + more
    values = torch.randn(channels, end + 3)
    x, y = all_of(windows(values, begin, end, lookback, horizon))
    first = [start - lookback for start in range(begin, end - horizon + 1)]
    assert len(x) == len(y) == len(first) == more + 1
    for place, start in enumerate(first):  # one slice after the other
        assert torch.equal(x[place], values[:, start : start + lookback])
        assert torch.equal(y[place], values[:, start + lookback : start + lookback + horizon])


def test_windows_share_the_memory_of_the_series() -> None:
    values = torch.randn(7, 3000)
    view = window_view(values, 1232)
    assert view.shape == (1769, 7, 1232)
    assert view.untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
    assert view.untyped_storage().nbytes() == 7 * 3000 * 4


def test_a_batch_has_memory_of_its_own_in_any_order() -> None:
    values = torch.arange(40.0).view(2, 20)
    examples = windows(values, 5, 20, 5, 3)
    x, y = examples.batch(torch.tensor([7, 0, 7]), torch.Generator())
    assert x[:, 0, 0].tolist() == [7, 0, 7]
    assert y[:, 1, -1].tolist() == [34, 27, 34]
    assert x.is_contiguous()
    assert y.is_contiguous()
    x.zero_()
    assert values[0, 1] == 1


@pytest.mark.parametrize(
    ("num_steps", "split", "ends"),
    [
        (17_420, (8640, 2880, 2880), (8640, 11_520, 14_400)),
        (69_680, (34_560, 11_520, 11_520), (34_560, 46_080, 57_600)),
        (7588, (0.7, 0.1, 0.2), (5311, 6071, 7588)),
        (52_696, (0.7, 0.1, 0.2), (36_887, 42_157, 52_696)),
        (966, (0.7, 0.1, 0.2), (676, 773, 966)),
        (100, (0.8, 0.2, 0.0), (80, 100, 100)),
        (100, (50, 30, 0), (50, 80, 80)),
    ],
)
def test_splits_are_the_published_ones(
    num_steps: int, split: tuple[float, float, float], ends: tuple[int, ...]
) -> None:
    assert ends_of(num_steps, split) == ends


@pytest.mark.parametrize("split", [(0.7, 0.1, 0.3), (0.5, 0.0, 0.5), (0, 10, 10), (10, -1, 5), (math.nan, 0.5, 0.5)])
def test_what_is_no_split_is_refused(split: Split) -> None:
    with pytest.raises(RecipeError, match="split must"):
        ends_of(100, split)


def test_a_series_shorter_than_its_split_is_refused() -> None:
    with pytest.raises(DataError, match=r"the split \(80, 15, 10\) needs 105 steps, and the series has 100"):
        ends_of(100, (80, 15, 10))


def waves(num_steps: int, columns: int = 3) -> Series:
    random = np.random.default_rng(0)
    values = np.sin(np.arange(num_steps) / 4) + random.standard_normal((columns, num_steps)) * 5 + 100
    return Series("waves", values, tuple("abcdefg"[:columns]))


def test_parts_reach_back_and_are_scaled_by_the_training_part() -> None:
    series = waves(200)
    parts = parts_of(series, lookback=24, horizon=8, split=(120, 30, 40))
    mean = series.values[:, :120].mean(axis=1, keepdims=True)
    sd = series.values[:, :120].std(axis=1, keepdims=True)
    scaled = (series.values - mean) / sd
    expected = {"train": (0, 120 - 32 + 1), "validation": (96, 30 - 8 + 1), "test": (126, 40 - 8 + 1)}
    for name, (start, size) in expected.items():
        examples = getattr(parts, name)
        assert examples.size == parts.facts["windows"][name] == size
        x, y = all_of(examples)
        np.testing.assert_allclose(x[0], scaled[:, start : start + 24], rtol=0, atol=1e-5)
        last = start + size - 1
        np.testing.assert_allclose(y[-1], scaled[:, last + 24 : last + 32], rtol=0, atol=1e-5)
    assert x.dtype == torch.float32
    assert parts.channels == 3
    assert parts.facts["steps"] == {"train": 120, "validation": 30, "test": 40}


def test_what_comes_later_changes_no_scale() -> None:
    series = waves(200)
    later = Series(
        "waves", np.concatenate([series.values[:, :120], 9 * series.values[:, 120:]], axis=1), series.columns
    )
    one, other = (parts_of(each, 24, 8, (120, 30, 40)) for each in (series, later))
    scales = [json.loads(each.files["series.json"]) for each in (one, other)]
    assert scales[0].pop("sha256") != scales[1].pop("sha256")  # of the values that decide what is trained
    assert scales[0] == scales[1]
    assert torch.equal(all_of(one.train)[0], all_of(other.train)[0])


def test_a_scale_goes_back_to_the_units_it_came_from() -> None:
    values = waves(50).values
    scaler = fit_scaler(values)
    np.testing.assert_allclose(scaler.unscale(scaler.scale(values)), values, rtol=1e-12)
    np.testing.assert_allclose(scaler.scale(values).std(axis=1), 1, rtol=1e-12)


def test_a_constant_column_is_scaled_by_one_and_told(caplog: pytest.LogCaptureFixture) -> None:
    series = waves(200)
    series.values[1] = 0.1  # whose mean is not quite 0.1
    series.values[1, 150:] = 0.35
    parts = parts_of(series, 24, 8, (120, 30, 40))
    assert parts.facts["constant"] == ["b"]
    assert "waves: columns that are constant over the training steps, and scaled by 1: b" in caplog.text
    x, _ = all_of(parts.train)
    assert (x[:, 1] == 0).all()
    assert all_of(parts.test)[1][-1, 1, -1] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ((31, 30, 40), "the training part of waves has 31 of its 200 steps, fewer than look-back . horizon, 32"),
        ((120, 7, 40), "the validation part of waves has 7 of its 200 steps, fewer than horizon, 8"),
        ((120, 30, 7), "the test part of waves has 7 of its 200 steps, fewer than horizon, 8"),
    ],
)
def test_parts_too_short_for_a_window_are_refused(split: tuple[int, int, int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parts_of(waves(200), 24, 8, split)


def test_parts_of_exactly_one_window_and_none_for_the_test() -> None:
    parts = parts_of(waves(200), 24, 8, (32, 8, 8))
    assert parts.train.size == parts.validation.size == 1
    assert parts.test is not None
    assert parts.test.size == 1
    assert parts_of(waves(200), 24, 8, (32, 8, 0)).test is None
