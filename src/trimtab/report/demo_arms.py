"""The demo's two arms, and what its page reads from a run."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from trimtab.report.runlog import Run


@dataclass(frozen=True)
class Arm:
    """One side of the comparison.

    Attributes:
        stabilizer: the recipe's field that tells the arms apart.
        name: as the page calls it.
        short: the same for narrow places.
        color: Okabe and Ito's, which the colour-blind can tell apart.
    """

    stabilizer: str
    name: str
    short: str
    color: str


BASELINE = Arm("none", "pre-LN", "pre-LN", "#D55E00")
STEADIED = Arm("sigma:gamma_init=one", "σ-Reparam without LayerNorm", "σ-Reparam", "#0072B2")
ARMS = (BASELINE, STEADIED)


def learning_rate(run: Run) -> float:
    """The recipe's learning rate."""
    return float(run.info["recipe"]["lr"])


def seed(run: Run) -> int:
    """The recipe's seed."""
    return int(run.info["recipe"]["seed"])


def accuracy(run: Run) -> float:
    """Share of the test set classified rightly by the final weights; for a run that did not end, the last known."""
    metrics = run.result.get("metrics", {})
    if "accuracy" in metrics:
        return float(metrics["accuracy"])
    known = run.column("accuracy")
    known = known[np.isfinite(known)]
    return float(known[-1]) if len(known) else float("nan")


def diverged(run: Run) -> bool:
    """Whether the loss left the finite numbers."""
    return run.result.get("status") == "diverged"


def of_arm(runs: Sequence[Run], arm: Arm, lr: float | None = None) -> list[Run]:
    """The runs of an arm, all or those at one learning rate, by learning rate and seed."""
    mine = [run for run in runs if run.info["recipe"]["stabilizer"] == arm.stabilizer]
    chosen = [run for run in mine if lr is None or learning_rate(run) == lr]
    return sorted(chosen, key=lambda run: (learning_rate(run), seed(run)))


def learning_rates(runs: Sequence[Run]) -> list[float]:
    """Every learning rate that both arms were trained at, ascending."""
    baseline, steadied = ({learning_rate(run) for run in of_arm(runs, arm)} for arm in ARMS)
    return sorted(baseline & steadied)
