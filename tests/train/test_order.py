from itertools import islice

import pytest
import torch
from engine_recipes import examples
from hypothesis import given
from hypothesis import strategies as st

from trimtab.tasks.recipe import Recipe
from trimtab.train.hardware import Hardware, launched
from trimtab.train.loader import Loader
from trimtab.train.order import batch_indices, batches, derived_seed, own_share


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_every_pass_sees_every_example_once_but_the_last_short_batch(
    num_examples: int, batch_size: int, seed: int, epoch: int
) -> None:
    batch_size = min(batch_size, num_examples)
    per_epoch = num_examples // batch_size
    steps = range(epoch * per_epoch + 1, (epoch + 1) * per_epoch + 1)
    seen = torch.cat([batch_indices(num_examples, batch_size, seed, step) for step in steps]).tolist()
    assert len(seen) == len(set(seen)) == per_epoch * batch_size
    assert set(seen) <= set(range(num_examples))


def test_each_pass_and_each_seed_has_an_order_of_its_own() -> None:
    orders = [batch_indices(1000, 1000, seed, epoch).tolist() for seed in (0, 1) for epoch in (1, 2)]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_does_not_depend_on_where_one_begins() -> None:
    from_the_start = list(islice(batches(10, 3, seed=4), 9))
    assert [indices.tolist() for indices in from_the_start] == [
        batch_indices(10, 3, 4, step).tolist() for step in range(1, 10)
    ]
    torch.manual_seed(9)  # nor on torch's own generator
    assert batch_indices(10, 3, 4, 9).tolist() == from_the_start[-1].tolist()


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 5))
def test_processes_share_every_micro_batch_without_overlap(accumulate: int, processes: int, size: int) -> None:
    step = torch.arange(accumulate * processes * size)
    shares = [own_share(step, accumulate, rank, processes) for rank in range(processes)]
    for number, whole in enumerate(step.chunk(accumulate)):
        assert torch.equal(torch.cat([share[number] for share in shares]), whole)


def test_seeds_for_different_things_are_different() -> None:
    parts = [("order", 0, 1), ("order", 1, 0), ("batch", 0, 1), ("order", 0, 1, 0), ("order", "0", 1)]
    seeds = {derived_seed(*each) for each in parts}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_the_loader_makes_the_same_batches_wherever_it_begins() -> None:
    recipe = Recipe(batch_size=8, accumulate=2, seed=3)
    with launched(Hardware(accelerator="cpu"), "32") as fabric:
        loader = Loader(examples(20, 1), recipe, fabric)
        first = list(islice(loader.batches(1), 5))
        late = next(loader.batches(5))
        assert loader.batch_seconds > 0
    assert [len(inputs) for inputs, _ in late] == [4, 4]
    for (x, y), (same_x, same_y) in zip(first[4], late, strict=True):
        assert torch.equal(x, same_x)
        assert torch.equal(y, same_y)


def test_an_error_of_the_data_comes_out_of_the_loader() -> None:
    def broken(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        raise OSError("the disk is gone")

    data = examples(20, 1)
    object.__setattr__(data, "batch", broken)
    with launched(Hardware(accelerator="cpu"), "32") as fabric, pytest.raises(OSError, match="the disk is gone"):
        next(Loader(data, Recipe(batch_size=8), fabric).batches(1))
