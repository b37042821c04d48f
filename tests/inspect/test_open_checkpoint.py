"""Every format gives the same weights; what is no good is refused with a message that says why, and nothing is run."""

import argparse
import json
import os
import pickle
import random
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from trimtab.errors import CheckpointError
from trimtab.inspect import Report, inspect_checkpoint

Weights = dict[str, Tensor]


def two_layers() -> Weights:
    """An embedding, then two layers with separate queries and keys, and biases."""
    generator = torch.Generator().manual_seed(0)
    state = {"embed_tokens.weight": torch.randn(20, 8, generator=generator)}
    for layer in range(2):
        for name, rows in (("attn.q_proj", 8), ("attn.k_proj", 8), ("mlp.up_proj", 16)):
            state[f"layers.{layer}.{name}.weight"] = torch.randn(rows, 8, generator=generator)
            state[f"layers.{layer}.{name}.bias"] = torch.randn(rows, generator=generator)
    return state


def write_safetensors(weights: Weights, folder: Path) -> Path:
    save_file(weights, folder / "model.safetensors")
    return folder / "model.safetensors"


def write_sharded_safetensors(weights: Weights, folder: Path) -> Path:
    return _sharded(weights, folder, "safetensors", save_file)


def write_torch(weights: Weights, folder: Path) -> Path:
    torch.save(weights, folder / "model.pt")
    return folder / "model.pt"


def write_old_torch(weights: Weights, folder: Path) -> Path:
    torch.save(weights, folder / "old.bin", _use_new_zipfile_serialization=False)
    return folder / "old.bin"


def write_nested_torch(weights: Weights, folder: Path) -> Path:
    moments = {number: {"exp_avg": torch.ones_like(w)} for number, w in enumerate(weights.values())}
    content = {"optimizer": {"state": moments}, "model": weights, "step": 3, "rng": torch.zeros(8, dtype=torch.uint8)}
    torch.save(content, folder / "training.pth")
    return folder / "training.pth"


def write_sharded_torch(weights: Weights, folder: Path) -> Path:
    return _sharded(weights, folder, "bin", torch.save)


def write_distributed(weights: Weights, folder: Path) -> Path:
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process only
        dcp.save({"model": dict(weights), "optim": {"lr": 0.1, "m": torch.ones(3)}}, checkpoint_id=folder / "dcp")
    return folder / "dcp"


def _sharded(weights: Weights, folder: Path, suffix: str, save: Callable[[Weights, Path], object]) -> Path:
    names = list(weights)
    place = {}
    for number, part in enumerate((names[:4], names[4:])):
        file = f"model-{number}.{suffix}"
        save({name: weights[name] for name in part}, folder / file)
        place |= dict.fromkeys(part, file)
    stem = "model.safetensors" if suffix == "safetensors" else "pytorch_model.bin"
    (folder / f"{stem}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": place}))
    return folder


FORMATS = {
    "safetensors": write_safetensors,
    "sharded safetensors": write_sharded_safetensors,
    "torch": write_torch,
    "old torch": write_old_torch,
    "nested torch": write_nested_torch,
    "sharded torch": write_sharded_torch,
    "distributed": write_distributed,
}


def numbers(report: Report) -> list[object]:
    """All that is measured, in the order of the names."""
    found = (*report.matrices, *report.attention, *report.embeddings, *report.vectors)
    return sorted(found, key=lambda each: (type(each).__name__, each.name))


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_numbers(name: str, tmp_path: Path) -> None:
    weights = two_layers()
    (tmp_path / "plain").mkdir()
    expected = inspect_checkpoint(write_safetensors(weights, tmp_path / "plain"), num_heads=2)
    report = inspect_checkpoint(FORMATS[name](weights, tmp_path), num_heads=2)
    assert numbers(report) == numbers(expected)
    assert len(report.matrices) == 7
    assert len(report.attention) == 2
    nested = name in ("nested torch", "distributed")
    assert report.key == ("model" if nested else "")
    assert report.left_out == (("optimizer", "rng") if name == "nested torch" else ("optim",) if nested else ())
    assert report.parameters == sum(tensor.numel() for tensor in weights.values())
    assert list(dict.fromkeys(m.name.split(".")[1] for m in report.matrices)) == ["weight", "0", "1"]


def test_a_sharded_tensor_of_a_distributed_checkpoint_is_put_together(tmp_path: Path) -> None:
    """Two processes would write two pieces; the metadata of one process is doctored to say the same."""
    weight = torch.randn(6, 4)
    folder = write_distributed({"a.weight": weight}, tmp_path)
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    index = next(index for index in metadata.storage_data if index.fqn == "model.a.weight")
    stored = metadata.storage_data.pop(index)
    for name, offset, piece in (("x.distcp", 0, weight[:2].clone()), ("y.distcp", 2, weight[2:].clone())):
        torch.save(piece, folder / name)
        size = (folder / name).stat().st_size
        metadata.storage_data[replace(index, offset=torch.Size((offset, 0)), index=offset)] = replace(
            stored, relative_path=name, offset=0, length=size
        )
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (matrix,) = inspect_checkpoint(folder).matrices
    assert matrix.shape == (6, 4)
    assert matrix.sigma == pytest.approx(float(torch.linalg.matrix_norm(weight.double(), 2)), rel=1e-6)

    metadata.storage_data.popitem()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match=r"the pieces of model\.a\.weight do not make"):
        inspect_checkpoint(folder)


def test_the_state_dict_is_chosen_by_key(tmp_path: Path) -> None:
    plain, average = {"a.weight": torch.eye(3)}, {"a.weight": 5 * torch.eye(3)}
    path = tmp_path / "training.pt"
    torch.save({"model": plain, "averages": {"ema": average}, "optimizer": {"state": {}}}, path)
    assert inspect_checkpoint(path).matrices[0].sigma == pytest.approx(1)
    chosen = inspect_checkpoint(path, key="averages.ema")
    assert chosen.matrices[0].sigma == pytest.approx(5)
    assert chosen.key == "averages.ema"
    with pytest.raises(CheckpointError, match=r"--key weights.*model, averages"):
        inspect_checkpoint(path, key="weights")
    save_file({"student.a.weight": torch.eye(3), "teacher.a.weight": 2 * torch.eye(3)}, tmp_path / "two.safetensors")
    (matrix,) = inspect_checkpoint(tmp_path / "two.safetensors", key="teacher").matrices
    assert matrix.name == "a.weight"
    assert matrix.sigma == pytest.approx(2)
    with pytest.raises(CheckpointError, match="student, teacher"):
        inspect_checkpoint(tmp_path / "two.safetensors", key="model")


def test_parts_saved_one_by_one_are_joined_and_the_optimizer_left_out(tmp_path: Path) -> None:
    path = tmp_path / "parts.pt"
    moments = {"state": {0: {"exp_avg": torch.ones(4, 4)}}}
    torch.save(
        {"encoder": nn.Linear(3, 2).state_dict(), "decoder": nn.Linear(2, 3).state_dict(), "optim": moments}, path
    )
    assert [matrix.name for matrix in inspect_checkpoint(path).matrices] == ["encoder.weight", "decoder.weight"]


def test_numbers_of_numpy_beside_the_weights_are_no_code(tmp_path: Path) -> None:
    beside = {"best": np.float64(0.5), "step": np.int64(3), "lr": np.float32(1e-3)}
    torch.save({"model": {"a.weight": torch.eye(2)}, **beside}, tmp_path / "best.pt")
    assert inspect_checkpoint(tmp_path / "best.pt").key == "model"


@pytest.mark.parametrize("wrap", [dict, lambda **values: argparse.Namespace(**values)])
def test_heads_are_read_from_the_arguments_saved_with_the_model(wrap: Callable[..., object], tmp_path: Path) -> None:
    weights = {"h.0.attn.c_attn.weight": torch.randn(24, 8), "h.0.attn.c_proj.weight": torch.randn(8, 8)}
    torch.save({"model": weights, "model_args": wrap(n_head=4, n_embd=8)}, tmp_path / "ckpt.pt")
    report = inspect_checkpoint(tmp_path / "ckpt.pt")
    assert report.num_heads == 4
    assert [len(pair.energy) for pair in report.attention] == [4]


def test_heads_are_read_from_files_beside_the_checkpoint(tmp_path: Path) -> None:
    path = write_safetensors(two_layers(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"num_attention_heads": 4, "num_key_value_heads": 2}))
    report = inspect_checkpoint(path)
    assert (report.num_heads, report.num_kv_heads) == (4, 2)


def test_a_run_folder_means_its_newest_checkpoint(tmp_path: Path) -> None:
    small = {name: tensor for name, tensor in two_layers().items() if "layers.1" not in name}
    for step, weights in (("200.part", small), ("00000200", small), ("100000000", two_layers()), ("00000300", small)):
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        write_safetensors(weights, folder)
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"model": {"num_heads": 2}}}))
    newest = tmp_path / "checkpoints" / "step-100000000"
    for path in (tmp_path, newest, newest / "model.safetensors"):
        report = inspect_checkpoint(path)
        assert report.num_heads == 2
        assert len(report.attention) == 2
    assert len(inspect_checkpoint(tmp_path / "checkpoints" / "step-00000300").attention) == 1


def test_a_run_folder_of_an_earlier_version(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    save_file(two_layers(), tmp_path / "checkpoints" / "last.safetensors")
    (tmp_path / "run.json").write_text(json.dumps({"recipe": {"model": {"num_heads": 2}}}))
    assert inspect_checkpoint(tmp_path).num_heads == 2


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    path, sprung = tmp_path / "trap.pt", tmp_path / "sprung"
    torch.save({"a": torch.eye(2), "b": Trap(sprung)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"mkdir|more than tensors.*nothing of it was run"):
        inspect_checkpoint(path)
    assert not sprung.exists()
    torch.load(path, weights_only=False)  # the trap is a real one
    assert sprung.exists()


def test_a_whole_pickled_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "module.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear.*state_dict"):
        inspect_checkpoint(tmp_path / "module.pt")


def test_a_torchscript_archive_is_refused(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is deprecated
        torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "script.pt")
    with pytest.raises(CheckpointError, match=r"TorchScript archive.*nothing of it was run"):
        inspect_checkpoint(tmp_path / "script.pt")


@pytest.mark.parametrize("where", [".metadata", "__0_0.distcp"])
def test_a_distributed_checkpoint_with_code_is_not_run(where: str, tmp_path: Path) -> None:
    folder, sprung = write_distributed({"a.weight": torch.eye(3)}, tmp_path), tmp_path / "sprung"
    if where == ".metadata":
        metadata = pickle.loads((folder / where).read_bytes())
        metadata.planner_data = Trap(sprung)
        (folder / where).write_bytes(pickle.dumps(metadata))
        assert inspect_checkpoint(folder).matrices[0].sigma == pytest.approx(1)  # what the trap stood for is not needed
    else:
        metadata = pickle.loads((folder / ".metadata").read_bytes())
        torch.save(Trap(sprung), folder / where)
        for index, stored in metadata.storage_data.items():
            metadata.storage_data[index] = replace(stored, offset=0, length=(folder / where).stat().st_size)
        (folder / ".metadata").write_bytes(pickle.dumps(metadata))
        with pytest.raises(CheckpointError, match="nothing of it was run"):
            inspect_checkpoint(folder)
    assert not sprung.exists()


def damaged(name: str, folder: Path) -> Path:
    path = FORMATS[name](two_layers(), folder)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    return path


def bad_files(folder: Path) -> dict[str, tuple[Path, str]]:
    made = {
        name: folder / name
        for name in ("empty.pt", "text.pt", "pointer.bin", "a.index.json", "zero", "several", "bare")
    }
    made["empty.pt"].write_bytes(b"")
    made["text.pt"].write_text("not a checkpoint at all")
    made["pointer.bin"].write_text("version https://git-lfs.example/spec/v1")
    made["a.index.json"].write_text("{}")
    made["zero"].mkdir()
    write_sharded_safetensors(two_layers(), made["zero"])
    (made["zero"] / "model-1.safetensors").unlink()
    made["bare"].mkdir()
    made["several"].mkdir()
    for name in ("x.pt", "y.pt"):
        torch.save(two_layers(), made["several"] / name)
    torch.save({"bias": torch.ones(3), "scale": torch.ones(())}, folder / "vectors.pt")
    torch.save({"step": 3}, folder / "nothing.pt")
    return {
        "missing": (folder / "nowhere.pt", "there is no file"),
        "empty": (made["empty.pt"], "is empty"),
        "text": (made["text.pt"], "no checkpoint of a known kind"),
        "git-lfs": (made["pointer.bin"], "git-lfs"),
        "index": (made["a.index.json"], "weight_map"),
        "shard": (made["zero"], r"1 are missing \(model-1"),
        "folder": (made["several"], r"several checkpoints.*x\.pt"),
        "empty folder": (made["bare"], "holds no checkpoint"),
        "no matrix": (folder / "vectors.pt", "no weight matrix: 2 tensors"),
        "no tensors": (folder / "nothing.pt", "holds no tensors"),
    }


@pytest.mark.parametrize(
    "name",
    ["missing", "empty", "text", "git-lfs", "index", "shard", "folder", "empty folder", "no matrix", "no tensors"],
)
def test_what_is_no_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    path, message = bad_files(tmp_path)[name]
    with pytest.raises(CheckpointError, match=message):
        inspect_checkpoint(path)


@pytest.mark.parametrize("name", ["safetensors", "torch", "old torch"])
def test_a_torn_file_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="damaged"):
        inspect_checkpoint(damaged(name, tmp_path))


@pytest.mark.parametrize("name", FORMATS)
def test_damage_anywhere_is_refused_or_changes_numbers_alone(name: str, tmp_path: Path) -> None:
    """Bytes are changed at random, mostly near the beginning of a file, where its structure is told."""
    path = FORMATS[name](two_layers(), tmp_path)
    whole = {file: file.read_bytes() for file in sorted(tmp_path.rglob("*")) if file.is_file()}
    rng = random.Random(name)
    refused = 0
    for _ in range(30):
        file = rng.choice(list(whole))
        content = bytearray(whole[file])
        for _ in range(rng.choice((1, 3, 30))):
            content[rng.randrange(min(len(content), rng.choice((64, 1500))))] = rng.randrange(256)
        file.write_bytes(content)
        try:
            inspect_checkpoint(path)
        except CheckpointError:
            refused += 1
        file.write_bytes(whole[file])
    assert refused > 5
    inspect_checkpoint(path)


def test_a_torn_distributed_checkpoint_is_refused(tmp_path: Path) -> None:
    folder = write_distributed(two_layers(), tmp_path)
    (folder / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"lacks 1 of its files.*__0_0\.distcp"):
        inspect_checkpoint(folder)
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:100])
    with pytest.raises(CheckpointError, match="damaged"):
        inspect_checkpoint(folder)


@pytest.mark.parametrize(("options", "message"), [({"num_heads": 0}, "num_heads"), ({"top": 0}, "top")])
def test_impossible_options_are_refused(options: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"{message} of at least 1, got 0"):
        inspect_checkpoint(write_torch(two_layers(), tmp_path), **options)
    with pytest.raises(CheckpointError, match="multiple of num_kv_heads, got 4 and 3"):
        inspect_checkpoint(tmp_path / "model.pt", num_heads=4, num_kv_heads=3)
