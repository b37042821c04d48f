"""Which runs a compare consists of, and what is refused before anything is written."""

import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab.errors import RecipeError
from trimtab.tasks.images import vit_digits
from trimtab.train.compare.grid import folder_name, parse_lrs, parse_seeds, plan, stabilizer_arms

RECIPE = vit_digits()


def test_learning_rates_from_a_list_and_from_a_range() -> None:
    assert parse_lrs("1e-3, 3e-3,") == (1e-3, 3e-3)
    assert parse_lrs("0.01") == (0.01,)
    assert parse_lrs("1e-3:1e-1:5") == (1e-3, 0.00316228, 1e-2, 0.0316228, 1e-1)
    assert parse_lrs("") == ()


@given(low=st.floats(1e-6, 1.0), factor=st.floats(2.0, 1e6), count=st.integers(2, 12))
def test_a_range_is_geometric_and_includes_both_ends(low: float, factor: float, count: int) -> None:
    lrs = parse_lrs(f"{low!r}:{low * factor!r}:{count}")
    assert len(lrs) == count
    assert lrs[0] == pytest.approx(low, rel=5e-6)  # six digits are kept
    assert lrs[-1] == pytest.approx(low * factor, rel=5e-6)
    steps = [math.log(after / before) for before, after in itertools.pairwise(lrs)]
    assert steps == pytest.approx([math.log(factor) / (count - 1)] * (count - 1), abs=1e-5)
    assert all(float(f"{lr:g}") == lr for lr in lrs)  # a folder's name tells it exactly


@pytest.mark.parametrize(
    "text", ["a", "1e-3:1e-1", "1e-3:1e-1:5:6", "1e-1:1e-3:5", "0:1:3", "1:2:1", "1:inf:3", "1:2:x"]
)
def test_other_learning_rates_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="learning rates are a list"):
        parse_lrs(text)


def test_seeds_from_their_number_and_from_a_list() -> None:
    assert parse_seeds("3") == (0, 1, 2)
    assert parse_seeds("0,4") == (0, 4)
    assert parse_seeds("7,") == (7,)
    for text in ("x", "1.5", "1,b"):
        with pytest.raises(RecipeError, match="seeds are how many"):
            parse_seeds(text)


def test_the_plan_is_whole_and_each_part_of_it_is_fair(tmp_path: Path) -> None:
    arms = stabilizer_arms(RECIPE, ["none", "sigma:gamma_init=one"])
    places = plan(arms, [1e-3, 0.03], [4, 0], tmp_path)
    assert [(place.recipe.seed, place.recipe.lr, place.arm) for place in places] == [
        (seed, lr, arm) for seed in (4, 0) for lr in (1e-3, 0.03) for arm in ("none", "sigma:gamma_init=one")
    ]
    for place in places:
        assert place.recipe == replace(RECIPE, lr=place.recipe.lr, seed=place.recipe.seed, stabilizer=place.arm)
    assert places[1].name == "sigma:gamma_init=one lr0.001 seed4"
    assert places[1].folder == tmp_path / "runs" / "sigma_gamma_init=one" / "lr0.001-seed4"
    assert len({place.folder for place in places}) == len({place.name for place in places}) == 8
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arms", "lrs", "seeds", "message"),
    [
        ({}, [1e-3], [0], "at least one arm"),
        ({"a": RECIPE}, [], [0], "at least one learning rate"),
        ({"a": RECIPE}, [1e-3], [], "at least one seed"),
        ({"a": RECIPE}, [1e-3, 0.0], [0], "must be a positive number, got 0"),
        ({"a": RECIPE}, [math.nan], [0], "must be a positive number, got nan"),
        ({"a": RECIPE}, [1e-3, 1e-3 * (1 + 1e-9)], [0], "learning rate 0.001 is there twice"),
        ({"a": RECIPE}, [1e-3], [1, 1], "seed 1 is there twice"),
        ({"a": RECIPE}, [1e-3], [-1], "seed must be at least 0"),
        ({"a:b": RECIPE, "a/b": RECIPE}, [1e-3], [0], "'a:b' and 'a/b' would share the folder a_b"),
        ({"A": RECIPE, "a": RECIPE}, [1e-3], [0], "would share the folder"),
        ({"..": RECIPE}, [1e-3], [0], "1 to 120 characters"),
        ({"a": replace(RECIPE, stabilizer="sigmaa")}, [1e-3], [0], "did you mean sigma"),
    ],
)
def test_what_cannot_be_run_is_refused(
    arms: dict, lrs: list[float], seeds: list[int], message: str, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(arms, lrs, seeds, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_arms_are_known_stabilizers_each_named_once() -> None:
    with pytest.raises(RecipeError, match="sigma is there twice"):
        stabilizer_arms(RECIPE, ["sigma", " sigma"])
    with pytest.raises(RecipeError, match="did you mean sigma"):
        stabilizer_arms(RECIPE, ["none", "sigmaa"])


@given(st.text(min_size=1, max_size=60))
def test_a_folder_name_is_one_plain_component(arm: str) -> None:
    try:
        name = folder_name(arm)
    except RecipeError:
        return
    assert name
    assert not set(name) & set('/\\:*?"<>| \0')
    assert not name.startswith(".")
    assert name.isascii()
