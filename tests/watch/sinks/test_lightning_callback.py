import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("lightning")

import lightning.pytorch

from trimtab.watch.sinks.lightning import TrimtabCallback

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning"),  # its own use
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),  # nor should it here
]

BATCHES = 8


class Module(lightning.pytorch.LightningModule):
    """Predicts the next token; keeps the loss of every micro-batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.losses: list[float] = []

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class Forward(Module):
    """The same, called as `self(batch)`, with a part of its own beside the model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.scale = nn.Parameter(torch.ones(11))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens) * self.scale

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss


class Manual(Module):
    """The same, stepping its optimiser itself, on every second batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        loss = super().training_step(batch, index)
        self.manual_backward(loss)
        if index % 2:
            optimizer = self.optimizers()
            optimizer.step()
            optimizer.zero_grad()
        return loss


def fit(module: Any, *callbacks: Any, trainer: Any = lightning.pytorch.Trainer, **options: Any) -> Any:
    drawn = torch.Generator().manual_seed(1)
    loader = torch.utils.data.DataLoader(torch.randint(11, (4 * BATCHES, 9), generator=drawn), batch_size=4)
    defaults = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "max_epochs": 1}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    torch.manual_seed(2)
    run = trainer(callbacks=list(callbacks), **defaults | quiet | options)
    run.fit(module, loader)
    return run


def log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]


def means(losses: list[float], *sizes: int) -> list[float]:
    parts = iter(losses)
    return [sum(next(parts) for _ in range(size)) / size for size in sizes]


@pytest.mark.parametrize(
    ("kind", "options", "sizes"),
    [
        (Module, {}, [1] * 8),
        (Module, {"accumulate_grad_batches": 3}, [3, 3, 2]),  # an epoch's last step has what is left
        (Forward, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}, [2] * 4),
        (Manual, {}, [2] * 4),
    ],
    ids=["plain", "accumulation", "a forward of its own", "manual optimisation"],
)
def test_the_weights_and_the_losses_are_trainers_own(tiny, tmp_path, leaves_nothing, kind, options, sizes) -> None:
    alone, watched = kind(tiny(dropout=0.1)), kind(tiny(dropout=0.1))
    fit(alone, **options)
    callback = TrimtabCallback(tmp_path / "run", every=1)
    fit(watched, callback, **options)
    for (name, expected), got in zip(alone.named_parameters(), watched.parameters(), strict=True):
        assert torch.equal(expected, got), name
    lines = log(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, len(sizes) + 1))
    # Lightning divides every loss by the accumulation and we multiply by it: two roundings in float32
    assert [line["loss"] for line in lines] == pytest.approx(means(watched.losses, *sizes), rel=5e-7)
    assert all(line["lr"] == [1e-2] and 0 < line["entropy_min"] <= 1 for line in lines)
    if "gradient_clip_val" in options:
        assert all(line["grad_norm"] <= 0.1 * (1 + 1e-6) for line in lines)
    assert len(json.loads((tmp_path / "run" / "heads.json").read_text())["heads"]) == 4
    leaves_nothing(watched)
    leaves_nothing(watched.model)


def test_under_its_other_name(tiny, tmp_path) -> None:
    """pytorch_lightning is a second copy of the same code, with classes of its own."""
    other = pytest.importorskip("pytorch_lightning")

    class Other(other.LightningModule):
        __init__, training_step = Module.__init__, Module.training_step
        configure_optimizers = Module.configure_optimizers

    module = Other.__new__(Other)
    other.LightningModule.__init__(module)
    module.model, module.losses = tiny(), []
    fit(module, TrimtabCallback(tmp_path / "run", every=1), trainer=other.Trainer)
    assert [line["loss"] for line in log(tmp_path / "run")] == pytest.approx(module.losses, rel=3e-7)


def test_the_step_counts_and_facts_of_several_epochs(tiny, tmp_path) -> None:
    callback = TrimtabCallback(tmp_path / "run", every=4, run={"seed": 2})
    fit(Module(tiny()), callback, max_epochs=2, accumulate_grad_batches=2)
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 4, 8]
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    assert info["recipe"] == {"accumulation": 2, "steps": 8}
    assert (info["trainer"], info["seed"]) == ("lightning", 2)


def test_the_model_may_be_named(tiny, tmp_path) -> None:
    callback = TrimtabCallback(tmp_path / "run", model="model.attentions.1")
    fit(Module(tiny()), callback, max_steps=1)
    heads = json.loads((tmp_path / "run" / "heads.json").read_text())["heads"]
    assert heads == [{"module": "(root)", "head": 0}, {"module": "(root)", "head": 1}]


def test_an_error_in_training_ends_the_watch(tiny, tmp_path, leaves_nothing) -> None:
    class Breaks(Module):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            if index == 2:
                raise ConnectionError("the data went away")
            return super().training_step(batch, index)

    module = Breaks(tiny())
    with pytest.raises(ConnectionError):
        fit(module, TrimtabCallback(tmp_path / "run", every=1))
    assert [line["step"] for line in log(tmp_path / "run")] == [1, 2]
    leaves_nothing(module)
    leaves_nothing(module.model)


def test_without_any_loss_it_says_what_to_do(tiny, tmp_path, leaves_nothing) -> None:
    class Silent(Manual):
        def training_step(self, batch: Tensor, index: int) -> None:
            super().training_step(batch, index)

    module = Silent(tiny())
    with pytest.raises(RuntimeError, match="let training_step return the loss"):
        fit(module, TrimtabCallback(tmp_path / "run"))
    leaves_nothing(module.model)
