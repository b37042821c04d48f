"""What uses a trained model: commands for text, translations, transcripts and forecasts; and `Forecaster`."""

from typing import Any

__all__ = ["Forecaster"]


def __getattr__(name: str) -> Any:
    if name == "Forecaster":  # its libraries wait until somebody asks
        from trimtab.use.forecaster import Forecaster

        return Forecaster
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
