"Laws of sedm_kit.solvers: steps for a budget, one scaling in every solver, orders of convergence, and a search that refuses to report an edge."
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sedm_kit.analytic import GaussianMixture, gaussian_flow, scale_error
from sedm_kit.diagnostics import linear_denoiser, neutral_lambda
from sedm_kit.metrics import FeatureStats
from sedm_kit.noise import edm_sigmas
from sedm_kit.sampler import SOLVERS, count_evaluations, sample, sample_seeds
from sedm_kit.solvers import block_lambda, block_stats, bracketed_minimum, convergence, paired_fd, steps_for

orders = {"euler": 1, "heun": 2, "midpoint": 2, "rk3": 3, "ab2": 2, "dpmpp2m": 2}
BLOCKS = [range(3_230_000 + 64 * k, 3_230_064 + 64 * k) for k in range(4)]
GAUSSIAN = GaussianMixture(torch.zeros(1, 1, 2, 2), [1.0], cov=torch.diag(torch.tensor([0.3, 0.6, 1.0, 1.5], dtype=torch.float64))[None])


def unit(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixture(seed):
    gen = torch.Generator().manual_seed(seed)
    factors = torch.randn(3, 4, 4, generator=gen, dtype=torch.float64)
    return GaussianMixture(torch.randn(3, 1, 2, 2, generator=gen), [0.2, 0.3, 0.5], cov=factors @ factors.mT / 8)


def ralston_step(slope, x, sigma, sigma_next, memory):
    "A user's own second-order solver."
    d, h = slope(x, sigma, 0), sigma_next - sigma
    return x + h * (d / 4 + 3 / 4 * slope(x + 2 / 3 * h * d, sigma + 2 / 3 * h, 1))


# ---- steps

@settings(max_examples=40)
@given(solver=st.sampled_from([*SOLVERS, ralston_step]), n=st.integers(1, 60), spare=st.integers(0, 5))
def test_steps_and_evaluations_are_inverse(solver, n, spare):
    nfe = count_evaluations(solver, n)
    assert steps_for(solver, nfe) == steps_for(solver, nfe, within=True) == n
    most = steps_for(solver, nfe + spare, within=True)
    assert count_evaluations(solver, most) <= nfe + spare < count_evaluations(solver, most + 1)
    if count_evaluations(solver, most) < nfe + spare:
        with pytest.raises(ValueError, match=f"cannot take exactly {nfe + spare} evaluations: {most} steps take"):
            steps_for(solver, nfe + spare)


@pytest.mark.parametrize("solver, nfe, message", [("heun", 36, "18 steps take 35 and 19 take 37"), ("rk3", 2, "needs 3 evaluations"), ("euler", 0, "nfe = 0"),
                                                  ("euler", 4.5, "integer"), ("euler", True, "integer"), ("leapfrog", 4, "unknown solver")])
def test_an_impossible_budget_is_refused(solver, nfe, message):
    with pytest.raises(ValueError, match=message):
        steps_for(solver, nfe)


# ---- one scaling in every solver

@settings(max_examples=40)
@given(solver=st.sampled_from([*SOLVERS, ralston_step]), seed=st.integers(0, 9999), n=st.integers(1, 10), lam=st.floats(0.8, 1.25))
def test_scaling_is_the_unscaled_solver_on_the_scaled_denoiser(solver, seed, n, lam):
    exact, x = mixture(seed).denoiser(), 80 * unit(3, 1, 2, 2, seed=seed)
    scaled = exact.like(lambda x, sigma, labels=None: x - (x - exact(x, sigma)) / lam)
    assert_close(sample(exact, x, edm_sigmas(n), solver=solver, scaling=lam), sample(scaled, x, edm_sigmas(n), solver=solver), rtol=1e-6, atol=1e-6)


# ---- orders

@pytest.mark.parametrize("solver", SOLVERS)
def test_the_measured_order_is_that_of_theory(solver):
    x, denoiser = 80 * unit(16, 1, 2, 2), mixture(3).denoiser()
    found = convergence(denoiser, x, sample(denoiser, x, edm_sigmas(512), solver="rk3"), [48, 64, 96, 128], solver=solver)
    assert abs(found["order"] - orders[solver]) < 0.2
    assert found["error"] == sorted(found["error"], reverse=True) and found["steps"] == [48, 64, 96, 128]


def test_scaling_costs_a_solver_its_convergence():
    x = 80 * unit(8, 1, 2, 2)
    assert convergence(GAUSSIAN.denoiser(), x, gaussian_flow(GAUSSIAN, x, 80.0), [48, 64, 96, 128], solver="rk3", scaling=1.02)["order"] < 0.1


def test_an_order_needs_four_steps_and_an_error():
    x = 80 * unit(2, 1, 2, 2)
    with pytest.raises(ValueError, match="at least 4 numbers of steps"):
        convergence(GAUSSIAN.denoiser(), x, x, [8, 16, 32, 32])
    point = GaussianMixture(torch.zeros(1, 1, 2, 2), [1.0], 0.0)
    with pytest.raises(ValueError, match="no slope"):
        convergence(point.denoiser(), x, torch.zeros_like(x), [4, 8, 16, 32])


# ---- the search

@given(vertex=st.floats(-0.9, 0.9), depth=st.floats(-5, 5), width=st.floats(0.1, 10), place=st.floats(-3, 3), unit=st.floats(0.01, 10))
def test_a_parabola_gives_its_vertex_in_any_units(vertex, depth, width, place, unit):
    grid = place + unit * np.array([-2.0, -1.0, 0.0, 0.7, 2.0])
    assert bracketed_minimum(grid, depth + width * ((grid - place) / unit - vertex) ** 2) == pytest.approx(place + unit * vertex, abs=1e-6 * unit)


@given(values=st.lists(st.floats(-10, 10), min_size=3, max_size=8, unique=True))
def test_the_minimum_is_inside_or_refused(values):
    i, grid = int(np.argmin(values)), np.arange(len(values))
    if i in (0, len(values) - 1):
        with pytest.raises(ValueError, match="does not bracket"):
            bracketed_minimum(grid, values)
    else:
        assert abs(bracketed_minimum(grid, values) - i) <= 0.5 + 1e-9


@pytest.mark.parametrize("x, y", [([1, 2], [1, 0]), ([1, 3, 2], [1, 0, 1]), ([1, 2, 3], [1, 0]), ([1, 2, 3], [1, float("nan"), 1]), ([], [])])
def test_a_malformed_grid_is_refused(x, y):
    with pytest.raises(ValueError, match="at least 3 rising positions"):
        bracketed_minimum(x, y)


@pytest.mark.parametrize("solver, n", [("euler", 18), ("heun", 18), ("midpoint", 9), ("rk3", 6), ("ab2", 12), ("dpmpp2m", 12)])
def test_measured_lambda_of_a_gaussian_is_the_closed_form(solver, n):
    "With the same seeds' exact ends for the truth, finite samples of a Gaussian show no floor."
    blocks, spectrum = BLOCKS[:3], torch.diagonal(GAUSSIAN.cov)
    ends = [FeatureStats.of(gaussian_flow(GAUSSIAN, sample_seeds(GAUSSIAN.denoiser(), seeds, edm_sigmas(1), solver=lambda slope, x, *_: x), 80.0)) for seeds in blocks]
    lam = neutral_lambda(spectrum, edm_sigmas(n), solver=solver)
    half = max(0.3 * abs(lam - 1), 0.004)
    found = block_lambda(GAUSSIAN.denoiser(), blocks, edm_sigmas(n), ends, [lam - half, lam, lam + half, lam + 2 * half], solver=solver, micro_batch=64)
    assert abs(found.mean - lam) < 0.1 * abs(lam - 1) + 5e-4 and found.block_size == 64


def test_a_grid_beside_the_minimum_is_refused_not_reported():
    ends = block_stats(GAUSSIAN.denoiser(), BLOCKS, edm_sigmas(40), micro_batch=64)
    with pytest.raises(ValueError, match="does not bracket the minimum.*its end, 1.01"):
        block_lambda(GAUSSIAN.denoiser(), BLOCKS, edm_sigmas(12), ends, [0.99, 1.0, 1.01], solver="euler", micro_batch=64)


@pytest.mark.parametrize("blocks", [[], [range(4)], [range(4), range(4, 7)], [[], []], [[1], [2]]])
def test_blocks_that_give_no_error_bar_are_refused(blocks):
    with pytest.raises(ValueError, match="at least 2 blocks of equal size"):
        block_stats(GAUSSIAN.denoiser(), blocks, edm_sigmas(2))


def test_distances_are_paired_block_by_block():
    made = block_stats(GAUSSIAN.denoiser(), BLOCKS, edm_sigmas(18), solver="euler", micro_batch=64)
    assert max(paired_fd(made, made).values) < 1e-9
    exact = SimpleNamespace(mean=GAUSSIAN.mean.flatten(), cov=GAUSSIAN.cov)
    assert paired_fd(made, exact).mean > 0 and paired_fd(made, exact).n_blocks == 4
    with pytest.raises(ValueError, match="one truth per block"):
        paired_fd(made, made[:3])


@pytest.mark.parametrize("solver", ["heun", "rk3", "ab2"])
def test_a_network_error_stays_when_the_solver_is_converged(solver):
    spectrum, sigmas = torch.tensor([0.3, 1.0]), edm_sigmas(steps_for(solver, 96, within=True))
    exact, spoiled = (neutral_lambda(spectrum, sigmas, denoiser, solver=solver) for denoiser in (None, scale_error(linear_denoiser(spectrum), 0.99)))
    assert abs(exact - 1) < 0.002 and 0.01 < spoiled - exact < 0.025
