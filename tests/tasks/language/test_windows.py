import numpy as np
import pytest
import torch

from trimtab.errors import DataError
from trimtab.tasks.language.streams import Stream
from trimtab.tasks.language.windows import evaluation_windows, training_windows
from trimtab.tasks.task import Examples


def stream(size: int) -> Stream:
    """Tokens 1 to `size` after a 0."""
    return Stream("a text", np.arange(size + 1, dtype=np.uint16), words=size // 3, unknown=0)


def all_of(examples: Examples) -> list[torch.Tensor]:
    made = examples.batch(torch.arange(examples.size), torch.Generator())
    return list(made) if isinstance(made, tuple) else [made]


@pytest.mark.parametrize(("size", "context", "stride"), [(100, 8, 1), (64, 64, 8), (71, 64, 8), (72, 64, 8), (9, 5, 1)])
def test_training_windows_begin_at_every_eighth_of_a_context(size: int, context: int, stride: int) -> None:
    (tokens,) = all_of(training_windows(stream(size), context))
    starts = list(range(0, size - context + 1, stride))
    assert tokens.tolist() == [list(range(start, start + context + 1)) for start in starts]
    assert tokens.dtype == torch.int64


@pytest.mark.parametrize("size", [8, 9, 15, 16, 17, 100])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_every_token_counts_once_and_sees_enough(size: int, stride: int) -> None:
    tokens, counted, words = all_of(evaluation_windows(stream(size), 8, stride))
    targets = tokens[:, 1:][counted]
    assert sorted(targets.tolist()) == list(range(1, size + 1))
    seen = torch.arange(1, 9).expand_as(counted)  # tokens that each target follows
    assert (seen[1:][counted[1:]] > 8 - stride).all()
    assert words.sum().item() == pytest.approx(size // 3)
    assert len(tokens) == 1 + -(-(size - 8) // stride)


def test_an_order_of_examples_is_their_own() -> None:
    examples = evaluation_windows(stream(40), 8, 4)
    tokens, counted, _ = examples.batch(torch.tensor([3, 0]), torch.Generator())
    assert tokens[:, 0].tolist() == [12, 0]
    assert counted.sum(dim=1).tolist() == [4, 8]


def test_a_text_shorter_than_a_context_is_refused() -> None:
    for windows in (training_windows(stream(7), 7), evaluation_windows(stream(7), 7, 7)):
        assert windows.size == 1
    with pytest.raises(DataError, match="a text has 7 tokens, fewer than a context of 8"):
        training_windows(stream(7), 8)
    with pytest.raises(DataError, match="a text has 7 tokens, fewer than a context of 8"):
        evaluation_windows(stream(7), 8, 8)
