"""Models with sigma-Reparam and qk-clip, and models that are watched: a step of SAM is one step."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from sam_models import closure_of, loss_of, net
from stabilizer_case import small
from torch import Tensor, nn

import trimtab as tt
from trimtab.reparam import sigma_gamma
from trimtab.stabilizers import stabilize_


def vectors(model: nn.Module) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_moved_once(model: nn.Module, before: dict[str, Tensor]) -> None:
    twin = copy.deepcopy(model)
    twin.load_state_dict(before, strict=False)
    tt.refresh_(twin)
    for name, expected in twin.named_buffers():
        torch.testing.assert_close(model.get_buffer(name), expected, rtol=1e-10, atol=1e-12)
        assert not torch.equal(model.get_buffer(name), before[name])


@pytest.mark.parametrize("closed", [True, False])
def test_vectors_stay_put_between_the_passes_and_move_once_a_step(closed: bool) -> None:
    model = tt.reparametrize_(net())
    optimizer = tt.SAM(model.parameters(), torch.optim.AdamW, rho=0.5, lr=0.02)
    seen: list[dict[str, Any]] = []

    def closure() -> Tensor:
        optimizer.zero_grad()
        seen.append({name: sigma.clone() for name, (sigma, _) in sigma_gamma(model).items()})
        for name, buffer in model.named_buffers():
            assert torch.equal(buffer, before[name])
            assert closed or len(seen) % 2 or optimizer.perturbed
        for name, (sigma, _) in sigma_gamma(model).items():  # that of the weight at hand
            layer = model.get_submodule(name.removesuffix(".weight"))
            assert sigma.item() == pytest.approx((layer.sigma_v @ layer.weight @ layer.sigma_u[0, 0]).item(), rel=1e-12)
        loss = loss_of(model)
        loss.backward()
        return loss

    for _ in range(3):
        before = vectors(model)
        if closed:
            optimizer.step(closure)
        else:
            closure()
            optimizer.first_step()
            closure()
            optimizer.second_step()
        assert_moved_once(model, before)
        first, second = seen[-2:]
        assert all(not torch.equal(first[name], second[name]) for name in first)
        before = vectors(model)
        optimizer.zero_grad()
        optimizer.first_step()
        optimizer.second_step()  # skipped
        torch.testing.assert_close(vectors(model), before, rtol=0, atol=0)


def by_hand(values: dict[str, Tensor], fixed: dict[str, Tensor]) -> Tensor:
    """The loss of the converted network as a plain function of its parameters, with vectors that stay."""

    def layer(x: Tensor, name: str) -> Tensor:
        weight = values[f"{name}.weight"]
        sigma = fixed[f"{name}.sigma_v"] @ weight @ fixed[f"{name}.sigma_u"][0, 0]
        return x @ (values[f"{name}.gamma"] / sigma * weight).T + values[f"{name}.bias"]

    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return (layer(torch.tanh(layer(x, "0")), "2") - 0.3 * x[:, :3]).square().mean()


def test_the_gradient_is_that_of_the_function_at_the_perturbed_weights() -> None:
    model = tt.reparametrize_(net())
    fixed = vectors(model)
    values = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    gradients = torch.autograd.grad(by_hand(values, fixed), list(values.values()))
    length = torch.stack([g.norm() for g in gradients]).norm()
    there = {
        name: (p + 0.5 * g / length).detach().requires_grad_()
        for (name, p), g in zip(values.items(), gradients, strict=True)
    }
    expected = torch.autograd.grad(by_hand(there, fixed), list(there.values()))
    optimizer = tt.SAM(model.parameters(), torch.optim.SGD, rho=0.5, lr=0.1)
    optimizer.step(closure_of(optimizer, model))
    for (name, p), g in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(p.detach(), values[name].detach() - 0.1 * g, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("closed", [True, False])
def test_qk_clip_acts_once_a_step(closed: bool) -> None:
    example = small("vit")
    stabilize_(example.model, "qk-clip:tau=1e-3:every=2")
    optimizer = tt.SAM(example.model.parameters(), torch.optim.SGD, rho=0.05, lr=0.0)
    keys = [name for name, _ in example.model.named_parameters() if name.endswith(("query.weight", "key.weight"))]
    assert len(keys) == 4

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = example.loss(example.model)
        loss.backward()
        return loss

    clipped = []
    for _ in range(4):
        before = copy.deepcopy(example.model.state_dict())
        if closed:
            optimizer.step(closure)
        else:
            closure()
            optimizer.first_step()
            closure()
            optimizer.second_step()
        clipped.append([not torch.equal(example.model.get_parameter(name), before[name]) for name in keys])
    assert clipped == [[True] * 4, [False] * 4] * 2
    assert example.model.get_buffer("qk_clip_steps").tolist() == [4, 4]


@pytest.mark.parametrize("form", ["closure", "two calls", "scaled"])
def test_a_watch_sees_the_step_of_the_inner_optimiser(form: str, tmp_path: Path) -> None:
    model, unwatched = net(torch.float32), net(torch.float32)
    optimizer, other = (tt.SAM(each.parameters(), torch.optim.AdamW, rho=0.3, lr=0.02) for each in (model, unwatched))
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    other_schedule = torch.optim.lr_scheduler.ExponentialLR(other, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with tt.Watch(model, tmp_path, every=1) as watch:
        for seed in range(3):
            before = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 2}
            lr = optimizer.param_groups[0]["lr"]
            closure = closure_of(optimizer, model, seed)
            if form == "closure":
                loss = optimizer.step(closure)
            else:
                scaled = form == "scaled"
                for end in (optimizer.first_step, lambda: scaler.step(optimizer) if scaled else optimizer.step()):
                    optimizer.zero_grad()
                    loss = loss_of(model, seed)
                    (scaler.scale(loss) if scaled else loss).backward()
                    end()
                if scaled:
                    scaler.update()
            watch.step(loss)
            gradients = torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])
            assert watch.last["grad_norm"] == pytest.approx(gradients.item(), rel=1e-6)
            assert watch.last["lr"] == [lr]
            ratios = {
                name.removesuffix(".weight"): ((model.get_parameter(name) - w).norm() / w.norm()).item()
                for name, w in before.items()
            }
            found = {name.removesuffix(".weight"): ratio for name, ratio in watch.last["update_ratio"].items()}
            assert found == pytest.approx(ratios, rel=1e-4)  # differences of float32 numbers
            schedule.step()
            other.step(closure_of(other, unwatched, seed))
            other_schedule.step()
        optimizer.zero_grad()
        optimizer.first_step()
        optimizer.second_step()  # skipped: no step was seen
        watch.step(1.0)
        assert "grad_norm" not in watch.last
    torch.testing.assert_close(model.state_dict(), unwatched.state_dict(), rtol=0, atol=0)
