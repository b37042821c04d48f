"""What a logged line holds, and how often."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trimtab.reparam import SigmaReparam, reparametrize_
from trimtab.watch import Watch

EVERY_LINE = {
    *("step", "loss", "lr", "grad_norm", "entropy_min", "entropy_mean", "entropy_bound", "max_logit", "logit_norm"),
    *(
        "sigma",
        "gamma",
        "stable_rank",
        "grad_variance",
        "update_ratio",
        "tev",
        "activation_rms",
        "output_z",
        "alarms",
        "time",
    ),
}
SLOW = {"sigma_error", "qk_energy", "grad_noise"}


def test_slow_signals_have_a_cadence_of_their_own(tiny, tmp_path) -> None:
    model = tiny()
    reparametrize_(model, SigmaReparam(), lambda module, name: "mlps" in name)
    optimizer = torch.optim.AdamW(model.parameters())
    with Watch(model, tmp_path, every=2, slow_every=4) as watch:
        for _ in range(8):
            optimizer.zero_grad()
            for _ in range(2):  # micro-batches, whose gradients tell the noise
                tokens = torch.randint(11, (4, 8))
                (F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()) / 2).backward()
            optimizer.step()
            watch.step(1.0)
    lines = [json.loads(line) for line in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert {line["step"]: set(line) & SLOW for line in lines} == {1: SLOW, 2: set(), 4: SLOW, 6: set(), 8: SLOW}
    assert all(set(line) - SLOW == EVERY_LINE for line in lines)
    last = lines[-1]
    assert set(last["sigma"]) == set(last["stable_rank"])
    assert set(last["gamma"]) == {name for name in last["sigma"] if "mlps" in name}
    assert list(last["qk_energy"]) == ["attentions.0", "attentions.1"]
    for name, ranks in last["stable_rank"].items():
        values = torch.linalg.svdvals(model.get_parameter(name).detach())
        assert ranks == pytest.approx([(values.square().sum() / values[0] ** 2).item()], rel=1e-3)


def test_a_signal_that_fails_is_missing_and_training_goes_on(tiny, train, tmp_path, monkeypatch, caplog) -> None:
    def fail(model: nn.Module) -> None:
        raise ArithmeticError("no table")

    monkeypatch.setattr("trimtab.watch.instruments.embedding_variability", fail)
    model = tiny()
    with Watch(model, tmp_path, every=1) as watch:
        train(model, torch.optim.SGD(model.parameters(), lr=0.1), 3, watch.step)
    assert [record.message for record in caplog.records] == [
        "tev cannot be measured, and is missing from the log: no table"
    ]
    assert set(watch.last) >= {"sigma", "update_ratio", "entropy_min"}
    assert "tev" not in watch.last


def test_sharpness_goes_into_the_next_logged_line(tmp_path) -> None:
    """A quadratic, whose Hessian is 2 A^T A / n, by hand."""
    torch.manual_seed(0)
    model, x, y = nn.Linear(3, 1, bias=False), torch.randn(20, 3), torch.randn(20, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    exact = torch.linalg.eigvalsh(2 * x.T @ x / 20)[-1].item()
    before = model.weight.detach().clone()
    with Watch(model, tmp_path, every=2, on_alarm=lambda alarm: None) as watch:
        watch.step(1.0)
        found = watch.sharpness(lambda: (model(x) - y).square().mean(), optimizer=optimizer)
        watch.step(1.0)
        assert watch.last["sharpness"]["eigenvalue"] == found.eigenvalue == pytest.approx(exact, rel=1e-3)
        assert watch.last["sharpness"]["limit"] == pytest.approx(20.0)
        for _ in range(2):
            watch.step(1.0)
        assert "sharpness" not in watch.last
    assert torch.equal(model.weight, before)
    assert model.weight.grad is None
