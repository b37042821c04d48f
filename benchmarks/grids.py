"""What benchmarks that train whole grids share: their options, and a line for every run that ends."""

import argparse
from collections.abc import Callable
from pathlib import Path

from trimtab.train.compare import Failure
from trimtab.train.hardware import Hardware
from trimtab.train.progress import Progress, Result


def options(doc: str | None, seeds: int | None = 5, *, gpu: bool = False) -> argparse.ArgumentParser:
    """A parser with the options of every grid: --folder, --seeds, --jobs, --quick, and --gpu where sizes are there."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the runs are kept; runs/<name of the results> by default")
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--jobs", type=int, help="runs at a time; the number of cores or GPUs by default")
    parser.add_argument("--quick", action="store_true", help="does it run? results/<name>_quick")
    parser.set_defaults(gpu=False)
    if gpu:
        parser.add_argument("--gpu", action="store_true", help="larger models and longer runs; results/<name>_gpu")
    return parser


def place(name: str, arguments: argparse.Namespace) -> tuple[str, Path]:
    """The name of the results, and the folder of the runs."""
    name += "_gpu" * arguments.gpu + "_quick" * arguments.quick
    return name, arguments.folder or Path("runs") / name


def hardware(arguments: argparse.Namespace) -> Hardware:
    """Where the runs train: with --gpu on a GPU if there is one, else on the CPU."""
    return Hardware(accelerator="auto" if arguments.gpu else "cpu")


def teller(total: int, title: str = "") -> Callable[[str, Progress | Result | Failure], None]:
    """For `on_news`: print a line when a run has ended, the first time it is heard of."""
    ended: set[str] = set()

    def tell(run: str, news: Progress | Result | Failure) -> None:
        if isinstance(news, Progress):
            return
        ended.add(run)
        how = f"failed: {news.error}" if isinstance(news, Failure) else f"{news.status} {news.metrics} {news.test}"
        print(f"{len(ended):4}/{total} {title} {run}: {how}".replace("  ", " "), flush=True)

    return tell
