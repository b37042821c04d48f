"""`stabilize_`, `with_changes` and `fold_` on the whole: errors undone, training changes, a stabilizer of one's own."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from stabilizer_case import TRIMTABS, StabilizerCase, small
from torch import nn

from trimtab.errors import ConversionError, RecipeError
from trimtab.stabilizers import STABILIZERS, Stabilizer, fold_, parse, register, stabilize_, with_changes


@dataclass(frozen=True)
class Inner:
    norm: str = "pre"


@dataclass(frozen=True)
class Plan:
    optimizer: str = "adamw"
    steps: int = 250
    warmup_steps: int = 0
    clip: float | None = None
    model: Inner = Inner()


@dataclass(frozen=True)
class Bare:
    steps: int = 5


def test_changes_of_a_recipe() -> None:
    changed = with_changes(Plan(), "deepnorm+warmup+clip:norm=0.5+muon+sigma")
    assert changed == Plan(optimizer="muon", warmup_steps=25, clip=0.5, model=Inner("post"))
    assert with_changes(Plan(), "none") == with_changes(Plan(), "sigma") == Plan()
    assert with_changes(Plan(steps=3), "warmup").warmup_steps == 1
    assert with_changes(Bare(), "deepnorm") == Bare()  # a recipe without such a choice brings a post-LN model itself
    with pytest.raises(RecipeError, match="warmup sets warmup_steps, but Bare has no field 'warmup_steps'"):
        with_changes(Bare(), "warmup")
    with pytest.raises(RecipeError, match=r"Inner has no field 'steps': say how many, warmup:steps="):
        with_changes(Inner(), "warmup")


@pytest.mark.parametrize("spec", ["warmup", "clip", "muon", "sam", "sigma+sam", "sigma+warmup"])
def test_changes_of_training_are_no_matter_of_a_bare_model(spec: str) -> None:
    model, before = small("vit").model, small("vit").model.state_dict()
    with pytest.raises(ConversionError, match="changes how a model is trained, not the model"):
        stabilize_(model, spec)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    stabilize_(model, spec, changes_made=True)
    assert ("head.gamma" in model.state_dict()) == ("sigma" in spec)


@pytest.fixture
def own() -> Iterator[type[Stabilizer]]:
    """A stabilizer of a user's own, in ten lines."""

    @register("tanh-head")
    @dataclass(frozen=True)
    class TanhHead(Stabilizer):
        """Bounds what the head puts out."""

        bound: float = 5.0

        def apply_(self, model: nn.Module) -> None:
            if not isinstance(getattr(model, "head", None), nn.Linear):
                raise ConversionError("tanh-head finds no head")
            model.get_submodule("head").register_forward_hook(lambda _, __, out: self.bound * torch.tanh(out))

    yield TanhHead
    del STABILIZERS["tanh-head"]


def test_a_stabilizer_of_ones_own(own: type[Stabilizer]) -> None:
    example = small("vit")
    plain = example.logits(example.model).detach()
    stabilize_(example.model, "tanh-head:bound=0.01+sigma")
    torch.testing.assert_close(example.logits(example.model), 0.01 * torch.tanh(plain))
    with pytest.raises(ConversionError, match="tanh-head is already applied"):
        stabilize_(example.model, "tanh-head")
    with pytest.raises(RecipeError, match=r"did you mean bound\?"):
        parse("tanh-head:bond=1")
    fold_(example.model)
    torch.testing.assert_close(example.logits(example.model), 0.01 * torch.tanh(plain))
    with pytest.raises(ConversionError, match="tanh-head cannot be folded"):
        fold_(example.model)


def test_an_error_of_the_second_undoes_the_first(own: type[Stabilizer]) -> None:
    example, twin = small("gpt2"), small("gpt2")  # without a head called so
    modules = [(type(module), dict(module.__dict__)) for module in example.model.modules()]
    with pytest.raises(ConversionError, match="finds no head"):
        stabilize_(example.model, "tanh-head+sigma:init_std=0.3:remove_norms=true+rezero")
    for module, (cls, attributes) in zip(example.model.modules(), modules, strict=True):
        assert type(module) is cls
        assert module.__dict__.keys() == attributes.keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    torch.testing.assert_close(example.model.state_dict(), twin.model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(example.logits(example.model), twin.logits(twin.model), rtol=0, atol=0)
    stabilize_(example.model, "sigma")  # and it can still be stabilized
    torch.testing.assert_close(example.logits(example.model), twin.logits(twin.model))


def test_what_is_applied_travels_with_a_copy() -> None:
    model = small("vit").model
    stabilize_(model, "sigma+layer-scale")
    twin = copy.deepcopy(model)
    fold_(model)
    with pytest.raises(ConversionError, match="sigma is already applied"):
        stabilize_(twin, "sigma")
    stabilize_(model, "sigma+layer-scale")


def test_part_of_a_model_can_be_stabilized_and_the_whole_folded() -> None:
    example = small("vit")
    part: Any = example.model
    stabilize_(part.blocks, "layer-scale:init=0.3")
    stabilize_(part.head, "sigma")
    expected = example.logits(example.model).detach()
    fold_(example.model)
    torch.testing.assert_close(example.logits(example.model), expected)
    assert example.model.state_dict().keys() == small("vit").model.state_dict().keys()
    stabilize_(part.blocks, "layer-scale")  # again


def test_none_changes_nothing_and_nothing_is_to_be_folded() -> None:
    model, twin = small("vit").model, small("vit").model
    assert stabilize_(model, "none") is model
    assert [dict(m.__dict__).keys() for m in model.modules()] == [dict(m.__dict__).keys() for m in twin.modules()]
    with pytest.raises(ConversionError, match="nothing to fold: this model has no stabilizer"):
        fold_(model)
    with pytest.raises(TypeError, match=r"nn.Module"):
        fold_(3)  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"nn.Module"):
        stabilize_(3, "none")  # type: ignore[type-var]


def test_every_stabilizer_of_models_has_its_test_case() -> None:
    """The laws that all inherit; a new member of the family is not forgotten."""
    import importlib.util
    from pathlib import Path

    for path in Path(__file__).parent.glob("test_*laws*.py"):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    tested = {each.name for case in StabilizerCase.__subclasses__() for each in parse(case.spec)}
    changing = {name for name, cls in TRIMTABS.items() if cls.apply_ is not Stabilizer.apply_}
    assert changing - {"none"} <= tested
