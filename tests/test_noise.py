"Laws and oracles of sedm_kit.noise."
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.integrate import quad

from sedm_kit.noise import (check_sigmas, ddpm_alphas_cumprod, edm_sigmas, iddpm_levels, iddpm_sigmas, sigma_from_alphas, snr, ve_sigmas, vp_scale,
                            vp_sigma, vp_sigmas, vp_time)

GRIDS = {"edm": edm_sigmas, "vp": vp_sigmas, "ve": ve_sigmas, "iddpm": iddpm_sigmas}
HIGHEST = {"edm": 80.0, "vp": math.sqrt(math.expm1(19.9 / 2 + 0.1)), "ve": 100.0, "iddpm": float(iddpm_levels()[iddpm_levels() <= 81].max())}
LOWEST = {"edm": 0.002, "vp": math.sqrt(math.expm1(19.9e-6 / 2 + 1e-4)), "ve": 0.02, "iddpm": float(iddpm_levels()[iddpm_levels() >= 0.002].min())}

# Levels of the public reference code, six digits.
REFERENCE = {
    18: [80, 57.586, 40.7856, 28.3746, 19.3525, 12.9101, 8.40094, 5.31519, 3.25682, 1.92334, 1.08817, 0.585348, 0.296442, 0.139516, 0.0599473,
         0.0229345, 0.00752802, 0.002, 0],
    13: [80, 49.9793, 30.1833, 17.5278, 9.7232, 5.10916, 2.51522, 1.14313, 0.469979, 0.169753, 0.0515324, 0.0122377, 0.002, 0],
    11: [80, 45.3137, 24.4083, 12.3816, 5.83895, 2.51522, 0.965417, 0.318283, 0.0850872, 0.0167208, 0.002, 0],
    7: [80, 30.1833, 9.7232, 2.51522, 0.469979, 0.0515324, 0.002, 0],
}


def close(actual, expected, rtol=1e-12, atol=0.0):
    expected = torch.as_tensor(np.asarray(expected), dtype=torch.float64)
    torch.testing.assert_close(torch.as_tensor(actual), expected, rtol=rtol, atol=atol)


# ---- grids

@pytest.mark.parametrize("n", REFERENCE)
def test_edm_grid_is_the_reference_codes(n):
    close(edm_sigmas(n), REFERENCE[n], rtol=6e-6)


@given(name=st.sampled_from(sorted(GRIDS)), n=st.integers(1, 400))
def test_every_grid_decreases_from_its_highest_to_its_lowest_level_and_then_to_zero(name, n):
    sigmas = GRIDS[name](n)
    assert sigmas.dtype == torch.float64 and sigmas.shape == (n + 1,)
    assert (sigmas.diff() < 0).all() and sigmas[-1] == 0
    close(sigmas[0], HIGHEST[name], rtol=1e-14)
    if n > 1:
        close(sigmas[-2], LOWEST[name], rtol=1e-11)


@given(n=st.integers(2, 200), low=st.floats(1e-4, 0.5), high=st.floats(1.0, 1e3), rho=st.floats(0.5, 20))
def test_edm_levels_are_evenly_spaced_in_their_rhoth_root(n, low, high, rho):
    sigmas = edm_sigmas(n, low, high, rho)
    close(sigmas[0], high, rtol=1e-12)
    top = high ** (1 / rho)
    close(sigmas[:-1] ** (1 / rho), np.linspace(top, low ** (1 / rho), n), atol=1e-13 * top)


@given(n=st.integers(2, 200), low=st.floats(1e-4, 0.5), high=st.floats(1.0, 1e3))
def test_ve_levels_fall_by_one_ratio(n, low, high):
    close(ve_sigmas(n, low, high)[:-1], np.geomspace(high, low, n), rtol=1e-12)


@given(n=st.integers(2, 200))
def test_vp_levels_are_evenly_spaced_in_time(n):
    close(vp_time(vp_sigmas(n)[:-1]), np.linspace(1, 1e-3, n), rtol=1e-10)


@given(n=st.integers(2, 100), low=st.floats(1e-3, 0.01), high=st.floats(20.0, 200.0))
def test_vp_grid_of_another_range_starts_and_ends_there(n, low, high):
    sigmas = vp_sigmas(n, low, high)
    close(sigmas[[0, -2]], [high, low], rtol=1e-9)
    assert sigmas[-1] == 0 and (sigmas.diff() < 0).all()


def test_iddpm_chain_has_the_cosine_schedules_alpha_bar():
    # The recursion telescopes: 1 / (1 + u_j^2) = alpha_bar(j) / alpha_bar(M). Only the first ratio (alpha_bar(0) = 0) is clamped.
    levels = iddpm_levels()
    j = np.arange(1, 1001)
    alpha_bar = np.sin(math.pi / 2 * j / (1000 * 1.008)) ** 2
    close(levels[1:], np.sqrt(alpha_bar[-1] / alpha_bar - 1), rtol=1e-9, atol=1e-9)
    close(levels[0] ** 2 + 1, (levels[1] ** 2 + 1) / 0.001)


def test_iddpm_grid_takes_chain_levels_and_all_of_them_if_asked():
    inside = [u for u in iddpm_levels().tolist() if 0.002 <= u <= 81]
    assert iddpm_sigmas(len(inside)).tolist() == [*inside, 0.0]
    assert set(iddpm_sigmas(18).tolist()) <= {*inside, 0.0}
    index = [inside.index(sigma) for sigma in iddpm_sigmas(18)[:-1].tolist()]
    assert index[0] == 0 and index[-1] == len(inside) - 1
    assert max(np.diff(index)) - min(np.diff(index)) <= 1
    with pytest.raises(ValueError, match=rf"has {len(inside)} levels between 0.002 and 81, {len(inside) + 1} were asked for"):
        iddpm_sigmas(len(inside) + 1)


# ---- conversions

@given(sigma=st.floats(1e-6, 1e5))
def test_vp_time_and_vp_sigma_are_inverse(sigma):
    close(vp_sigma(vp_time(sigma)), sigma, rtol=1e-11)


@given(tau=st.floats(1e-6, 2.0))
def test_vp_sigma_and_vp_scale_solve_the_vp_process(tau):
    growth = quad(lambda t: 0.1 + 19.9 * t, 0, tau)[0]  # integral of beta
    close(vp_sigma(tau), math.sqrt(math.expm1(growth)), rtol=1e-9)
    close(vp_scale(vp_sigma(tau)), math.exp(-growth / 2), rtol=1e-9)


@pytest.mark.parametrize("sigma, tau, alpha", [(0.002, 3.984197539034483e-05, 0.999998000006), (0.1, 0.026994948374791883, 0.9950371902099892),
                                               (1.0, 0.25896026243279663, 0.7071067811865475), (80.0, 0.9335111432407039, 0.012499023551926025)])
def test_vp_time_and_scale_are_the_reference_codes(sigma, tau, alpha):
    close(vp_time(sigma), tau, rtol=1e-10)  # the reference subtracts two close numbers at small sigma
    close(vp_scale(sigma), alpha, rtol=2e-12)


def test_vp_time_keeps_its_digits_at_tiny_noise():
    close(vp_time(1e-8), 1e-16 / 0.1, rtol=1e-9)  # tau -> sigma^2 / beta_min; the textbook form returns 0 here


@given(alpha=st.floats(1e-6, 0.999999))
def test_snr_of_a_ddpm_level(alpha):
    close(snr(sigma_from_alphas(alpha)), alpha / (1 - alpha), rtol=1e-11)


def test_ddpm_linear_schedule():
    close(ddpm_alphas_cumprod("linear"), np.cumprod(1 - np.linspace(1e-4, 0.02, 1000)), rtol=1e-12)
    close(ddpm_alphas_cumprod("linear", 250), np.cumprod(1 - np.linspace(4e-4, 0.08, 250)), rtol=1e-12)  # a quarter of the steps, each four times as noisy


@given(steps=st.integers(10, 2000))
def test_ddpm_cosine_schedule_telescopes(steps):
    t = np.arange(1, steps + 1) / steps
    f = np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    got = ddpm_alphas_cumprod("cosine", steps)
    assert (got.diff() < 0).all()
    close(got[:-1], f[:-1], rtol=1e-9)         # only the last ratio, 0, meets the clamp
    close(got[-1], f[-2] * 0.001, rtol=1e-9)


# ---- bad input

@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("n", [0, -3, 2.5, True, "18", None])
def test_number_of_steps_must_be_an_integer_of_at_least_one(grid, n):
    with pytest.raises(ValueError, match=rf"integer of at least 1, got {n!r}"):
        grid(n)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("low, high", [(0.0, 80.0), (-1.0, 80.0), (2.0, 1.0), (1.0, 1.0), (math.nan, 80.0), (0.002, math.nan), (0.002, math.inf)])
def test_range_of_levels_must_be_positive_and_finite(grid, low, high):
    with pytest.raises(ValueError, match=rf"0 < sigma_min < sigma_max < inf, got {low!r} and {high!r}"):
        grid(5, low, high)


@pytest.mark.parametrize("sigmas, message", [
    ([3.0, 2.0, 1.0], "end in 0 .*got 1 at the end"),
    ([3.0, 3.0, 0.0], r"decrease strictly, but sigmas\[0\] = 3 is followed by 3"),
    ([3.0, 1.0, 2.0, 0.0], r"decrease strictly, but sigmas\[1\] = 1 is followed by 2"),
    ([3.0, -1.0, 0.0], r"not negative, got \[3.0, -1.0, 0.0\]"),
    ([3.0, 1.0, -1.0], r"not negative, got \[3.0, 1.0, -1.0\]"),
    ([3.0, math.nan, 0.0], r"finite .*got \[3.0, nan, 0.0\]"),
    ([math.inf, 1.0, 0.0], r"finite .*got \[inf, 1.0, 0.0\]"),
    ([0.0], r"at least two levels, got shape \(1,\)"),
    ([], r"at least two levels, got shape \(0,\)"),
    ([[2.0, 0.0]], r"at least two levels, got shape \(1, 2\)"),
])
def test_check_sigmas_says_what_is_wrong(sigmas, message):
    with pytest.raises(ValueError, match=message):
        check_sigmas(sigmas)


def test_check_sigmas_returns_float64_of_any_sequence():
    for sigmas in ([2, 1, 0], (2.0, 1.0, 0.0), np.array([2, 1, 0], np.float32), torch.tensor([2.0, 1.0, 0.0]), range(2, -1, -1)):
        assert check_sigmas(sigmas).dtype == torch.float64 and check_sigmas(sigmas).tolist() == [2.0, 1.0, 0.0]


def test_unknown_ddpm_schedule_and_empty_chain():
    with pytest.raises(ValueError, match="unknown schedule 'sqrt'; known: 'linear', 'cosine'"):
        ddpm_alphas_cumprod("sqrt")
    with pytest.raises(ValueError, match="at least 1 step, got 0"):
        ddpm_alphas_cumprod("linear", 0)
