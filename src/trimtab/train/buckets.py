"""Batches of examples of similar length, cut by the number of tokens they come to with their padding."""

import torch
from torch import Tensor

from trimtab.errors import RecipeError
from trimtab.train.order import derived_seed


class Buckets:
    """The batches of a run, by step: each pass over the examples cuts and orders them anew.

    Examples are sorted by length, in a random order among equals, and cut where the next ones would be too many tokens;
    then the batches are shuffled. Every batch is a multiple of some number of examples, so that processes and
    micro-batches share it evenly. A pass leaves out, at random, what is left over of that multiple.

    Args:
        lengths: tokens of each example, (N, K) int64: in each of its K sequences.
        batch_tokens: largest number of tokens in a batch, K rectangles of padded sequences.
        multiple: of which the size of every batch is one.
        seed: decides the batches.

    Raises:
        RecipeError: there are fewer examples than `multiple`, or so many of the longest do not fit in.
    """

    def __init__(self, lengths: Tensor, batch_tokens: int, multiple: int, seed: int) -> None:
        if len(lengths) < multiple:
            raise RecipeError(
                f"batches are of multiples of {multiple} examples, and there are {len(lengths)} in all: give more data"
            )
        longest = multiple * int(lengths.amax(dim=0).sum())
        if longest > batch_tokens:
            raise RecipeError(
                f"batch_tokens {batch_tokens} is too few: {multiple} of the longest examples come to {longest} tokens. "
                "Raise it (--batch-tokens), or leave out examples that are so long"
            )
        self._lengths, self._batch_tokens, self._multiple, self._seed = lengths, batch_tokens, multiple, seed
        self._first_steps = [1]  # of each pass that was cut so far, and of the one after
        self._current: tuple[int, list[Tensor]] = (0, self._pass(0))
        self._first_steps.append(1 + len(self._current[1]))

    @property
    def mean_size(self) -> float:
        """Examples in a batch, mean of a pass."""
        return (len(self._lengths) - len(self._lengths) % self._multiple) / (self._first_steps[1] - 1)

    def indices(self, step: int) -> Tensor:
        """The examples of a step of all processes together, (B,) int64; steps are counted from 1."""
        while self._first_steps[-1] <= step:
            following = len(self._first_steps) - 1
            self._current = (following, self._pass(following))
            self._first_steps.append(self._first_steps[-1] + len(self._current[1]))
        epoch = next(i for i in reversed(range(len(self._first_steps))) if self._first_steps[i] <= step)
        if self._current[0] != epoch:
            self._current = (epoch, self._pass(epoch))
        return self._current[1][step - self._first_steps[epoch]]

    def _pass(self, epoch: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(derived_seed("order", self._seed, epoch))
        count = len(self._lengths)
        chosen = torch.randperm(count, generator=generator)[: count - count % self._multiple]
        chosen = chosen[by_length(self._lengths[chosen])]
        cuts = cut(self._lengths[chosen], self._batch_tokens, self._multiple)
        made = chosen.split(cuts)
        return [made[i] for i in torch.randperm(len(made), generator=generator).tolist()]


def by_length(lengths: Tensor) -> Tensor:
    """The order from short to long of examples with lengths (N, K), (N,); equals keep theirs."""
    return lengths.sum(dim=-1).argsort(stable=True)


def cut(lengths: Tensor, batch_tokens: int, multiple: int) -> list[int]:
    """The sizes of batches of consecutive examples that hold no more than so many tokens, padding included.

    Args:
        lengths: (N, K), N a multiple of `multiple`.
        batch_tokens: a batch of `multiple` examples may hold more, if they are so long.
        multiple: of which every size is one.
    """
    longest = [0] * lengths.shape[-1]
    sizes = [0]
    for unit in lengths.view(-1, multiple, lengths.shape[-1]).amax(dim=1).tolist():
        longest = [max(pair) for pair in zip(longest, unit, strict=True)]
        if sizes[-1] and (sizes[-1] + multiple) * sum(longest) > batch_tokens:
            sizes.append(0)
            longest = unit
        sizes[-1] += multiple
    return sizes
