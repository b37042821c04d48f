"""The two pictures of entropy_collapse.py, from the logs of its runs."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import pictures
from matplotlib.lines import Line2D

from trimtab.report.looks import looks
from trimtab.report.summary import RunSummary

ROWS = ("training loss, nats", "attention entropy, 0 to 1", "largest logit")
LOOKS = looks(["pre-LN", "sigma-Reparam"])


def learning_rates(
    name: str, runs: Sequence[RunSummary], best: Mapping[str, float], broken: float, tokens: int
) -> Path:
    """Columns: the baseline at its best learning rate times 1, 2, 4 and where it breaks; sigma-Reparam at the ends."""
    baseline, sigma = LOOKS
    top = max(run.lr for run in runs)
    wanted = [(baseline, factor) for factor in dict.fromkeys((1.0, 2.0, 4.0, broken))]
    wanted += [(sigma, factor) for factor in dict.fromkeys((1.0, 4.0, min(broken, top / best[sigma])))]
    drawn = [
        (arm, factor, found)
        for arm, factor in wanted
        if (found := [run for run in runs if run.arm == arm and math.isclose(run.lr, best[arm] * factor)])
    ]
    columns = [f"{arm}, lr {best[arm] * factor:g}\nits best × {factor:g}" for arm, factor, _ in drawn]
    figure, axes = pictures.panels(ROWS, columns)
    for column, (arm, _, found) in enumerate(drawn):
        _draw([row[column] for row in axes], found, LOOKS[arm].color, tokens)
    _finish(axes)
    pictures.legend(figure, _ENTROPIES)
    return pictures.save(figure, name)


def heats(name: str, runs: Mapping[str, Sequence[RunSummary]], since: int, tokens: int) -> Path:
    """Columns: by what the logits are multiplied; the arms over each other."""
    columns = list(dict.fromkeys(run.arm for found in runs.values() for run in found))
    figure, axes = pictures.panels(ROWS, [f"logits {column}" for column in columns])
    for place, column in enumerate(columns):
        panels = [row[place] for row in axes]
        for arm, all_of_it in runs.items():
            _draw(panels, [run for run in all_of_it if run.arm == column], LOOKS[arm].color, tokens)
        for ax in panels:
            ax.axvline(since, color=pictures.INK, linewidth=0.7, linestyle=":")
    _finish(axes)
    pictures.legend(figure, {arm: Line2D([], [], color=LOOKS[arm].color) for arm in runs} | _ENTROPIES)
    return pictures.save(figure, name)


_ENTROPIES = {
    "entropy of the lowest head": Line2D([], [], color=pictures.INK),
    "mean over heads": Line2D([], [], color=pictures.INK, linestyle="--"),
}


def _draw(axes: Sequence[pictures.Axes], runs: Sequence[RunSummary], color: str, tokens: int) -> None:
    losses, entropies, logits = axes
    pictures.seeds(losses, [run.curves["loss"] for run in runs], color)
    pictures.seeds(entropies, [run.curves["entropy_min"] for run in runs], color)
    means = [(steps, values / math.log(tokens)) for steps, values in (run.curves["entropy_mean"] for run in runs)]
    pictures.seeds(entropies, means, color, "--")
    pictures.seeds(logits, [run.curves["max_logit"] for run in runs], color)


def _finish(axes: Sequence[Sequence[pictures.Axes]]) -> None:
    losses, entropies, logits = axes
    losses[0].set_yscale("log")
    entropies[0].set_ylim(-0.03, 1.03)
    logits[0].set_yscale("log")
    for ax in logits:
        ax.set_xlabel("step", fontsize=8, color=pictures.INK)
