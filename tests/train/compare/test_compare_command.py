"""`trimtab compare`, as a person sees it; here a stand-in trains in the place of the workers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trimtab.cli import main
from trimtab.errors import RunFolderError
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.recipes import find_recipe
from trimtab.train.compare import Failure
from trimtab.train.compare.grid import RunPlace, plan
from trimtab.train.hardware import Hardware
from trimtab.train.progress import Progress, Result

GRID = ["--stabilizers", "none,sigma+clip", "--lrs", "1e-3:1e-1:3", "--seeds", "2"]
News = Progress | Result | Failure


def result(folder: Path, accuracy: float = 0.9, **changes: Any) -> Result:
    ended = Result(folder, "finished", 200, 0.25, 12.0, 0.01, 3000.0, 1e5, 10**9, metric="accuracy")
    return replace(ended, metrics={"accuracy": accuracy}, **changes)


@dataclass
class Workers:
    """Take the place of `compare`: note what they are asked for, and tell of every run what `fate` says."""

    fate: Callable[[RunPlace], News] = lambda place: result(place.folder)
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(
        self,
        arms: Mapping[str, Recipe],
        lrs: Sequence[float],
        seeds: Sequence[int],
        folder: Path,
        on_news: Callable[[str, News], None],
        **options: Any,
    ) -> None:
        self.calls.append({"arms": dict(arms), "lrs": lrs, "seeds": seeds, "folder": folder, **options})
        for place in plan(arms, lrs, seeds, folder):
            on_news(place.name, Progress(20, 200, 0.5, 1e-3, {}, None, None, (), 1.0, 100.0))
            on_news(place.name, self.fate(place))


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Workers:
    workers = Workers()
    monkeypatch.setattr("trimtab.train.compare.command.compare", workers)
    monkeypatch.setattr("trimtab.report.compare_page.write_compare_page", _write_page)
    monkeypatch.chdir(tmp_path)
    return workers


def _write_page(paths: Sequence[Path], out: Path) -> object:
    return SimpleNamespace(path=out, summary=f"the summary of {paths[0]}")


def test_the_words_make_the_grid(workers: Workers) -> None:
    words = "--steps 50 --jobs 2 --ray auto --folder here --accelerator cpu --model.depth 1"
    assert main(["compare", "vit-digits", *GRID, *words.split()]) == 0
    (call,) = workers.calls
    plain: Any = find_recipe("vit-digits")
    recipe = replace(plain, steps=50, model=replace(plain.model, depth=1))
    assert call == {
        "arms": {name: replace(recipe, stabilizer=name) for name in ("none", "sigma+clip")},
        "lrs": (1e-3, 1e-2, 1e-1),
        "seeds": (0, 1),
        "folder": Path("here"),
        "jobs": 2,
        "ray_address": "auto",
        "hardware": Hardware("cpu"),
        "facts": {"recipe_name": "vit-digits"},
    }


def test_it_says_what_it_does_and_what_came_out(workers: Workers, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "vit-digits", *GRID, "--jobs", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "12 runs of 200 steps: 2 stabilizers × 3 learning rates × 2 seeds, 2 at a time, into runs/compare-vit-digits"
    )
    assert lines[1].startswith("1/12  none lr0.001 seed0: finished, accuracy 0.900, 12 s  about ")
    assert lines[12] == "12/12  sigma+clip lr0.1 seed1: finished, accuracy 0.900, 12 s"
    assert lines[13:] == [
        "",
        "the summary of runs/compare-vit-digits",
        "",
        "report: runs/compare-vit-digits/report.html",
    ]


def test_a_diverged_run_is_a_result_and_a_failed_one_is_not(
    workers: Workers, capsys: pytest.CaptureFixture[str]
) -> None:
    def fate(place: RunPlace) -> News:
        if place.recipe.lr == 0.1:
            return result(place.folder, status="diverged")
        return result(place.folder)

    workers.fate = fate
    assert main(["compare", "vit-digits", *GRID]) == 0
    assert "sigma+clip lr0.1 seed1: diverged" in capsys.readouterr().out

    def broken(place: RunPlace) -> News:
        return Failure(place.folder, "ValueError", "no such thing") if "lr0.01 seed1" in place.name else fate(place)

    workers.fate = broken
    assert main(["compare", "vit-digits", *GRID, "--no-report"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-2:] == [
        f"failed: {arm} lr0.01 seed1: ValueError: no such thing "
        f"(run folder: runs/compare-vit-digits/runs/{arm}/lr0.01-seed1)"
        for arm in ("none", "sigma+clip")
    ]


def test_runs_that_were_there_are_not_told_again(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def done_before(place: RunPlace) -> bool:
        return place.recipe.seed == 0

    monkeypatch.setattr("trimtab.train.compare.command.finished", done_before)
    assert main(["compare", "vit-digits", *GRID, "--no-report"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "6 of them were done before"
    assert len(lines) == 8
    assert lines[2].startswith("7/12  none lr0.001 seed1: ")


def test_ctrl_c_says_how_to_go_on(workers: Workers, capsys: pytest.CaptureFixture[str]) -> None:
    def fate(place: RunPlace) -> News:
        if place.recipe.seed == 1:
            raise KeyboardInterrupt
        return result(place.folder)

    workers.fate = fate
    assert main(["compare", "vit-digits", *GRID]) == 130
    assert capsys.readouterr().out.splitlines()[-1] == (
        "stopped; 6 of 12 runs are done, and those under way were saved. The same command goes on: "
        f"trimtab compare vit-digits {' '.join(GRID)}"
    )


def test_the_runs_are_worth_more_than_their_page(
    workers: Workers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def write(paths: object, out: object) -> None:
        raise RunFolderError("nothing could be read")

    monkeypatch.setattr("trimtab.report.compare_page.write_compare_page", write)
    assert main(["compare", "vit-digits", *GRID]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "there is no report: nothing could be read"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "trimtab compare vit-digits needs --stabilizers and --lrs"),
        ("--stabilizers none --lrs x", "learning rates are a list"),
        ("--stabilizers none --lrs -1", "a learning rate must be a positive number"),
        ("--stabilizers none --lrs ,", "a compare needs at least one learning rate"),
        ("--stabilizers none --lrs 1e-3 --seeds 0", "a compare needs at least one seed"),
        ("--stabilizers none,none --lrs 1e-3", "stabilizer none is there twice"),
        ("--stabilizers none,sgima --lrs 1e-3", "sigma"),
        ("--stabilizers none --lrs 1e-3 --lr 3", "--lr is what a compare varies: use --lrs"),
        ("--stabilizers none --lrs 1e-3 --seed=3", "--seed is what a compare varies: use --seeds"),
        ("--stabilizers none --lrs 1e-3 --stabilizer none", "use --stabilizers"),
        ("--stabilizers none --lrs 1e-3 --stepps 3", "unknown field --stepps. Did you mean --steps?"),
        ("--stabilizers none --lrs 1e-3 --jobs 0", "--jobs must be at least 1, got 0"),
        ("--stabilizers none --lrs 1e-3 --batch-tokens 9 --batch-size 8", "--batch-size has no effect beside"),
        ("--stabilizers none --lrs 1e-3 --jobs two", "--jobs must be a whole number or None; got 'two'"),
    ],
)
def test_an_error_is_one_line_and_nothing_is_trained(
    words: str, message: str, workers: Workers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "vit-digits", *words.split()]) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert workers.calls == []
    assert list(tmp_path.iterdir()) == []


def test_data_that_are_missing_are_told_once_and_nothing_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", "gpt-shakespeare", "--data", "nowhere.txt", *GRID]) == 2
    assert capsys.readouterr().err.startswith("error: there is no text 'nowhere.txt'. Expected tinyshakespeare")
    assert list(tmp_path.iterdir()) == []


def test_help_tells_the_options_and_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "vit-digits", "--help"]) == 0
    out = capsys.readouterr().out
    for part in ("--stabilizers STR", "--lrs STR", "--no-report", "--steps INT", "--model.depth INT"):
        assert part in out, part
    assert main(["compare"]) == 0
    out = capsys.readouterr().out
    assert "trimtab compare vit-digits --stabilizers none,sigma+qk-norm --lrs 1e-3:1e-1:5" in out
    assert "spectral-norm," in out
    assert max(map(len, out.splitlines())) <= 80
