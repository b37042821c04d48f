import math

from hypothesis import given
from hypothesis import strategies as st

from trimtab.report.sparkline import sparkline


def test_sparklines_by_hand() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert sparkline([0, 2, 10, 12], 2) == "▁█"
    assert sparkline([5, 5, 5], 8) == "▁▁▁"
    assert sparkline([1, math.nan, 2, math.inf, 2], 8) == "▁!█!█"
    assert sparkline([1, math.inf, 2, 2], 2) == "!▁"
    assert sparkline([1, 10, 1000], 8) == "▁▃█"  # logarithmic: 10 stands a third of the way
    assert sparkline([-1, 10, 100], 8) == "▁▂█"  # linear: (10 + 1) / (100 + 1) of the way
    assert sparkline([-1e308, 1e308], 8) == "▁█"
    assert sparkline([math.nan], 8) == "!"
    assert sparkline([], 8) == ""


@given(st.lists(st.floats(), max_size=60), st.integers(1, 40))
def test_a_sparkline_of_anything(values: list[float], width: int) -> None:
    drawn = sparkline(values, width)
    assert len(drawn) == min(width, len(values))
    assert set(drawn) <= set("▁▂▃▄▅▆▇█!")
    if not all(map(math.isfinite, values)):
        assert "!" in drawn
