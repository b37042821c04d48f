import copy
import gc
import json
import logging
import math
import pickle
import weakref
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import nn

from trimtab.attention import attention_stats_reference
from trimtab.errors import RunFolderError
from trimtab.models.dlinear import DLinear
from trimtab.models.tsmixer import TSMixer
from trimtab.reparam import SigmaReparam, reparametrize_
from trimtab.watch import Alarm, Thresholds, Watch


def lines_of(folder: Path) -> list[dict]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not strict JSON")

    text = (folder / "steps.jsonl").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def same(one: object, two: object) -> bool:
    """Bit for bit, through dicts and lists."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[key], two[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return one == two


@pytest.mark.parametrize("every", [1, 3, 1000])
@pytest.mark.parametrize("converted", [False, True], ids=["plain", "converted"])
def test_a_watched_run_ends_in_bit_identical_weights(tiny, train, tmp_path, every, converted) -> None:
    def run(watched: bool) -> tuple:
        model = tiny(dropout=0.2)  # one random number drawn by the watch would change every mask after it
        if converted:
            reparametrize_(model, SigmaReparam(gamma_init="one"))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
        torch.manual_seed(1)
        if watched:
            with Watch(model, tmp_path / "run", every=every) as watch:
                train(model, optimizer, 7, watch.step)
            assert len(lines_of(tmp_path / "run")) == len({n for n in range(1, 8) if n == 1 or n % every == 0})
        else:
            train(model, optimizer, 7)
        gradients = [parameter.grad for parameter in model.parameters()]
        return model.state_dict(), optimizer.state_dict(), gradients, torch.get_rng_state()

    assert same(run(watched=True), run(watched=False))


def test_the_log_tells_loss_rates_norms_and_entropies(tiny, train, tmp_path) -> None:
    model = tiny()
    groups = [{"params": model.head.parameters(), "lr": 1e-3}, {"params": model.mlps.parameters()}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    losses: list[float] = []
    norms: list[float] = []

    def after(loss: torch.Tensor) -> None:
        losses.append(loss.item())
        held = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(torch.nn.utils.get_total_norm(held).item())
        watch.step(loss)
        schedule.step()

    with Watch(model, tmp_path, every=3) as watch:
        train(model, optimizer, 7, after)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 3, 6]
    for line in lines:
        index = line["step"] - 1
        assert line["loss"] == losses[index]
        assert line["lr"] == pytest.approx([1e-3 * 0.5**index, 1e-2 * 0.5**index])
        assert line["grad_norm"] == pytest.approx(norms[index], rel=1e-5)  # torch's is a float32 norm of norms
        assert 0 < line["entropy_min"] <= 1
        assert 0 < line["entropy_mean"] < math.log(8)
        assert line["alarms"] == []
        assert "gamma" not in line
    assert lines[0]["time"] < lines[1]["time"] < lines[2]["time"]
    assert watch.last == lines[-1]


def test_entropies_and_logits_are_those_of_each_head(tiny, train, tmp_path) -> None:
    model = tiny()
    with Watch(model, tmp_path, every=1) as watch:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, watch.step)
    heads = json.loads((tmp_path / "heads.json").read_text())["heads"]
    assert heads == [{"module": f"attentions.{m}", "head": h} for m in range(2) for h in range(2)]
    entropy, normalized, max_logit = (
        torch.frombuffer(bytearray((tmp_path / f"heads_{name}.f32").read_bytes()), dtype=torch.float32)
        for name in ("entropy", "entropy_normalized", "max_logit")
    )
    stats = [attention_stats_reference(*attention.last, is_causal=True) for attention in model.attentions]
    expected = torch.cat([s.entropy.mean((0, 2)) for s in stats])
    assert entropy.shape == (2 * 4,)
    assert torch.allclose(entropy[4:].double(), expected, atol=1e-5)
    keys = torch.arange(2, 9).log()  # query i of 8 sees i + 1 keys; the first has no choice
    expected = torch.cat([(s.entropy[..., 1:] / keys).mean((0, 2)) for s in stats])
    assert torch.allclose(normalized[4:].double(), expected, atol=1e-5)
    assert watch.last["entropy_min"] == pytest.approx(expected.min().item(), abs=1e-5)
    expected = torch.cat([s.max_logit.amax((0, 2)) for s in stats])
    assert torch.allclose(max_logit[4:].double(), expected, atol=1e-5)
    assert watch.last["max_logit"] == pytest.approx(expected.max().item(), abs=1e-5)


@pytest.mark.parametrize("slow_every", [2, 4])
def test_sigma_of_plain_weights_is_that_after_the_step(tiny, train, tmp_path, slow_every) -> None:
    model = tiny()
    with Watch(model, tmp_path, every=2, slow_every=slow_every) as watch:
        train(model, torch.optim.SGD(model.parameters(), lr=0.5), 2, watch.step)
    assert set(watch.last["sigma"]) == {
        "head.weight",
        *(f"attentions.{i}.{name}.weight" for i in range(2) for name in ("qkv", "out")),
        *(f"mlps.{i}.{layer}.weight" for i in range(2) for layer in (0, 2)),
    }
    for name, (sigma,) in watch.last["sigma"].items():
        exact = torch.linalg.matrix_norm(model.get_parameter(name), 2).item()
        # Exact on the slow cadence; between its steps a lower bound, followed until it rises by less than a thousandth.
        assert exact * (1 - (1e-5 if slow_every == 2 else 1e-3)) <= sigma <= exact * (1 + 1e-6)


def test_sigma_and_gamma_of_converted_weights(tiny, train, tmp_path) -> None:
    model = tiny()
    reparametrize_(model, SigmaReparam(gamma_init="one"), lambda module, name: "head" not in name)
    with Watch(model, tmp_path, every=1) as watch:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, watch.step)
    assert "head.weight" in watch.last["sigma"]  # left plain, seen all the same
    assert "head.weight" not in watch.last["gamma"]
    assert set(watch.last["sigma"]) - {"head.weight"} == set(watch.last["gamma"])
    for gamma in watch.last["gamma"].values():
        assert gamma == pytest.approx([1.0] * len(gamma), abs=0.1)
        assert 1.0 not in gamma  # each has taken a step
    assert set(watch.last["sigma_error"]) == set(watch.last["gamma"])
    for errors in watch.last["sigma_error"].values():
        assert errors == pytest.approx([0.0] * len(errors), abs=1e-3)  # one small step from the exact vectors


def test_metrics_join_the_line_of_a_logged_step(tiny, train, tmp_path) -> None:
    model = tiny()
    logged = []

    def after(loss: torch.Tensor) -> None:
        logged.append(watch.next_step_is_logged)
        if watch.next_step_is_logged:
            watch.step(loss, accuracy=0.5, best=torch.tensor(2.0), worst=-math.inf)
        else:
            with pytest.raises(ValueError, match="next_step_is_logged"):
                watch.step(loss, accuracy=0.5)
            watch.step(loss)

    with Watch(model, tmp_path, every=2) as watch:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 5, after)
    assert logged == [True, True, False, True, False]
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 4]
    assert [(line["accuracy"], line["best"], line["worst"]) for line in lines] == [(0.5, 2.0, "-inf")] * 3


@pytest.mark.parametrize(
    ("loss", "metrics", "error", "says"),
    [
        ("low", {}, TypeError, "loss to be a number"),
        (None, {}, TypeError, "got NoneType"),
        (torch.zeros(3), {}, ValueError, r"shape \(3,\)"),
        (1.0, {"accuracy": "high"}, TypeError, "accuracy to be a number"),
        (1.0, {"lr": 1.0}, ValueError, "'lr' of its own"),
    ],
)
def test_a_refused_step_is_not_counted(tiny, tmp_path, loss, metrics, error, says) -> None:
    with Watch(tiny(), tmp_path, on_alarm=print) as watch:
        with pytest.raises(error, match=says):
            watch.step(loss, **metrics)
        watch.step(1.5)
    assert [line["step"] for line in lines_of(tmp_path)] == [1]


def test_a_diverged_run_is_logged_to_its_end(tiny, train, tmp_path) -> None:
    model = tiny()
    with torch.no_grad():
        model.attentions[0].qkv.weight[0, 0] = math.nan
    with Watch(model, tmp_path, every=1) as watch:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 2, watch.step)
    line = lines_of(tmp_path)[-1]
    assert line["loss"] == line["grad_norm"] == line["max_logit"] == line["entropy_mean"] == "nan"
    assert line["sigma"]["attentions.0.qkv.weight"] == ["nan"]
    assert math.isnan(watch.last["loss"])  # for live displays: a float


def test_collapsed_heads_raise_an_alarm(tiny, train, tmp_path, caplog) -> None:
    model = tiny()
    with torch.no_grad():
        model.attentions[1].qkv.weight.mul_(1000)
    with Watch(model, tmp_path, every=1) as watch:
        train(model, torch.optim.SGD(model.parameters(), lr=1e-6), 4, watch.step)
    assert {alarm.kind for alarm in watch.alarms} == {"entropy collapse", "logit growth"}
    assert [(alarm.step, alarm.since) for alarm in watch.alarms] == [(2, 1)] * 2
    assert all(alarm.where.startswith("attentions.1 head ") for alarm in watch.alarms)
    assert [record.message for record in caplog.records] == [alarm.message for alarm in watch.alarms]
    in_log = [[alarm["kind"] for alarm in line["alarms"]] for line in lines_of(tmp_path)]
    assert in_log == [[], [alarm.kind for alarm in watch.alarms], [], []]
    assert lines_of(tmp_path)[1]["alarms"][0]["message"] == watch.alarms[0].message


def test_on_alarm_takes_the_place_of_logging(tiny, train, tmp_path, caplog) -> None:
    model, seen = tiny(), list[Alarm]()
    with Watch(model, tmp_path, every=1, thresholds=Thresholds(max_logit=1e-9), on_alarm=seen.append) as watch:
        train(model, torch.optim.SGD(model.parameters(), lr=1e-6), 2, watch.step)
    assert seen == watch.alarms != []
    assert not caplog.records


class Token:
    """Something that can be watched dying."""


class Probe(torch.autograd.Function):
    """The identity; its node of the graph holds a token."""

    tokens: ClassVar[list[weakref.ref]] = []

    @staticmethod
    def forward(ctx, x: torch.Tensor) -> torch.Tensor:
        ctx.token = Token()
        Probe.tokens.append(weakref.ref(ctx.token))
        return x.clone()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def test_no_graph_is_kept(tiny, tmp_path, loss_of) -> None:
    model = tiny()
    for attention in model.attentions:
        attention.qkv.register_forward_hook(lambda module, args, output: Probe.apply(output))
    with Watch(model, tmp_path, every=1) as watch:
        loss = loss_of(model, torch.randint(11, (4, 9)))
        assert len(Probe.tokens) == 2
        assert all(token() for token in Probe.tokens)
        value = loss.item()
        del loss
        gc.collect()
        assert not any(token() for token in Probe.tokens)
        watch.step(value)
    assert "max_logit" in watch.last


def test_nothing_is_left_behind_when_training_fails(tiny, train, tmp_path, leaves_nothing) -> None:
    model = tiny()

    def fail(loss: torch.Tensor) -> None:
        watch.step(loss)
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), Watch(model, tmp_path, every=1) as watch:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3, fail)
    leaves_nothing(model)
    assert [line["step"] for line in lines_of(tmp_path)] == [1]
    with pytest.raises(RuntimeError, match="outside its with block"):
        watch.step(1.0)


def test_step_before_entering_is_refused(tiny, tmp_path) -> None:
    with pytest.raises(RuntimeError, match="outside its with block"):
        Watch(tiny(), tmp_path).step(1.0)
    assert list(tmp_path.iterdir()) == []


def test_copies_and_pickles_of_a_watched_model_are_not_watched(tiny, train, tmp_path, leaves_nothing) -> None:
    model = tiny()
    with Watch(model, tmp_path, every=1) as watch:
        average = copy.deepcopy(model)
        again = pickle.loads(pickle.dumps(model))
        for other in (average, again):
            other(torch.zeros(2, 3, dtype=torch.long))
        watch.step(1.0)
        assert "max_logit" not in watch.last
    leaves_nothing(model)
    average(torch.zeros(2, 3, dtype=torch.long))


def test_a_model_without_attention_is_told_once_and_logged_on(tmp_path, caplog) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with Watch(model, tmp_path, every=1) as watch:
        for _ in range(3):
            model(torch.randn(2, 3))
            watch.step(1.0)
    of_optimizer, record = caplog.records
    assert "call watch.step after the optimizer.step()" in of_optimizer.message
    assert record.levelno == logging.WARNING
    assert "no attention was seen" in record.message
    assert "watch.attention(query, key)" in record.message
    names = ["alarms", "loss", "output_z", "sigma", "stable_rank", "step", "time"]
    assert [sorted(line) for line in lines_of(tmp_path)] == [names] * 3
    assert not (tmp_path / "heads.json").exists()


@pytest.mark.parametrize("model", [DLinear(8, 4, 2), TSMixer(8, 4, 2)])
def test_our_models_without_attention_are_asked_nothing(model, tmp_path, caplog) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with Watch(model, tmp_path, every=1) as watch:
        model(torch.randn(3, 2, 8)).square().mean().backward()
        optimizer.step()
        watch.step(1.0)
    assert not caplog.records


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ({"model": "gpt2"}, TypeError, "nn.Module, got str"),
        ({"every": 0}, ValueError, "every >= 1"),
        ({"every": 2.5}, TypeError, "whole number of steps"),
        ({"every": True}, TypeError, "whole number of steps"),
        ({"slow_every": 30}, ValueError, "multiple of every=20, got 30"),
        ({"thresholds": 0.03}, TypeError, "tt.Thresholds, got float"),
        ({"sinks": [print]}, TypeError, "methods write and close, got builtin"),
        ({"run": {"seed": object()}}, TypeError, r"run\['seed'\]"),
        ({"run": {"format": 2}}, ValueError, "another name"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_made(tiny, tmp_path, arguments, error, says) -> None:
    with pytest.raises(error, match=says):
        Watch(**({"model": tiny(), "folder": tmp_path / "run"} | arguments))
    assert list(tmp_path.iterdir()) == []


def test_a_model_is_watched_by_one_at_a_time(tiny, train, tmp_path, leaves_nothing) -> None:
    model = tiny()
    with Watch(model, tmp_path / "one") as watch:
        with pytest.raises(ValueError, match="being watched already"), Watch(model, tmp_path / "two"):
            pass
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, watch.step)
    assert not (tmp_path / "two").exists()
    assert len(lines_of(tmp_path / "one")) == 1
    with Watch(model, tmp_path / "two") as watch:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 1, watch.step)
    assert watch.last["max_logit"]
    leaves_nothing(model)


def test_a_watch_is_for_one_run(tiny, tmp_path) -> None:
    watch = Watch(tiny(), tmp_path)
    with watch:
        pass
    with pytest.raises(RunFolderError, match="already holds a run"), watch:
        pass


def test_an_error_while_entering_leaves_nothing_behind(tiny, tmp_path, leaves_nothing, monkeypatch) -> None:
    def fail(*_: object) -> None:
        raise ArithmeticError

    model = tiny()
    monkeypatch.setattr("trimtab.watch.instruments.GradientTap", fail)
    with pytest.raises(ArithmeticError), Watch(model, tmp_path / "run"):
        pass
    leaves_nothing(model)
    monkeypatch.undo()
    with Watch(model, tmp_path / "again"):  # it does not count as watched
        pass


def test_a_model_and_its_wrapper_are_one_model(tiny, tmp_path) -> None:
    model = tiny()
    with Watch(model, tmp_path / "one"):
        for wrapper in (nn.DataParallel(model), torch.compile(model, backend="eager")):
            with pytest.raises(ValueError, match="being watched already"), Watch(wrapper, tmp_path / "two"):
                pass
