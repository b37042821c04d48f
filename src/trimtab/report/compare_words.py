"""The sentences of a comparison, computed from its runs, whatever they say."""

import math
from collections import Counter
from collections.abc import Sequence

from trimtab.report.comparison import Comparison, of_arm
from trimtab.report.differences import MIN_SEEDS
from trimtab.report.measured import BEST_LOSS, BEST_METRIC, LR_SENSITIVITY, STEP_RATIO, Measured, best_lr


def headline(comparison: Comparison, measured: Sequence[Measured]) -> list[str]:
    """What was run, who is ahead tuned, who minds the learning rate least, who fails, and at what cost."""
    by_name = {each.measure.name: each for each in measured}
    lines = [_grid_sentence(comparison)]
    if not measured:
        return [*lines, _failures(comparison), "Nothing can be measured; what there is, is shown below."]
    tuned = by_name.get(BEST_METRIC.name, by_name[BEST_LOSS.name])
    title = tuned.measure.title[:1].upper() + tuned.measure.title[1:]
    if len(comparison.lrs) > 1:
        title += ", each at its own best learning rate"
    if not all(grid.failed.all() for grid in comparison.grids.values()):
        lines.append(f"{title}: {_ahead(tuned, {arm: at_lr(comparison, arm, tuned) for arm in comparison.grids})}")
    sensitivity = by_name.get(LR_SENSITIVITY.name)
    if sensitivity and any(math.isfinite(value) for value in sensitivity.values.values()):
        lines.append(f"LR sensitivity, over all learning rates: {_ahead(sensitivity)}")
    lines.append(_failures(comparison))
    lines += _cost(by_name[STEP_RATIO.name])
    if len(comparison.grids) > 1 and len(comparison.seeds) < MIN_SEEDS:
        lines.append(
            f"With {count(len(comparison.seeds), 'seed')} no difference can be told from chance; run at least "
            f"{MIN_SEEDS}, better 5."
        )
    return lines


def at_lr(comparison: Comparison, arm: str, measured: Measured) -> str:
    """Where an arm is best, " at 0.01"; nothing where there is no choice of learning rates, or no best one."""
    lr = best_lr(comparison, arm, measured.measure)
    return "" if lr is None or len(comparison.lrs) == 1 else f" at {lr:g}"


def told(measured: Measured) -> str:
    """Which pairs of arms the seeds tell apart on one measure, in a sentence."""
    better = {"lower": "below", "higher": "above"}[measured.measure.better or "lower"]
    higher = measured.measure.better == "higher"
    pairs = [
        (each.first, each.second) if (each.value > 0) == higher else (each.second, each.first)
        for each in measured.differences
        if each.told
    ]
    total = len(measured.differences)
    title = measured.measure.title[:1].upper() + measured.measure.title[1:]
    if not pairs:
        return f"{title}: the seeds cannot tell any two apart."
    if len(pairs) > 6:
        return f"{title}: the seeds can tell {len(pairs)} of {total} pairs apart."
    rest = "" if len(pairs) == total else f" They cannot tell the other {count(total - len(pairs), 'pair')}."
    listed = join([f"{ahead} {better} {behind}" for ahead, behind in pairs])
    return f"{title}: the seeds can tell {listed}.{rest}"


def some_notes(comparison: Comparison, most: int = 6) -> list[str]:
    """What was left out of the measures and why, a sentence each; the first of them where there are many."""
    more = len(comparison.notes) - most
    return [f"{note}." for note in comparison.notes[:most]] + ([f"And {more} more such."] if more > 0 else [])


def reading(tolerance: float, num_seeds: int) -> list[str]:
    """How to read the page."""
    spread = (
        f"Behind each number stands a 95 % interval from resampling the {count(num_seeds, 'seed')}, all learning rates "
        "of a seed together and the same draw for all arms. With few seeds such intervals are too narrow. "
        "Whether the seeds can tell two arms apart is decided by a paired test, corrected for the number of pairs "
        "(Holm). Bold is an arm that the seeds tell from every other one; grey are arms that they tell to be worse "
        "than the best. No bold number in a column means that no winner can be named, however the numbers look."
    )
    if num_seeds < MIN_SEEDS:
        spread = (
            f"Whether two arms differ by more than chance is told from at least {MIN_SEEDS} seeds, which would give "
            "each number an interval and bold type to an arm that is told from every other. Here no winner can be "
            "named, however the numbers look."
        )
    return [
        "Against the learning rate, a point is a run (a cross: it failed), a line the median of the seeds, a band "
        "their lowest to highest. A flat line is an arm that does not mind how its learning rate is set. Compare the "
        "lowest points of two lines for tuned quality, their width for safety. Click on a point, or on a row of the "
        "list of runs, for that run's curves; click on an arm's name to hide it.",
        "A run fails when its loss leaves the finite numbers, when it raises an error, or when it ends no better than "
        "it began; it counts with the loss at init, as in the definition of LR sensitivity.",
        spread,
        f"The LR range counts learning rates around the best one whose loss misses at most {tolerance:.0%} of the way "
        "from the loss at init to the best loss. It is as coarse as the grid.",
        "Low entropy alone is no verdict: a head that has found the one key that matters is right to look at it alone. "
        "Low entropy together with large logits and a loss that stands still or spikes is the collapse to fear.",
        "Step time and memory are those of runs that may have shared the machine: read them as hints.",
    ]


def join(parts: Sequence[str]) -> str:
    """Join with commas and a last "and"."""
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)


def count(number: int, what: str) -> str:
    """A number of things: "1 seed", "2 seeds"."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def number(value: float, form: str) -> str:
    """A measure as text; a dash where it is not known."""
    return format(value, form) if math.isfinite(value) else "–"


def _grid_sentence(comparison: Comparison) -> str:
    runs = comparison.runs
    names = {str(name) for run in runs if (name := run.info.get("recipe_name") or run.info.get("task"))}
    lrs, seeds = ({getattr(run, name) for run in runs} for name in ("lr", "seed"))
    of = f" of {join(sorted(names))}" if names else ""
    return (
        f"{count(len(runs), 'run')}{of}: {count(len(comparison.arms), 'arm')}, {count(len(lrs), 'learning rate')}, "
        f"{count(len(seeds), 'seed')}."
    )


def _ahead(measured: Measured, notes: dict[str, str] | None = None) -> str:
    """Who is best on a measure, from whom the seeds tell it, and who comes next."""
    form, notes = measured.measure.form, notes or {}
    known = {arm: value for arm, value in measured.values.items() if math.isfinite(value)}
    if not known:
        return "not known."
    order = sorted(known, key=lambda arm: known[arm], reverse=measured.measure.better == "higher")

    def say(arm: str) -> str:
        return f"{arm} {number(known[arm], form)}{notes.get(arm, '')}"

    if len(order) == 1:
        return f"{say(order[0])}."
    best = order[0]
    if measured.winner == best:
        value = number(known[best], form)
        rest = f"{say(order[1])}" if len(order) == 2 else f"all others; next is {say(order[1])}"
        return f"{best} is first with {value}{notes.get(best, '')}; the seeds tell it from {rest}."
    level = [arm for arm in order[1:] if arm not in measured.behind]
    if len(level) > 3:
        return f"{say(best)} is first, but the seeds cannot tell it from {len(level)} of the {len(order) - 1} others."
    return f"{say(best)} is first, but the seeds cannot tell it from {join([say(arm) for arm in level])}."


def _failures(comparison: Comparison) -> str:
    counts = {arm: Counter(run.failed for run in of_arm(comparison.runs, arm)) for arm in comparison.arms}
    some = [f"{each[True]} of {each.total()} with {arm}" for arm, each in counts.items() if each[True]]
    if not some:
        return "No run failed."
    if len(some) > 4:
        worst = max(counts, key=lambda arm: counts[arm][True])
        total, most = sum(each[True] for each in counts.values()), counts[worst]
        return f"{total} runs failed, with {len(some)} of the arms; most with {worst}, {most[True]} of {most.total()}."
    return f"Runs that failed: {join(some)}."


def _cost(measured: Measured) -> list[str]:
    """What a step costs over one of the first arm."""
    first, *others = measured.values
    costs = sorted((measured.values[arm], arm) for arm in others if math.isfinite(measured.values[arm]))
    if not costs:
        return []
    if len(costs) > 4:
        listed = f"from {costs[0][0]:.2f} × with {costs[0][1]} to {costs[-1][0]:.2f} × with {costs[-1][1]}"
    else:
        listed = join([f"{cost:.2f} × with {arm}" for cost, arm in costs])
    return [f"A step takes {listed}, over one with {first}."]
