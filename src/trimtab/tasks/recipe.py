"""`Recipe`: everything that decides the numbers of one run, as a typed, frozen config."""

import math
from dataclasses import dataclass, fields
from typing import Literal, get_type_hints

import torch
from torch import nn

from trimtab.errors import RecipeError
from trimtab.tasks.optimizers import build_optimizers
from trimtab.tasks.task import Task
from trimtab.tasks.typed import typed

Optimizer = Literal["adamw", "adam", "sgd", "lars", "muon"]
Schedule = Literal["constant", "cosine", "cosine_restarts", "step", "inverse_sqrt"]
Precision = Literal["32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to train, and, in a subclass, what: its `task` makes the model, the data, the loss and the score.

    Attributes:
        stabilizer: names of `trimtab.stabilizers` with their options, joined by "+": "none", "sigma",
            "sigma:gamma_init=one+qk-norm".
        optimizer: "adamw", "adam", "sgd", "lars" (You et al., arXiv 1708.03888: SGD by which every weight moves by a
            share of its own norm; not biases and gains), or "muon" for the hidden matrices with AdamW for the rest.
        lr: peak learning rate.
        betas: of Adam and AdamW.
        momentum: of SGD and LARS.
        trust_coefficient: of LARS: without momentum a step moves a weight by `lr` times this share of its norm.
        weight_decay: the optimiser's weight decay; biases, norms, gammas and scales of branches do not decay.
        rho: SAM's radius: the optimiser steps by the gradient at the worst point that near; None for no SAM.
        adaptive: whether that is `trimtab.ASAM`'s radius, relative to the weights.
        schedule: "constant"; "cosine", down to `min_lr` at the last step; "cosine_restarts", from the peak towards
            `min_lr` again and again, in `restart_every` steps (Loshchilov & Hutter, arXiv 1608.03983, equation 5);
            "step", times `step_factor` every `step_every` steps; or "inverse_sqrt", by one over the square root of the
            step (Vaswani et al., arXiv 1706.03762); all of them after the warmup.
        min_lr: where the two cosines end.
        restart_every: of the schedule "cosine_restarts".
        step_every: of the step schedule.
        step_factor: of the step schedule.
        warmup_steps: steps over which the learning rate rises linearly from zero.
        clip: largest gradient norm; None leaves gradients as they are.
        steps: optimiser steps.
        seconds: training ends after so many seconds, and the schedule runs over them; None for no such limit.
        batch_size: examples in a step, of all processes and micro-batches together.
        batch_tokens: for examples of different lengths: largest number of tokens in a step, padding included, in place
            of `batch_size`; examples of similar length come together. None has `batch_size` examples in a step.
        accumulate: micro-batches in a step.
        precision: "32", or mixed precision with "bf16" or "fp16" (with loss scaling).
        ema: decay of an exponential moving average of the weights, which is what is evaluated; None for none.
        compile: whether the model is compiled.
        patience: evaluations without a better metric after which training stops, and the best weights are kept; None
            trains to the end and keeps the last.
        seed: decides the weights at the start, the order of the examples and all that is random.
        watch: whether Watch looks on; without it, the log has losses and metrics only.
        watch_every: steps between two lines of the run log.
        eval_every: steps between two evaluations, a multiple of `watch_every`. The last step is always evaluated.
        eval_micro_batches: how many micro-batches' worth of examples are measured at once: without gradients there is
            room for more than in training, in all but shallow models.
        checkpoint_every: steps between two checkpoints. There is one at the end, too.
        keep: how many of the last checkpoints are kept, beside the best.

    Raises:
        RecipeError: a field is out of range, or has the wrong type.
    """

    stabilizer: str = "none"
    optimizer: Optimizer = "adamw"
    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    momentum: float = 0.9
    trust_coefficient: float = 1e-3
    weight_decay: float = 0.0
    rho: float | None = None
    adaptive: bool = False
    schedule: Schedule = "constant"
    min_lr: float = 0.0
    restart_every: int = 1000
    step_every: int = 1000
    step_factor: float = 0.1
    warmup_steps: int = 0
    clip: float | None = None
    steps: int = 200
    seconds: float | None = None
    batch_size: int = 64
    batch_tokens: int | None = None
    accumulate: int = 1
    precision: Precision = "32"
    ema: float | None = None
    compile: bool = False
    patience: int | None = None
    seed: int = 0
    watch: bool = True
    watch_every: int = 20
    eval_every: int = 20
    eval_micro_batches: int = 4
    checkpoint_every: int = 1000
    keep: int = 2

    def task(self) -> Task:
        """Make the model, from torch's global random number generator, and what it is trained on."""
        raise RecipeError(
            f"{type(self).__name__} has no task: give it a method `task` that returns a trimtab.tasks.task.Task"
        )

    def optimizers(self, model: nn.Module) -> "list[torch.optim.Optimizer]":
        """Make the optimisers of a model that has its stabilizers, its device and its shards.

        Override it for another optimiser. The learning rates they are made with are the peaks of the schedule. One
        that has an attribute ``needs_closure = True`` gets a closure, and must then be the only one.
        """
        return build_optimizers(self, model)

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in fields(self):  # so that 1 and 1.0, or a list and a tuple, are the same recipe
            object.__setattr__(self, field.name, typed(hints[field.name], getattr(self, field.name), field.name))
        for name in ("lr", "clip", "seconds", "step_factor", "trust_coefficient", "rho"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise RecipeError(f"{name} must be a positive number, got {value}")
        if self.ema is not None and not 0 < self.ema < 1:
            raise RecipeError(f"ema must be between 0 and 1, got {self.ema}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise RecipeError(f"betas must be at least 0 and below 1, got {self.betas}")
        if self.adaptive and self.rho is None:
            raise RecipeError("adaptive is of SAM, and there is none without its radius: set rho as well")
        if self.rho is not None and (self.optimizer == "muon" or self.precision == "fp16"):
            what = "optimizer muon, which is two" if self.optimizer == "muon" else 'precision fp16: use "bf16" or "32"'
            raise RecipeError(f"SAM (rho) asks for a closure, which does not go with {what}")
        if not 0 <= self.momentum < 1:
            raise RecipeError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        if not 0 <= self.min_lr <= self.lr:
            raise RecipeError(f"min_lr must be from 0 to lr, {self.lr}; got {self.min_lr}")
        positive = ("steps", "step_every", "batch_size", "accumulate", "watch_every", "eval_every", "checkpoint_every")
        for name in (*positive, "keep", "patience", "batch_tokens", "restart_every", "eval_micro_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} must be at least 1, got {value}")
        for name in ("warmup_steps", "weight_decay", "seed"):
            value = getattr(self, name)
            if not 0 <= value < 2**63:
                raise RecipeError(f"{name} must be at least 0 and below 2^63, got {value}")
        if self.eval_every % self.watch_every:
            raise RecipeError(
                f"eval_every must be a multiple of watch_every, whose lines it writes to; "
                f"got {self.eval_every} and {self.watch_every}"
            )
        if self.batch_tokens is None and self.batch_size % self.accumulate:
            raise RecipeError(
                f"batch_size must be a multiple of accumulate, got {self.batch_size} and {self.accumulate}"
            )
