"""What `Watch` accepts: errors say what was expected and what came."""

from collections.abc import Mapping, Sequence
from numbers import Real
from pathlib import Path

from torch import Tensor, nn

from trimtab.watch.alarms import Thresholds


def check_kinds(
    model: object, folder: object, run: object, on_alarm: object, thresholds: object, sinks: object
) -> None:
    """Refuse arguments of the wrong kind with a TypeError."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected model to be an nn.Module, got {type(model).__name__}")
    if not isinstance(folder, str | Path) or not str(folder):
        raise TypeError(f"expected folder to be the path of a new folder, got {folder!r}")
    if run is not None and not isinstance(run, Mapping):
        raise TypeError(f"expected run to be a dict of facts for run.json, got {type(run).__name__}")
    if on_alarm is not None and not callable(on_alarm):
        raise TypeError(f"expected on_alarm to be a function of an Alarm, got {type(on_alarm).__name__}")
    if thresholds is not None and not isinstance(thresholds, Thresholds):
        raise TypeError(f"expected thresholds to be a tt.Thresholds, got {type(thresholds).__name__}")
    if not isinstance(sinks, Sequence):
        raise TypeError(f"expected sinks to be a list of sinks, got {type(sinks).__name__}")
    for sink in sinks:
        if not callable(getattr(sink, "write", None)) or not callable(getattr(sink, "close", None)):
            raise TypeError(f"expected a sink to have the methods write and close, got {type(sink).__name__}")


def check_cadence(name: str, value: object) -> None:
    """Refuse a number of steps that is none."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected {name} to be a whole number of steps, got {value!r}")
    if value < 1:
        raise ValueError(f"expected {name} >= 1 (steps from one logged step to the next), got {value}")


def check_number(name: str, value: object) -> None:
    """Refuse what is neither a number nor a tensor of one."""
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"expected {name} to be one number, got a tensor of shape {tuple(value.shape)}")
        if value.is_complex() or value.is_meta:
            kind = "complex" if value.is_complex() else "meta"
            raise TypeError(f"expected {name} to be a real number, got a {kind} tensor")
    elif not isinstance(value, Real):
        raise TypeError(
            f"expected {name} to be a number or a tensor of one, got {type(value).__name__}: pass float({name})"
        )


def number(value: Tensor | float) -> float:
    """The number that a number or a tensor of one holds."""
    return float(value.item() if isinstance(value, Tensor) else value)
