"Laws of sedm_kit.churn: the variance recursion against gaussian_variance, a product written by hand, and samples; what is neutral; what is refused."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sedm_kit.analytic import Denoiser, scale_error
from sedm_kit.churn import churned_lambda, churned_variance, neutral_s_noise
from sedm_kit.diagnostics import gaussian_variance, linear_denoiser, neutral_lambda
from sedm_kit.noise import edm_sigmas
from sedm_kit.sampler import Churn, sample

solvers = st.sampled_from(["euler", "heun", "midpoint", "rk3"])
spectra = st.lists(st.floats(1e-3, 4.0), min_size=1, max_size=5)


def by_hand(v, n, gamma, low, high, s_noise, lam=1.0, solver="euler"):
    "The recursion with factors written out, for one direction."
    sigmas, spread = edm_sigmas(n).tolist(), 80.0**2
    for sigma, sigma_next in zip(sigmas, sigmas[1:]):
        hat = sigma * (1 + gamma) if low <= sigma <= high else sigma
        slope = lambda s: s / (v + s**2) / lam
        gain = 1 + (sigma_next - hat) * slope(hat)
        if solver == "heun" and sigma_next > 0:
            gain = 1 + (sigma_next - hat) * (slope(hat) + slope(sigma_next) * gain) / 2
        spread = gain**2 * (spread + s_noise**2 * (hat**2 - sigma**2))
    return spread


@settings(max_examples=30)
@given(v=st.floats(1e-3, 4.0), n=st.integers(1, 40), gamma=st.floats(0, math.sqrt(2) - 1.001), s_noise=st.floats(0, 1.5), lam=st.floats(0.9, 1.1), solver=st.sampled_from(["euler", "heun"]))
def test_the_recursion_is_the_one_written_by_hand(v, n, gamma, s_noise, lam, solver):
    made = churned_variance([v], edm_sigmas(n), Churn(gamma * n, 0.05, 50.0, s_noise), solver=solver, scaling=lam)
    assert_close(made.item(), by_hand(v, n, gamma, 0.05, 50.0, s_noise, lam, solver), rtol=1e-6, atol=1e-12)


@settings(max_examples=30)
@given(spectrum=spectra, n=st.integers(1, 20), solver=solvers, lam=st.floats(0.9, 1.1), shrink=st.floats(0.9, 1.05))
def test_without_churn_it_is_gaussian_variance(spectrum, n, solver, lam, shrink):
    spoiled = scale_error(linear_denoiser(spectrum), shrink)
    for denoiser in (None, spoiled):
        assert_close(churned_variance(spectrum, edm_sigmas(n), Churn(0.0, s_noise=1.3), denoiser, solver=solver, scaling=lam),
                     gaussian_variance(spectrum, edm_sigmas(n), denoiser, solver=solver, scaling=lam), rtol=1e-7, atol=1e-12)


@settings(max_examples=30)
@given(spectrum=spectra, n=st.integers(1, 20), solver=solvers, s_churn=st.floats(0.1, 10), a=st.floats(0, 2))
def test_variance_is_linear_in_the_square_of_s_noise(spectrum, n, solver, s_churn, a):
    still, whole, made = (churned_variance(spectrum, edm_sigmas(n), Churn(s_churn, s_noise=s), solver=solver) for s in (0.0, 1.0, a))
    assert_close(made, still + a**2 * (whole - still), rtol=1e-6, atol=1e-12)
    assert (whole >= still).all()


@settings(max_examples=30)
@given(s_churn=st.floats(0, 60), n=st.integers(1, 20))
def test_churn_above_the_cap_changes_nothing(s_churn, n):
    cap = (math.sqrt(2) - 1) * n
    assert_close(churned_variance([0.5], edm_sigmas(n), Churn(cap + s_churn)), churned_variance([0.5], edm_sigmas(n), Churn(cap)))


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "rk3"])
def test_samples_have_the_predicted_variance(solver):
    gen, n = torch.Generator().manual_seed(1), 20_000
    noise = lambda x: torch.randn(x.shape, generator=gen, dtype=x.dtype)
    spectrum, churn = torch.tensor([0.01, 0.3, 2.0], dtype=torch.float64), Churn(6.0, 0.05, 50.0, 1.05)
    images = sample(linear_denoiser(spectrum), 80 * noise(torch.ones(n, 1, 1, 3, dtype=torch.float64)), edm_sigmas(18), solver=solver, churn=churn, scaling=1.02, noise=noise)
    ratio = images.flatten(1).square().mean(0) / churned_variance(spectrum, edm_sigmas(18), churn, solver=solver, scaling=1.02)
    assert (ratio - 1).abs().max() < 4 * math.sqrt(2 / n)


@settings(max_examples=10)
@given(v=st.floats(0.05, 4.0), n=st.integers(12, 24), gamma=st.floats(0.1, 0.4), solver=st.sampled_from(["euler", "midpoint"]))
def test_one_direction_is_repaired_by_either_knob(v, n, gamma, solver):
    churn = Churn(gamma * n)
    s_noise = neutral_s_noise([v], edm_sigmas(n), churn, solver=solver)
    lam = churned_lambda([v], edm_sigmas(n), churn, solver=solver)
    assert_close(churned_variance([v], edm_sigmas(n), Churn(gamma * n, s_noise=s_noise), solver=solver).item(), v, rtol=1e-3, atol=0)
    assert_close(churned_variance([v], edm_sigmas(n), churn, solver=solver, scaling=lam).item(), v, rtol=1e-3, atol=0)
    assert abs(churned_lambda([v], edm_sigmas(n), Churn(gamma * n, s_noise=s_noise), solver=solver) - 1) < 1e-3


def test_lambda_without_churn_is_the_neutral_lambda():
    spectrum = np.geomspace(0.01, 2.0, 8)
    for solver in ("euler", "heun"):
        assert churned_lambda(spectrum, edm_sigmas(18), Churn(), solver=solver) == pytest.approx(neutral_lambda(spectrum, edm_sigmas(18), solver=solver), abs=1e-5)


def test_heun_with_an_exact_denoiser_asks_for_less_noise_and_a_shrinking_one_for_more():
    spectrum, churn = np.geomspace(0.01, 2.0, 8), Churn(40 * 64 / 256, 0.05, 50.0)
    exact, shrunk = (neutral_s_noise(spectrum, edm_sigmas(64), churn, denoiser) for denoiser in (None, scale_error(linear_denoiser(spectrum), 0.998)))
    assert exact < 1 < shrunk


@pytest.mark.parametrize("variances", [[], [-0.1], [float("nan")], [float("inf")]])
def test_bad_variances_are_refused(variances):
    with pytest.raises(ValueError, match="variances must be finite and not negative"):
        churned_variance(variances, edm_sigmas(4), Churn(1.0))


@pytest.mark.parametrize("solver", ["ab2", "dpmpp2m"])
def test_solvers_with_memory_are_refused(solver):
    with pytest.raises(ValueError, match="would make stale"):
        churned_variance([0.5], edm_sigmas(4), Churn(1.0), solver=solver)


def test_a_run_without_noise_has_no_neutral_noise():
    for churn in (Churn(), Churn(5.0, 100.0, 200.0)):
        with pytest.raises(ValueError, match="adds no noise"):
            neutral_s_noise([0.5], edm_sigmas(8), churn)


def test_a_best_value_at_a_bound_is_refused():
    with pytest.raises(ValueError, match="no s_noise between 0.9 and 1.1"):
        neutral_s_noise([0.5], edm_sigmas(18), Churn(2.8, 0.05, 50.0), solver="euler", bounds=(0.9, 1.1))
    with pytest.raises(ValueError, match="no lambda between 0.99 and 1.01"):
        churned_lambda([0.5], edm_sigmas(18), Churn(2.8, 0.05, 50.0), solver="euler", bounds=(0.99, 1.01))


def test_the_denoiser_snaps_the_stirred_level_as_in_sampling():
    "A discrete network's levels are the sampler's business; the recursion sees what the sampler does."
    snapping = Denoiser(linear_denoiser([0.5]).function, (1, 1, 1), 0.7, round_sigma=lambda sigma: torch.as_tensor(sigma).round())
    made = churned_variance([0.5], [40.0, 7.0, 2.0, 0.0], Churn(0.9), snapping, solver="euler")
    spread = 1600.0
    for sigma, hat, sigma_next in ((40, 52, 7), (7, 9, 2), (2, 3, 0)):
        spread = (1 + (sigma_next - hat) * hat / (0.5 + hat**2)) ** 2 * (spread + hat**2 - sigma**2)
    assert_close(made.item(), spread)
