"""The closed-form ridge lambda*(w): the table by independent recomputation, linearity, sign rule, Euler and Heun."""
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch.testing import assert_close

from sedm_kit.diagnostics import gaussian_variance, linear_denoiser
from sedm_kit.noise import edm_sigmas
from sedm_kit.ridge import gaussian_ridge, linear_guidance, ridge_slope

WEIGHTS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0]
TABLE = {(0.95, 18): [1.0365, 1.0318, 1.0272, 1.0226, 1.0181, 1.0093], (0.95, 200): [1.0137, 1.0082, 1.0028, 0.9975, 0.9922, 0.9818],
         (1.0, 18): [1.0274] * 6, (1.05, 18): [1.0188, 1.0232, 1.0277, 1.0322, 1.0368, 1.0462]}
HEUN = [1.0007, 0.9986, 0.9965, 0.9944, 0.9924, 0.9883]


def slope_factor(sigma, s2, m2, lam, w):
    "d = factor * x, written out from the Gaussian scores without the kit's sampler."
    model = sigma / (m2 + sigma**2)
    push = 1 / (m2 + sigma**2) - 1 / (s2 + sigma**2)
    return model / lam - w * sigma * push


def sampled_std(solver, n, s2, m2, lam, w):
    "Standard deviation of samples of N(0, s2) by a network that has learned N(0, m2)."
    sigmas, x = edm_sigmas(n).tolist(), 80.0
    for i in range(n):
        now, then = sigmas[i], sigmas[i + 1]
        first = slope_factor(now, s2, m2, lam, w) * x
        ahead = x + (then - now) * first
        if solver == "heun" and then > 0:
            ahead = x + (then - now) * (first + slope_factor(then, s2, m2, lam, 0.0) * ahead) / 2
        x = ahead
    return abs(x)


def root(solver, n, factor, w, s=0.75):
    return brentq(lambda lam: sampled_std(solver, n, s**2, (factor * s) ** 2, lam, w) - s, 0.9, 1.15, xtol=1e-12)


@pytest.mark.parametrize("factor,n", TABLE)
def test_euler_table(factor, n):
    expected = [root("euler", n, factor, w) for w in WEIGHTS]
    assert_close(torch.tensor(expected), torch.tensor(TABLE[factor, n]), atol=6e-5, rtol=0)  # what was published
    assert_close(gaussian_ridge([0.5625], edm_sigmas(n), WEIGHTS, model=[0.5625 * factor**2]), np.array(expected), atol=2e-6, rtol=0)


def test_heun_table():
    expected = [root("heun", 18, 0.95, w) for w in WEIGHTS]
    assert_close(torch.tensor(expected), torch.tensor(HEUN), atol=6e-5, rtol=0)
    assert_close(gaussian_ridge([0.5625], edm_sigmas(18), WEIGHTS, model=[0.5625 * 0.95**2], solver="heun"), np.array(expected), atol=2e-6, rtol=0)


@settings(max_examples=25)
@given(variance=st.floats(0.05, 2.0), spread=st.floats(0.7, 1.3), w=st.floats(0, 1.5), n=st.integers(12, 40))
def test_sign_rule_and_closed_slope(variance, spread, w, n):
    sigmas, fakes = edm_sigmas(n), variance * spread**2
    low, lam, high = gaussian_ridge([variance], sigmas, [w - 0.01, w, w + 0.01], fakes=[fakes])
    slope = ridge_slope(variance, sigmas, lam, w, fakes=fakes)
    assert abs(slope - (high - low) / 0.02) < 1e-4 + 1e-3 * abs(slope)
    assert slope * (spread - 1) >= 0  # falls for under-dispersed fakes, rises for over-dispersed ones


def test_nearly_straight_and_flat_for_exact_fakes():
    for solver in ("euler", "heun"):
        for factor in (0.95, 1.0, 1.05):
            line = gaussian_ridge([0.5625], edm_sigmas(18), WEIGHTS, model=[0.5625 * factor**2], solver=solver)
            assert abs(line - np.polyval(np.polyfit(WEIGHTS, line, 1), WEIGHTS)).max() < 5e-4
            if factor == 1.0:
                assert np.ptp(line) < 1e-6


def test_weight_one_repairs_a_spectrum_exactly():
    v, m = torch.tensor([1.0, 0.3, 0.01]), torch.tensor([0.8, 0.35, 0.02])
    for solver, weight in (("euler", 1.0), ("heun", (1.0, 1.0))):
        repaired = gaussian_variance(v, edm_sigmas(18), linear_denoiser(m), solver=solver, guidance=linear_guidance(v, m, weight))
        assert_close(repaired, gaussian_variance(v, edm_sigmas(18), solver=solver))


def test_guidance_of_the_first_evaluation_only_repairs_half_of_heun():
    v, m = torch.tensor([1.0]), torch.tensor([0.9])
    made = [gaussian_variance(v, edm_sigmas(100), linear_denoiser(m), solver="heun", guidance=linear_guidance(v, m, w)).item() for w in (1.0, 2.0)]
    assert abs(made[0] - 0.95) < 0.01 and abs(made[1] - 1.0) < 0.01
