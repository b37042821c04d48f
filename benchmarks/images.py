"""A Vision Transformer with nothing: sigma-Reparam without LayerNorm, warmup, weight decay or an adaptive optimiser.

    python benchmarks/images.py fashion              # hours on 2 cores; killed, the same command goes on where it was
    python benchmarks/images.py cifar10
    python benchmarks/images.py fashion --arms nothing --seeds 20    # this one and the baseline: a narrower interval
    python benchmarks/images.py fashion --quick      # every arm, one setting, one seed, 20 steps: does it run?
    python benchmarks/images.py cifar10 --gpu        # a larger model and budget: results/images_cifar10_gpu

It is held against the tuned design that has them all, and against what could explain it away. All arms have the same
sizes, examples, budget and cosine schedule, from Glorot's start:

  baseline        pre-LN, AdamW, warmup, weight decay
  nothing         sigma-Reparam, no LayerNorm, warmup or decay, LARS
  nothing-sgd     the same with SGD and momentum, gamma = 1
  sigma-preln     sigma-Reparam in the baseline
  init-scale      the control: as `nothing`, but weights merely start at W / sigma(W), without reparametrisation
  plain           as `nothing`, without sigma-Reparam: no LayerNorm, LARS
  spectral-norm   as `nothing`, with spectral normalisation, which has no gamma
  weight-norm     as `nothing`, with weight normalisation

Each arm is tuned over twelve settings (all of them are in the results), each trained once with the whole budget, and
judged by 5,000 training images that nobody trains on. The best setting then runs with new seeds. Only these
runs are tested.

Prints test accuracies and each arm's difference from the baseline, paired by seed, with the 95 % interval of Student's
t. Writes results/images_<data>.json (with some arms only, images_<data>_<arms>.json) with every run, and a picture.
"""

import statistics
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grids
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import measure

from trimtab.models.vit import ViTConfig
from trimtab.report.runlog import read_run
from trimtab.tasks.images import ImagesRecipe
from trimtab.train.compare.grid import RunPlace
from trimtab.train.compare.running import finished, run_places

Setting = Mapping[str, Any]
TUNING_SEED = 0
CHANCE = 0.1

# Of LARS, `lr` is that of gammas and biases; in a step the weights move by `lr` times the trust coefficient of their
# norms, before momentum: this share is the first number here.
LARS = [
    {"optimizer": "lars", "lr": lr, "trust_coefficient": round(share / lr, 3)}
    for share in (0.002, 0.004, 0.008)
    for lr in (0.0003, 0.00125, 0.005, 0.02)
]
SIGMA_SGD = [
    {"optimizer": "sgd", "lr": lr, "stabilizer": f"sigma:gamma_init=one:init_std={std}"}
    for lr in (0.05, 0.1, 0.2, 0.4)
    for std in (0.1, 0.2, 0.4)
]
ADAMW = [
    {"optimizer": "adamw", "lr": lr, "weight_decay": decay, "warmup_steps": 100}
    for lr in (1e-3, 3e-3, 6e-3, 1.2e-2)
    for decay in (0.05, 0.3, 1.0)
]
# Name: where the LayerNorms are, the stabilizer, the settings to be tuned over.
ARMS: dict[str, tuple[str, str, list[dict[str, Any]]]] = {
    "baseline": ("pre", "none", ADAMW),
    "nothing": ("none", "sigma", LARS),
    "plain": ("none", "none", LARS),
    "spectral-norm": ("none", "spectral-norm", LARS),
    "weight-norm": ("none", "weight-norm", LARS),
    "init-scale": ("none", "init-scale", LARS),
    "sigma-preln": ("pre", "sigma", ADAMW),
    "nothing-sgd": ("none", "sigma", SIGMA_SGD),
}


def recipe(data: str, gpu: bool, quick: bool) -> ImagesRecipe:
    """What all arms share."""
    side, channels = {"fashion": (28, 1), "cifar10": (32, 3)}[data]
    sizes = {"dim": 192, "depth": 9, "num_heads": 3} if gpu else {"dim": 64, "depth": 4, "num_heads": 4}
    patch = 4 if gpu else side // 4  # 16 tokens on a CPU
    steps = 20 if quick else 20_000 if gpu else 1_000
    return ImagesRecipe(
        data={"fashion": "fashion-mnist", "cifar10": "cifar10-jpeg"}[data],
        model=ViTConfig(
            image_size=side,
            patch_size=patch,
            in_channels=channels,
            num_classes=10,
            init="xavier",
            position_std=0.5,
            **sizes,
        ),
        validation=5_000,
        schedule="cosine",
        batch_size=128,
        steps=steps,
        watch_every=steps // 10,
        eval_every=steps,
        checkpoint_every=steps,
        keep=1,
    )


def planned(folder: Path, arm: str, shared: ImagesRecipe, setting: Setting, seed: int, stage: str) -> RunPlace:
    norm, stabilizer, _ = ARMS[arm]
    made = replace(shared, model=replace(shared.model, norm=norm), stabilizer=stabilizer, seed=seed)
    name = f"{arm} {words(setting)} seed{seed}"
    place = folder / stage / arm / words(setting).replace(" ", "_") / f"seed{seed}"
    return RunPlace(name, arm, replace(made, **setting), place)


def words(setting: Setting) -> str:
    """A setting in a line: lr=0.1 trust_coefficient=0.02."""
    return " ".join(f"{key}={value}" for key, value in setting.items() if key != "optimizer")


def score(place: RunPlace) -> float:
    """The accuracy on the validation images; of a run that failed, below all others."""
    result = finished(place)
    return result.metrics.get("accuracy", -1.0) if result and result.status == "finished" else -1.0


def tuned(folder: Path, arms: Sequence[str], shared: ImagesRecipe, options: Namespace) -> dict[str, Setting]:
    """The best setting of each arm; the first of several that are equal."""
    settings = {arm: ARMS[arm][2][: 1 if options.quick else None] for arm in arms}
    places = {
        arm: [planned(folder, arm, shared, setting, TUNING_SEED, "tuning") for setting in settings[arm]] for arm in arms
    }
    run([place for arm in arms for place in places[arm]], options)
    best = {}
    for arm in arms:
        scores = [score(place) for place in places[arm]]
        best[arm] = settings[arm][scores.index(max(scores))]
    return best


def run(places: Sequence[RunPlace], options: Namespace) -> None:
    run_places(places, jobs=options.jobs, on_news=grids.teller(len(places)), hardware=grids.hardware(options))


def row(place: RunPlace, stage: str) -> dict[str, Any]:
    """How a run ended, and the extremes of its heads."""
    result = finished(place)
    facts = {"arm": place.arm, "stage": stage, "seed": place.recipe.seed, "stabilizer": place.recipe.stabilizer}
    if result is None:
        return facts | {"status": "failed"}
    log = read_run(place.folder)
    low, high = log.column("entropy_min"), log.column("max_logit")
    return facts | {
        "status": result.status,
        "steps": result.steps,
        "train_loss": result.loss,
        "validation_accuracy": result.metrics.get("accuracy"),
        "test_accuracy": result.test.get("accuracy") if stage == "test" else None,
        "entropy_min": min((value for value in low if value == value), default=None),
        "max_logit": max((value for value in high if value == value), default=None),
        "samples_per_second": result.samples_per_second,
    }


def accuracies(runs: Mapping[str, dict[str, Any]], arm: str) -> dict[int, float]:
    """Test accuracy of each seed; a run that diverged guesses."""
    chosen = (each for each in runs.values() if each["arm"] == arm and each["stage"] == "test")
    return {each["seed"]: each["test_accuracy"] if each["status"] == "finished" else CHANCE for each in chosen}


def compared(runs: Mapping[str, dict[str, Any]], arms: Sequence[str], best: Mapping[str, Setting]) -> dict[str, Any]:
    """For each arm its accuracies and its differences from the baseline in points."""
    base = accuracies(runs, "baseline")
    table = {}
    for arm in arms:
        own = accuracies(runs, arm)
        points = [100 * (own[seed] - base[seed]) for seed in own if seed in base]
        mean, low, high = measure.t_interval(points)
        table[arm] = {
            "setting": best[arm],
            "test_accuracy": [own[seed] for seed in sorted(own)],
            "median": statistics.median(own.values()),
            "points_over_baseline": mean,
            "interval": [low, high],
            "diverged": sum(value == CHANCE for value in own.values()),
            "settings_failed": sum(
                each["arm"] == arm and each["stage"] == "tuning" and each["status"] != "finished"
                for each in runs.values()
            ),
        }
    return table


def show(table: Mapping[str, dict[str, Any]], title: str) -> None:
    print(f"\n{title}: test accuracy, median (lowest-highest) of the seeds; points over the baseline, 95 % interval")
    for arm, found in table.items():
        values = [100 * value for value in found["test_accuracy"]]
        low, high = found["interval"]
        print(
            f"{arm:15}{statistics.median(values):7.2f} ({min(values):.2f}-{max(values):.2f})"
            f"{found['points_over_baseline']:9.2f} ({low:+.2f} to {high:+.2f})"
            f"  settings that failed: {found['settings_failed']}  {words(found['setting'])}"
        )


def picture(table: Mapping[str, dict[str, Any]], title: str, path: Path) -> None:
    """Differences from the baseline with their intervals, and every seed as a dot."""
    base = table["baseline"]["test_accuracy"]
    others = [arm for arm in table if arm != "baseline"]
    figure, axes = plt.subplots(figsize=(8, 0.55 * len(others) + 1.6), layout="constrained")
    for y, arm in enumerate(reversed(others)):
        found = table[arm]
        points = [100 * (own - its) for own, its in zip(found["test_accuracy"], base, strict=False)]
        low, high = found["interval"]
        axes.plot([low, high], [y, y], color="#1f6f8b", linewidth=2, solid_capstyle="butt")
        axes.plot(points, [y] * len(points), "o", color="#1f6f8b", alpha=0.35, markersize=5)
        axes.plot(found["points_over_baseline"], y, "|", color="#12343b", markersize=16, markeredgewidth=2.5)
    axes.axvline(0, color="#999999", linewidth=1)
    axes.axvline(-0.5, color="#c0392b", linewidth=1, linestyle="--")
    axes.set_yticks(range(len(others)), list(reversed(others)))
    axes.set_xscale("symlog", linthresh=2)  # an arm that fails lies far out
    low, high = axes.get_xlim()
    ticks = [tick for tick in (-50, -20, -10, -5, -2, -1, -0.5, 0, 0.5, 1, 2, 5) if low <= tick <= high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel("points of test accuracy over the tuned baseline, paired by seed (dashed: −0.5)")
    axes.set_title(title, loc="left", fontsize=10)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = grids.options(__doc__, gpu=True)
    parser.add_argument("data", choices=["fashion", "cifar10"])
    parser.add_argument("--arms", help="with the baseline: names joined by commas; all by default")
    arguments = parser.parse_args()
    name, folder = grids.place(f"images_{arguments.data}", arguments)
    wanted = arguments.arms.split(",") if arguments.arms else list(ARMS)
    if arguments.arms:
        name = "_".join([name, *wanted])
    if unknown := sorted(set(wanted) - set(ARMS)):
        parser.error(f"unknown arm {unknown[0]}; there are: {', '.join(ARMS)}")
    arms = [arm for arm in ARMS if arm in wanted or arm == "baseline"]
    shared = recipe(arguments.data, arguments.gpu, arguments.quick)

    best = tuned(folder, arms, shared, arguments)
    seeds = range(1, 2 if arguments.quick else arguments.seeds + 1)
    # seed by seed, so that what is there after a while is a fair table too
    tests = [planned(folder, arm, shared, best[arm], seed, "test") for seed in seeds for arm in arms]
    run(tests, arguments)

    quick = arguments.quick
    tunings = [
        planned(folder, arm, shared, setting, TUNING_SEED, "tuning")
        for arm in arms
        for setting in ARMS[arm][2][: 1 if quick else None]
    ]
    runs = {place.name: row(place, "tuning") for place in tunings} | {place.name: row(place, "test") for place in tests}
    table = compared(runs, arms, best)
    sets = {"fashion": "Fashion-MNIST", "cifar10": "CIFAR-10 (JPEG copy)"}
    steps, size = shared.steps, shared.batch_size
    sizes = f"ViT of {shared.model.depth} blocks and {shared.model.dim} features"
    title = f"{sets[arguments.data]}, {sizes}, {steps:,} steps of {size}"
    show(table, title)
    settings = {arm: ARMS[arm][2] for arm in arms}
    path = measure.write(name, {"title": title, "settings_tried": settings, "table": table, "runs": runs})
    picture(table, title, path.with_suffix(".png"))
    print(f"\nwritten to {path} and {path.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
