"""What forecasting.py prints and draws from its results: cells, the whole table, the paper's headlines, a picture."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import measure
import pictures
from forecasting_arms import ARMS, HORIZONS, NEEDED, PUBLISHED, SEEDS

SAMFORMER, MIXER = "samformer", "tsmixer"
DRAWN = [*ARMS, "frozen"]
_COLOURS = ("#0b6e4f", "#c0392b", "#1f6f8b", "#7fb3c8", "#8e6c3a", "#7d5ba6", "#555555")
Arms = Mapping[str, Any]


def errors(arms: Arms, name: str, which: str = "test_mse") -> dict[int, float]:
    """Of an arm's runs by seed; infinite for one that failed."""
    return {each["seed"]: each.get(which) or math.inf for each in arms[name]["runs"]} if name in arms else {}


def mean(values: Mapping[int, float]) -> float:
    return statistics.fmean(values.values())


def difference(arms: Arms, name: str) -> tuple[float, float, float] | None:
    """SAMformer's test MSE less an arm's, paired by seed: mean and 95 % interval."""
    ours, theirs = errors(arms, SAMFORMER), errors(arms, name)
    pairs = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    return measure.t_interval(pairs) if pairs and all(map(math.isfinite, pairs)) else None


def cell(data: str, horizon: int, found: Mapping[str, Any]) -> list[str]:
    """A horizon of a data set's results: its arms, and what nothing learned has."""
    lines = ["", f"{data}, horizon {horizon}", *cell_lines(data, horizon, found["cells"][str(horizon)])]
    for name, error in found.get("naive", {}).get(str(horizon), {}).items():
        lines.append(f"{name:13}{'':10}{error['mse']:>8.4f}{'':9}{error['mae']:>8.4f}")
    return lines


def cell_lines(data: str, horizon: int, arms: Arms) -> list[str]:
    """A line for each arm: published, ours ± sd, MAE, parameters, seconds, setting; SAMformer less it."""
    lines = [
        f"{'':13}{'published':>10}{'test MSE ± sd':>17}{'MAE':>8}{'validation':>12}{'lowest entropy':>16}"
        f"{'parameters':>12}{'s':>6}  SAMformer less it"
    ]
    for name, arm in arms.items():
        mse, mae = errors(arms, name), errors(arms, name, "test_mae")
        known = PUBLISHED[data].get(name)
        sd = statistics.stdev(mse.values()) if len(mse) > 1 and all(map(math.isfinite, mse.values())) else 0.0
        told = difference(arms, name) if name != SAMFORMER else None
        less = "" if told is None else f"{told[0]:+.4f} ({told[1]:+.4f} to {told[2]:+.4f})"
        runs = arm["runs"]
        lowest = [each["entropy_min_end"] for each in runs if each.get("entropy_min_end") is not None]
        entropies = f"{min(lowest):.2f}-{max(lowest):.2f}" if lowest else ""
        setting = " ".join(f"{key}={value}" for key, value in arm["setting"].items())
        lines.append(
            f"{name:13}{'' if known is None else f'{known[HORIZONS.index(horizon)]:.3f}':>10}"
            f"{f'{mean(mse):.4f} ± {sd:.4f}':>17}{mean(mae):>8.4f}"
            f"{mean(errors(arms, name, 'validation_mse')):>12.4f}{entropies:>16}{parameters(arm):>12,}"
            f"{statistics.median(each.get('seconds', math.nan) for each in runs):>6.0f}  {less:32} {setting}"
        )
    return lines


def results() -> dict[str, dict[int, Arms]]:
    """Of every data set that has been run: horizon to arms."""
    found = {}
    for data in SEEDS:
        if cells := measure.read(f"forecasting_{data}").get("cells"):
            found[data] = {int(horizon): arms for horizon, arms in cells.items()}
    return found


def parameters(arm: Mapping[str, Any]) -> int:
    """Of an arm's model, attention included; 0 if all its runs failed."""
    return next((each["parameters"] for each in arm["runs"] if "parameters" in each), 0)


def beats(arms: Arms, names: Sequence[str]) -> bool:
    """Whether SAMformer's mean test MSE is below that of each of these arms."""
    return all(mean(errors(arms, SAMFORMER)) < mean(errors(arms, name)) for name in names)


def beaten(cells: Iterable[Arms], names: Sequence[str]) -> str:
    """In how many of the cells that have all these arms SAMformer beats them."""
    below = [beats(arms, names) for arms in cells if all(name in arms for name in names)]
    return f"{sum(below)} of {len(below)} cells that have them"


def gain(pairs: Iterable[tuple[float, float]]) -> float:
    """One less the sum of the first over that of the second, as the published improvement is reckoned."""
    first, second = zip(*pairs, strict=True)
    return 1 - sum(first) / sum(second)


def write_table() -> None:
    """Print all results so far with the headlines, and draw them."""
    found = results()
    if not found:
        print("no results yet: run `python benchmarks/forecasting.py ETTh1 --horizons 96`")
        return
    for data, cells in found.items():
        whole = measure.read(f"forecasting_{data}")
        for horizon in cells:
            print("\n".join(cell(data, horizon, whole)))
    print()
    print("\n".join(headlines(found)))
    print("written to", draw(found))


def headlines(found: Mapping[str, Mapping[int, Arms]]) -> list[str]:
    """How many cells reach the published ones and beat our own baselines, and the paper's two figures from ours."""
    cells = [(data, horizon, arms) for data, each in found.items() for horizon, arms in each.items()]
    cells = [each for each in cells if SAMFORMER in each[2]]
    lines = []
    reached = [
        mean(errors(arms, SAMFORMER)) <= PUBLISHED[data][SAMFORMER][HORIZONS.index(horizon)]
        for data, horizon, arms in cells
    ]
    lines.append(f"SAMformer at or below its published test MSE: {sum(reached)} of {len(reached)} cells")
    tables = [arms for *_, arms in cells]
    rivals = [name for name in ARMS if name != SAMFORMER]
    models = [name for name in rivals if name != "adam"]
    lines.append(f"below all of {', '.join(rivals)}: {beaten(tables, rivals)}")
    run = [(arms, names) for arms in tables if (names := [name for name in rivals if name in arms])]
    below = sum(beats(arms, names) for arms, names in run)
    lines.append(f"below those of them that have been run: {below} of {len(run)} cells")
    lines.append(f"below all that are other models ({', '.join(models)}): {beaten(tables, models)}")
    lines.append(f"below all variants of its own ({', '.join(NEEDED)}): {beaten(tables, list(NEEDED))}")
    both = [(data, HORIZONS.index(horizon), arms) for data, horizon, arms in cells if MIXER in arms]
    if both:
        ours = gain((mean(errors(arms, SAMFORMER)), mean(errors(arms, MIXER))) for *_, arms in both)
        theirs = gain((PUBLISHED[data][SAMFORMER][place], PUBLISHED[data][MIXER][place]) for data, place, _ in both)
        lines.append(
            f"improvement over TSMixer: {100 * ours:.2f} %; published: {100 * theirs:.2f} % on the same {len(both)} "
            "cells, 14.33 % on the 32 of eight data sets (electricity and traffic are not among ours)"
        )
        pairs = [(parameters(arms[MIXER]), parameters(arms[SAMFORMER])) for *_, arms in both]
        if sizes := [mixer / own for mixer, own in pairs if mixer and own]:
            lines.append(
                f"parameters, TSMixer over SAMformer, attention included: {statistics.fmean(sizes):.1f} (published: "
                "about 4); TSMixer's width and depth, 64 and 2, are our choice, so this ratio is, too"
            )
    return lines


def draw(found: Mapping[str, Mapping[int, Arms]]) -> Any:
    """A panel for each data set: test MSE over that of SAMformer, by horizon, every seed a dot."""
    title = ["test MSE over SAMformer's"]
    figure, grid = pictures.panels(title, list(found), width=2.6, height=2.6, sharey=False)
    colours = dict(zip(DRAWN, _COLOURS, strict=True))
    names = [name for name in DRAWN if any(name in arms for each in found.values() for arms in each.values())]
    entries = {}
    for ax, (data, cells) in zip(grid[0], found.items(), strict=True):
        for index, name in enumerate(names):
            line = _relative(ax, cells, name, colours[name], 0.08 * (index - len(names) / 2))
            if line is not None:
                entries[name] = line
        published = {horizon: PUBLISHED[data][SAMFORMER][HORIZONS.index(horizon)] for horizon in cells}
        entries["published SAMformer"] = _marks(ax, cells, published, "black")
        bottom, top = ax.get_ylim()  # a last value above all that is trained would leave no room for it
        naive = measure.read(f"forecasting_{data}").get("naive", {})
        known = {int(horizon): each["last value"]["mse"] for horizon, each in naive.items()}
        last = _marks(ax, cells, known, "#d39a00")
        entries["last value (beyond the panel where it is not seen)"] = last
        ax.set_ylim(min([bottom, *(0.98 * value for value in last.get_ydata())]), top)
        ax.set_xlim(-0.5, len(HORIZONS) - 0.5)
        ax.set_xticks(range(len(HORIZONS)), list(map(str, HORIZONS)))
        ax.set_xlabel("horizon", fontsize=7.5)
    pictures.legend(figure, entries)
    return pictures.save(figure, "forecasting")


def _marks(ax: Any, cells: Mapping[int, Arms], errors_of: Mapping[int, float], colour: str) -> Any:
    """A dash at each horizon, for what has no seeds."""
    known = [horizon for horizon in cells if horizon in errors_of]
    values = [errors_of[horizon] / mean(errors(cells[horizon], SAMFORMER)) for horizon in known]
    (line,) = ax.plot([HORIZONS.index(horizon) for horizon in known], values, "_", color=colour, markersize=16)
    return line


def _relative(ax: Any, cells: Mapping[int, Arms], name: str, colour: str, shift: float) -> Any:
    line = None
    for horizon, arms in cells.items():
        if name in arms and SAMFORMER in arms:
            base = mean(errors(arms, SAMFORMER))
            values: Sequence[float] = [value / base for value in errors(arms, name).values()]
            places = [HORIZONS.index(horizon) + shift] * len(values)
            (line,) = ax.plot(places, values, "o", color=colour, markersize=3, alpha=0.6)
    return line
