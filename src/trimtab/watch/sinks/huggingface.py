"""A callback for the Trainer of Hugging Face transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trimtab.watch.taps.entries import Hook
from trimtab.watch.watch import Watch


class TrimtabCallback(TrainerCallback):
    """Watches the model of a `transformers.Trainer` from the beginning of its training to the end.

        Trainer(model, args, train_dataset=data, callbacks=[TrimtabCallback("runs/gpt2", every=20)]).train()

    The loss is the one that the model returns, taken together over the micro-batches of a step as Trainer does it.
    Where there is none to be seen (`compute_loss_func`, label smoothing), override Trainer's
    `training_step` and give what it returns to `see_loss`. The weights end bit-identical to those of an unwatched run.

    Trainer does not tell its callbacks of an error. After one, `close` ends the watch; so does the next `train()`.

    Args:
        folder: the run folder, a new one for each `train()`.
        every: steps from one logged step to the next.
        options: more arguments for `trimtab.Watch`. Facts in `run` go beside those that Trainer knows: number of
            steps, learning rate, batch size, accumulation, seed.

    Attributes:
        watch: the `trimtab.Watch`, also after it has ended; None before training begins.
    """

    def __init__(self, folder: str | Path, every: int = 20, **options: Any) -> None:
        self.watch: Watch | None = None
        self._folder, self._every, self._options = folder, every, options
        self._returned: list[Tensor] = []  # the model's own losses in this step, already in their shares of the step's
        self._given: list[Tensor] = []  # those that `see_loss` was given
        self._scaled = False
        self._hook: Any = None  # there while the watch is open

    def see_loss(self, loss: Tensor) -> None:
        """Take the loss of a micro-batch, as Trainer's `training_step` returns it, in place of the model's own."""
        if self._wanted:
            self._given.append(loss.detach())

    def close(self) -> None:
        """End the watch; nothing of it stays on the model. Closing twice does no harm."""
        if self.watch is not None and self._hook is not None:
            self._hook.remove()
            self._hook = None
            self._returned, self._given = [], []
            self.watch.__exit__(None, None, None)

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Begin to watch Trainer's model, which is the user's own, not the wrapper that DDP puts around it."""
        assert model is not None  # Trainer always hands it over
        self.close()
        run = _facts(args, state) | dict(self._options.get("run") or {})
        self.watch = Watch(model, self._folder, self._every, **self._options | {"run": run})
        self.watch.__enter__()
        # A loss divided by the number of items on all processes: Trainer multiplies it again before DDP averages.
        self._processes = args.world_size if args.average_tokens_across_devices else 1
        self._hook = model.register_forward_hook(Hook(self._after_forward), with_kwargs=True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End one optimiser step."""
        if self.watch is not None and self._hook is not None:
            self.watch.step(self._loss() if self._wanted else 0.0)  # which only a logged step reads
            self._returned, self._given = [], []

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """End the watch."""
        self.close()

    @property
    def _wanted(self) -> bool:
        return self.watch is not None and self._hook is not None and self.watch.next_step_is_logged

    def _after_forward(self, model: nn.Module, args: Any, kwargs: Mapping[str, Any], output: Any) -> None:
        if not model.training or not self._wanted:
            return
        loss = output.get("loss") if isinstance(output, Mapping) else output[0] if isinstance(output, tuple) else None
        if isinstance(loss, Tensor) and loss.numel() == 1:
            # With this argument the model divides by the items of the whole step: its losses add up.
            self._scaled = kwargs.get("num_items_in_batch") is not None
            self._returned.append(loss.detach() * (self._processes if self._scaled else 1))

    def _loss(self) -> Tensor:
        """The loss of this step; without one the watch ends in an error, which its first step already shows."""
        if self._given:
            return torch.stack(self._given).sum()
        if self._returned:
            losses = torch.stack(self._returned)
            return losses.sum() if self._scaled else losses.mean()
        self.close()
        raise RuntimeError(
            "the model returned no loss that TrimtabCallback could see: override training_step of your Trainer and "
            "give what it returns to the callback's see_loss"
        )


def _facts(args: TrainingArguments, state: TrainerState) -> dict[str, Any]:
    """What run.json says beside what Watch knows by itself."""
    recipe = {
        "steps": state.max_steps,
        "lr": args.learning_rate,
        "batch_size": args.per_device_train_batch_size,
        "accumulation": args.gradient_accumulation_steps,
    }
    return {"trainer": "transformers", "recipe": recipe, "seed": args.seed}
