import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from trimtab.cli import main
from trimtab.demo import demo, demo_recipes
from trimtab.errors import RunFolderError, TrimtabError
from trimtab.models import ViTConfig
from trimtab.tasks.images import ImagesRecipe

pytestmark = pytest.mark.usefixtures("fork_server")


def small() -> dict[str, ImagesRecipe]:
    """The demo's two arms at one learning rate, of another model, for a few steps."""
    recipes = {}
    for name in ("none-lr0.03-seed0", "sigma-lr0.03-seed0"):
        recipe = demo_recipes()[name]
        model = ViTConfig(8, 4, 1, 10, dim=16, depth=1, num_heads=2, norm=recipe.model.norm, init="xavier")
        recipes[name] = replace(recipe, model=model, steps=4, watch_every=2, eval_every=2)
    return recipes


def log(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "steps.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def test_the_runs_are_the_ones_the_page_tells_of() -> None:
    recipes = demo_recipes()
    for stabilizer, norm in (("none", "pre"), ("sigma:gamma_init=one", "none")):
        arm = [recipe for recipe in recipes.values() if recipe.stabilizer == stabilizer]
        assert sorted((recipe.lr, recipe.seed) for recipe in arm) == [
            (1e-3, 0),
            (1e-2, 0),
            (3e-2, 0),
            (3e-2, 1),
            (3e-2, 2),
        ]
        for recipe in arm:
            assert recipe.model.norm == norm
            assert (recipe.warmup_steps, recipe.clip, recipe.weight_decay) == (0, None, 0)
            assert (recipe.optimizer, recipe.schedule) == ("adamw", "constant")
            assert (recipe.steps, recipe.batch_size, recipe.data) == (200, 64, "digits")


def test_it_trains_shows_and_writes_and_again_with_the_same_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    out = io.StringIO()
    path = demo(folder, console=Console(file=out, width=200), recipes=small())
    assert path == folder / "demo.html"
    assert path.read_text(encoding="utf-8").count("<figcaption>") == 3
    shown = out.getvalue()
    assert "run pre-LN, LR 0.03, seed 0, step 4/4" in shown
    assert "run σ-Reparam, LR 0.03, seed 0, step 4/4" in shown
    assert str(path.resolve()) in shown

    first = {name: log(folder / name) for name in small()}
    (folder / "mine.txt").write_text("stays")
    screen = io.StringIO()
    demo(folder, console=Console(file=screen, width=120, force_terminal=True), recipes=small())
    assert {name: log(folder / name) for name in small()} == first
    assert (folder / "mine.txt").read_text() == "stays"
    for column in ("LR", "seed", "loss", "accuracy", "lowest entropy", "alarms"):
        assert column in screen.getvalue()


def test_a_folder_of_something_else_is_refused_untouched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    assert main(["demo", "--folder", str(tmp_path)]) == 2
    assert "holds no earlier demo" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(RunFolderError, match="is a file"):
        demo(tmp_path / "thesis.tex", recipes=small())


def test_a_marker_cannot_make_it_delete_elsewhere(tmp_path: Path) -> None:
    from trimtab.demo import _clear

    outside = tmp_path / "outside"
    outside.mkdir()
    folder = tmp_path / "demo"
    folder.mkdir()
    (folder / "demo.json").write_text(json.dumps({"runs": ["../outside", str(outside), ".", ".."]}))
    (folder / "mine.txt").write_text("stays")
    _clear(folder, [])
    assert outside.is_dir()
    assert (folder / "mine.txt").is_file()
    (folder / "demo.json").write_text("[")
    with pytest.raises(RunFolderError, match="is damaged; remove"):
        _clear(folder, [])


def test_an_error_in_a_worker_ends_the_demo(tmp_path: Path) -> None:
    # Each its own: what all arms say alike is refused before any worker starts.
    recipes = {name: replace(recipe, batch_size=2000 + i) for i, (name, recipe) in enumerate(small().items())}
    with pytest.raises(TrimtabError, match=r"failed: batch_size 200\d is larger"):
        demo(tmp_path / "demo", console=Console(file=io.StringIO()), recipes=recipes)


@pytest.mark.skipif(os.name == "nt", reason="signals of a terminal")
def test_ctrl_c_ends_it_cleanly(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab.cli", "demo", "--folder", str(tmp_path / "demo")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob("demo/*/steps.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the workers get it too
    _, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert err.splitlines() == [
        "stopping: the runs under way save first; Ctrl-C again ends them at once",
        "stopped; what was written until now is kept",
    ]
