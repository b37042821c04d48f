import math
from pathlib import Path

import pytest
from run_folders import write_compare, write_json, write_run

from trimtab.report.collect import Collection, collect
from trimtab.report.comparison import comparisons


def reasons(collection: Collection) -> dict[str, str]:
    return {each.path.name: each.reason for each in collection.unreadable}


def test_runs_are_found_wherever_they_lie(tmp_path: Path) -> None:
    write_compare(tmp_path / "compare", {"none": {0.1: [1.0], 0.2: [1.0]}})
    write_run(tmp_path / "deep" / "er" / "single", "sigma")
    (tmp_path / "deep" / "er" / "single" / "checkpoints" / "step-00000010").mkdir(parents=True)
    write_json(tmp_path / "deep" / "er" / "single" / "checkpoints" / "run.json", {})  # not a run of its own
    found = collect([tmp_path])
    assert [(run.arm, run.lr) for run in found.runs] == [("none", 0.1), ("none", 0.2), ("sigma", 0.01)]
    assert found.unreadable == ()
    assert len(collect([tmp_path / "compare", tmp_path]).runs) == 3  # named twice, read once


def test_a_loop_of_links_ends(tmp_path: Path) -> None:
    write_run(tmp_path / "run")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "again").symlink_to(tmp_path / "run", target_is_directory=True)
    assert len(collect([tmp_path]).runs) == 1


def test_damaged_folders_are_listed_with_the_reason(tmp_path: Path) -> None:
    write_run(tmp_path / "good")
    (write_run(tmp_path / "torn-json") / "run.json").write_text('{"recipe": {"lr"')
    (write_run(tmp_path / "no-line") / "steps.jsonl").write_text('{"step": 10, "lo')
    (write_run(tmp_path / "no-json") / "run.json").unlink()
    write_run(tmp_path / "newer", info={"format": 2})
    (write_run(tmp_path / "bad-result") / "result.json").write_text("[1, 2")
    write_run(tmp_path / "words", recipe={"lr": "high"})
    (tmp_path / "empty").mkdir()
    found = collect([tmp_path, tmp_path / "missing", tmp_path / "good" / "run.json", tmp_path / "empty"])
    assert [run.folder.name for run in found.runs] == ["good"]
    told = reasons(found)
    assert "run.json is damaged" in told.pop("torn-json")
    assert told.pop("no-line") == "it has no logged step yet"
    assert told.pop("no-json") == "it has no run.json"
    assert "format 2" in told.pop("newer")
    assert "result.json is damaged" in told.pop("bad-result")
    assert "no number" in told.pop("words")
    assert told.pop("missing") == "there is no such folder"
    assert "it is a file" in told.pop("run.json")
    assert "no run in it" in told.pop("empty")
    assert told == {}


def test_what_is_torn_but_readable_is_read_with_a_note(tmp_path: Path) -> None:
    log = write_run(tmp_path / "log", losses=[2.0, 1.5, 1.0]) / "steps.jsonl"
    first, second, third = log.read_text().splitlines()
    log.write_text(f"{first}\n{second[:-5]}\n{third}\n")
    array = write_run(tmp_path / "array", losses=[2.0, 1.5, 1.0]) / "heads_entropy.f32"
    array.write_bytes(array.read_bytes()[:-1])
    runs = {run.folder.name: run for run in collect([tmp_path]).runs}
    assert runs["log"].curves["loss"][1].tolist() == [2.0]
    assert runs["log"].notes == ("steps.jsonl is damaged after line 1; what follows is left out",)
    assert runs["array"].notes == ("heads_entropy.f32 is torn: it has no row for 1 of 3 lines",)


def test_the_numbers_of_a_run(tmp_path: Path) -> None:
    alarms = [{"step": 30, "kind": "loss spike"}]
    losses = [2.0, "nan", 1.0]
    write_run(tmp_path / "run", "sigma", 0.03, 4, loss=0.25, losses=losses, entropy="nan", logit="inf", alarms=alarms)
    [run] = collect([tmp_path]).runs
    assert (run.arm, run.lr, run.seed, run.status, run.failed) == ("sigma", 0.03, 4, "finished", False)
    assert (run.loss, run.initial_loss, run.metric_name, run.metric) == (0.25, 2.0, "accuracy", 0.9)
    assert (run.steps, run.step_seconds, run.peak_memory) == (30, 0.01, 1000)
    assert run.max_logit == math.inf
    assert math.isnan(run.entropy_min)
    assert [alarm["kind"] for alarm in run.alarms] == ["loss spike"]
    assert run.curves["loss"][0].tolist() == [10, 30]
    assert "eval_loss" not in run.curves  # no line has it
    assert run.curves["lr"][1].tolist() == [0.03] * 3  # the first group's
    assert "sigma" not in run.curves


@pytest.mark.parametrize(
    ("changes", "failed"),
    [
        ({"status": "diverged", "loss": "nan"}, True),
        ({"loss": "inf"}, True),
        ({"loss": 2.0}, True),  # no lower than at init
        ({"loss": 1.99}, False),
        ({"status": "stopped early"}, False),
        ({"result": False}, False),  # not known yet
    ],
)
def test_which_runs_failed(tmp_path: Path, changes: dict[str, object], failed: bool) -> None:
    write_run(tmp_path / "run", **changes)  # type: ignore[arg-type]
    [run] = collect([tmp_path]).runs
    assert run.failed == failed


def test_curves_of_metrics_begin_before_the_first_step(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "steps.jsonl").write_text('{"step": 10, "loss": 1.5}\n{"step": 20, "loss": 1.0, "accuracy": 0.9}\n')
    curves = collect([tmp_path]).runs[0].curves
    assert [each.tolist() for each in curves["accuracy"]] == [[0, 20], [0.1, 0.9]]
    assert [each.tolist() for each in curves["loss"]] == [[10, 20], [1.5, 1.0]]


def test_without_an_evaluation_the_loss_of_the_batch_counts(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", losses=[3.0, 2.0, 1.5])
    write_json(folder / "result.json", {"status": "finished", "steps": 30, "loss": 1.5, "initial": {}, "metrics": {}})
    [run] = collect([tmp_path]).runs
    assert (run.initial_loss, run.loss, run.metric_name) == (3.0, 1.5, "")


def test_a_run_that_raised_before_its_first_line_is_known_by_its_place(tmp_path: Path) -> None:
    compare = write_compare(tmp_path / "c", {"none": {0.1: [1.0]}, "sigma:gamma_init=one": {0.1: [1.0]}})
    place = compare / "runs" / "sigma_gamma_init=one" / "lr0.3-seed2"
    place.mkdir()
    write_json(place / "error.json", {"kind": "RuntimeError", "error": "no memory"})
    found = collect([compare])
    assert found.unreadable == ()
    [run] = [run for run in found.runs if run.status == "error"]
    assert (run.arm, run.lr, run.seed, run.failed) == ("sigma:gamma_init=one", 0.3, 2, True)
    assert run.error == "RuntimeError: no memory"
    alone = tmp_path / "alone"
    alone.mkdir()
    write_json(alone / "error.json", {"kind": "RuntimeError", "error": "no memory"})
    assert reasons(collect([alone])) == {"alone": "RuntimeError: no memory"}


def test_a_run_of_ones_own_loop_is_read_by_what_watch_was_told(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "mine", result=False)
    write_json(folder / "run.json", {"format": 1, "torch": "9.9", "lr": 0.5, "seed": 3, "data": "own"})
    [run] = collect([tmp_path]).runs
    assert (run.arm, run.lr, run.seed, run.status) == ("mine", 0.5, 3, "unfinished")
    write_json(folder / "run.json", {"format": 1})
    assert math.isnan(collect([tmp_path]).runs[0].lr)


def test_runs_that_cannot_be_compared_are_told_apart(tmp_path: Path) -> None:
    write_compare(tmp_path / "a", {"none": {0.1: [1.0, 1.0]}, "sigma": {0.1: [1.0, 1.0]}})
    write_run(tmp_path / "data", recipe={"data": "fashion"})
    write_run(tmp_path / "other way", recipe={"source": "de", "target": "en"})
    write_run(tmp_path / "longer", recipe={"steps": 10_000})
    write_run(tmp_path / "larger", recipe={"batch_tokens": 4096})
    write_run(tmp_path / "deeper", recipe={"model": {"depth": 12, "norm": "layernorm"}})
    write_run(tmp_path / "task", info={"task": "SpeechRecipe"})
    groups = comparisons(collect([tmp_path]))
    assert sorted(len(group.runs) for group in groups) == [1, 1, 1, 1, 1, 1, 4]
    assert len(groups[0].runs) == 4  # the largest first
    # What a stabilizer changes of the same model and budget stays comparable.
    write_run(tmp_path / "plain", "sigma", 0.1, 2, recipe={"model": {"depth": 2, "norm": "none"}, "warmup_steps": 5})
    assert len(comparisons(collect([tmp_path]))[0].runs) == 5


def test_arms_of_one_name_but_other_recipes_get_names_of_their_own(tmp_path: Path) -> None:
    write_run(tmp_path / "a", "none", recipe={"optimizer": "adamw", "keep": 2})
    write_run(tmp_path / "b", "none", recipe={"optimizer": "sgd", "keep": 5})
    write_run(tmp_path / "c", "sigma", recipe={"optimizer": "sgd"})
    arms = [run.arm for run in collect([tmp_path]).runs]
    assert arms == ["none [optimizer=adamw]", "none [optimizer=sgd]", "sigma"]


def test_the_arms_keep_the_order_of_the_compare(tmp_path: Path) -> None:
    compare = write_compare(tmp_path / "c", {"warmup": {0.1: [1.0]}, "none": {0.1: [1.0]}, "clip": {0.1: [1.0]}})
    assert comparisons(collect([compare]))[0].arms == ("warmup", "none", "clip")
    (compare / "compare.json").write_text("{")  # damaged: the runs tell enough
    assert comparisons(collect([compare]))[0].arms == ("none", "clip", "warmup")
