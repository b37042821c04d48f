from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

from trimtab.errors import CheckpointError, TrimtabError
from trimtab.reparam import reparametrize_
from trimtab.train import load_checkpoint, save_checkpoint


def model(seed: int, width: int = 5) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.GELU(), nn.Linear(width, 2))


@pytest.mark.parametrize("converted", [False, True], ids=["plain", "sigma"])
def test_a_model_comes_back_as_it_was(tmp_path: Path, converted: bool) -> None:
    saved, loaded = model(0), model(1)
    if converted:
        reparametrize_(saved)
        reparametrize_(loaded)
        with torch.no_grad():
            saved[0].gamma.mul_(3)
    path = tmp_path / "deep" / "last.safetensors"
    save_checkpoint(path, saved, step=7)
    assert load_checkpoint(path, loaded) == 7
    x = torch.randn(4, 3)
    assert torch.equal(saved(x), loaded(x))
    assert [entry.name for entry in path.parent.iterdir()] == ["last.safetensors"]  # nothing is left aside


def test_a_newer_checkpoint_replaces_the_older(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, model(0), step=1)
    save_checkpoint(path, model(1), step=2)
    loaded = model(2)
    assert load_checkpoint(path, loaded) == 2
    assert torch.equal(loaded[0].weight, model(1)[0].weight)


def test_a_write_that_fails_leaves_the_older_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, model(0), step=1)

    def full(_: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("trimtab.train.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(path, model(1), step=2)
    assert load_checkpoint(path, model(2)) == 1


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"there is no checkpoint .*last\.safetensors"):
        load_checkpoint(tmp_path / "last.safetensors", model(0))


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_torn_file_is_an_error_and_the_model_stays(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "last.safetensors"
    save_checkpoint(path, model(0), step=1)
    path.write_bytes(path.read_bytes()[:keep])
    target = model(1)
    with pytest.raises(TrimtabError, match=r"last\.safetensors is damaged"):
        load_checkpoint(path, target)
    assert torch.equal(target[0].weight, model(1)[0].weight)


@pytest.mark.parametrize("other", ["width", "converted"])
def test_another_model_is_refused_before_it_is_touched(tmp_path: Path, other: str) -> None:
    path = tmp_path / "last.safetensors"
    saved = model(0)
    save_checkpoint(path, reparametrize_(saved) if other == "converted" else saved, step=1)
    target = model(1, width=6 if other == "width" else 5)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(CheckpointError, match="belongs to another model: 0\\."):
        load_checkpoint(path, target)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "last.safetensors"
    safetensors.torch.save_file(model(0).state_dict(), path)
    with pytest.raises(CheckpointError, match=r"expected format 'trimtab\.1' and a step"):
        load_checkpoint(path, model(0))


def test_tied_weights_are_written_and_come_back(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    save_checkpoint(tmp_path / "x", model, 1)
    other = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other[1].weight = other[0].weight
    load_checkpoint(tmp_path / "x", other)
    assert torch.equal(other[1].weight, model[0].weight)


def test_a_file_without_its_step_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file(nn.Linear(2, 2).state_dict(), tmp_path / "x", metadata={"format": "trimtab.1"})
    with pytest.raises(CheckpointError, match="and a step"):
        load_checkpoint(tmp_path / "x", nn.Linear(2, 2))
