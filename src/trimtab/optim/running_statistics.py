"""Running statistics of BatchNorm, kept from a second pass over the same batch."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

_STATISTICS = ("running_mean", "running_var")


@contextmanager
def running_statistics_kept(model: nn.Module) -> Iterator[None]:
    """Have BatchNorm and InstanceNorm, in training mode, normalise by the batch as ever and remember nothing of it.

    Their buffers are out of sight meanwhile, and nothing is written to them: a backward that comes later finds what its
    forward left.
    """
    tracking = [m for m in model.modules() if m.training and getattr(m, "track_running_stats", False)]
    buffers = [{name: m._buffers[name] for name in _STATISTICS if name in m._buffers} for m in tracking]
    try:
        for module, own in zip(tracking, buffers, strict=True):
            module.track_running_stats = False  # type: ignore[assignment]
            module._buffers.update(dict.fromkeys(own))  # InstanceNorm would write to them all the same
        yield
    finally:
        for module, own in zip(tracking, buffers, strict=True):
            module.track_running_stats = True  # type: ignore[assignment]
            module._buffers.update(own)
