import pytest
import torch
from torch import nn

from trimtab.models.tsmixer import TSMixer

X = torch.randn(5, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
NORMS = ("batch", "layer")


def tsmixer(**options: object) -> TSMixer:
    torch.manual_seed(1)
    model = TSMixer(6, 4, 3, **({"dim": 5} | options)).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.LayerNorm):
            nn.init.normal_(module.weight, 1.0, 0.3)
            nn.init.normal_(module.bias, 0.0, 0.3)
    return model


def normalized(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Batch norm by the mean over windows, layer norm by that over a window; value by value."""
    result = torch.empty_like(x)
    for b in range(len(x)):
        for c in range(3):
            for step in range(6):
                group = x[:, c, step] if isinstance(module, nn.BatchNorm1d) else x[b]
                mean, variance = group.mean(), (group - group.mean()).square().mean()
                place = c * 6 + step
                value = (x[b, c, step] - mean) / (variance + 1e-5).sqrt()
                result[b, c, step] = value * module.weight[place] + module.bias[place]
    return result


@pytest.mark.parametrize("revin", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@torch.no_grad()
def test_it_is_what_loops_compute(norm: str, revin: bool) -> None:
    model = tsmixer(norm=norm, revin=revin)
    level = X.mean(-1, keepdim=True) if revin else torch.zeros(5, 3, 1, dtype=X.dtype)
    spread = ((X - level).square().mean(-1, keepdim=True) + 1e-5).sqrt() if revin else torch.ones_like(level)
    x = (X - level) / spread
    for block in model.blocks:
        steps = normalized(block.time_norm, x)
        mixed = x.clone()
        for b in range(5):
            for c in range(3):
                mixed[b, c] += (block.time.weight @ steps[b, c] + block.time.bias).clamp_min(0)
        features = normalized(block.feature_norm, mixed)
        x = mixed.clone()
        for b in range(5):
            for step in range(6):
                hidden = (block.up.weight @ features[b, :, step] + block.up.bias).clamp_min(0)
                x[b, :, step] += block.down.weight @ hidden + block.down.bias
    expected = torch.empty(5, 3, 4, dtype=X.dtype)
    for b in range(5):
        for c in range(3):
            expected[b, c] = (model.head.weight @ x[b, c] + model.head.bias) * spread[b, c] + level[b, c]
    torch.testing.assert_close(model(X), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("norm", NORMS)
def test_every_block_has_layers_of_its_own(norm: str) -> None:
    model = tsmixer(norm=norm, depth=3)
    block = 2 * 2 * 3 * 6 + (6 * 6 + 6) + (3 * 5 + 5) + (5 * 3 + 3)
    assert sum(p.numel() for p in model.parameters()) == 3 * block + (6 * 4 + 4)
    model(X).square().sum().backward()
    first, second, _ = model.blocks
    for name, parameter in first.named_parameters():
        other = second.get_parameter(name)
        assert parameter is not other
        assert not torch.equal(parameter.grad, other.grad)


def test_batch_norm_learns_its_statistics_in_training_alone() -> None:
    model = tsmixer(revin=False)
    norm = model.blocks[0].time_norm
    model(X + 3.0)
    torch.testing.assert_close(norm.running_mean, 0.1 * (X + 3.0).mean(0).flatten(), rtol=1e-10, atol=1e-12)
    model.eval()
    before = norm.running_mean.clone()
    alone = torch.cat([model(window.unsqueeze(0)) for window in X])
    torch.testing.assert_close(alone, model(X), rtol=1e-11, atol=1e-12)  # no window depends on another
    assert torch.equal(norm.running_mean, before)


def test_dropout_is_for_training_alone() -> None:
    model = tsmixer(norm="layer", dropout=0.5)
    assert not torch.allclose(model(X), model(X))
    torch.testing.assert_close(model.eval()(X), tsmixer(norm="layer")(X), rtol=0, atol=0)


@pytest.mark.parametrize("norm", NORMS)
def test_gradients_are_those_of_the_function(norm: str) -> None:
    model, x = tsmixer(norm=norm, depth=1).eval(), X[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(model, (x,))


def test_what_does_not_fit_is_refused() -> None:
    for x in (X[0], X[:, :2], X[..., :5], X.long()):
        with pytest.raises(ValueError, match=r"\(B, 3 channels, 6 steps of look-back\), got"):
            tsmixer()(x)
