"""Does SAMformer's attention choose anything? Test errors of trained models, and with its attention replaced.

    python benchmarks/forecasting.py ETTh1 --horizons 96 --needed    # first: these are the models
    python benchmarks/forecast_uniform.py ETTh1                      # a second for each run; nothing is trained

Takes every run of forecasting.py that was tested and whose model attends over channels, and measures the test part
twice more with its best weights: with uniform attention (the query layer is zero, so that every channel looks at all
alike), and with every channel looking at itself alone, so that no channel learns of another. The model was not trained
so: an error that stays the same means that its attention chose nothing, or nothing that helps; one that rises, that
what was learned beside it leans on it.

Prints for each horizon and arm the mean test MSE over seeds as trained, and how much more it is with each of the two,
paired by seed, with the 95 % interval of Student's t. Writes results/forecast_uniform_<data>.json.
"""

import argparse
from argparse import Namespace
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import forecasting
import grids
import measure
from forecasting_arms import ALL, SEEDS
from torch import Tensor, nn

from trimtab.attention.channel import ChannelAttention
from trimtab.tasks.forecasting import ForecastingRecipe
from trimtab.tasks.forecasting.naive import measure as errors_of
from trimtab.tasks.forecasting.parts import Parts
from trimtab.train.trained import load_trained, open_trained


def uniform_(model: nn.Module) -> nn.Module:
    """Make every channel look at all alike, in place: queries of zero have equal logits."""
    for module in model.modules():
        if isinstance(module, ChannelAttention):
            for parameter in module.query.parameters():
                nn.init.zeros_(parameter)
    return model


def attends(name: str) -> bool:
    return ALL[name].model.get("kind", "samformer") == "samformer"


def alone_(model: nn.Module) -> nn.Module:
    """Make every channel look at itself alone, in place."""
    for module in model.modules():
        if isinstance(module, ChannelAttention):
            module.forward = partial(_itself, module)  # type: ignore[method-assign]
    return model


def _itself(attention: ChannelAttention, x: Tensor, values: Tensor | None = None) -> Tensor:
    found: Tensor = attention.out(attention.value(x)) if values is None else values
    return found


WAYS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "test_mse": lambda model: model,
    "uniform_test_mse": uniform_,
    "alone_test_mse": alone_,
}


def tested(folder: Path, parts: Parts) -> dict[str, float]:
    """Test MSE of a run's best weights, as trained, with uniform attention, and every channel alone."""
    trained = open_trained(folder, ForecastingRecipe)
    assert parts.test is not None
    found = {}
    for name, change_ in WAYS.items():
        model = change_(load_trained(trained, lambda: trained.recipe.make_model(parts.channels)))
        found[name] = errors_of(model, parts.test)["mse"]
    return found


def cell(options: Namespace, folder: Path, horizon: int, arms: Mapping[str, Any]) -> dict[str, Any]:
    """By arm its runs: seed and the test errors of each way."""
    found: dict[str, Any] = {}
    parts: Parts | None = None
    for name, arm in arms.items():
        seeds = [run["seed"] for run in arm["runs"] if attends(name) and run.get("test_mse") is not None]
        for seed in seeds:
            place = forecasting.planned(options, folder, horizon, name, arm["setting"], seed)
            parts = parts or place.recipe.parts()  # the same of all
            found.setdefault(name, []).append({"seed": seed, **tested(place.folder, parts)})
    return found


def line(name: str, runs: list[dict[str, float]]) -> str:
    cells = f"{name:14}{sum(run['test_mse'] for run in runs) / len(runs):>10.4f}"
    for way in ("uniform_test_mse", "alone_test_mse"):
        more, low, high = measure.t_interval([run[way] - run["test_mse"] for run in runs])
        cells += f"   {more:+.4f} ({low:+.4f} to {high:+.4f})"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", choices=SEEDS)
    parser.add_argument("--folder", type=Path, help="of the runs; runs/forecasting_<data> by default")
    parser.add_argument("--quick", action="store_true", help="of the runs of forecasting.py --quick")
    options = parser.parse_args()
    options.gpu = False
    name, folder = grids.place(f"forecasting_{options.data}", options)
    cells = measure.read(name).get("cells", {})
    if not cells:
        raise SystemExit(f"no runs yet: `python benchmarks/forecasting.py {options.data} --needed`")
    found = {horizon: cell(options, folder, int(horizon), arms) for horizon, arms in cells.items()}
    for horizon, arms in found.items():
        print(f"\n{options.data}, horizon {horizon}\n{'':14}{'test MSE':>10}   {'uniform':28}   every channel alone")
        for arm, runs in arms.items():
            print(line(arm, runs))
    print("written to", measure.write(f"forecast_uniform_{options.data}" + "_quick" * options.quick, {"cells": found}))


if __name__ == "__main__":
    main()
