"""Names and options in words: read, refused, and written again."""

from dataclasses import dataclass, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stabilizer_case import TRIMTABS

from trimtab.errors import RecipeError
from trimtab.stabilizers import STABILIZERS, Clip, LayerScale, Sigma, Stabilizer, Warmup, parse, register, spec_of


def test_names_options_and_their_order() -> None:
    found = parse("layer-scale:init=0.5 + sigma:gamma_init=one:remove-norms=true+clip:norm=1e+1")
    assert found == (Sigma(gamma_init="one", remove_norms=True), LayerScale(init=0.5), Clip(norm=10.0))
    assert parse("none") == parse("none+none") == ()
    assert parse(Sigma()) == parse([Sigma()]) == parse("sigma") == (Sigma(),)
    assert parse("sigma:gamma_init=2") == (Sigma(gamma_init=2.0),)
    assert parse("sigma:init_std=none+warmup:steps=7") == (Sigma(), Warmup(steps=7))


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ("sgima", "did you mean sigma?"),
        ("qknorm", "did you mean qk-norm?"),
        ("sigma:gamma_int=one", "did you mean gamma_init?"),
        ("sigma:gamma_init=two", "gamma_init must be spectral, one or a number; got 'two'"),
        ("sigma:remove_norms=1", "remove_norms must be true or false; got '1'"),
        ("sigma:vectors=2.5", "vectors must be a whole number; got '2.5'"),
        ("sigma:vectors=0", "from 1 up"),
        ("sigma:gamma_init=nan", "got 'nan'"),
        ("sigma:layers", "expected option=value"),
        ("sigma:layers=mlp:layers=all", "given twice"),
        ("sigma+sigma:layers=mlp", "named twice"),
        ("clip:norm=0", "positive"),
        ("sam:rho=0", "positive"),
        ("sam:adaptive=1", "true or false"),
        ("warmup:steps=0", "at least 1"),
        ("muon:lr=1", "it has none"),
        ("", "expected names"),
        ("sigma+", "expected names"),
        ("+", "expected names"),
    ],
)
def test_what_is_wrong_is_told(spec: str, told: str) -> None:
    with pytest.raises(RecipeError) as error:
        parse(spec)
    assert told in str(error.value)


def test_options_given_to_the_class_are_checked_too() -> None:
    wrong: Any = "two"
    with pytest.raises(RecipeError, match="sigma: gamma_init must be spectral, one or a number; got 'two'"):
        Sigma(gamma_init=wrong)
    with pytest.raises(RecipeError, match="expected the name of a stabilizer"):
        parse([wrong])


options_of_sigma = st.fixed_dictionaries(
    {},
    optional={
        "gamma_init": st.sampled_from(["spectral", "one"]) | st.floats(1e-6, 1e6),
        "layers": st.sampled_from(["all", "blocks", "attention", "mlp"]),
        "blocks": st.sampled_from(["auto", "one", "heads"]),
        "vectors": st.integers(1, 9),
        "remove_norms": st.booleans(),
        "init_std": st.none() | st.floats(1e-30, 1e30),
    },
)


@given(options_of_sigma, st.floats(1e-30, 1e30), st.none() | st.integers(1, 10**9))
def test_words_written_are_read_back(options: dict[str, Any], norm: float, steps: int | None) -> None:
    stabilizers = (Sigma(**options), Clip(norm=norm), Warmup(steps=steps))
    assert parse(spec_of(stabilizers)) == tuple(sorted(stabilizers, key=lambda each: (each.order, each.name)))


def test_each_name_is_a_class_with_a_docstring_that_says_what_when_not_and_its_options() -> None:
    for name, cls in TRIMTABS.items():
        assert cls.name == name
        assert parse(name) == (() if name == "none" else (cls(),))
        words = cls.__doc__ or ""
        if name != "none":
            assert "When not to use it: " in words, name
            for option in fields(cls):
                assert f"        {option.name}: " in words, (name, option.name)
        if name not in ("none", "init-scale"):
            assert "arXiv" in words, name


def test_what_can_be_registered() -> None:
    @dataclass(frozen=True)
    class Fine(Stabilizer):
        """Nothing."""

    with pytest.raises(RecipeError, match="Fine has no name"):
        parse(Fine())
    with pytest.raises(ValueError, match="taken"):
        register("sigma")(Fine)
    with pytest.raises(ValueError, match="lower-case"):
        register("My Own")(Fine)
    wrong: Any = type("NoDataclass", (Stabilizer,), {})
    with pytest.raises(TypeError, match="dataclass"):
        register("my-own")(wrong)
    assert "my-own" not in STABILIZERS
