from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal attention of 2 heads over 16 features; remembers the query and key of its last call."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.qkv, self.out, self.dropout = nn.Linear(16, 48), nn.Linear(16, 16), dropout

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        self.last = query.detach(), key.detach()
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Tiny(nn.Module):
    """Two blocks of attention and an MLP over 11 tokens; predicts the next one."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 16)
        self.positions = nn.Parameter(torch.randn(8, 16))
        self.attentions = nn.ModuleList(Attention(dropout) for _ in range(2))
        self.mlps = nn.ModuleList(nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16)) for _ in range(2))
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(16, 11)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions[: tokens.shape[-1]]
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            x = x + self.drop(attention(x))
            x = x + self.drop(mlp(x))
        return self.head(x)


def next_token_loss(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, after: Callable = lambda loss: None) -> None:
    """A plain loop over random tokens, (4, 9); `after` is called with the loss of each step."""
    for _ in range(steps):
        loss = next_token_loss(model, torch.randint(11, (4, 9)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        after(loss)


@pytest.fixture
def tiny() -> Callable[..., nn.Module]:
    """`tiny(dropout=...)` makes the same small Transformer every time."""

    def make(dropout: float = 0.0) -> nn.Module:
        torch.manual_seed(0)
        return Tiny(dropout)

    return make


@pytest.fixture(name="train")
def train_fixture() -> Callable[..., None]:
    return train


@pytest.fixture
def loss_of() -> Callable[[nn.Module, Tensor], Tensor]:
    return next_token_loss


@pytest.fixture
def leaves_nothing() -> Callable[[nn.Module], None]:
    """`leaves_nothing(model)` fails when a watch has left a hook or a mode behind, anywhere in the process."""
    from torch.nn.modules import module as modules
    from torch.optim import optimizer as optimizers
    from torch.overrides import _get_current_function_mode_stack

    from trimtab.watch.taps import patches

    def check(model: nn.Module) -> None:
        assert not model._forward_hooks
        assert not model._forward_pre_hooks
        assert not modules._global_forward_hooks
        assert not modules._global_forward_pre_hooks
        assert not optimizers._global_optimizer_pre_hooks
        assert not _get_current_function_mode_stack()
        assert not patches._open
        assert not patches._replaced

    return check
