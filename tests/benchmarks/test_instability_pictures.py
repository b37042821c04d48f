"""What the benchmarks about entropy collapse, sharpness and update norms rest on."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from trimtab.report.runlog import read_run
from trimtab.stabilizers import stabilize_
from trimtab.train import Hardware, train


@pytest.mark.parametrize("stabilizer", ["none", "sigma:gamma_init=one:init_std=0.4:remove_norms=true"])
def test_heat_multiplies_the_logits_in_its_steps_only_and_remembers_them(bench, stabilizer: str) -> None:
    recipe = replace(bench("entropy_collapse").plain(quick=True), heat=4.0, heat_from=2, heat_until=4)

    def drawn() -> torch.nn.Module:
        torch.manual_seed(0)
        model = recipe.task().model
        stabilize_(model, stabilizer)
        return model.blocks[1].attention.query

    query, x = drawn(), torch.randn(2, 16, 64)
    query.eval()
    cold = query(x)
    query.train()
    found = [query(x) for _ in range(2)]
    resumed = drawn()
    resumed.load_state_dict(query.state_dict())
    found += [resumed(x) for _ in range(2)]
    for output, factor in zip(found, (1, 4, 4, 1), strict=True):
        torch.testing.assert_close(output, factor * cold, rtol=0, atol=0)  # powers of two: exact


def test_measuring_sharpness_leaves_the_run_as_it_was(bench, tmp_path: Path) -> None:
    sharp = bench("sharpness_entropy")
    recipe = replace(sharp.recipes(quick=True)["digits"], steps=4, watch_every=2, eval_every=2, sharpness_batch=8)
    plain = sharp.ImagesRecipe(**{name: getattr(recipe, name) for name in sharp.ImagesRecipe.__dataclass_fields__})
    runs = {}
    for name, wanted in (("sharp", recipe), ("plain", plain)):
        train(wanted, tmp_path / name, lambda progress: None, hardware=Hardware(accelerator="cpu"))
        runs[name] = read_run(tmp_path / name)
    measured = runs["sharp"].column(sharp.RAW), runs["sharp"].column(sharp.PRECONDITIONED)
    assert np.isfinite(measured)[:, 1:].all()
    np.testing.assert_array_equal(runs["sharp"].column("loss"), runs["plain"].column("loss"))
    np.testing.assert_array_equal(runs["sharp"].entropy, runs["plain"].entropy)
    weights = [(tmp_path / name / "checkpoints/step-00000004/model.safetensors").read_bytes() for name in runs]
    assert weights[0] == weights[1]


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(-6, 6), st.integers(0, 999))
def test_no_idealised_adam_step_is_shorter_than_proposition_3_2_allows(
    bench, rows: int, columns: int, noise: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mean, spread = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    variance = (10**noise * spread).square()
    step = mean / (mean.square() + variance).sqrt()
    bound = bench("update_norms").adam_update_norm_bound(mean, variance)
    assert torch.linalg.matrix_norm(step, 2) >= bound * (1 - 1e-12)


def test_the_bound_is_reached_by_orthogonal_signs_and_is_that_of_the_paper(bench) -> None:
    bound = bench("update_norms").adam_update_norm_bound
    signs = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    signs = torch.kron(signs, torch.kron(signs, signs))  # Hadamard, 8 × 8: every singular value is sqrt(8)
    torch.testing.assert_close(bound(3 * signs, torch.zeros_like(signs)), torch.linalg.matrix_norm(signs, 2))
    mean, variance = torch.rand(2, 8, 8, dtype=torch.float64)
    expected = 8**0.5 * (1 - (variance / (mean**2 + variance)).mean()) ** 0.5
    torch.testing.assert_close(bound(mean, variance), expected)
    assert bound(torch.zeros(3, 3), torch.zeros(3, 3)) == 0


def test_rank_correlations_are_those_of_scipy_and_of_regression_on_the_groups(bench) -> None:
    rank_correlation = bench("rank_correlation").rank_correlation
    generator = np.random.default_rng(0)
    x, noise = generator.integers(0, 9, size=(2, 40)).astype(float)  # with ties
    groups = np.repeat(np.arange(4.0), 10)
    y = noise - x + 5 * groups
    assert rank_correlation(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
    indicators = np.eye(4)[groups.astype(int)]
    left = [
        ranks - indicators @ np.linalg.lstsq(indicators, ranks, rcond=None)[0]
        for ranks in (stats.rankdata(x), stats.rankdata(y))
    ]
    assert rank_correlation(x, y, groups) == pytest.approx(np.corrcoef(*left)[0, 1], abs=1e-12)
    assert np.isnan(rank_correlation(x, np.ones(40)))


def test_intervals_of_correlations_draw_runs_and_have_no_ends_where_nothing_can_be_drawn(bench) -> None:
    module = bench("rank_correlation")
    x = np.random.default_rng(1).normal(size=200)
    y = x + np.random.default_rng(2).normal(size=200)
    value, low, high = module.with_interval(lambda runs: module.rank_correlation(x[runs], y[runs]), 200)
    assert low < value < high
    # the standard error of a rank correlation, Bonett and Wright (Psychometrika 65, 2000); a bootstrap of 1,000 is near
    expected = 2 * 1.96 * np.sqrt((1 + value**2 / 2) / (200 - 3)) * (1 - value**2)
    assert high - low == pytest.approx(expected, rel=0.25)
    alone = np.arange(3)  # every run in a group of its own
    found = module.with_interval(lambda runs: module.rank_correlation(x[runs], y[runs], alone[runs]), 3)
    assert np.isnan(found).all()
