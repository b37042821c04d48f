"""The numbers against float64 SVDs, closed forms, and what a converted model says of itself."""

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import trimtab as tt
from trimtab.inspect import Matrix, Report, inspect_checkpoint, measures
from trimtab.inspect.measures import measure, qk_share_of_all_heads
from trimtab.reparam.sigmas import sigma_gamma
from trimtab.watch.signals.embeddings import token_embedding_variability

# spectral_norm stops at a relative error of 1e-6 in float32; sums are made in float64.
SIGMA = {"rel": 2e-6}


def inspected(tmp_path: Path, **weights: Tensor) -> Report:
    path = tmp_path / "weights.pt"
    torch.save({name.replace("__", "."): weight for name, weight in weights.items()}, path)
    return inspect_checkpoint(path)


@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    scale=st.sampled_from([1e-12, 1.0, 1e12]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=40)
def test_a_matrix_is_measured_as_its_svd_says(
    rows: int, columns: int, scale: float, dtype: torch.dtype, seed: int
) -> None:
    weight = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)
    values = torch.linalg.svdvals(weight.double())
    found = measure(weight)
    assert found.sigma == pytest.approx(float(values[0]), **SIGMA)
    assert found.stable_rank == pytest.approx(float(values.square().sum() / values[0] ** 2), rel=4e-6)
    assert 1 - 4e-6 <= found.stable_rank <= min(rows, columns) * (1 + 4e-6)
    assert found.frobenius == pytest.approx(float(weight.double().norm()), rel=1e-12)
    assert found.rms == pytest.approx(found.frobenius / math.sqrt(rows * columns), rel=1e-12)
    assert found.max_abs == float(weight.double().abs().max())
    assert found.nonfinite == 0


@pytest.mark.parametrize("shape", [(20000, 60), (60, 20000), (200, 1500)], ids=["tall", "wide", "Lanczos"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_large_matrices_are_measured_as_their_svd_says(shape: tuple[int, int], scale: float) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * scale
    before = weight.clone()
    found = measure(weight)
    assert found.sigma == pytest.approx(float(torch.linalg.svdvals(weight.double())[0]), **SIGMA)
    assert torch.equal(weight, before)
    doubled = weight.double()
    assert measure(doubled).sigma == pytest.approx(found.sigma, **SIGMA)
    assert torch.equal(doubled, before.double())


def test_a_convolution_is_flattened_to_out_times_the_rest(tmp_path: Path) -> None:
    weight = torch.randn(6, 3, 2, 2)
    (matrix,) = inspected(tmp_path, conv__weight=weight).matrices
    assert matrix.shape == (6, 3, 2, 2)
    assert matrix.sigma == pytest.approx(float(torch.linalg.matrix_norm(weight.flatten(1).double(), 2)), **SIGMA)


def test_stacked_experts_have_a_sigma_each(tmp_path: Path) -> None:
    weight = torch.stack([torch.eye(3), 4 * torch.eye(3)])
    report = inspected(tmp_path, layers__0__mlp__experts__down_proj=weight)
    assert [(m.part, m.role) for m in report.matrices] == [("expert 0", "mlp out"), ("expert 1", "mlp out")]
    assert [m.sigma for m in report.matrices] == pytest.approx([1, 4])


def test_weights_that_are_not_finite_are_counted_and_named(tmp_path: Path) -> None:
    weight = torch.eye(4)
    weight[0, 1], weight[2, 2], weight[1, 1] = math.nan, math.inf, -7
    report = inspected(tmp_path, a__weight=weight, b__weight=torch.eye(2), b__bias=torch.tensor([math.nan, 1.0]))
    broken, whole = report.matrices
    assert (broken.nonfinite, broken.max_abs) == (2, 7)
    assert math.isnan(broken.sigma)
    assert math.isnan(broken.stable_rank)
    assert (whole.sigma, whole.stable_rank) == pytest.approx((1, 2))
    assert report.broken == ("a.weight", "b.bias")


def test_a_zero_weight_has_sigma_zero_and_no_stable_rank(tmp_path: Path) -> None:
    (matrix,) = inspected(tmp_path, a__weight=torch.zeros(3, 4)).matrices
    assert matrix.sigma == 0
    assert math.isnan(matrix.stable_rank)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16])
def test_small_floats_are_widened_exactly(dtype: torch.dtype, tmp_path: Path) -> None:
    weight = torch.randn(12, 10, generator=torch.Generator().manual_seed(2)).to(dtype)
    save_file({"a.weight": weight, "a.bias": weight[0].clone()}, tmp_path / "small.safetensors")
    report = inspect_checkpoint(tmp_path / "small.safetensors")
    (matrix,) = report.matrices
    assert matrix.dtype == str(dtype).removeprefix("torch.")
    assert matrix.sigma == pytest.approx(float(torch.linalg.matrix_norm(weight.double(), 2)), **SIGMA)
    assert report.vectors[0].max_abs == float(weight[0].double().abs().max())


def test_what_is_packed_is_listed_with_the_reason(tmp_path: Path) -> None:
    weights = {
        "a.weight": torch.eye(3),
        "ids": torch.arange(6).view(2, 3),
        "packed.weight": torch.zeros(4, 4, dtype=torch.int8),
        "scaled.weight": torch.ones(4, 4).to(torch.float8_e4m3fn),
        "scaled.weight_scale_inv": torch.ones(2, 2),
        "absent.weight": torch.empty(3, 3, device="meta"),
        "empty.weight": torch.empty(0, 3),
    }
    torch.save(weights, tmp_path / "packed.pt")
    report = inspect_checkpoint(tmp_path / "packed.pt")
    assert {skipped.name: skipped.reason for skipped in report.skipped} == {
        "ids": "int64: packed, or no weight",
        "packed.weight": "int8: packed, or no weight",
        "scaled.weight": "8-bit with scales of its own, which are not applied here",
        "scaled.weight_scale_inv": "scales of a packed weight",
        "absent.weight": "it has no values (meta device)",
        "empty.weight": "empty",
    }
    assert [matrix.name for matrix in report.matrices] == ["a.weight"]


def test_token_embeddings_have_their_variability(tmp_path: Path) -> None:
    table = torch.randn(50, 16)
    report = inspected(tmp_path, model__embed_tokens__weight=table, wpe__weight=torch.randn(9, 16))
    (embedding,) = report.embeddings
    rows = table.double().var(1, correction=0).sqrt()
    assert embedding.tev_mean == pytest.approx(float(rows.mean()), rel=1e-6)  # the rows are made in float32
    assert embedding.tev_std == pytest.approx(float(rows.std(correction=0)), rel=1e-5)
    assert tuple(token_embedding_variability(table)) == (embedding.tev_mean, embedding.tev_std)


def test_energy_of_all_heads_as_one_agrees_with_the_svd(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(40, 30, generator=generator), torch.randn(40, 36, generator=generator)
    energy = torch.linalg.svdvals(query.double().t() @ key.double()).square()
    for top in (1, 3):
        share = float(energy[:top].sum() / energy.sum())
        assert qk_share_of_all_heads(query, key, top) == pytest.approx(share, rel=1e-5)
    monkeypatch.setattr(measures, "_FULL", 8)  # as if it were large
    assert qk_share_of_all_heads(query, key, 1) == pytest.approx(float(energy[0] / energy.sum()), rel=1e-5)
    assert math.isnan(qk_share_of_all_heads(query, key, 2))


class Fused(nn.Module):
    """GPT-2's two ways to hold a fused weight, and an output of the same shape either way round."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.c_attn = Conv1D(24, 8) if transposed else nn.Linear(8, 24)
        self.c_proj = Conv1D(8, 8) if transposed else nn.Linear(8, 8)

    num_heads = 2


class Patches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Conv2d(3, 8, 2)
        self.embed_tokens = nn.Embedding(11, 8)
        self.attention = nn.MultiheadAttention(8, 2)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        (Fused(True), {}),
        (Fused(False), {}),
        (Fused(False), {"blocks": "heads"}),
        (Fused(False), {"blocks": "one", "gamma_init": "one"}),
        (Patches(), {"embeddings": True, "vectors": 2}),
    ],
    ids=["Conv1D", "Linear", "heads", "one", "patches"],
)
def test_converted_weights_show_sigma_gamma_and_the_sigma_in_use(
    model: nn.Module, options: dict[str, object], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    tt.reparametrize_(model, tt.SigmaReparam(**options))  # type: ignore[arg-type]
    with torch.no_grad():  # move the weights, so that the carried vectors are no longer exact
        for name, parameter in model.named_parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter) if "weight" in name else 0.1
    torch.save(model.state_dict(), tmp_path / "converted.pt")
    report = inspect_checkpoint(tmp_path / "converted.pt")
    assert not [vector for vector in report.vectors if "sigma" in vector.name or "gamma" in vector.name]
    state = model.state_dict()
    for name, (sigma, gamma) in sigma_gamma(model).items():
        rows: list[Matrix] = [matrix for matrix in report.matrices if matrix.name == name]
        several = len(sigma) > 1
        assert len(rows) == (3 if state[name].numel() == 192 else 1)
        in_use = [value for row in rows for value in row.sigma_in_use] if several else list(rows[0].sigma_in_use)
        assert in_use == pytest.approx(sigma.tolist(), rel=1e-5), name
        assert [g for row in rows for g in row.gamma][: len(gamma)] == pytest.approx(gamma.tolist()), name
        transposed = isinstance(model, Fused) and isinstance(model.c_attn, Conv1D) and len(rows) == 3
        matrix = (state[name].t() if transposed else state[name].flatten(1)).double()
        exact = [float(torch.linalg.matrix_norm(part, 2)) for part in matrix.chunk(len(rows))]
        assert [row.sigma for row in rows] == pytest.approx(exact, **SIGMA)
