"""The demo's page, from its run folders alone."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from trimtab.errors import RunFolderError
from trimtab.report import demo_charts, demo_words
from trimtab.report.demo_arms import (
    ARMS,
    BASELINE,
    STEADIED,
    accuracy,
    learning_rate,
    learning_rates,
    of_arm,
    seed,
)
from trimtab.report.page import Figure, Table, page, write_html
from trimtab.report.runlog import Floats, Run, read_run

_COLUMNS = (
    "model",
    "LR",
    "seed",
    "end",
    "last loss (nats)",
    "test accuracy",
    "lowest entropy",
    "highest logit",
    "alarms",
    "first at step",
)


def write_demo_page(folders: Sequence[str | Path], path: str | Path) -> None:
    """Read the demo's run folders and write its page.

    Args:
        folders: run folders of both arms.
        path: the HTML file to write, replacing an older one.

    Raises:
        RunFolderError: a folder cannot be read, or the arms have no learning rate in common.
    """
    text = demo_page([read_run(folder) for folder in folders])
    write_html(path, text)


def demo_page(runs: Sequence[Run]) -> str:
    """The page of these runs, as HTML; see `write_demo_page`."""
    rates = learning_rates(runs)
    if not rates:
        raise RunFolderError("the demo's page compares two arms, and they have no learning rate in common")
    top = rates[-1]
    return page(
        title="A Transformer that collapses, and the same one steadied",
        intro=_intro(runs),
        figures=[
            Figure(
                f"Learning rate {top:g}: loss and accuracy",
                demo_charts.curves(runs, top),
                demo_words.curves_sentence(runs, top),
            ),
            Figure(
                f"Learning rate {top:g}: attention entropy of every head",
                demo_charts.heat_maps(runs, top),
                demo_words.entropy_sentence(runs, top),
                demo_charts.entropy_key(),
            ),
            Figure(
                "Every learning rate: accuracy at the end",
                [demo_charts.sweep(runs)],
                demo_words.sweep_sentence(runs),
            ),
        ],
        tables=[Table("Every run", _COLUMNS, [_row(run) for arm in ARMS for run in of_arm(runs, arm)])],
        facts=_facts(runs),
    )


def _intro(runs: Sequence[Run]) -> list[str]:
    recipe = runs[0].info["recipe"]
    model = recipe["model"]
    return [
        f"A small Vision Transformer ({model['depth']} layers, {model['num_heads']} heads) learns to read handwritten "
        f"digits in {recipe['steps']} steps, in two forms: {BASELINE.name}, the usual design, and {STEADIED.name}, "
        "which divides every weight matrix by its largest singular value and learns its scale. Both train with the "
        "same optimiser, data and seeds, each from the start of the weights that suits it, without warmup, clipping or "
        "weight decay.",
        "Attention entropy is what to watch. As it falls to zero, each head fixes on a single patch and the gradient "
        "through its softmax dies. Low entropy alone is no verdict, so the accuracy stands beside it.",
    ]


def _row(run: Run) -> list[str]:
    arm = next(arm for arm in ARMS if arm.stabilizer == run.info["recipe"]["stabilizer"])
    low, high = run.column("entropy_min"), run.column("max_logit")
    return [
        arm.short,
        f"{learning_rate(run):g}",
        str(seed(run)),
        f"{run.result.get('status', 'stopped')} at {run.steps[-1]:.0f}",
        f"{run.column('loss')[-1]:.4g}",
        f"{accuracy(run):.4f}",
        _extreme(low, np.min, ".4f"),
        _extreme(high, np.max, ",.0f"),
        str(len(run.alarms)),
        str(run.alarms[0]["step"]) if run.alarms else "–",
    ]


def _extreme(values: Floats, pick: Callable[[Floats], np.floating], form: str) -> str:
    known = values[np.isfinite(values)]
    return format(float(pick(known)), form) if len(known) else "–"


def _facts(runs: Sequence[Run]) -> dict[str, str]:
    """Machine, versions and seeds as the runs' own run.json has them; what is nested is written flat."""
    info = runs[0].info
    recipe = info["recipe"]
    facts = {
        "data": f"{recipe['data']}, batches of {recipe['batch_size']}, {recipe['steps']} steps",
        "seeds": ", ".join(map(str, sorted({seed(run) for run in runs}))),
    }
    hidden = {"recipe", "seed", "task", "arm"}
    for name, value in info.items():
        if name not in hidden:
            facts[name.replace("_", " ")] = _flat(value)
    for arm in ARMS:
        recipe = of_arm(runs, arm)[0].info["recipe"]
        facts[arm.name] = _flat({name: value for name, value in recipe.items() if name not in ("lr", "seed")})
    return facts


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(entry)}" for name, entry in value.items())
    return ", ".join(map(_flat, value)) if isinstance(value, list) else str(value)
