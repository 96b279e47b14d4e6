"Laws of sedm_kit.explore: errors that are what they say, runs that converge, ratios that are exact, lambdas that are best, weights and grids as the kit has them."
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sedm_kit.analytic import GaussianMixture, gaussian_flow
from sedm_kit.diagnostics import gaussian_variance, linear_denoiser, neutral_lambda
from sedm_kit.explore import (GRIDS, SCHEDULES, Grid, NetworkError, Repair, Run, Weighting, drift, exact_ends, exact_states, repair,
                              schedule_sigmas, small_mixture, solver_errors, states, steps_per_decade, three_runs, training_norms,
                              weight_panels, weights_at)
from sedm_kit.noise import edm_sigmas, iddpm_sigmas, sigma_from_alphas, ddpm_alphas_cumprod, snr, ve_sigmas, vp_sigmas
from sedm_kit.sampler import SOLVERS, sample
from sedm_kit.weights import PREDICTIONS, SCHEMES, loss_weight

mixture = small_mixture()
GAUSSIAN = GaussianMixture(torch.zeros(1, 1, 2, 2), [1.0], cov=torch.diag(torch.tensor([0.3, 0.6, 1.0, 1.5], dtype=torch.float64))[None])
NOTHING = NetworkError()


# ---- errors by hand

def test_no_error_is_the_exact_denoiser():
    x = mixture.sample(8, 0.5, torch.Generator().manual_seed(0))
    assert_close(NOTHING.spoil(mixture)(x, 0.5), mixture.denoiser()(x, 0.5))


@settings(max_examples=20)
@given(scale=st.floats(0.5, 1.5), level=st.floats(0.5, 2.0), sigma=st.floats(0.01, 50.0))
def test_errors_add_up_as_they_are_named(scale, level, sigma):
    x = mixture.sample(4, sigma, torch.Generator().manual_seed(0))
    expected = mixture.mean + scale * (mixture.denoiser()(x, level * sigma) - mixture.mean)
    assert_close(NetworkError(scale, 0.0, level).spoil(mixture)(x, torch.tensor(sigma, dtype=torch.float64)), expected)


@pytest.mark.parametrize("sigma", [0.01, 0.3, 20.0])
def test_noise_is_in_units_of_c_out_fresh_each_time_and_from_its_seed(sigma):
    x, data = mixture.sample(4000, sigma, torch.Generator().manual_seed(0)), mixture.denoiser().sigma_data
    level, noisy = torch.tensor(sigma, dtype=torch.float64), NetworkError(noise=0.2).spoil(mixture)
    first, second = noisy(x, level), noisy(x, level)
    assert_close((first - mixture.denoiser()(x, level)).std().item(), 0.2 * sigma * data / math.hypot(sigma, data), rtol=0.02, atol=0)
    assert not torch.equal(first, second) and torch.equal(first, NetworkError(noise=0.2).spoil(mixture)(x, level))


@pytest.mark.parametrize("bad, message", [(dict(scale=0.0), "scale .* positive, got 0.0"), (dict(scale=math.nan), "scale .* got nan"), (dict(noise=-0.1), "noise .* not negative, got -0.1"),
                                          (dict(noise=math.inf), "noise .* finite"), (dict(level=-1.0), "told level .* positive, got -1.0")])
def test_an_impossible_error_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        NetworkError(**bad)


# ---- grids

def test_grids_are_those_of_the_kit():
    assert torch.equal(Grid(n=9, rho=3.0, sigma_min=0.01, sigma_max=50.0).sigmas(), edm_sigmas(9, 0.01, 50.0, 3.0))
    for name, made in (("VP", vp_sigmas), ("VE", ve_sigmas), ("iDDPM", iddpm_sigmas)):
        assert torch.equal(Grid(name, 9, 3.0, 0.01, 50.0).sigmas(), made(9, 0.01, 50.0))


@pytest.mark.parametrize("bad, message", [(dict(name="DDIM"), "unknown grid 'DDIM'; known: EDM, VP"), (dict(n=0), "at least 1, got 0"), (dict(rho=-1.0), "rho"), (dict(sigma_min=0.0), "0 < sigma_min"),
                                          (dict(sigma_max=math.nan), "sigma_max"), (dict(name="iDDPM", n=5000), "5000 were asked for")])
def test_an_impossible_grid_is_refused(bad, message):
    with pytest.raises(ValueError, match=message):
        Grid(**bad).sigmas()


@settings(max_examples=30)
@given(name=st.sampled_from(list(GRIDS)), n=st.integers(2, 60))
def test_steps_per_decade_count_the_steps(name, n):
    sigmas = Grid(name, n).sigmas()
    middle, density = steps_per_decade(sigmas)
    assert_close((1 / density).sum(), (sigmas[0] / sigmas[-2]).log10())
    assert ((middle < sigmas[:-2]) & (middle > sigmas[1:-1])).all()


def test_one_step_has_no_density():
    with pytest.raises(ValueError, match="at least 2"):
        steps_per_decade(Grid(n=1).sigmas())


# ---- runs

@pytest.mark.parametrize("n", [2, 5, 18, 29, 30, 40])
def test_the_converged_run_has_converged(n):
    seen, _, images = exact_states(mixture, Grid(n=n), 64)
    exact = exact_ends(mixture, 80.0, 64)
    assert len(seen) == n and abs(images.var(0).mean() / exact.var(0).mean() - 1) < 1e-3


def test_the_exact_path_of_a_gaussian_is_the_one_in_closed_form():
    grid = Grid(n=12)
    seen, _, images = exact_states(GAUSSIAN, grid, 32)
    for k in (3, 7, 11):
        assert_close(seen[k], gaussian_flow(GAUSSIAN, seen[0], 80.0, float(grid.sigmas()[k])), rtol=1e-3, atol=1e-3)
    assert_close(exact_ends(GAUSSIAN, 80.0, 32), gaussian_flow(GAUSSIAN, seen[0], 80.0), rtol=1e-4, atol=1e-4)


def test_states_are_those_of_the_sampler():
    grid = Grid(n=7)
    seen, norms, images = states(mixture.denoiser(), mixture, grid, 8, "heun", converged=False, scaling=1.02)
    assert_close(images, sample(mixture.denoiser(), seen[0], grid.sigmas(), solver="heun", scaling=1.02))
    eps = (seen[3] - mixture.denoiser()(seen[3], float(grid.sigmas()[3]))) / grid.sigmas()[3]
    assert_close(norms[3], eps.flatten(1).norm(dim=1))


def test_one_step_cannot_be_split():
    with pytest.raises(ValueError, match="N must be at least 2, got 1"):
        drift(mixture, Run(grid=Grid(n=1)))


def test_without_any_error_every_ratio_is_one():
    found = drift(mixture, Run(converged=True), 32)
    for key in ("norm", "variance"):
        assert_close(found[key], torch.ones(18, dtype=torch.float64))
        assert (found[f"{key}_error"] < 1e-9).all()
    assert found["fd"] < 1e-9


@pytest.mark.parametrize("solver, error", [("euler", NOTHING), ("heun", NetworkError(scale=0.97)), ("euler", NetworkError(level=1.1))])
def test_on_a_gaussian_the_variance_is_that_of_the_closed_form(solver, error):
    run = Run(error, Grid(n=12), solver)
    images, exact = states(error.spoil(GAUSSIAN), GAUSSIAN, run.grid, 64, solver, converged=False)[2], exact_ends(GAUSSIAN, 80.0, 64)
    spectrum = GAUSSIAN.cov.diagonal()
    spoilt = error.spoil(GaussianMixture(torch.zeros(1, 1, 1, 4), [1.0], cov=torch.diag(spectrum)[None]))
    ratio = gaussian_variance(spectrum, run.grid.sigmas(), spoilt, solver=solver) / gaussian_variance(spectrum, edm_sigmas(400, 1e-4), linear_denoiser(spectrum), solver="rk3")
    assert_close(((images / exact) ** 2).mean(0).flatten(), ratio, rtol=1e-2, atol=0)


def test_training_norms_are_of_the_spoilt_denoiser_on_the_exact_path():
    grid, error = Grid(n=5), NetworkError(scale=1.1)
    x, level = exact_states(mixture, grid, 16)[0][2], grid.sigmas()[2]
    assert_close(training_norms(mixture, error, grid, 16)[2], ((x - error.spoil(mixture)(x, level)) / level).flatten(1).norm(dim=1))


def test_the_split_separates_the_errors():
    runs = three_runs(NetworkError(scale=1.02), Grid(), "euler")
    found = {name: drift(mixture, run) for name, run in runs.items()}
    end = {name: float(one["variance"][-1]) for name, one in found.items()}
    assert end["discretisation"] < 0.8 < end["both"] < 1 < 1.2 < end["network"]
    assert runs["network"].converged and runs["discretisation"].error == NOTHING and not runs["both"].converged


def test_few_seeds_tell_what_many_tell():
    few, many = (drift(mixture, Run(NetworkError(scale=0.98), Grid(), "heun"), n)["variance"][-1] for n in (64, 1024))
    assert abs(few - many) < 0.03


def test_error_bars_hold():
    "The spread of ratios over groups of seeds is what the bar of one group says."
    run, grid = Run(NetworkError(scale=0.98)), Grid()
    exact, plain, _ = exact_states(mixture, grid, 1024)
    x = states(run.error.spoil(mixture), mixture, grid, 1024, "euler", converged=False)[0]
    squares = [(z - mixture.mean).flatten(2).square().mean(2)[-1].reshape(16, 64) for z in (x, exact)]
    ratios = squares[0].mean(1) / squares[1].mean(1)
    assert 0.6 < ratios.std() / drift(mixture, run, 64)["variance_error"][-1] < 1.7


# ---- repairs

@pytest.mark.parametrize("run", [Run(), Run(solver="heun"), Run(NetworkError(scale=0.98), converged=True), Run(NetworkError(level=0.9))])
def test_no_other_constant_is_better(run):
    found = repair(mixture, run, 128)
    away = [drift(mixture, replace(run, scaling=found.scaling + step), 128)["fd"] for step in (-0.02, -0.004, 0.004, 0.02)]
    assert found.after < min(away) and away[0] > away[1] and away[3] > away[2]
    assert_close(found.after, drift(mixture, replace(run, scaling=found.scaling), 128)["fd"])
    assert_close(found.before, drift(mixture, replace(run, scaling=1.0), 128)["fd"])
    assert str(found) == f"λ = {found.scaling:.4f} takes away {100 * found.share:.0f} % of the distance (of the seeds it was found with)"


def test_on_a_gaussian_it_is_the_neutral_lambda():
    assert abs(repair(GAUSSIAN, Run(grid=Grid(n=12)), 2048).scaling - neutral_lambda(GAUSSIAN.cov.diagonal(), edm_sigmas(12), solver="euler")) < 2e-3


def test_what_a_constant_cannot_repair_is_said():
    noisy = repair(mixture, Run(NetworkError(noise=0.3), converged=True), 128)
    assert noisy.share < 0.8 and str(noisy).startswith("no constant λ repairs it: the best, λ = ")
    assert str(repair(mixture, Run(converged=True), 64)) == "nothing to repair" and repair(mixture, Run(converged=True), 64).scaling == 1
    assert str(Repair(None, 1.0, 0.5)) == "no constant λ repairs it"
    assert repair(mixture, Run(), 64, bounds=(0.99, 1.01)).scaling is None
    assert "no constant λ repairs it: the best, λ" in str(repair(mixture, Run(grid=Grid(n=2)), 64))


def test_a_search_can_be_stopped():
    calls = []
    def check():
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        repair(mixture, Run(NetworkError(scale=1.013)), 32, check=check)
    assert len(calls) == 3


# ---- weights

@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_rises_and_spans_its_range(name):
    sigma = schedule_sigmas(name)
    assert sigma.dtype == torch.float64 and (sigma.diff() > 0).all() and len(sigma) == 120
    if name.startswith("DDPM"):
        chain = sigma_from_alphas(ddpm_alphas_cumprod(name.split()[1]))
        assert_close(sigma[60].item(), chain[504].item(), rtol=1e-3, atol=0)


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="unknown schedule 'sigmoid'; known: EDM training"):
        weight_panels(Weighting("sigmoid"))


@settings(max_examples=40)
@given(name=st.sampled_from(SCHEMES), form=st.sampled_from(PREDICTIONS), k=st.floats(0, 5), gamma=st.floats(0, 3), cap=st.floats(0.1, 20), data=st.floats(0.1, 2), clamp=st.one_of(st.none(), st.floats(0.01, 1)))
def test_weights_are_those_of_the_kit(name, form, k, gamma, cap, data, clamp):
    weighting = Weighting("DDPM cosine", form, k, gamma, cap, data, clamp)
    panels, sigma = weight_panels(weighting), schedule_sigmas("DDPM cosine")
    expected = loss_weight(name, snr(sigma), form, k=k, gamma=gamma, cap=cap, sigma_data=data, snr_min=clamp)
    assert_close(panels["weight"][name], expected)
    assert_close(panels["share"][name] / panels["share"]["constant"], expected / panels["weight"]["constant"] * (panels["weight"]["constant"].sum() / expected.sum()))
    assert_close(weights_at(weighting, 0.7)[name][form], loss_weight(name, snr(0.7), form, k=k, gamma=gamma, cap=cap, sigma_data=data, snr_min=clamp).item())


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_a_level_without_weights_is_refused(sigma):
    with pytest.raises(ValueError, match=f"positive and finite, got {sigma}"):
        weights_at(Weighting(), sigma)


# ---- solvers

@pytest.mark.parametrize("solver, order", dict(euler=1, heun=2, midpoint=2, rk3=3, ab2=2, dpmpp2m=2).items())
def test_on_a_fine_grid_the_order_is_that_of_theory(solver, order):
    found = solver_errors(mixture if solver == "midpoint" else GAUSSIAN, Grid(n=60), solver)  # on one Gaussian midpoint's error of second order nearly cancels
    assert abs(found["order"] - order) < 0.35
    assert found["steps"] == [30, 45, 60, 90] and found["here"] == found["error"][2] and np.all(np.diff(found["evaluations"]) > 0)


def test_errors_are_distances_to_the_exact_ends():
    found, count = solver_errors(GAUSSIAN, Grid("VE", 10), "euler", 16), 16
    start = exact_states(GAUSSIAN, Grid(n=2), count)[0][0]
    end = sample(GAUSSIAN.denoiser(), start, ve_sigmas(10, 0.002, 80.0), solver="euler")
    assert_close(found["here"], (end - gaussian_flow(GAUSSIAN, start, 80.0)).flatten(1).square().mean(1).sqrt().median().item(), rtol=1e-3, atol=0)


def test_a_single_point_has_no_order_and_few_steps_have_one():
    assert math.isnan(solver_errors(mixture, Grid(), "heun", shares=(1,))["order"])
    assert solver_errors(mixture, Grid(n=1), "heun")["steps"] == [1, 2]
    assert solver_errors(mixture, Grid(), "heun", shares=(1,))["here"] == solver_errors(mixture, Grid(), "heun")["here"]


def test_everything_is_computed_once():
    for made in (lambda: drift(mixture, Run(), 64), lambda: weight_panels(Weighting()), lambda: solver_errors(mixture, Grid(), "ab2"), lambda: small_mixture()):
        assert made() is made()


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_can_be_explored(solver):
    assert 0 < drift(mixture, Run(NetworkError(1.01, 0.05, 1.02), Grid(n=6), solver), 16)["variance"][-1] < 5
