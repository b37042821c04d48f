"""Examples of different lengths: what a batch holds, and that a step is the mean over the tokens of all its parts."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from engine_recipes import Sequences, Small
from gloo_processes import in_processes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from trimtab.errors import RecipeError, RunFolderError
from trimtab.train import Hardware, train
from trimtab.train.buckets import Buckets
from trimtab.train.checkpoints import load_weights, newest_checkpoint

LENGTHS = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=8, max_size=80)


@given(LENGTHS, st.integers(0, 400), st.sampled_from([1, 2, 8]), st.integers(0, 3))
@settings(deadline=None)
def test_a_pass_has_every_example_once_in_batches_of_no_more_tokens_than_asked_for(
    pairs: list[tuple[int, int]], more: int, multiple: int, epoch: int
) -> None:
    lengths = torch.tensor(pairs)
    limit = multiple * int(lengths.amax(0).sum()) + more
    buckets = Buckets(lengths, limit, multiple, seed=3)
    batches: list[Tensor] = []
    step = passes = 0
    while passes <= epoch:
        batches, count = [], 0
        while count < len(pairs) - len(pairs) % multiple:
            step += 1
            batches.append(buckets.indices(step))
            count += len(batches[-1])
        passes += 1
    seen = torch.cat(batches).tolist()
    assert len(seen) == len(set(seen)) == len(pairs) - len(pairs) % multiple
    for batch in batches:
        assert len(batch) % multiple == 0
        assert len(batch) * int(lengths[batch].amax(0).sum()) <= limit


def test_steps_are_the_same_wherever_one_begins_and_passes_differ() -> None:
    lengths = torch.randint(1, 40, (300, 2))
    one, other = Buckets(lengths, 700, 4, seed=1), Buckets(lengths, 700, 4, seed=1)
    forwards = [one.indices(step).tolist() for step in range(1, 200)]
    backwards = [other.indices(step).tolist() for step in reversed(range(1, 200))]
    assert forwards == backwards[::-1]
    first = forwards[: round(300 / one.mean_size)]
    assert sorted(map(sorted, first)) != sorted(map(sorted, forwards[len(first) : 2 * len(first)]))
    assert forwards[0] != Buckets(lengths, 700, 4, seed=2).indices(1).tolist()


def test_similar_lengths_waste_little() -> None:
    lengths = torch.randint(1, 60, (4000, 1), generator=torch.Generator().manual_seed(0))
    buckets = Buckets(lengths, 2000, 8, seed=0)
    used = padded = 0
    for step in range(1, 100):
        batch = lengths[buckets.indices(step)]
        used, padded = used + int(batch.sum()), padded + len(batch) * int(batch.max())
    assert used / padded > 0.95  # in random order it is about a half


def weights(folder: Path) -> dict[str, Tensor]:
    model, newest = nn.Linear(1, 1), newest_checkpoint(folder)
    assert newest is not None
    load_weights(newest, model)
    return dict(model.state_dict())


def test_micro_batches_of_other_lengths_make_the_same_step(tmp_path: Path) -> None:
    whole = train(Sequences(), tmp_path / "whole")
    parts = train(Sequences(accumulate=4), tmp_path / "parts")
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5)
    torch.testing.assert_close(weights(tmp_path / "parts"), weights(tmp_path / "whole"))
    assert whole.metrics["eval_loss"] == pytest.approx(parts.metrics["eval_loss"], rel=1e-5)
    assert whole.samples_per_second > 0
    # alike whatever the tokens it is another mean
    plain = replace_weight(Sequences(accumulate=4))
    train(plain, tmp_path / "alike")
    assert not torch.allclose(weights(tmp_path / "alike")["weight"], weights(tmp_path / "whole")["weight"], rtol=1e-4)


def replace_weight(recipe: Sequences) -> Sequences:
    class Alike(Sequences):
        def task(self):  # type: ignore[no-untyped-def]
            return replace(super().task(), weight=None)

    return Alike(**{name: getattr(recipe, name) for name in recipe.__dataclass_fields__})


def in_process(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test"}
    train(Sequences(), f"{folder}/two", hardware=Hardware(accelerator="cpu"))


def test_two_processes_with_unlike_shares_make_the_same_step(tmp_path: Path) -> None:
    one = train(Sequences(), tmp_path / "one", hardware=Hardware(accelerator="cpu"))
    in_processes(2, in_process, str(tmp_path))
    torch.testing.assert_close(weights(tmp_path / "two"), weights(tmp_path / "one"))
    two = train(Sequences(), tmp_path / "two", hardware=Hardware(accelerator="cpu"))  # has ended: read back
    assert two.test["eval_loss"] == pytest.approx(one.test["eval_loss"], rel=1e-5)
    assert two.loss == pytest.approx(one.loss, rel=1e-5)


def test_a_tasks_files_are_in_the_run_folder(tmp_path: Path) -> None:
    train(Sequences(), tmp_path / "run")
    assert (tmp_path / "run" / "files" / "lengths.txt").read_text().startswith("[")
    train(Sequences(), tmp_path / "run")  # a folder with files is still the run's
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "files").write_text("no folder")
    with pytest.raises(RunFolderError, match="cannot write"):
        train(Sequences(), tmp_path / "taken")


def test_what_cannot_be_put_together_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="batch_tokens 71 is too few: 8 of the longest examples come to 72 tokens"):
        train(Sequences(batch_tokens=71), tmp_path / "few")
    with pytest.raises(RecipeError, match="batch_tokens is for examples that are sequences"):
        train(Small(batch_tokens=100), tmp_path / "none")
    with pytest.raises(RecipeError, match="multiples of 80 examples, and there are 61 in all"):
        train(Sequences(accumulate=80, batch_tokens=10_000), tmp_path / "parts")
    with pytest.raises(RecipeError, match="batch_tokens must be at least 1"):
        Sequences(batch_tokens=0)
