"""How benchmarks of forecasting choose settings, and what their attention is replaced by."""

from collections.abc import Callable, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from trimtab.models.samformer import SAMformer

Bench = Callable[[str], ModuleType]


def test_tuning_goes_on_from_the_best_and_outwards_until_it_is_inside(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = bench("tuning")
    ran: list[list[Any]] = []

    def plan(name: str, setting: dict[str, float]) -> Any:
        return SimpleNamespace(name=name, setting=setting)

    def run(places: Sequence[Any]) -> None:
        ran.append([(place.name, place.setting) for place in places])

    def error(place: Any) -> float:  # arm "a" is best at 8, arm "b" at 1
        return float(abs(place.setting["lr"] - (8 if place.name == "a" else 1)) + place.setting.get("decay", 0.0))

    def second(name: str, best: dict[str, float] | None) -> list[dict[str, float]]:
        assert best is not None
        return [best | {"decay": 0.1}]

    monkeypatch.setattr(tuning, "validation_mse", error)
    strokes = [lambda name, best: [{"lr": 0.5}, {"lr": 1.0}, {"lr": 2.0}], second]
    tried = tuning.tune(["a", "b"], strokes, plan, run, 6)
    assert [setting for setting, _ in tried["a"]][3:] == [
        {"lr": 2.0, "decay": 0.1},
        {"lr": 4.0},
        {"lr": 8.0},
        {"lr": 16.0},
    ]
    assert tuning.best(tried["a"]) == {"lr": 8.0}
    assert [setting for setting, _ in tried["b"]][3:] == [{"lr": 1.0, "decay": 0.1}]  # nothing beyond
    assert [len(each) for each in ran] == [6, 2, 1, 1, 1]
    assert len(tuning.tune(["a"], strokes, plan, run, 1)["a"]) == 5
    assert tuning.told(tried["b"])[0] == {"setting": {"lr": 0.5}, "validation_mse": 0.5}


@pytest.mark.parametrize("form", ["factored", "full"])
def test_alone_no_channel_learns_of_another_and_uniform_it_learns_of_all(form: Any, bench: Bench) -> None:
    uniform = bench("forecast_uniform")
    torch.manual_seed(0)
    x = torch.randn(2, 3, 12)
    other = x.clone()
    other[:, 2] = torch.randn(2, 12)
    for change_, learns in ((uniform.WAYS["test_mse"], True), (uniform.uniform_, True), (uniform.alone_, False)):
        model = change_(SAMformer(12, 4, 3, dim=4, form=form))
        assert torch.equal(model(x)[:, 0], model(other)[:, 0]) is not learns
    model = uniform.uniform_(SAMformer(12, 4, 3, dim=4, form=form))
    attention = model.attention
    expected = attention.out(attention.value(x).mean(1, keepdim=True).expand(-1, 3, -1))
    torch.testing.assert_close(attention(x), expected)
