"""Run folders as `trimtab train` and `trimtab compare` leave them, with the numbers that a test wants."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

NAN, INF = "nan", "inf"


def write_run(
    folder: Path,
    arm: str = "none",
    lr: float = 0.01,
    seed: int = 0,
    *,
    loss: float | str = 0.5,
    initial: float = 2.0,
    accuracy: float | str = 0.9,
    status: str = "finished",
    losses: Sequence[float | str] | None = None,
    entropy: float | str = 0.5,
    logit: float | str = 10.0,
    step_seconds: float = 0.01,
    recipe: dict[str, Any] | None = None,
    info: dict[str, Any] | None = None,
    result: bool = True,
    alarms: Sequence[dict[str, Any]] = (),
) -> Path:
    """One run; `losses` are those of the logged steps 10, 20, ..., `loss` is the final evaluation's."""
    folder.mkdir(parents=True)
    losses = [initial, loss] if losses is None else losses
    own = recipe_of(arm, lr, seed, steps=10 * len(losses)) | (recipe or {})
    facts = {"format": 1, "trimtab": "0.1.0", "torch": "9.9", "task": "ImagesRecipe", "recipe_name": "vit-digits"}
    write_json(folder / "run.json", facts | {"arm": arm, "recipe": own, "seed": seed} | (info or {}))
    with (folder / "steps.jsonl").open("w") as log:
        for place, value in enumerate(losses, 1):
            line = {"step": 10 * place, "loss": value, "lr": [lr, lr], "entropy_min": entropy, "max_logit": logit}
            line |= {"sigma": {"head": [1.0]}, "time": 0.1 * place}
            line["alarms"] = list(alarms) if place == len(losses) else []
            log.write(json.dumps(line) + "\n")
    write_json(folder / "heads.json", {"heads": [{"module": "blocks.0.attention", "head": head} for head in (0, 1)]})
    value = float(entropy)
    for name in ("entropy", "entropy_normalized", "max_logit"):
        (folder / f"heads_{name}.f32").write_bytes(np.full((len(losses), 2), value, "<f4").tobytes())
    if result:
        end = {"status": status, "steps": 10 * len(losses), "loss": losses[-1], "metric": "accuracy"}
        end |= {"higher_is_better": True, "initial": {"accuracy": 0.1, "eval_loss": initial}}
        end |= {"metrics": {"accuracy": accuracy, "eval_loss": loss}, "step_seconds": step_seconds}
        write_json(folder / "result.json", end | {"peak_memory_bytes": 1000, "test": {}, "best": {}, "best_step": 0})
    return folder


def write_compare(folder: Path, losses: dict[str, dict[float, Sequence[float | str]]], **settings: Any) -> Path:
    """A compare: arm → learning rate → final loss of each seed; a loss of "nan" is a run that diverged."""
    for arm, by_lr in losses.items():
        for lr, finals in by_lr.items():
            for seed, loss in enumerate(finals):
                status = "diverged" if loss == NAN else "finished"
                accuracy = 0.1 if loss == NAN else round(1 - float(loss) / 4, 6)
                place = folder / "runs" / arm.replace(":", "_") / f"lr{lr:g}-seed{seed}"
                write_run(place, arm, lr, seed, loss=loss, accuracy=accuracy, status=status, **settings)
    arms = {arm: recipe_of(arm, 0.1, 0, steps=20) for arm in losses}
    write_json(folder / "compare.json", {"arms": arms, "lrs": [], "seeds": [], "recipe_name": "vit-digits"})
    return folder


def recipe_of(arm: str, lr: float, seed: int, steps: int) -> dict[str, Any]:
    """What a recipe looks like in a run.json."""
    recipe = {"stabilizer": arm, "lr": lr, "seed": seed, "data": "digits", "steps": steps, "batch_size": 8}
    return recipe | {"model": {"depth": 2, "norm": "layernorm"}}


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value) + "\n")
