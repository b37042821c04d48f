import math

from hypothesis import given
from hypothesis import strategies as st

from trimtab.watch.alarms import Head, Reading
from trimtab.watch.sinks.scalars import head_values, scalars


def test_a_line_becomes_flat_numbers_in_its_order() -> None:
    line = {
        "step": 40,
        "loss": 2.5,
        "lr": [0.1, 0.01],
        "max_logit": math.inf,
        "sigma": {"head.weight": [3.0], "blocks.0.qkv.weight": [1.0, 2.0, 4.0]},
        "stable_rank": {"head.weight": 7.5},
        "tev": {"embedding.weight": [0.02, 0.001]},
        "alarms": [{"kind": "dead head"}, {"kind": "loss spike"}],
        "time": 12.5,
        "note": "text",
    }
    flat = scalars(line)
    assert flat == {
        "loss": 2.5,
        "lr/0": 0.1,
        "lr/1": 0.01,
        "max_logit": math.inf,
        "sigma/head.weight": 3.0,
        "sigma/blocks.0.qkv.weight/0": 1.0,
        "sigma/blocks.0.qkv.weight/1": 2.0,
        "sigma/blocks.0.qkv.weight/2": 4.0,
        "stable_rank/head.weight": 7.5,
        "tev/embedding.weight/0": 0.02,
        "tev/embedding.weight/1": 0.001,
        "time": 12.5,
        "alarms": 2.0,
    }
    assert list(flat)[:4] == ["loss", "lr/0", "lr/1", "max_logit"]


def test_a_line_read_back_from_the_log_gives_the_same() -> None:
    flat = scalars({"step": 1, "loss": "nan", "lr": [0.1], "max_logit": "-inf"})
    assert math.isnan(flat.pop("loss"))
    assert flat == {"lr": 0.1, "max_logit": -math.inf}


numbers = st.floats(allow_nan=False) | st.integers(-1000, 1000)
values = st.recursive(
    numbers,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.", max_size=3), inner, max_size=3),
    max_leaves=12,
)


def leaves(value: object) -> list[float]:
    if isinstance(value, dict):
        return [leaf for entry in value.values() for leaf in leaves(entry)]
    return [leaf for entry in value for leaf in leaves(entry)] if isinstance(value, list) else [float(value)]  # type: ignore[arg-type]


@given(st.dictionaries(st.sampled_from(["loss", "lr", "sigma", "gamma"]), values, max_size=4))
def test_no_number_is_lost_and_none_invented(line: dict[str, object]) -> None:
    assert list(scalars(line).values()) == leaves(line)


def test_the_heads_are_distributions_of_what_is_finite() -> None:
    rows = [(1.0, 0.5, 3.0), (0.1, 0.1, math.inf), (math.nan, math.nan, math.nan)]
    readings = {Head("attention", head): Reading(*row) for head, row in enumerate(rows)}
    assert head_values(readings) == {"heads/entropy_normalized": [0.5, 0.1], "heads/max_logit": [3.0]}
    assert head_values({Head("attention", 0): Reading(*rows[2])}) == {}
    assert head_values({}) == {}
