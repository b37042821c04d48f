"""Training that starts from the weights of a checkpoint."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import trimtab as tt
from trimtab.errors import CheckpointError, RecipeError
from trimtab.models import ViT
from trimtab.tasks.images import vit_digits
from trimtab.train import Hardware, train

SMALL = replace(vit_digits().model, dim=8, depth=2, num_heads=2)
RECIPE = replace(vit_digits(), model=SMALL, steps=2, watch=False, eval_every=2, watch_every=2)


def saved(
    path: Path, stabilizer: str = "none", change: Callable[[ViT], Any] = lambda model: None, **fields: Any
) -> ViT:
    """Write a run folder's newest checkpoint, without training."""
    torch.manual_seed(1)
    model = ViT(replace(SMALL, **fields))
    tt.stabilize_(model, stabilizer)
    change(model)
    checkpoint = path / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()}, checkpoint / "model.safetensors"
    )
    (path / "run.json").write_text(json.dumps({"recipe": {"model": {"num_heads": model.config.num_heads}}}))
    return model


def started(path: Path, **changes: Any) -> nn.Module:
    torch.manual_seed(5)
    return replace(RECIPE, weights=str(path), **changes).task().model


def test_a_run_starts_from_the_weights_of_another(tmp_path: Path) -> None:
    train(RECIPE, tmp_path / "first", hardware=Hardware("cpu"))
    recipe = replace(RECIPE, weights=str(tmp_path / "first"), lr=1e-9, stabilizer="sigma", seed=3)
    first = json.loads((tmp_path / "first" / "result.json").read_text())["metrics"]
    second = train(recipe, tmp_path / "second", hardware=Hardware("cpu"))
    assert second.metrics["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-4)  # sigma is good to float32
    drawn = train(replace(recipe, weights=None), tmp_path / "drawn", hardware=Hardware("cpu"))
    assert drawn.metrics["eval_loss"] != pytest.approx(first["eval_loss"], rel=1e-2)


def test_a_folder_and_a_file_of_a_checkpoint_are_taken(tmp_path: Path) -> None:
    expected = saved(tmp_path).state_dict()
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    for path in (tmp_path, checkpoint, checkpoint / "model.safetensors"):
        found = started(path).state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("stabilizer", ["sigma", "sigma:blocks=heads"])
def test_weights_under_sigma_come_as_they_are_used(stabilizer: str, tmp_path: Path) -> None:
    def change(model: ViT) -> None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("gamma"):
                    parameter.mul_(torch.linspace(1.5, 2, len(parameter)))

    model = saved(tmp_path, stabilizer, change).eval()
    images = torch.randn(4, 1, 8, 8)
    torch.testing.assert_close(started(tmp_path)(images), model(images), rtol=1e-4, atol=1e-5)


def test_of_a_simclr_run_the_encoder_is_taken(tmp_path: Path) -> None:
    from trimtab.models.simclr import SimCLR

    model = SimCLR(replace(SMALL, num_classes=0), hidden=4, out=4)
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    save_file(model.state_dict(), checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match="has num_classes 0, the recipe's model has 10: --new-head"):
        started(tmp_path)
    found = started(tmp_path, new_head=True)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(found.features(images), model.encoder(images))  # type: ignore[operator]


def test_a_new_head_is_drawn_and_the_rest_is_taken(tmp_path: Path) -> None:
    model = saved(tmp_path, num_classes=3)
    found = started(tmp_path, new_head=True)
    torch.manual_seed(5)
    drawn = ViT(SMALL)
    for name, value in found.state_dict().items():
        assert torch.equal(value, (drawn if name.startswith("head") else model).state_dict()[name])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": 3}, "has num_classes 3, the recipe's model has 10: --new-head draws a new head"),
        ({"in_channels": 3}, "has in_channels 3, the recipe's model has 1: --model.in-channels 3 takes a model"),
        ({"image_size": 16}, "has tokens 64, the recipe's model has 16: image_size, patch_size and pool must be"),
        ({"patch_size": 4}, "has patch_size 4, the recipe's model has 2"),
        ({"dim": 16}, "has dim 16, the recipe's model has 8"),
        ({"depth": 1}, "has depth 1, the recipe's model has 2"),
        ({"num_heads": 4}, "has num_heads 4, the recipe's model has 2"),
        ({"pool": "cls"}, "has pool cls, the recipe's model has mean"),
        ({"norm": "none"}, "has norm none, the recipe's model has pre: --model.norm none"),
        ({"qkv_bias": False}, r"blocks.0.attention.key.bias has the shape None there and \(8,\)"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    saved(tmp_path, **fields)
    with pytest.raises(CheckpointError, match=message):
        started(tmp_path)


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="holds no ViT of trimtab's"):
        started(tmp_path)
    with pytest.raises(CheckpointError, match="there is no file"):
        started(tmp_path / "nothing")


def test_other_stabilizers_must_be_folded_first(tmp_path: Path) -> None:
    saved(tmp_path, "layer-scale")
    with pytest.raises(CheckpointError, match=r"residual_scale has the shape \(8,\) there and None .* a folded copy"):
        started(tmp_path)


@pytest.mark.parametrize("option", ["gamma_init=one", "init_std=0.1", "remove_norms=true"])
def test_a_stabilizer_that_changes_the_function_of_the_start_is_refused(option: str) -> None:
    with pytest.raises(RecipeError, match=f"leave {option.partition('=')[0]} of sigma out"):
        replace(RECIPE, weights="anywhere", stabilizer=f"sigma:{option}")
