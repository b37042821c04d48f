"""A callback for Lightning's Trainer, under either of its names."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from trimtab.watch.watch import Watch

if TYPE_CHECKING:
    from lightning.pytorch import Callback, LightningModule, Trainer
else:
    try:
        from lightning.pytorch import Callback
    except ModuleNotFoundError as error:
        if error.name not in ("lightning", "lightning.pytorch"):
            raise
        from pytorch_lightning import Callback


class TrimtabCallback(Callback):
    """Watches a LightningModule's model from the beginning of `Trainer.fit` to its end, also when it ends in an error.

        Trainer(callbacks=[TrimtabCallback("runs/gpt", every=20)]).fit(module, loader)

    One step of the log is one step of the optimiser, whatever the accumulation. The loss is what `training_step`
    returns, averaged over the micro-batches. The weights end bit-identical to those of an unwatched run.

    Args:
        folder: the run folder, a new one for each `fit`.
        every: steps from one logged step to the next.
        model: the dotted name, within the LightningModule, of the module that `training_step` calls; "" is the
            LightningModule itself, called as `self(batch)`. By default the only child that has parameters, and the
            LightningModule when there are several.
        options: more arguments for `trimtab.Watch`.

    Attributes:
        watch: the `trimtab.Watch`, also after it has ended; None before training begins.
    """

    def __init__(self, folder: str | Path, every: int = 20, *, model: str | None = None, **options: Any) -> None:
        self.watch: Watch | None = None
        self._folder, self._every, self._model, self._options = folder, every, model, options
        self._losses: list[Tensor] = []
        self._steps = 0  # of the optimiser, as Trainer counts them
        self._open = False

    def close(self) -> None:
        """End the watch; nothing of it stays on the model. Closing twice does no harm."""
        if self.watch is not None and self._open:
            self._open = False
            self._losses = []
            self.watch.__exit__(None, None, None)

    def on_train_start(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """Begin to watch."""
        self.close()
        model = _called(pl_module) if self._model is None else pl_module.get_submodule(self._model)
        run = _facts(trainer) | dict(self._options.get("run") or {})
        self.watch = Watch(model, self._folder, self._every, **self._options | {"run": run})
        self.watch.__enter__()
        self._open, self._steps = True, trainer.global_step

    def on_train_batch_end(
        self, trainer: "Trainer", pl_module: "LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """End one micro-batch, and with the last of a step the step."""
        if self.watch is None or not self._open:
            return
        loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
        if isinstance(loss, Tensor) and self.watch.next_step_is_logged:
            # Lightning has divided it by the number of micro-batches, also in an epoch's last step, which has fewer.
            parts = trainer.accumulate_grad_batches if pl_module.automatic_optimization else 1
            self._losses.append(loss.detach() * parts)
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.watch.step(self._loss() if self.watch.next_step_is_logged else 0.0)  # which only a logged step reads
            self._losses = []

    def on_train_end(self, trainer: "Trainer", pl_module: "LightningModule") -> None:
        """End the watch."""
        self.close()

    def on_exception(self, trainer: "Trainer", pl_module: "LightningModule", exception: BaseException) -> None:
        """End the watch."""
        self.close()

    def _loss(self) -> Tensor:
        if not self._losses:
            raise RuntimeError(
                "TrimtabCallback saw no loss: let training_step return the loss, also when it steps itself"
            )
        return torch.stack(self._losses).mean()


def _called(module: "LightningModule") -> nn.Module:
    """The module whose call is the model's forward: most LightningModules hold one model and call that."""
    children = [child for child in module.children() if next(child.parameters(), None) is not None]
    own = next(module.parameters(recurse=False), None)
    return children[0] if len(children) == 1 and own is None else module


def _facts(trainer: "Trainer") -> dict[str, Any]:
    """What run.json says beside what Watch knows by itself."""
    recipe: dict[str, Any] = {"accumulation": trainer.accumulate_grad_batches}
    steps = trainer.estimated_stepping_batches
    if math.isfinite(steps) and steps > 0:
        recipe["steps"] = int(steps)
    return {"trainer": "lightning", "recipe": recipe}
