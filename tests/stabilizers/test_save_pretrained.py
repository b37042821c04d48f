"""Saving a folded copy."""

from pathlib import Path

import pytest
import torch
from torch import nn

import trimtab as tt
from trimtab.models import ViT
from trimtab.tasks.images import vit_digits

safetensors = pytest.importorskip("safetensors.torch")


def test_a_plain_module_is_written_folded_and_loads_strictly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tt.reparametrize_(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4)), tt.SigmaReparam("one"))
    model[1].weight = model[1].weight
    x = torch.randn(2, 3)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    tt.save_pretrained(model, tmp_path / "new" / "folder")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
    plain = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 4))
    safetensors.load_model(plain, tmp_path / "new" / "folder" / "model.safetensors", strict=True)
    torch.testing.assert_close(plain(x), model(x))
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["model.safetensors"]


def test_a_plain_model_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(tt.ConversionError, match="nothing to fold"):
        tt.save_pretrained(nn.Linear(2, 2), tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_made_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        tt.save_pretrained(tt.reparametrize_(nn.Linear(2, 2)), tmp_path / "file")


@pytest.mark.parametrize("kept", ["qk-norm", "softcap:logits=none"])
def test_what_no_plain_model_computes_is_refused(kept: str, tmp_path: Path) -> None:
    model = ViT(vit_digits().model)
    tt.stabilize_(model, f"sigma+{kept}")
    with pytest.raises(tt.ConversionError, match=kept.partition(":")[0]):
        tt.save_pretrained(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_what_a_part_has_counts_too(tmp_path: Path) -> None:
    model = tt.stabilize_(ViT(vit_digits().model), "sigma")
    tt.stabilize_(model.blocks, "qk-norm")
    with pytest.raises(tt.ConversionError, match="would not compute qk-norm"):
        tt.save_pretrained(model, tmp_path / "x")


def test_a_hugging_face_model_without_its_norms_is_refused(tmp_path: Path) -> None:
    """Plain transformers would load it with fresh norms, which compute something else."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=7, n_positions=4, n_embd=8, n_layer=1, n_head=2)
    model = tt.stabilize_(transformers.GPT2LMHeadModel(config), "sigma:remove_norms=true")
    with pytest.raises(tt.ConversionError, match="the norm layers that were taken out"):
        tt.save_pretrained(model, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_scaled_branches_are_saved_folded(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = ViT(vit_digits().model)
    tt.stabilize_(model, "sigma+layer-scale")
    images = torch.randn(2, 1, 8, 8)
    tt.save_pretrained(model, tmp_path)
    plain = ViT(vit_digits().model)
    safetensors.load_model(plain, tmp_path / "model.safetensors", strict=True)
    torch.testing.assert_close(plain(images), model(images), rtol=1e-4, atol=1e-5)  # float32: rounded once more
