"""Windows on a stream of tokens: what a batch of training is made of, and one of evaluation."""

import numpy as np
import torch
from torch import Tensor

from trimtab.errors import DataError
from trimtab.tasks.language.streams import Stream
from trimtab.tasks.task import Examples

_OVERLAP = 8  # training windows that a token lies in, at as many places


def training_windows(stream: Stream, context: int) -> Examples:
    """Windows that begin at every eighth of a context; a batch is tokens (B, context + 1), int64.

    Each is one of the same few examples, so that what a run sees depends on its seed alone, whatever the number of
    processes. Since they overlap, a token comes at eight places, and never only without what went before it.

    Raises:
        DataError: the text is shorter than a context.
    """
    _check(stream, context)
    stride = max(1, context // _OVERLAP)

    def batch(indices: Tensor, generator: torch.Generator) -> Tensor:
        return _windows(stream, indices * stride, context)

    return Examples((stream.size - context) // stride + 1, batch)


def evaluation_windows(stream: Stream, context: int, stride: int) -> Examples:
    """Windows in which every token of the text counts once.

    Those that count are the last `stride` of a window, and all of the first one. The last window ends with the text.

    Args:
        stream: the text.
        context: tokens that the model sees at most.
        stride: tokens that count in a window; what a counted token follows is at least `context - stride` long.

    Returns:
        Examples whose batch is tokens (B, context + 1), int64; of the second to the last, whether they count, (B,
        context), bool; and the words that they stand for, (B,): those of the text, in equal shares.

    Raises:
        DataError: the text is shorter than a context.
    """
    _check(stream, context)
    last = stream.size - context
    starts = torch.arange(0, last + stride, stride).clamp_(max=last)
    counting = starts.diff(prepend=starts[:1] - context)  # how many tokens were not in the window before

    def batch(indices: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        counted = torch.arange(context) >= context - counting[indices][:, None]
        share = torch.full((len(indices),), stream.words / len(starts))
        return _windows(stream, starts[indices], context), counted, share

    return Examples(len(starts), batch)


def _windows(stream: Stream, starts: Tensor, context: int) -> Tensor:
    places = starts.numpy()[:, None] + np.arange(context + 1)
    return torch.from_numpy(stream.tokens[places].astype(np.int64))


def _check(stream: Stream, context: int) -> None:
    if stream.size < context:
        raise DataError(
            f"{stream.name} has {stream.size:,} tokens, fewer than a context of {context:,}: take a longer one, or a "
            "smaller --model.context"
        )
