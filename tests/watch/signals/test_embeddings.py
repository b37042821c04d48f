import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import trimtab as tt
from trimtab.watch.signals import embeddings
from trimtab.watch.signals.embeddings import embedding_variability, token_embedding_variability

tables = st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000)).map(
    lambda shape: torch.randn(shape[:2], generator=torch.Generator().manual_seed(shape[2]))
)


@settings(deadline=None, max_examples=25)
@given(table=tables, factor=st.floats(-8, 8), shift=st.floats(-8, 8))
def test_the_definition_and_its_laws(table, factor, shift) -> None:
    """The spread of a row scales with it and knows no offset; the order of rows and of entries does not matter."""
    rows = [[x - sum(row) / len(row) for x in row] for row in table.tolist()]
    each = [math.sqrt(sum(x * x for x in row) / len(row)) for row in rows]
    mean = sum(each) / len(each)
    std = math.sqrt(sum((x - mean) ** 2 for x in each) / len(each))
    found = token_embedding_variability(table)
    assert found == pytest.approx((mean, std), abs=1e-6)
    moved = token_embedding_variability((table * factor + shift).flip(0, 1))
    assert moved == pytest.approx((abs(factor) * found.mean, abs(factor) * found.std), abs=2e-5)


def test_at_a_normal_start_it_is_the_scale() -> None:
    """Mean s and standard deviation s / sqrt(2 d); each within four of its own standard errors."""
    torch.manual_seed(0)
    rows, d, s = 4000, 64, 0.02
    found = token_embedding_variability(torch.randn(rows, d) * s)
    spread = s / math.sqrt(2 * d)
    bias = s * 0.75 / d  # E of a sample's standard deviation is s (1 - 3 / (4 d)) to this order
    assert abs(found.mean - (s - bias)) < 4 * spread / math.sqrt(rows)
    assert abs(found.std - spread) < 4 * spread / math.sqrt(2 * rows) + spread / d


def test_half_precision_and_many_rows_are_no_different(monkeypatch) -> None:
    torch.manual_seed(0)
    table = torch.randn(50, 8).bfloat16()
    expected = token_embedding_variability(table.double())
    monkeypatch.setattr(embeddings, "_AT_ONCE", 24)  # three rows at a time
    assert token_embedding_variability(table) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(0, 3), torch.zeros(2, 3, dtype=torch.long)], ids=str)
def test_what_is_no_table_is_refused(bad) -> None:
    with pytest.raises(ValueError, match="vocabulary"):
        token_embedding_variability(bad)


def test_every_table_of_a_model_once() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"words": nn.Embedding(9, 4), "places": nn.Embedding(5, 4), "again": nn.Embedding(9, 4)})
    model["again"].weight = model["words"].weight
    found = embedding_variability(model)
    assert list(found) == ["words", "places"]
    assert found["places"] == token_embedding_variability(model["places"].weight)
    config = tt.SigmaReparam("one", embeddings=True)
    tt.reparametrize_(model, config, lambda module, name: name == "places")
    in_use = tt.effective_weight(model["places"])
    assert embedding_variability(model)["places"] == pytest.approx(token_embedding_variability(in_use))
    assert embedding_variability(model)["places"] != pytest.approx(found["places"], rel=1e-2)


def test_a_model_that_is_a_table_has_no_name_here_and_one_in_the_log(tmp_path) -> None:
    table = nn.Embedding(7, 4)
    tev = token_embedding_variability(table.weight)
    assert embedding_variability(table) == {"": tev}
    with tt.Watch(table, tmp_path / "run") as watch:
        watch.step(1.0)
    assert watch.last["tev"] == {"(root)": list(tev)}
