"""The batches of a run: made in line on a CPU, and one step ahead in a thread where a GPU waits for them."""

import math
import statistics
import time
from collections import deque
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from trimtab.errors import RecipeError
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.task import Batch, Examples
from trimtab.train.buckets import Buckets
from trimtab.train.order import batch_indices, derived_seed, own_share

if TYPE_CHECKING:
    from lightning_fabric import Fabric


class Loader:
    """Makes the micro-batches of one step after the other.

    Args:
        examples: what to learn from.
        recipe: its seed, batch size and accumulation.
        fabric: which process this is, and its device.

    Raises:
        RecipeError: the examples cannot be put together as the recipe asks for.
    """

    def __init__(self, examples: Examples, recipe: Recipe, fabric: "Fabric") -> None:
        self._examples, self._recipe, self._fabric = examples, recipe, fabric
        self._buckets = _buckets(examples, recipe, recipe.accumulate * fabric.world_size)
        self._seconds: deque[float] = deque(maxlen=1000)

    @property
    def examples_in_step(self) -> float:
        """Of all processes together; the mean, where their number varies."""
        return self._recipe.batch_size if self._buckets is None else self._buckets.mean_size

    def batches(self, first_step: int) -> Generator[list[Batch], None, None]:
        """The micro-batches of `first_step` and of all that follow, on the device; close it when it is done."""
        step = first_step
        if self._fabric.device.type != "cuda":
            while True:
                made = self._make(step)
                yield made if self._fabric.device.type == "cpu" else self._fabric.to_device(made)
                step += 1
        with ThreadPoolExecutor(max_workers=1) as thread:
            ahead = thread.submit(self._make, step)
            while True:
                step += 1
                ready, ahead = ahead.result(), thread.submit(self._make, step)
                yield self._fabric.to_device(ready)  # pinned, so the copy overlaps with what the GPU is doing

    @property
    def batch_seconds(self) -> float:
        """The median time of making the batches of a step; NaN before the first."""
        return statistics.median(self._seconds or [math.nan])

    def _make(self, step: int) -> list[Batch]:
        began = time.perf_counter()
        recipe, rank = self._recipe, self._fabric.global_rank
        if self._buckets is None:
            indices = batch_indices(self._examples.size, recipe.batch_size, recipe.seed, step)
        else:
            indices = self._buckets.indices(step)
        generator = torch.Generator().manual_seed(derived_seed("batch", recipe.seed, step, rank))
        shares = own_share(indices, recipe.accumulate, rank, self._fabric.world_size)
        made = [self._examples.batch(share, generator) for share in shares]
        if self._fabric.device.type == "cuda":
            made = _pinned(made)
        self._seconds.append(time.perf_counter() - began)
        return made


def _buckets(examples: Examples, recipe: Recipe, parts: int) -> Buckets | None:
    if recipe.batch_tokens is None:
        return None
    if examples.lengths is None:
        raise RecipeError("batch_tokens is for examples that are sequences of different lengths: set batch_size")
    # Batches are multiples of 8, so that their number of processes does not show in what they hold.
    return Buckets(examples.lengths, recipe.batch_tokens, math.lcm(8, parts), recipe.seed)


def _pinned(batch: Batch) -> Any:
    from lightning_utilities import apply_to_collection

    return apply_to_collection(batch, Tensor, Tensor.pin_memory)
