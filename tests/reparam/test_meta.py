"""Models converted on the meta device and given values later compute what models converted with values do."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import trimtab as tt
from trimtab.reparam import sigma_gamma

CONFIGS = pytest.mark.parametrize(
    "config", [tt.SigmaReparam(), tt.SigmaReparam("one", blocks="heads", embeddings=True)], ids=["spectral", "one"]
)


class Net(nn.Module):
    """Images and tokens in; two layers share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, stride=2)
        self.embed = nn.Embedding(10, 16)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True)
        self.up = nn.Linear(16, 16)
        self.down = nn.Linear(16, 16)
        self.head = nn.Linear(16, 10)
        self.tie()

    def tie(self) -> None:
        self.down.weight = self.up.weight

    def forward(self, image: Tensor, tokens: Tensor) -> Tensor:
        x = torch.cat([self.patch(image).flatten(2).transpose(1, 2), self.embed(tokens)], 1)
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head((x + self.down(torch.tanh(self.up(x)))).mean(1))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 4, 4, generator=generator), torch.randint(0, 10, (4, 5), generator=generator)


def plain() -> Net:
    torch.manual_seed(0)
    return Net()


def trained(config: tt.SigmaReparam) -> Net:
    model = tt.reparametrize_(plain(), config)
    train(model)
    return model


def on_meta(config: tt.SigmaReparam) -> Any:
    with torch.device("meta"):
        return tt.reparametrize_(Net(), config)


def emptied(config: tt.SigmaReparam) -> Any:
    model = on_meta(config).to_empty(device="cpu")
    for name, tensor in model.state_dict().items():
        if "gamma" in name or "sigma" in name:
            assert tensor.isnan().all(), name  # not garbage that looks like values
    return model


def train(model: nn.Module) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(4):
        loss = (model(*batch()) - 1).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def draw(model: nn.Module) -> None:
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if name.endswith("weight"):
            nn.init.trunc_normal_(parameter, std=0.02, generator=generator)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def assert_same_from_here_on(model: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(model.state_dict(), other.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in other.named_parameters()]
    assert train(model) == pytest.approx(train(other), rel=1e-5)


@CONFIGS
def test_ties_dtypes_and_shapes_are_those_of_a_model_with_values(config: tt.SigmaReparam) -> None:
    model, other = on_meta(config), tt.reparametrize_(plain(), config)
    assert all(tensor.is_meta for tensor in model.state_dict().values())
    assert model.down.gamma is model.up.gamma
    assert model.down.sigma_u is model.up.sigma_u
    for name, tensor in other.state_dict().items():
        mine = model.state_dict()[name]
        assert (mine.shape, mine.dtype) == (tensor.shape, tensor.dtype), name


@CONFIGS
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "to-empty"])
def test_a_converted_checkpoint(config: tt.SigmaReparam, assign: bool) -> None:
    other = trained(config)
    model = on_meta(config) if assign else emptied(config)
    model.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    model.tie()
    torch.testing.assert_close(model(*batch()), other(*batch()), rtol=0, atol=0)
    tt.refresh_(other, exact=True)
    tt.refresh_(model, exact=True)  # which also makes one gamma of the two that tied layers came to hold
    assert_same_from_here_on(model, other)


@CONFIGS
@pytest.mark.parametrize("assign", [True, False], ids=["assign", "to-empty"])
def test_a_plain_checkpoint(config: tt.SigmaReparam, assign: bool) -> None:
    model = on_meta(config) if assign else emptied(config)
    model.load_state_dict(plain().state_dict(), assign=assign)
    model.tie()
    torch.testing.assert_close(model(*batch()), plain()(*batch()))
    tt.refresh_(model, exact=True)
    other = tt.reparametrize_(plain(), tt.SigmaReparam(blocks=config.blocks, embeddings=config.embeddings))
    assert_same_from_here_on(model, other)  # gamma is sigma, whatever the configuration says


@CONFIGS
def test_each_layers_own_reset(config: tt.SigmaReparam) -> None:
    model = emptied(config)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    model.tie()
    tt.refresh_(model, exact=True)
    other = Net()
    other.load_state_dict({k: v for k, v in model.state_dict().items() if k.endswith(("weight", "bias"))})
    expected = tt.reparametrize_(other, config)
    if config.gamma_init == "spectral":  # the tied weight was drawn twice, and each layer had its own gamma by then
        with torch.no_grad():
            expected.up.gamma.copy_(model.up.gamma)
            model.down.gamma = model.up.gamma
    assert_same_from_here_on(model, expected)


@CONFIGS
def test_own_initialisation_then_refresh(config: tt.SigmaReparam) -> None:
    model, other = emptied(config), Net()
    model.tie()
    draw(model)
    draw(other)
    assert tt.refresh_(model, exact=True) is model
    assert model.down.gamma is model.up.gamma
    assert_same_from_here_on(model, tt.reparametrize_(other, config))


@CONFIGS
def test_a_gamma_that_was_set_is_kept(config: tt.SigmaReparam) -> None:
    model = emptied(config)
    model.tie()
    draw(model)
    with torch.no_grad():
        model.head.gamma.fill_(3.0)
    tt.refresh_(model, exact=True)
    sigma, gamma = sigma_gamma(model)["patch.weight"]
    torch.testing.assert_close(gamma, config.first_gamma(sigma))
    assert float(sigma_gamma(model)["head.weight"][1]) == 3.0
    with torch.no_grad():
        model.patch.gamma.fill_(2.0)
    tt.refresh_(model, exact=True)
    assert float(sigma_gamma(model)["patch.weight"][1]) == 2.0


def test_gammas_of_a_tied_weight_that_differ_stay_two() -> None:
    model = emptied(tt.SigmaReparam("one"))
    model.tie()
    draw(model)
    with torch.no_grad():
        model.up.gamma.fill_(3.0)
    tt.refresh_(model, exact=True)
    assert [float(layer.gamma.detach()) for layer in (model.up, model.down)] == [3.0, 1.0]


@CONFIGS
def test_what_a_model_on_meta_can_be_asked(config: tt.SigmaReparam) -> None:
    model = on_meta(config)
    state = [type(module) for module in model.modules()]
    assert sigma_gamma(model) == tt.sigma_error(model) == {}
    assert "head.weight" in tt.describe(model)
    assert tt.effective_weight(model.head).shape == (10, 16)
    assert tt.effective_weight(model.head).is_meta
    assert model(*(tensor.to("meta") for tensor in batch())).shape == (4, 10)
    assert tt.refresh_(model) is model
    with pytest.raises(tt.ConversionError, match=r"patch\.weight cannot be refreshed: it is on the meta device"):
        tt.refresh_(model, exact=True)
    with pytest.raises(tt.ConversionError, match=r"patch\.weight is on the meta device: give it values first"):
        tt.fold_(model)
    for module in copy.deepcopy(model).modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()  # as in a plain model, nothing happens
    assert [type(module) for module in model.modules()] == state


def test_a_class_without_reset_parameters_says_what_to_do() -> None:
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(4, 3)
    nn.init.normal_(conv1d.weight)
    with pytest.raises(AttributeError, match=r"Conv1D has no reset_parameters.*refresh_\(model, exact=True\)"):
        tt.reparametrize_(conv1d).reset_parameters()


@pytest.mark.parametrize("transfer", [lambda m: m.to("meta"), lambda m: copy.deepcopy(m).to(device="meta")])
def test_a_model_moved_to_meta_takes_a_plain_checkpoint_by_assignment(transfer: Callable[[Net], Net]) -> None:
    model = transfer(tt.reparametrize_(Net()))
    model.load_state_dict(plain().state_dict(), assign=True)
    torch.testing.assert_close(model(*batch()), plain()(*batch()))
    assert "head.gamma" in dict(model.named_parameters())


def test_another_default_device_does_not_matter() -> None:
    layer = nn.Linear(200, 200)
    with torch.device("meta"):
        tt.reparametrize_(layer)
    assert layer.sigma_u.device.type == "cpu"
