import copy
import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import trimtab as tt
from trimtab.models.samformer import SAMformer
from trimtab.stabilizers import stabilize_

FORMS = ("factored", "full")
# 24 rows of 20 steps, 4 of which are forecast: 24 · 16 > 4 · 20, so value and head are multiplied first
X = torch.randn(8, 3, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
Y = torch.randn(8, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def samformer(form: str = "full", **options: object) -> SAMformer:
    torch.manual_seed(2)
    return SAMformer(20, 4, 3, dim=6, form=form, **options).double()


def one_after_the_other(model: SAMformer, x: Tensor) -> Tensor:
    """The function as it is defined, by the model's own layers."""
    forecast: Callable[[Tensor], Tensor] = lambda x: model.head(x + model.attention(x))  # noqa: E731
    return forecast(x) if model.revin is None else model.revin(x, forecast)


def dot(left: Iterable[float], right: Iterable[float]) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def gradients(model: nn.Module, output: Tensor) -> dict[str, Tensor | None]:
    names, parameters = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    found = torch.autograd.grad((output - Y).square().mean(), parameters, allow_unused=True)
    return dict(zip(names, found, strict=True))


def expect_same(model: SAMformer) -> None:
    """Outputs and gradients are those of one layer after the other."""
    found, expected = model(X), one_after_the_other(model, X)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    theirs = gradients(model, expected)
    assert all(gradient is not None for gradient in theirs.values())
    torch.testing.assert_close(gradients(model, found), theirs, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("revin", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_it_is_what_loops_compute(form: str, revin: bool) -> None:
    model = samformer(form, revin=revin)
    expected = torch.empty_like(Y)
    with torch.no_grad():
        weights = {name: value.tolist() for name, value in model.state_dict().items()}

        def mapped(name: str, series: list[float]) -> list[float]:
            rows = zip(weights[f"{name}.weight"], weights[f"{name}.bias"], strict=True)
            return [dot(row, series) + bias for row, bias in rows]

        for b, window in enumerate(X.tolist()):
            means = [math.fsum(series) / 20 if revin else 0.0 for series in window]
            stds = [
                math.sqrt(math.fsum((v - m) ** 2 for v in series) / 20 + 1e-5) if revin else 1.0
                for series, m in zip(window, means, strict=True)
            ]
            window = [[(v - m) / s for v in series] for series, m, s in zip(window, means, stds, strict=True)]
            query, key, value = ([mapped(f"attention.{n}", s) for s in window] for n in ("query", "key", "value"))
            for c in range(3):
                scores = [math.exp(dot(query[c], other) / math.sqrt(6)) for other in key]
                mixed = [dot(scores, column) / math.fsum(scores) for column in zip(*value, strict=True)]
                added = mapped("attention.out", mixed) if form == "factored" else mixed
                forecast = mapped("head", [v + a for v, a in zip(window[c], added, strict=True)])
                expected[b, c] = torch.tensor([means[c] + stds[c] * f for f in forecast], dtype=torch.float64)
    torch.testing.assert_close(model(X), expected, rtol=1e-12, atol=1e-12)


def test_parameters_of_the_published_model() -> None:
    def count(form: str, affine: bool = False) -> int:
        return sum(p.numel() for p in SAMformer(512, 96, 7, form=form, affine=affine).parameters())

    head = 512 * 96 + 96
    assert count("factored") == 3 * (512 * 16 + 16) + (16 * 512 + 512) + head == 82_576
    assert count("full") == 2 * (512 * 16 + 16) + (512 * 512 + 512) + head == 328_320
    assert count("full", affine=True) == 328_320 + 14


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_multiplied_first_is_the_same_function(affine: bool, bias: bool) -> None:
    model = samformer(affine=affine)
    if not bias:
        model.attention.value.bias = model.head.bias = None
    assert model._multiplies_first(len(X))
    expect_same(model)


@pytest.mark.parametrize("spec", ["sigma", "sigma:gamma_init=one", "spectral-norm", "qk-norm", "init-scale", "qk-clip"])
def test_multiplied_first_with_stabilizers(spec: str) -> None:
    model = samformer()
    stabilize_(model, spec)
    assert model._multiplies_first(len(X))
    expect_same(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        optimizer.step()
    expect_same(model)  # the vectors have moved


def test_gamma_of_value_and_head_is_trained() -> None:
    model = samformer()
    tt.reparametrize_(model)
    found = gradients(model, model(X))
    assert all(bool(found[f"{layer}.gamma"].abs() > 0) for layer in ("attention.value", "head"))
    direction = {name: torch.ones_like(value) for name, value in model.named_parameters() if name.endswith("gamma")}

    def loss(step: float) -> float:
        values = {name: p + step * direction[name] for name, p in model.named_parameters() if name in direction}
        return (torch.func.functional_call(model, values, X) - Y).square().mean().item()

    slope = sum(found[name].sum().item() for name in direction)
    assert slope == pytest.approx((loss(1e-5) - loss(-1e-5)) / 2e-5, rel=1e-6)  # error of 1e-10 and of rounding


@pytest.mark.parametrize("sigma", [False, True])
def test_weights_given_from_outside_are_used(sigma: bool) -> None:
    model = samformer()
    if sigma:
        tt.reparametrize_(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    values = {name: p.detach().clone() for name, p in other.named_parameters()}  # no Parameters

    def loss(values: dict[str, Tensor]) -> Tensor:
        return (torch.func.functional_call(model, values, X) - Y).square().mean()

    torch.testing.assert_close(torch.func.functional_call(model, values, X), other(X), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.func.grad(loss)(values), gradients(other, other(X)), rtol=1e-11, atol=1e-12)


def bend(model: SAMformer) -> None:
    model.head.register_forward_hook(lambda module, args, output: output.tanh())


def replace_forward(model: SAMformer) -> None:
    model.attention.value.forward = lambda x: x.cumsum(-1)


STRANGE: dict[str, Callable[[SAMformer], object]] = {
    "softcap": lambda model: stabilize_(model, "softcap:attention=1:logits=0.1"),
    "weight-norm": lambda model: stabilize_(model, "weight-norm"),
    "low-rank": lambda model: stabilize_(model, "low-rank"),
    "z-loss": lambda model: stabilize_(model, "z-loss"),
    "torch's spectral norm": lambda model: parametrizations.spectral_norm(model.eval().attention.value),
    "torch's weight norm": lambda model: parametrizations.weight_norm(model.head),
    "a hook": bend,
    "a hook before": lambda model: model.attention.value.register_forward_pre_hook(lambda module, args: -args[0]),
    "a forward": replace_forward,
    "a hook on gradients": lambda model: model.head.register_full_backward_hook(lambda module, grads, _: (-grads[0],)),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_changes_a_layer_has_its_say(name: str) -> None:
    model = samformer()
    plain = model(X)
    STRANGE[name](model)
    assert not model._multiplies_first(len(X))
    if name == "a forward":
        torch.testing.assert_close(model(X), one_after_the_other(model, X), rtol=0, atol=0)
    elif name == "a hook on gradients":
        torch.testing.assert_close(model(X), plain, rtol=1e-12, atol=1e-12)
    else:
        expect_same(model)
    changes = name in ("softcap", "low-rank", "torch's spectral norm", "a hook", "a hook before", "a forward")
    assert changes == (not torch.allclose(model(X), plain, rtol=1e-6, atol=1e-6))


@pytest.mark.parametrize(
    ("batch", "horizon", "form", "num_heads", "first"),
    [
        (8, 4, "full", 1, True),
        (2, 4, "full", 1, True),  # 6 · 16 > 80
        (1, 4, "full", 1, False),  # 3 · 16 < 80
        (100, 20, "full", 1, False),  # nothing is saved where the horizon is as long as the look-back
        (100, 30, "full", 1, False),
        (8, 4, "factored", 1, False),
        (8, 4, "full", 2, False),  # a head for each product
    ],
)
def test_the_cheaper_order_is_taken(batch: int, horizon: int, form: str, num_heads: int, first: bool) -> None:
    model = SAMformer(20, horizon, 3, dim=6, form=form, num_heads=num_heads).double()
    assert model._multiplies_first(batch) == first
    x = torch.randn(batch, 3, 20, dtype=torch.float64)
    torch.testing.assert_close(model(x), one_after_the_other(model, x), rtol=1e-12, atol=1e-12)


def test_the_published_batch_takes_the_cheaper_order() -> None:
    model = SAMformer(512, 96, 7, form="full")
    assert model._multiplies_first(32)
    assert model._multiplies_first(256)


@pytest.mark.parametrize("form", FORMS)
def test_frozen_attention_stays_as_it_is_drawn(form: str) -> None:
    model = samformer(form, frozen_attention=True)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    (model(X) - Y).square().mean().backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"}
    torch.testing.assert_close(before, samformer(form).state_dict())  # drawn as if it were trained


@pytest.mark.parametrize("form", FORMS)
def test_the_order_of_channels_is_none(form: str) -> None:
    model, order = samformer(form), torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(X[:, order]), model(X)[:, order], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_its_entropy_is_seen_and_bounded(form: str) -> None:
    model = samformer(form)
    with tt.observe(model) as seen:
        model(X)
    entropy = seen.heads["attention"].entropy
    assert entropy.shape == (1,)
    assert 0 < float(entropy) <= math.log(3)
    nn.init.zeros_(model.attention.key.weight)  # every channel is the same key
    with tt.observe(model) as seen:
        model(X)
    assert float(seen.heads["attention"].entropy) == pytest.approx(math.log(3), rel=1e-6)


def test_watching_changes_nothing(tmp_path: Path) -> None:
    """Not even the order of the products, though Watch hangs hooks on every layer for a while."""
    states = []
    for watched in (True, False):
        model = samformer().float()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        with tt.Watch(model, tmp_path, every=1) if watched else nullcontext() as watch:
            for _ in range(4):
                optimizer.zero_grad()
                loss = (model(X.float()) - Y.float()).square().mean()
                loss.backward()
                optimizer.step()
                if watch is not None:
                    watch.step(loss)
        states.append(model.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


@pytest.mark.parametrize("sigma", [False, True])
def test_compiled_equals_eager(sigma: bool) -> None:
    model = samformer()
    if sigma:
        tt.reparametrize_(model)
    expected = model(X)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)(X)
    torch.testing.assert_close(compiled, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients(model, compiled), gradients(model, expected), rtol=1e-11, atol=1e-12)


def test_under_autocast_the_level_is_kept() -> None:
    model, x = samformer().float(), 1000 + X.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model(x), rtol=0, atol=0.05)  # bfloat16 would be off by up to 4 at 1000


def test_missing_values_and_flat_series() -> None:
    model = samformer()
    x = X.clone()
    x[0, 1, 3:9] = torch.nan
    x[1, 2] = 7.0
    assert torch.isfinite(model(x)).all()
    torch.testing.assert_close(model(x)[2:], model(X)[2:], rtol=1e-12, atol=1e-12)
    assert samformer(revin=False)(x)[0].isnan().any()


def test_what_does_not_fit_is_refused() -> None:
    model = samformer()
    for x in (X[0], X[:, :2], X[..., :19], X.long()):
        with pytest.raises(ValueError, match=r"\(B, 3 channels, 20 steps of look-back\), got"):
            model(x)
    with pytest.raises(ValueError, match="multiple of num_heads"):
        SAMformer(20, 4, 3, dim=6, num_heads=4)
