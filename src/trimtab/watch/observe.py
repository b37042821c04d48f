"""Look at the attention of a model once, in any mode, without a run folder."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from trimtab.watch.coverage import Coverage, Seen
from trimtab.watch.signals import HeadStats
from trimtab.watch.taps import compiled, patches
from trimtab.watch.taps.forward import Forward, dotted_names


class Observed:
    """What `observe` has seen so far."""

    def __init__(self, model: nn.Module, seen: Seen) -> None:
        self._model, self._seen = model, seen

    @property
    def heads(self) -> dict[str, HeadStats]:
        """Statistics of the heads, by module name; entropies of several forwards are averaged, logits maxed."""
        return self._seen.merged()

    @property
    def coverage(self) -> Coverage:
        """What was seen, what was not, and why."""
        return self._seen.coverage(self._model, dotted_names(self._model))


@contextmanager
def observe(model: nn.Module) -> Iterator[Observed]:
    """See the attention of every forward of `model` inside the ``with`` block: training, evaluation, no_grad.

        with tt.observe(model) as seen:
            model(x)
        print(seen.heads["blocks.0.attn"].entropy)

    The model computes what it computes without; a compiled one runs in eager mode here.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}")
    seen = Seen()
    forward = Forward(model, seen, began=False)
    with ExitStack() as stack:
        if compiled.has_compiled_parts(model) or compiled.wrappers(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        patches.open_(forward, patches.places(model))
        stack.callback(patches.close, forward)
        yield Observed(model, seen)
