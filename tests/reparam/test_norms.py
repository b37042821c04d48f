"""Removing norm layers."""

import pytest
import torch
from torch import nn

import trimtab as tt


class LlamaRMSNorm(nn.Module):
    """Named as Hugging Face names its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))


def test_every_norm_becomes_identity_shared_ones_too() -> None:
    shared = nn.LayerNorm(4)
    model = nn.ModuleDict(
        {
            "a": nn.Sequential(nn.Linear(4, 4), shared),
            "b": shared,
            "c": nn.RMSNorm(4),
            "d": LlamaRMSNorm(),
            "e": nn.BatchNorm1d(4),
            "f": nn.GroupNorm(2, 4),
        }
    )
    assert tt.remove_norms_(model) is model
    assert [type(m).__name__ for m in model.values()] == ["Sequential", *["Identity"] * 5]
    assert type(model["a"][1]) is nn.Identity
    assert {name for name, _ in model.named_parameters()} == {"a.0.weight", "a.0.bias"}


def test_a_filter_keeps_some() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    tt.remove_norms_(model, filter_fn=lambda module, name: name == "1")
    assert [type(m) for m in model] == [nn.LayerNorm, nn.Identity]


def test_refusals() -> None:
    with pytest.raises(tt.ConversionError, match="found no norm layer"):
        tt.remove_norms_(nn.Linear(2, 2))
    with pytest.raises(tt.ConversionError, match="that filter_fn accepts"):
        tt.remove_norms_(nn.Sequential(nn.LayerNorm(2)), filter_fn=lambda m, n: False)
    with pytest.raises(tt.ConversionError, match="the model itself is a norm layer"):
        tt.remove_norms_(nn.LayerNorm(2))
    with pytest.raises(TypeError, match=r"expected an nn\.Module"):
        tt.remove_norms_(3)


def test_one_norm_under_two_names_of_one_parent() -> None:
    model = nn.Module()
    model.first = model.second = nn.LayerNorm(4)
    tt.remove_norms_(model)
    assert type(model.first) is type(model.second) is nn.Identity
