import dataclasses
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trimtab.errors import RecipeError
from trimtab.models.vit import ViTConfig
from trimtab.tasks.images import Augment, ImagesRecipe, vit_digits, vit_fashion
from trimtab.tasks.recipes import RECIPES, find_recipe, recipe_of
from trimtab.tasks.typed import typed

positive = st.floats(1e-6, 1e6)
models = st.builds(
    ViTConfig,
    image_size=st.just(8),
    patch_size=st.sampled_from([1, 2, 4]),
    in_channels=st.just(1),
    num_classes=st.just(10),
    dim=st.sampled_from([8, 16]),
    depth=st.integers(1, 3),
    num_heads=st.sampled_from([1, 2, 4]),
    norm=st.sampled_from(["pre", "post", "none"]),
    pool=st.sampled_from(["mean", "cls"]),
    drop_path=st.floats(0, 0.9),
    init_std=positive,
)
augments = st.builds(
    Augment,
    crop=st.integers(0, 4),
    flip=st.booleans(),
    rand_augment=st.none() | st.tuples(st.integers(1, 13), st.integers(1, 29)),
    mixup=st.floats(0, 5),
)
recipes = st.builds(
    ImagesRecipe,
    data=st.sampled_from(["digits", "fashion-mnist"]),
    model=models,
    augment=augments,
    validation=st.integers(0, 100),
    weights=st.none() | st.text(),
    optimizer=st.sampled_from(["adamw", "sgd"]),
    lr=positive | st.integers(1, 3),
    betas=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)),
    clip=st.none() | positive,
    seconds=st.none() | positive,
    ema=st.none() | st.floats(0.1, 0.9),
    patience=st.none() | st.integers(1, 5),
    compile=st.booleans(),
    seed=st.integers(0, 2**63 - 1),
)


@given(recipes)
@settings(max_examples=100, deadline=None)
def test_a_recipe_survives_the_way_through_run_json(recipe: ImagesRecipe) -> None:
    content = json.loads(json.dumps(asdict(recipe)))
    assert recipe_of({"task": "ImagesRecipe", "recipe": content}) == recipe
    assert recipe_of({"task": "ImagesRecipe", "recipe_name": "vit-fashion", "recipe": content}) == recipe


@dataclass(frozen=True)
class Inner:
    size: int = 1


@dataclass(frozen=True)
class Everything:
    """A field of every kind that a recipe may have."""

    whole: int = 0
    number: float = 0.0
    flag: bool = False
    kind: Literal["a", "b", 3] = "a"
    gamma: Literal["one"] | float = "one"
    either: int | float = 0
    maybe: Inner | None = None
    pair: tuple[int, str] = (0, "")
    many: tuple[float, ...] = ()
    names: list[str] = dataclasses.field(default_factory=list)
    table: dict[str, Inner] = dataclasses.field(default_factory=dict)
    anything: Any = None
    made: int = dataclasses.field(default=5, init=False)


everything = st.builds(
    Everything,
    whole=st.integers(),
    number=st.floats(allow_nan=False),
    flag=st.booleans(),
    kind=st.sampled_from(["a", "b", 3]),
    gamma=st.just("one") | st.floats(allow_nan=False),
    either=st.integers() | st.floats(allow_nan=False),
    maybe=st.none() | st.builds(Inner, st.integers()),
    pair=st.tuples(st.integers(), st.text()),
    many=st.lists(st.floats(allow_nan=False)).map(tuple),
    names=st.lists(st.text()),
    table=st.dictionaries(st.text(), st.builds(Inner, st.integers())),
    anything=st.none() | st.integers() | st.text(),
)


def infinite_as_text(value: Any) -> Any:
    """What a run.json holds: floats without end are strings."""
    if isinstance(value, dict):
        return {key: infinite_as_text(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [infinite_as_text(item) for item in value]
    return str(value) if isinstance(value, float) and abs(value) == float("inf") else value


@given(everything)
@settings(max_examples=200, deadline=None)
def test_every_kind_of_field_survives_json(value: Everything) -> None:
    content = json.loads(json.dumps(infinite_as_text(asdict(value)), allow_nan=False))
    again = typed(Everything, content)
    assert again == value
    assert isinstance(again.number, float)
    assert type(again.either) is type(value.either)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.1}, r"unknown field 'learning_rate' of ImagesRecipe\."),
        ({"sede": 1}, r"unknown field 'sede' of ImagesRecipe. Did you mean seed\?"),
        ({"model.deph": 1}, r"unknown field 'model.deph' of ViTConfig. Did you mean depth\?"),
        ({"model.norm": "prae"}, "model.norm must be one of pre, post, none; got 'prae'. Did you mean pre"),
        ({"model.dim": "64"}, "model.dim must be a whole number; got '64'"),
        ({"model": None}, "model must be the fields of a ViTConfig; got None"),
        ({"steps": 1.5}, "steps must be a whole number; got 1.5"),
        ({"steps": True}, "steps must be a whole number; got True"),
        ({"lr": "fast"}, "lr must be a number; got 'fast'"),
        ({"clip": "1"}, "clip must be a number or None; got '1'"),
        ({"compile": 1}, "compile must be true or false; got 1"),
        ({"betas": [0.9]}, "betas must have 2 values; got 1"),
        ({"betas": [0.9, "x"]}, r"betas\[1\] must be a number; got 'x'"),
        ({"lr": -1.0}, "lr must be a positive number, got -1.0"),
    ],
)
def test_a_field_that_is_unknown_or_ill_typed_is_named(changes: dict[str, object], message: str) -> None:
    content = asdict(vit_digits())
    for name, value in changes.items():
        place, _, last = name.rpartition(".")
        (content[place] if place else content)[last] = value
    with pytest.raises(RecipeError, match=message):
        recipe_of({"task": "ImagesRecipe", "recipe": content})


def test_a_field_without_a_default_may_not_be_missing_and_others_have_their_own() -> None:
    content = asdict(vit_digits())
    del content["lr"]
    assert recipe_of({"task": "ImagesRecipe", "recipe": content}) == vit_digits()
    del content["model"]["dim"]
    with pytest.raises(RecipeError, match=r"model\.dim is missing: ViTConfig has no default for it"):
        recipe_of({"task": "ImagesRecipe", "recipe": content})


def test_a_run_json_without_a_recipe_or_of_an_unknown_task() -> None:
    with pytest.raises(RecipeError, match=r"run\.json has no recipe"):
        recipe_of({"task": "ImagesRecipe"})
    with pytest.raises(RecipeError, match=r"its task 'Mine' is not one of Trimtab's \(ImagesRecipe, ContrastRecipe, L"):
        recipe_of({"task": "Mine", "recipe": {}})


def test_recipes_by_name_each_with_its_line() -> None:
    assert {"vit-digits", "vit-fashion", "vit-cifar10-sigma", "vit-ti16-deit", "vit-h14-sigma-preln"} <= set(RECIPES)
    assert find_recipe("vit-digits") == vit_digits()
    assert find_recipe("vit-fashion") == vit_fashion()
    for make in RECIPES.values():
        assert make.__doc__
        assert len(make.__doc__.splitlines()[0]) > 20


def test_an_unknown_name_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match=r"unknown recipe 'vit-digit'. Did you mean vit-digits\?"):
        find_recipe("vit-digit")
    with pytest.raises(RecipeError, match=r"unknown recipe 'zzzz'. There are: vit-digits, .*yours: file.py:NAME"):
        find_recipe("zzzz")


OWN = """\
from dataclasses import dataclass
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.images import vit_digits
from beside import SIZE

@dataclass(frozen=True, kw_only=True)
class Mine(Recipe):
    size: int = SIZE

    def task(self):
        pass

class Other:
    pass

def tiny():
    return Mine(size=2, steps=5)

def theirs():
    return vit_digits()

def broken():
    return Mine(lr=-1.0)

def empty():
    pass

number = 3
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "beside.py").write_text("SIZE = 7\n")
    path = tmp_path / "mine.py"
    path.write_text(OWN)
    return path


def test_a_recipe_of_ones_own_by_function_or_class(own: Path) -> None:
    tiny, default = find_recipe(f"{own}:tiny"), find_recipe(f"{own}:Mine")
    assert (tiny.steps, tiny.size, default.size) == (5, 2, 7)  # type: ignore[attr-defined]
    assert type(tiny) is type(default)  # the file ran once
    assert find_recipe(f"{own}:tiny") == tiny
    assert find_recipe(f"{own}:theirs") == vit_digits()
    info = {"task": "Mine", "recipe_name": f"{own}:tiny", "recipe": json.loads(json.dumps(asdict(default)))}
    assert recipe_of(info) == default


def test_a_changed_file_is_another_module(own: Path) -> None:
    before = find_recipe(f"{own}:tiny")
    own.write_text(OWN.replace("size=2", "size=3"))
    assert find_recipe(f"{own}:tiny").size == 3  # type: ignore[attr-defined]
    assert before.size == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":tny", r"mine\.py has no 'tny'\. Did you mean tiny\? There are: Mine, tiny, theirs, broken, empty"),
        (":number", "number of .* is of type int; expected a function that returns a Recipe"),
        (":empty", r"empty\(\) of .* returned something of type NoneType; expected"),
        (":broken", r"mine\.py, line 23: RecipeError: lr must be a positive number"),
        ("", r"which recipe of .*\? Write .*mine\.py:NAME; there are: Mine, tiny"),
        (":", r"which recipe of .*\? Write .*mine\.py:NAME; there are: Mine, tiny"),
    ],
)
def test_what_is_no_recipe_in_a_file_is_told_with_its_place(own: Path, name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        find_recipe(f"{own}{name}")


OWN_CLASS = """\
from dataclasses import dataclass
from pathlib import Path
from trimtab.tasks.recipe import Recipe

@dataclass(frozen=True, kw_only=True)
class Sound(Recipe):
    width: int = 8

    def task(self):
        pass

"""


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("@dataclass(frozen=True)\nclass Mine(Recipe):\n    width: int = 3", "Mine of .* has no method `task`"),
        ("class Mine(Sound):\n    lr: float = 0.1", r"Mine of .* is no dataclass, so that its lr would not count"),
        ("class Mine(Sound):\n    width = 9", "width of Mine of .* has no type, so that it would not count"),
        ("@dataclass(frozen=True)\nclass Mine(Sound):\n    lr = 0.1", "lr of Mine of .* has no type"),
        (
            "@dataclass(frozen=True)\nclass Mine(Sound):\n    data: Path = Path('x')",
            "data is declared as Path, which a run.json cannot hold: declare it as bool, int, float, str",
        ),
        ("@dataclass(frozen=True)\nclass Mine(Sound):\n    sizes: tuple = ()", "sizes is declared as tuple, which"),
    ],
)
def test_a_class_that_would_train_something_else_than_it_says_is_refused(
    written: str, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"{OWN_CLASS}\n{written}\n")
    with pytest.raises(RecipeError, match=message):
        find_recipe(f"{path}:Mine")
    path.write_text(f"{OWN_CLASS}\nclass Mine(Sound):\n    def loss(self):\n        pass\n")
    assert find_recipe(f"{path}:Mine").lr == 1e-3  # it has no field of its own, so it need be no dataclass


def test_a_run_json_whose_file_is_elsewhere_tells_where_the_name_is_from() -> None:
    with pytest.raises(
        RecipeError, match=r"gone\.py cannot be read .*\(the run\.json names the recipe 'gone\.py:Mine'"
    ):
        recipe_of({"task": "Mine", "recipe_name": "gone.py:Mine", "recipe": {}})


def test_a_file_that_is_missing_or_does_not_run(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"absent\.py cannot be read \(No such file"):
        find_recipe(f"{tmp_path / 'absent.py'}:x")
    path = tmp_path / "fails.py"
    path.write_text("x = 1\ny = 1 / 0\n")
    with pytest.raises(RecipeError, match=r"fails\.py, line 2: ZeroDivisionError"):
        find_recipe(f"{path}:x")
    path.write_text("x = 1\nraise SystemExit('enough')\n")
    with pytest.raises(RecipeError, match=r"fails\.py, line 2: SystemExit: enough"):
        find_recipe(f"{path}:x")
    path.write_text("x = 1\ny = = 2\n")
    with pytest.raises(RecipeError, match=r"fails\.py, line 2: SyntaxError"):
        find_recipe(f"{path}:x")
