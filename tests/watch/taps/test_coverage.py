"""The table of what was seen, and attention that shows only in the weights that modules return."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trimtab.watch.observe import observe


class Seen(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Returns(nn.Module):
    """Own attention: output and weights (B, H, L, S), with or without dropout."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mask = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool).tril()
        weights = (x @ x.mT).masked_fill(~mask, -torch.inf).softmax(-1)
        weights = F.dropout(weights, self.dropout, self.training)
        return weights @ x, weights


class SecretAttention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x @ x.mT).softmax(-1) @ x


class Block(nn.Module):
    """A container whose class has Attention in its name, with the real one inside."""

    def __init__(self) -> None:
        super().__init__()
        self.secret = SecretAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.secret(x)


class BlockWithAttention(Block):
    pass


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.seen, self.returns, self.dropped = Seen(), Returns(), Returns(0.5)
        self.block, self.never = BlockWithAttention(), SecretAttention()
        self.projections = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "k_proj": nn.Linear(8, 8)})

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.dropped(self.returns(self.seen(x))[0])[0])


def test_every_kind_of_row() -> None:
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 3, 5, 8)
    with observe(model) as seen:
        model(x)
    table = {row.module: row for row in seen.coverage}
    assert [(name, row.seen, row.heads) for name, row in table.items()] == [
        ("seen", "exact", 3),
        ("returns", "exact", 3),
        ("block.secret", "not seen", 0),
        ("never", "not seen", 0),
        ("projections", "not seen", 0),
    ]
    assert "no logits" in table["returns"].why
    assert "watch.attention" in table["block.secret"].why
    assert "has not run" in table["never"].why
    assert list(seen.coverage.unseen) == ["block.secret", "never", "projections"]
    first, *lines = str(seen.coverage).splitlines()
    assert first.split() == ["module", "heads", "attention", "by", "seen"]
    assert [line.split()[0] for line in lines] == list(table)


def test_returned_weights_with_dropout_in_them_are_no_distribution() -> None:
    """Entropies come from whole rows alone; in evaluation there is no dropout."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Returns(0.5)), torch.randn(2, 3, 5, 8)
    with observe(model.train()) as seen:
        model(x)
    assert seen.heads == {}
    with observe(model.eval()) as seen:
        _, weights = model(x)
    entropy = torch.special.entr(weights).sum(-1)
    heads = seen.heads["0"]
    torch.testing.assert_close(heads.entropy, entropy.mean((0, 2)))
    keys = torch.arange(1, 6).clamp(min=2)
    torch.testing.assert_close(heads.normalized, (entropy / keys.log())[..., 1:].mean((0, 2)))
    assert heads.max_logit.isnan().all()
    assert heads.logit_norm.isnan().all()


def test_other_tensors_of_four_dimensions_are_no_weights() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x * 2

    with observe(Pair()) as seen:
        seen._model(torch.randn(2, 3, 5, 8))
    assert seen.heads == {}
    assert len(seen.coverage) == 0
    assert "no attention" in str(seen.coverage)


@pytest.mark.parametrize("names", [("to_q", "to_k"), ("query", "key"), ("wq", "wk"), ("qkv",), ("c_attn",)])
def test_projections_of_queries_and_keys_look_like_attention(names) -> None:
    model = nn.ModuleDict({"mixer": nn.ModuleDict({name: nn.Linear(2, 2) for name in names})})
    with observe(model) as seen:
        pass
    assert list(seen.coverage.unseen) == ["mixer"]
