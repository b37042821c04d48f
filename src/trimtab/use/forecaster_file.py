"""A fitted forecaster on disk: what it is in forecaster.json, its numbers in forecaster.safetensors."""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from trimtab.errors import CheckpointError, RunFolderError
from trimtab.models.forecasting import make_forecast_model
from trimtab.stabilizers import fold_, stabilize_
from trimtab.stabilizers.apply import applied
from trimtab.stabilizers.fold import folds
from trimtab.tasks.forecasting.splits import Scaler
from trimtab.tasks.forecasting.timestamps import Frequency
from trimtab.tasks.typed import typed
from trimtab.use.fitted_forecast import FittedForecast
from trimtab.use.forecaster_settings import ForecasterSettings

_FORMAT = "trimtab.forecaster.2"
_CONTENT, _TENSORS = "forecaster.json", "forecaster.safetensors"
_MODEL, _ERRORS = "model.", "errors"


@dataclass(frozen=True)
class FrameFacts:
    """What a forecaster knows of the frame that it was fitted to.

    Attributes:
        columns: in order.
        frequency: how far times are apart.
        local: whether they count as clocks show them in their time zone, and not as in UTC.
        metrics: on its validation part.
    """

    columns: tuple[str, ...]
    frequency: Frequency
    local: bool
    metrics: dict[str, float]


def write_forecaster(
    folder: str | Path, settings: ForecasterSettings, facts: FrameFacts, fitted: FittedForecast
) -> None:
    """Write both files, aside and then renamed; those that are there are replaced.

    The first knows the second, and itself, by a sha256: killed between the two, they are found not to belong
    together.

    Raises:
        RunFolderError: they cannot be written.
    """
    from safetensors.torch import save_file

    from trimtab import __version__

    folder = Path(folder).expanduser()
    content = {
        "format": _FORMAT,
        "trimtab": __version__,
        "settings": asdict(settings),
        "frame": asdict(facts),
        "scale": {name: values.tolist() for name, values in asdict(fitted.scaler).items()},
    }
    tensors = {f"{_MODEL}{name}": tensor.contiguous() for name, tensor in fitted.model.state_dict().items()}
    tensors[_ERRORS] = torch.from_numpy(fitted.errors)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / f"{_TENSORS}.part")
        content["sha256"] = _sha256(folder / f"{_TENSORS}.part")
        content["sha256_of_this"] = _sha256_of(content)
        (folder / f"{_CONTENT}.part").write_text(json.dumps(content, indent=1, ensure_ascii=False), "utf-8")
        for name in (_TENSORS, _CONTENT):
            os.replace(folder / f"{name}.part", folder / name)
    except OSError as error:
        raise RunFolderError(f"cannot write to {folder}: {error.strerror or error}; choose another folder") from error


def read_forecaster(folder: str | Path) -> tuple[ForecasterSettings, FrameFacts, FittedForecast]:
    """Read both files back.

    Raises:
        CheckpointError: they are not there, or damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder).expanduser()
    try:
        content = json.loads((folder / _CONTENT).read_text("utf-8"))
        if content["format"] != _FORMAT:
            raise ValueError(f"expected the format {_FORMAT}, it has {content['format']!r}")
        if content.pop("sha256_of_this") != _sha256_of(content):
            raise ValueError(f"{_CONTENT} is not what was written")
        settings: ForecasterSettings = typed(ForecasterSettings, content["settings"], "settings")
        facts: FrameFacts = typed(FrameFacts, content["frame"], "frame")
        if _sha256(folder / _TENSORS) != content["sha256"]:
            raise ValueError(f"{_CONTENT} and {_TENSORS} are not of one save")
        tensors = load_file(folder / _TENSORS)
        errors = tensors.pop(_ERRORS).numpy()
        with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten
            model = make_forecast_model(replace(settings.model, channels=len(facts.columns)))
            stabilize_(model, settings.stabilizer, changes_made=True)
        if any(map(folds, applied(model))):  # as it was written
            fold_(model)
        model.to(next(tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()))
        model.load_state_dict({name.removeprefix(_MODEL): tensor for name, tensor in tensors.items()})
        config = settings.model
        scaler = Scaler(**{name: np.array(values) for name, values in content["scale"].items()})
        fitted = FittedForecast(model.eval(), config.lookback, config.horizon, scaler, errors)
    except OSError as error:
        raise CheckpointError(
            f"{folder} has no forecaster that can be read ({error.strerror or error}); Forecaster.save writes one"
        ) from None
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(f"the forecaster in {folder} is damaged: {error}") from None
    return settings, facts, fitted


def _sha256_of(content: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
