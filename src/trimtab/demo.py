"""The demo: one small Transformer, plain and steadied, on real digits, and a page that tells what happened.

A small compare: ten runs of 200 steps, in two processes of one thread each, so that the numbers are the same on every
run of the same machine.
"""

import json
import shutil
import time
import webbrowser
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from trimtab.errors import RunFolderError, TrimtabError
from trimtab.report.demo_arms import ARMS, STEADIED
from trimtab.report.demo_page import write_demo_page
from trimtab.tasks.images import ImagesRecipe, vit_digits
from trimtab.train.compare.grid import RunPlace
from trimtab.train.compare.running import Failure, run_places
from trimtab.train.hardware import Hardware
from trimtab.train.live_view import LiveView
from trimtab.train.progress import Progress, Result

MARKER = "demo.json"
PAGE = "demo.html"

_SEEDS = {1e-3: (0,), 1e-2: (0,), 3e-2: (0, 1, 2)}  # learning rate to seeds
_WORKERS = 2


def demo_recipes() -> dict[str, ImagesRecipe]:
    """The demo's runs: folder name to recipe, in the order in which they train.

    Both arms share optimiser, data, seeds and position embedding. The weights' start is each arm's own: for the
    baseline Glorot's, at its best learning rate the most accurate plain one found; N(0, 0.4²) for sigma-Reparam with
    gamma 1, where the weights' scale sets only how fast they turn.
    """
    baseline = replace(vit_digits(), watch_every=10, eval_every=20)
    model = replace(baseline.model, norm="none", init="normal", init_std=0.4)
    steadied = replace(baseline, model=model, stabilizer=STEADIED.stabilizer)
    recipes = {}
    for lr in sorted(_SEEDS, reverse=True):  # the story first
        for seed in _SEEDS[lr]:
            for arm, recipe in (("none", baseline), ("sigma", steadied)):
                recipes[f"{arm}-lr{lr:g}-seed{seed}"] = replace(recipe, lr=lr, seed=seed)
    return recipes


def demo(
    folder: str | Path = "runs/demo",
    open_page: bool = False,
    console: Console | None = None,
    recipes: dict[str, ImagesRecipe] | None = None,
) -> Path:
    """Train the demo's runs, show them live, and write their page.

    Args:
        folder: where the runs and the page go. An earlier demo there is replaced.
        open_page: open the page in a browser at the end.
        console: where the live table goes; the terminal by default. Not a terminal: plain lines.
        recipes: other runs than `demo_recipes()`, folder name to recipe; both arms must be among them.

    Returns:
        The path of the HTML page.

    Raises:
        RunFolderError: the folder holds something else than a demo.
        TrimtabError: a run failed; the others are stopped.
    """
    folder = Path(folder)
    console = console or Console()
    recipes = demo_recipes() if recipes is None else recipes
    _clear(folder, list(recipes))
    start = time.perf_counter()
    places = [RunPlace(name, recipe.stabilizer, recipe, folder / name) for name, recipe in recipes.items()]
    arms = " against ".join(arm.name for arm in ARMS)
    console.print(f"A small ViT on handwritten digits: {arms}, {len(recipes)} runs.\n")
    with _Screen(recipes, console) as screen:
        run_places(places, jobs=_WORKERS, threads=1, on_news=screen.hear, hardware=Hardware(accelerator="cpu"))
    path = folder / PAGE
    write_demo_page([folder / name for name in recipes], path)
    console.print(
        f"\n{len(recipes)} runs in {time.perf_counter() - start:.0f} s. The whole story, to open in a browser:"
    )
    console.print(str(path.resolve()), style="bold", soft_wrap=True)
    if open_page:
        webbrowser.open(path.resolve().as_uri())
    return path


def _clear(folder: Path, names: Sequence[str]) -> None:
    """Make the folder ready: remove an earlier demo's own files, refuse anything else."""
    marker = folder / MARKER
    if folder.exists() and not folder.is_dir():
        raise RunFolderError(f"{folder} is a file; the demo needs a folder: choose another with --folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not marker.is_file():
            raise RunFolderError(f"{folder} is not empty and holds no earlier demo; choose another with --folder")
        try:
            runs = set(json.loads(marker.read_text(encoding="utf-8"))["runs"])
        except (ValueError, TypeError, KeyError):
            raise RunFolderError(f"{marker} is damaged; remove {folder}, or choose another with --folder") from None
        for entry in folder.iterdir():  # only what lies in the folder itself, whatever the marker says
            if entry.name in runs and entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
        (folder / PAGE).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    marker.write_text(json.dumps({"runs": list(names)}) + "\n", encoding="utf-8")


class _Screen(LiveView):
    """The live table in a terminal; elsewhere a line for each run that ends."""

    def __init__(self, recipes: dict[str, ImagesRecipe], console: Console) -> None:
        super().__init__(console)
        self.recipes = recipes
        self.progress: dict[str, Progress] = {}
        self.results: dict[str, Result] = {}

    def hear(self, name: str, news: Progress | Result | Failure) -> None:
        """Take note of how a run goes."""
        if isinstance(news, Failure):
            raise TrimtabError(f"the run {name} failed: {news.error}")
        if isinstance(news, Progress):
            self.progress[name] = news
            return
        self.results[name] = news
        if not self._console.is_interactive:
            titled = zip(_COLUMNS, self.row(name), strict=True)
            line = ", ".join(f"{column} {cell}".strip() for column, cell in titled)
            self._console.print(line, soft_wrap=True, highlight=False)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Every run on a line."""
        table = Table(box=None, header_style="dim", pad_edge=False)
        for index, column in enumerate(_COLUMNS):
            table.add_column(column, justify="right" if index else "left", no_wrap=True)
        for name in self.recipes:
            row = self.row(name)
            table.add_row(*row, style="" if name in self.progress else "dim")
        yield table

    def row(self, name: str) -> list[str]:
        """What is known of a run, a cell for each column."""
        recipe, now, result = self.recipes[name], self.progress.get(name), self.results.get(name)
        arm = next(arm for arm in ARMS if arm.stabilizer == recipe.stabilizer)
        cells = [arm.short, f"{recipe.lr:g}", str(recipe.seed)]
        if now is None:
            return [*cells, "waits", "", "", "", ""]
        accuracy = (result or now).metrics.get("accuracy")
        return [
            *cells,
            result.status if result and result.status != "finished" else f"{now.step}/{now.steps}",
            f"{now.loss:.3f}",
            "" if accuracy is None else f"{accuracy:.3f}",
            "" if now.entropy_min is None else f"{now.entropy_min:.3f}",
            str(len(now.alarms) or "–"),
        ]


_COLUMNS = ("run", "LR", "seed", "step", "loss", "accuracy", "lowest entropy", "alarms")
