"""What the intervals of forecasts hold on the test part, and what it costs that one part chooses and calibrates.

    TRIMTAB_DATA=... python benchmarks/forecast_intervals.py

SAMformer with SAM, every epoch's weights kept. The validation part is cut into two halves, without the windows that
lie in both. Weights are chosen by the first, by the second, or by the whole of it. "Held" is the share of the test
values in intervals of level 0.9 that the whole part has chosen and calibrated, and beside it of those that the first
half has chosen and the second calibrated. "Ratio" is the mean margin on a half by the weights that it chose itself,
over that by those which the other half chose: what is below 1 is the price of choosing and calibrating on one part.
Of all windows, every third is measured. Writes results/forecast_intervals.json.
"""

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import measure
import numpy as np
import torch
from torch import nn

from trimtab.models.forecasting import ForecastModelConfig
from trimtab.report.runlog import Floats
from trimtab.tasks.forecasting.conformal import conformal_margin
from trimtab.tasks.forecasting.recipes import SAM, published
from trimtab.tasks.task import Examples
from trimtab.train import Hardware, train
from trimtab.train.checkpoints import load_weights
from trimtab.train.checkpoints.files import CHECKPOINTS, in_order

LEVEL, EVERY = 0.9, 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["ETTh1", "ETTh2"])
    parser.add_argument("--horizons", nargs="+", type=int, default=[24, 96])
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=15)
    options = parser.parse_args()
    rows = []
    print(f"{'data':6} horizon seed   held  in halves  ratio on the first and the second half")
    for data in options.data:
        for horizon in options.horizons:
            for seed in range(options.seeds):
                row = run(data, horizon, seed, options.epochs)
                rows.append({"data": data, "horizon": horizon, "seed": seed, **row})
                told = "  ".join(f"{row[name]:9.3f}" for name in ("held_in_halves", "first", "second"))
                print(f"{data:6} {horizon:7} {seed:4}  {row['held']:.3f}  {told}", flush=True)
    settings = {"level": LEVEL, "every": EVERY, "epochs": options.epochs}
    print(measure.write("forecast_intervals", {"settings": settings, "rows": rows}))


def run(data: str, horizon: int, seed: int, epochs: int) -> dict[str, Any]:
    recipe = published(data, ForecastModelConfig("samformer", 512, horizon), stabilizer=SAM, seed=seed, watch=False)
    epoch = recipe.eval_every
    recipe = replace(recipe, steps=epochs * epoch, patience=None, checkpoint_every=epoch, keep=epochs)
    with tempfile.TemporaryDirectory() as folder:
        train(recipe, folder, hardware=Hardware("cpu"))
        parts = recipe.parts()
        model = recipe.make_model(parts.channels).eval()
        whole, test = [], []
        for checkpoint in in_order(Path(folder) / CHECKPOINTS):
            load_weights(checkpoint, model, None)
            whole.append(errors_of(model, parts.validation))
            test.append(errors_of(model, parts.test))
    half, between = len(whole[0]) // 2, horizon // EVERY + 1
    first, second = [each[: half - between] for each in whole], [each[half:] for each in whole]
    of_whole, of_first, of_second = best(whole), best(first), best(second)

    def margin(errors: Sequence[Floats], chosen: int) -> Floats:
        return conformal_margin(errors[chosen], LEVEL)

    return {
        "epochs": [of_whole + 1, of_first + 1, of_second + 1],
        "held": float((test[of_whole] <= margin(whole, of_whole)).mean()),
        "held_in_halves": float((test[of_first] <= margin(second, of_first)).mean()),
        "first": float(margin(first, of_first).mean() / margin(first, of_second).mean()),
        "second": float(margin(second, of_second).mean() / margin(second, of_first).mean()),
    }


def best(errors: Sequence[Floats]) -> int:
    return int(np.argmin([np.square(each, dtype=np.float64).mean() for each in errors]))


@torch.no_grad()
def errors_of(model: nn.Module, examples: Examples) -> Floats:
    generator, found = torch.Generator(), []
    for indices in torch.arange(0, examples.size, EVERY).split(64):
        x, y = examples.batch(indices, generator)
        found.append((model(x) - y).abs().numpy())
    return np.concatenate(found)


if __name__ == "__main__":
    main()
