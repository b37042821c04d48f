"""`trimtab train` and `trimtab recipes`, as a person sees them; here a stand-in trains in the place of the engine."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

import trimtab
from trimtab.cli import main
from trimtab.errors import RunFolderError
from trimtab.tasks.recipe import Recipe
from trimtab.tasks.recipes import RECIPES, find_recipe
from trimtab.train.hardware import Hardware
from trimtab.train.progress import Progress, Result
from trimtab.train.train_command import _signatures

RESULT = Result(Path(), "finished", 200, 0.25, 12.0, 0.01, 3000.4, 250_000.0, 10**9, metric="accuracy")
SCORES = {"accuracy": 0.975, "eval_loss": 0.1}


@dataclass
class Engine:
    """Takes the place of `train`: notes what it is asked for, tells of two steps, and returns `result`."""

    result: Result = RESULT
    steps: tuple[Progress, ...] = ()
    calls: list[tuple[Recipe, Path, Hardware, dict[str, Any]]] = field(default_factory=list)

    def __call__(
        self,
        recipe: Recipe,
        folder: Path,
        on_step: Callable[[Progress], None],
        *,
        hardware: Hardware,
        facts: dict[str, Any],
    ) -> Result:
        self.calls.append((recipe, folder, hardware, facts))
        for progress in self.steps:
            on_step(progress)
        return replace(self.result, folder=folder)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Engine:
    engine = Engine()
    monkeypatch.setattr("trimtab.train.train_command.train", engine)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return engine


def progress(step: int, **changes: Any) -> Progress:
    now = Progress(step, 200, 0.5, 1e-3, {}, 0.25, "blocks.0.attention head 1", (), step / 10, 3000.4)
    return replace(now, **changes)


def earlier_run(folder: Path, **changes: Any) -> Path:
    """The run.json of a run of vit-digits with lr 0.01."""
    recipe = replace(find_recipe("vit-digits"), lr=0.01)
    info = {
        "trimtab": trimtab.__version__,
        "torch": str(torch.__version__),
        "recipe_name": "vit-digits",
        "task": "ImagesRecipe",
        "recipe": asdict(recipe),
    }
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(info | changes))
    return folder / "run.json"


@pytest.mark.parametrize("words", [["recipes"], ["recipes", "--help"]])
def test_the_recipes_are_listed_with_one_line_each(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in RECIPES:
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert len(line.split()) > 5
    assert any("file.py:NAME" in line for line in lines)


@pytest.mark.parametrize("words", [["train"], ["train", "--help"], ["compare"]])
def test_the_usage_names_every_recipe(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 0
    out = capsys.readouterr().out
    assert set(RECIPES) | {"file.py:NAME"} <= set(re.split(r"[,\s]+", out))
    assert max(map(len, out.splitlines())) <= 80


def test_a_recipes_fields_are_overridden_by_name(engine: Engine) -> None:
    words = (
        "train vit-digits --lr 3e-3 --clip 1 --stabilizer sigma:gamma_init=one+qk-norm --no-watch --model.depth 2 "
        "--folder here --accelerator cpu --strategy fsdp"
    )
    assert main(words.split()) == 0
    ((recipe, folder, hardware, facts),) = engine.calls
    plain: Any = find_recipe("vit-digits")
    assert recipe == replace(
        plain,
        lr=3e-3,
        clip=1.0,
        stabilizer="sigma:gamma_init=one+qk-norm",
        watch=False,
        model=replace(plain.model, depth=2),
    )
    assert (folder, hardware, facts) == (Path("here"), Hardware("cpu", "fsdp"), {"recipe_name": "vit-digits"})


def test_a_recipe_of_ones_own(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.py").write_text(
        "from dataclasses import dataclass\n"
        "from trimtab.tasks.recipe import Recipe\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Mine(Recipe):\n"
        "    '''My own one.'''\n"
        "    width: int = 8\n"
        "    def task(self): ...\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Clash(Mine):\n"
        "    folder: str = 'x'\n"
    )
    assert main(["train", "mine.py:Mine", "--width", "3"]) == 0
    ((recipe, folder, _, facts),) = engine.calls
    assert recipe.width == 3  # type: ignore[attr-defined]
    assert (folder, facts) == (Path("runs/Mine"), {"recipe_name": "mine.py:Mine"})
    capsys.readouterr()
    assert main(["train", "mine.py:Mine", "--widht", "3"]) == 2
    assert capsys.readouterr().err == "error: unknown field --widht. Did you mean --width?\n"
    assert main(["train", "mine.py:Clash"]) == 2
    assert "the recipe's field 'folder' is an option of trimtab train: rename it" in capsys.readouterr().err


def test_help_tells_every_field_and_its_default(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "vit-digits", "--help"]) == 0
    shown = capsys.readouterr().out
    for part in ("--lr FLOAT", "0.001", "--stabilizer", "--model.depth INT", "--folder", "runs/NAME", "A small ViT"):
        assert part in shown, part
    assert "--recipe" not in shown
    assert "--options" not in shown
    assert engine.calls == []


def test_plain_lines(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    long = "step 40: large updates: what moved. " + "What to do next. " * 20
    engine.steps = (
        progress(20),
        progress(40, metrics=SCORES, alarms=(long,)),
        progress(60, metrics=SCORES, alarms=(long,), loss=float("nan"), entropy_min=None),
    )
    assert main(["train", "vit-digits"]) == 0
    assert capsys.readouterr().out.splitlines()[:4] == [
        "step 20/200  loss 0.5000  lr 0.001  lowest entropy 0.250  3,000 samples/s",  # no pace is known yet
        "step 40/200  loss 0.5000  lr 0.001  accuracy 0.9750  eval_loss 0.1000  lowest entropy 0.250  "
        "3,000 samples/s  16 s left",
        f"  alarm: {long}",
        "step 60/200  loss nan  lr 0.001  3,000 samples/s  14 s left",  # no metric and no alarm is told twice
    ]


def test_the_end_says_what_came_out_and_what_to_do_next(engine: Engine, capsys: pytest.CaptureFixture[str]) -> None:
    best = {"accuracy": 0.98, "eval_loss": 0.09}
    engine.result = replace(RESULT, metrics=SCORES, best=best, best_step=180, test={"accuracy": 0.97})
    assert main(["train", "vit-digits", "--folder", "a b"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "finished after 200 of 200 steps, 12 s, loss 0.25",
        "metrics: accuracy 0.9750, eval_loss 0.1000",
        "best accuracy, at step 180: accuracy 0.9800, eval_loss 0.0900",
        "on the test examples: accuracy 0.9700",
        "speed: 3,000 samples/s; the loader alone would make 250,000",
        "run folder: a b",
        "next: trimtab report 'a b'",
    ]


def test_a_run_that_diverged_is_a_result_and_says_what_to_try(
    engine: Engine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.result = replace(RESULT, status="diverged", steps=40, loss=float("nan"))
    assert main(["train", "vit-digits", "--lr", "0.3"]) == 0
    first, advice, *_ = capsys.readouterr().out.splitlines()
    assert first == "diverged after 40 of 200 steps, 12 s, loss nan"
    for part in ("--lr 0.1", "--warmup-steps 20", "--stabilizer sigma", "docs/stabilizers.md"):
        assert part in advice, part


def test_a_run_that_was_interrupted_says_the_command_that_goes_on(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.result = replace(RESULT, status="interrupted", steps=1234)
    (tmp_path / "a b/checkpoints/step-00001234").mkdir(parents=True)
    assert main(["train", "vit-digits", "--folder", "a b"]) == 130
    assert capsys.readouterr().out == (
        "stopped; saved at step 1,234. The same command goes on: trimtab train vit-digits --folder 'a b'\n"
    )
    engine.result = replace(RESULT, status="interrupted", steps=1250)  # and the disk was full
    assert main(["train", "vit-digits", "--folder", "a b"]) == 130
    assert capsys.readouterr().out.startswith("stopped at step 1,250; saved at step 1,234. The same command goes on: ")
    earlier_run(tmp_path / "old")
    assert main(["train", "--from", "old"]) == 130
    # the same words alone would begin another new folder
    assert capsys.readouterr().out.endswith("goes on: trimtab train --from old --folder old-again\n")


def test_the_same_command_goes_on_and_says_from_where(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("step-00000080", "step-00000100", "step-00000120.part", "best.json"):
        (tmp_path / "runs/vit-digits/checkpoints" / name).mkdir(parents=True)
    engine.steps = (progress(120), progress(140))
    assert main(["train", "vit-digits"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "continues at step 100"


def test_a_finished_run_is_said_to_be_so(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "done/checkpoints/step-00000200").mkdir(parents=True)
    (tmp_path / "done/result.json").write_text("{}")
    assert main(["train", "vit-digits", "--folder", "done"]) == 0
    first, second, *_ = capsys.readouterr().out.splitlines()
    assert first == "done holds this run, at its end; to train it anew, choose another --folder, or remove this one"
    assert second.startswith("finished after 200 of 200 steps")


def test_from_a_run_json_repeats_that_run_in_a_new_folder(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = earlier_run(tmp_path / "runs/old")
    again = replace(find_recipe("vit-digits"), lr=0.01)
    assert main(["train", "--from", "runs/old/run.json"]) == 0
    assert engine.calls[-1][:2] == (again, Path("runs/old-again"))
    assert engine.calls[-1][3] == {"recipe_name": "vit-digits"}
    (tmp_path / "runs/old-again").mkdir()
    assert main(["train", f"--from={path}", "--seed", "4"]) == 0
    assert engine.calls[-1][:2] == (replace(again, seed=4), tmp_path / "runs/old-again2")
    assert main(["train", "--from", "runs/old", "--folder", "runs/old"]) == 0
    assert engine.calls[-1][1] == Path("runs/old")  # the old one only when it is named
    monkeypatch.chdir(tmp_path / "runs/old")
    assert main(["train", "--from", "run.json"]) == 0
    assert engine.calls[-1][1] == tmp_path / "runs/old-again2"
    assert capsys.readouterr().err == ""


def test_other_versions_are_warned_of(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    earlier_run(tmp_path / "old", torch="1.0")
    assert main(["train", "--from", "old"]) == 0
    assert capsys.readouterr().err == (
        f"note: that run used torch 1.0, this is {torch.__version__}: numbers may differ\n"
    )


def test_only_the_first_of_several_processes_shows_anything(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    engine.steps = (progress(20),)
    earlier_run(tmp_path / "old", torch="1.0")
    assert main(["train", "vit-digits"]) == 0
    assert main(["train", "--from", "old", "--folder", "new"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main(["train", "--from", "old"]) == 2  # each process could find another name
    assert "name it, --folder old-again" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train vit-digit", "unknown recipe 'vit-digit'. Did you mean vit-digits?"),
        ("train --folder x", "a recipe's name comes first, then --folder: trimtab train NAME --folder x"),
        ("train vit-digits --lrr 1", "unknown field --lrr. Did you mean --lr?"),
        ("train vit-digits --depth 1", "unknown field --depth. Did you mean --model.depth?"),
        ("train vit-digits --lr fast", "--lr must be a number; got 'fast'"),
        ("train vit-digits --lr -1", "lr must be a positive number, got -1.0"),
        ("train vit-digits --model.dim 63", "dim"),
        ("train vit-digits --watch-every 7", "eval_every must be a multiple of watch_every"),
        ("train speech-an4 --batch-size 8", "--batch-size has no effect beside batch_tokens, which is 5200"),
        ("train speech-an4 --batch-tokens 9 --batch_size=8", "batch_tokens, which is 9"),
        ("train translate-multi30k --beam 5000", "beam must be at most model.target_vocab, 4,000"),
        ("train vit-digits --strategy dpp", "--strategy must be one of auto, ddp, fsdp; got 'dpp'"),
        (
            "train --form x",
            "a recipe's name comes first, then --form: trimtab train NAME --form x. Did you mean --from?",
        ),
        ("train --from nowhere", "there is no nowhere; --from takes the run.json of a run, or its folder"),
        ("train --from", "--from takes the run.json of a run"),
        ("train vit-digits --from x", "--from stands in the place of the recipe's name: leave vit-digits out"),
        ("train mine.py:Mine", "mine.py cannot be read"),
        ("recipes vit-digits", "trimtab recipes takes nothing more, got 'vit-digits'"),
    ],
)
def test_an_error_is_one_line_and_nothing_is_trained(
    words: str, message: str, engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert out == ""
    assert engine.calls == []
    assert list(tmp_path.iterdir()) == []


def test_examples_are_counted_where_tokens_are_not(engine: Engine) -> None:
    words = "--batch-size 8 --batch-tokens None --folder 1", "--batch-tokens 9 --accumulate 5 --folder 2"
    for each in words:  # 5 micro-batches of tokens; no batch_size has to be a multiple of that
        assert main(["train", "speech-an4", *each.split()]) == 0
    one, other = (call[0] for call in engine.calls)
    assert (one.batch_size, one.batch_tokens) == (8, None)
    assert (other.accumulate, other.batch_tokens) == (5, 9)


def test_a_damaged_run_json_is_named(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    earlier_run(tmp_path / "old").write_text("{")
    assert main(["train", "--from", "old"]) == 2
    assert "old/run.json is damaged" in capsys.readouterr().err


def test_what_the_engine_refuses_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RunFolderError("x holds another run: lr is 0.01 there and 0.001 here")

    monkeypatch.setattr("trimtab.train.train_command.train", refuse)
    monkeypatch.chdir(tmp_path)
    assert main(["train", "vit-digits"]) == 2
    assert capsys.readouterr() == ("", "error: x holds another run: lr is 0.01 there and 0.001 here\n")


def test_a_real_run_its_repetition_and_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "--steps 4 --watch-every 2 --eval-every 2 --model.dim 16 --model.depth 1 --stabilizer sigma"
    assert main(["train", "vit-digits", *words.split()]) == 0
    first = capsys.readouterr().out
    assert first.splitlines()[-5].startswith("finished after 4 of 4 steps")
    assert main(["train", "vit-digits", *words.split()]) == 0
    assert capsys.readouterr().out.startswith("runs/vit-digits holds this run, at its end")
    assert main(["train", "--from", "runs/vit-digits"]) == 0
    logs = [
        [json.loads(line) for line in (tmp_path / "runs" / name / "steps.jsonl").read_text().splitlines()]
        for name in ("vit-digits", "vit-digits-again")
    ]
    for line in (*logs[0], *logs[1]):
        del line["time"]
    assert logs[0] == logs[1]
    capsys.readouterr()
    assert main(["train", "vit-digits", *words.split(), "--lr", "0.5"]) == 2
    assert "lr" in capsys.readouterr().err


def test_the_signature_of_a_metric_is_printed_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text('{"seed": 0, "bleu_signature": "nrefs:1|case:mixed"}', encoding="utf8")
    assert _signatures(tmp_path) == ["bleu signature: nrefs:1|case:mixed"]
