"Laws and oracles of sedm_kit.diagnostics: the closed-form tables of Gaussian data, the variance identity, and what a trace records."
import math
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from torch.testing import assert_close

from sedm_kit.analytic import Denoiser, GaussianMixture, noise_error, scale_error, sigma_error
from sedm_kit.diagnostics import (Trace, drift_profile, drift_split, eps_norms, eps_ratio, euler_variance_loss, gaussian_variance, linear_denoiser, neutral_lambda,
                                  variance_ratio)
from sedm_kit.discriminator import DiscriminatorGuidance
from sedm_kit.noise import edm_sigmas, refine_sigmas, vp_sigmas
from sedm_kit.sampler import Churn, LinearScaling, sample, sample_seeds

S = 0.75  # standard deviation of the data in all tables


def unit(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- the closed form, written as a product of factors, without the library

def grid(n, high=80.0, low=0.002):
    i = np.arange(n) / max(n - 1, 1)
    return np.append((high ** (1 / 7) + i * (low ** (1 / 7) - high ** (1 / 7))) ** 7, 0.0)


def product(solver, sigmas, shrink=1.0, lam=1.0, s_model=S, w=(0.0, 0.0), told=1.0):
    "What a unit of sigmas[0] becomes: the model is shrink * s_m^2 / (s_m^2 + (told sigma)^2) x, guided with weights w towards N(0, S^2)."
    def rate(sigma, weight):
        gain = shrink * s_model**2 / (s_model**2 + (told * sigma) ** 2)
        correction = 1 / (s_model**2 + sigma**2) - 1 / (S**2 + sigma**2)  # true score minus model score, times 1/x
        return (1 - gain) / (lam * sigma) - weight * sigma * correction

    total = 1.0
    for sigma, sigma_next in zip(sigmas[:-1], sigmas[1:]):
        step = sigma_next - sigma
        factor = 1 + step * rate(sigma, w[0])
        if solver == "heun" and sigma_next > 0:
            factor = 1 + step * (rate(sigma, w[0]) + rate(sigma_next, w[1]) * factor) / 2
        total *= factor
    return total


def product_variance(solver, sigmas, **model):
    return (sigmas[0] * product(solver, sigmas, **model)) ** 2


def product_lambda(solver, sigmas, **model):
    "The lambda in 0.8 ... 1.25 at which the variance is right; there must be just one."
    def excess(lam):
        return abs(sigmas[0] * product(solver, sigmas, lam=lam, **model)) - S
    lams = np.linspace(0.8, 1.25, 226)
    values = [excess(lam) for lam in lams]
    brackets = [(a, b) for a, b, u, v in zip(lams, lams[1:], values, values[1:]) if u * v < 0]
    assert len(brackets) == 1
    return brentq(excess, *brackets[0], xtol=1e-13)


def printed(value, cell):
    "Whether a value rounds to what is printed."
    return abs(value - float(cell)) <= 0.5 * 10.0 ** -len(cell.partition(".")[2]) * (1 + 1e-9)


# Variance of the samples over S^2 at lambda 1, and the lambda that makes it 1, for a denoiser c D.
COLUMNS = [("euler", c) for c in (0.98, 0.99, 1.0, 1.01, 1.02)] + [("heun", c) for c in (0.99, 1.0, 1.01)]
TABLE_A = {
    5: ".194/1.065 .204/1.062 .215/1.060 .226/1.058 .238/1.056 1.44/1.017 4.39/1.062 9.4/1.087",
    10: ".473/1.053 .511/1.048 .551/1.042 .594/1.037 .640/1.032 1.14/.978 1.43/.937 1.78/.890",
    18: ".601/1.044 .662/1.036 .729/1.027 .803/1.019 .883/1.011 .937/1.008 1.100/.989 1.291/.970",
    35: ".679/1.037 .762/1.026 .854/1.015 .957/1.004 1.07/.993 .886/1.013 1.023/.9975 1.18/.982",
    140: ".739/1.032 .843/1.018 .962/1.004 1.10/.990 1.25/.977 .871/1.015 1.001/.9999 1.15/.985",
}
CELLS_A = [(n, solver, c, *cell.split("/")) for n, row in TABLE_A.items() for (solver, c), cell in zip(COLUMNS, row.split())]


@pytest.mark.parametrize("n, solver, c, variance, lam", CELLS_A)
def test_table_of_shrunk_denoisers(n, solver, c, variance, lam):
    denoiser = scale_error(linear_denoiser([S**2]), c)
    got = gaussian_variance([S**2], edm_sigmas(n), denoiser, solver=solver).item()
    assert got == pytest.approx(product_variance(solver, grid(n), shrink=c), rel=1e-11)
    assert printed(got / S**2, variance)
    got = neutral_lambda([S**2], edm_sigmas(n), denoiser, solver=solver)
    assert got == pytest.approx(product_lambda(solver, grid(n), shrink=c), abs=1e-6)
    assert printed(got, lam)


# The lambda that makes the variance right when a model N(0, (f S)^2) is guided by the optimal discriminator with weight w.
WEIGHTS = (0, 0.5, 1, 1.5, 2, 3)
TABLE_B = [
    (0.95, "euler", 18, "1.0365 1.0318 1.0272 1.0226 1.0181 1.0093"),
    (0.95, "euler", 200, "1.0137 1.0082 1.0028 .9975 .9922 .9818"),
    (0.95, "heun", 18, "1.0007 .9986 .9965 .9944 .9924 .9883"),  # guided at the first evaluation of a step only
    (1.0, "euler", 18, "1.0274 1.0274 1.0274 1.0274 1.0274 1.0274"),
    (1.05, "euler", 18, "1.0188 1.0232 1.0277 1.0322 1.0368 1.0462"),
]
CELLS_B = [(f, solver, n, w, cell) for f, solver, n, row in TABLE_B for w, cell in zip(WEIGHTS, row.split())]


def optimal_guidance(s_model, weights):
    "Guidance by the exact log-ratio of N(0, S^2) and N(0, s_model^2): L = const + correction x^2 / 2."
    def guidance(x, sigma, class_labels=None, *, step, stage):
        correction = 1 / (s_model**2 + sigma**2) - 1 / (S**2 + sigma**2)
        return -weights[min(stage, 1)] * sigma**2 * correction * x, None
    return guidance


@pytest.mark.parametrize("f, solver, n, w, lam", CELLS_B)
def test_table_of_guided_models(f, solver, n, w, lam):
    model = linear_denoiser([(f * S) ** 2])
    got = neutral_lambda([S**2], edm_sigmas(n), model, solver=solver, guidance=optimal_guidance(f * S, (w, 0)))
    assert got == pytest.approx(product_lambda(solver, grid(n), s_model=f * S, w=(w, 0)), abs=1e-6)
    assert printed(got, lam)


@pytest.mark.parametrize("weights, variance", [((1, 0), ".950"), ((2, 0), ".9976"), ((1, 1), None)])
def test_heun_needs_both_slopes_or_twice_the_weight(weights, variance):
    got = gaussian_variance([S**2], edm_sigmas(100), linear_denoiser([(0.95 * S) ** 2]), guidance=optimal_guidance(0.95 * S, weights)).item()
    assert got == pytest.approx(product_variance("heun", grid(100), s_model=0.95 * S, w=weights), rel=1e-11)
    if variance:
        assert printed(got / S**2, variance)
    else:  # exactly the true model
        assert got == pytest.approx(gaussian_variance([S**2], edm_sigmas(100)).item(), rel=1e-11)


@pytest.mark.parametrize("told, variance, lam", [(1.02, ".700", "1.031"), (0.98, ".760", "1.024")])
def test_wrong_noise_level(told, variance, lam):
    denoiser = sigma_error(linear_denoiser([S**2]), told)
    got = gaussian_variance([S**2], edm_sigmas(18), denoiser, solver="euler").item()
    assert got == pytest.approx(product_variance("euler", grid(18), told=told), rel=1e-11) and printed(got / S**2, variance)
    assert printed(neutral_lambda([S**2], edm_sigmas(18), denoiser, solver="euler"), lam)


@pytest.mark.parametrize("high, solver, variance, lam", [(20.0, "euler", ".783", "1.031"), (20.0, "heun", "1.056", ".991"),
                                                         (10.0, "euler", ".805", "1.036")])
def test_lower_start(high, solver, variance, lam):
    sigmas = edm_sigmas(18, sigma_max=high)
    got = gaussian_variance([S**2], sigmas, solver=solver).item()
    assert got == pytest.approx(product_variance(solver, grid(18, high)), rel=1e-11) and printed(got / S**2, variance)
    assert printed(neutral_lambda([S**2], sigmas, solver=solver), lam)


# ---- laws of the Gaussian world

@settings(max_examples=60)
@given(variances=st.lists(st.floats(1e-4, 100), min_size=1, max_size=4), n=st.integers(1, 30), solver=st.sampled_from(["euler", "heun"]),
       b=st.floats(0.9, 1.1), k=st.floats(-0.003, 0.003))
def test_every_direction_has_its_own_product(variances, n, solver, b, k):
    lambdas, sigmas = [b + k * i for i in range(n)], grid(n)
    got = gaussian_variance(variances, edm_sigmas(n), solver=solver, scaling=LinearScaling(b, k))
    for variance, value in zip(variances, got.tolist()):
        x = sigmas[0]
        for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:])):
            d = x * sigma / (variance + sigma**2) / lambdas[i]
            ahead = x + (sigma_next - sigma) * d
            if solver == "heun" and sigma_next > 0:
                ahead = x + (sigma_next - sigma) * (d + ahead * sigma_next / (variance + sigma_next**2) / lambdas[i]) / 2
            x = ahead
        assert value == pytest.approx(x**2, rel=1e-9)


@settings(max_examples=40)
@given(variances=st.lists(st.floats(1e-3, 10), min_size=1, max_size=4), n=st.integers(2, 60))
def test_euler_loses_variance_in_every_direction(variances, n):
    assert (gaussian_variance(variances, edm_sigmas(n), solver="euler") < torch.tensor(variances)).all()


def test_heun_gains_variance():
    for n in (5, 10, 18, 35, 140):
        assert gaussian_variance([S**2], edm_sigmas(n), solver="heun").item() > S**2


@settings(max_examples=40)
@given(s=st.floats(0.05, 5), sigma=st.floats(0.01, 80), share=st.floats(0, 0.99))
def test_one_euler_step_loses_the_variance_that_the_identity_says(s, sigma, share):
    # variance s^2 + sigma^2 before, (1 + (s'/s - 1)(1 - k))^2 of it after; s^2 + s'^2 is what it should be
    sigma_next, gain = share * sigma, s**2 / (s**2 + sigma**2)
    after = (1 + (share - 1) * (1 - gain)) ** 2 * (s**2 + sigma**2)
    mmse = s**2 * sigma**2 / (s**2 + sigma**2)
    assert euler_variance_loss(sigma, sigma_next, mmse) == pytest.approx(after - (s**2 + sigma_next**2), rel=1e-6, abs=1e-9 * (s**2 + sigma**2))
    assert euler_variance_loss(sigma, sigma_next, mmse) < 0


@pytest.mark.parametrize("n", [5, 18, 50])
def test_lambda_per_step_in_closed_form_restores_the_variance_after_each_step(n):
    sigmas = edm_sigmas(n)
    here, after = sigmas[:-1], sigmas[1:]
    k = S**2 / (S**2 + here**2)
    lambdas = (1 - after / here) * (1 - k) / (1 - ((S**2 + after**2) / (S**2 + here**2)).sqrt())
    assert lambdas[0] == pytest.approx(1.0, abs=1e-3) and lambdas.max() > 1.05
    seen = []
    start = (S**2 + sigmas[0] ** 2).sqrt() * torch.ones(1, 1, 1, 1, dtype=torch.float64)
    final = sample(linear_denoiser([S**2]), start, sigmas, solver="euler", scaling=lambdas.tolist(),
                   callback=lambda info: seen.append(info["x"].item()))
    assert_close(torch.tensor([*seen, final.item()], dtype=torch.float64) ** 2, S**2 + sigmas**2, rtol=1e-10, atol=0)
    assert final.item() == pytest.approx(S, rel=1e-12)


@pytest.mark.parametrize("spectrum", [[0.5, 0.5, 0.5], [1.0, 0.3, 0.01]])
def test_neutral_lambda_is_the_least_frechet_distance(spectrum):
    variances, sigmas = torch.tensor(spectrum, dtype=torch.float64), edm_sigmas(12)

    def distance(lam):  # of two zero-mean Gaussians that share their axes
        return (gaussian_variance(variances, sigmas, solver="euler", scaling=lam).sqrt() - variances.sqrt()).square().sum().item()

    best = neutral_lambda(variances, sigmas, solver="euler")
    scan = np.linspace(1.0, 1.1, 201)
    assert abs(best - scan[np.argmin([distance(lam) for lam in scan])]) <= 0.5e-3
    assert distance(best) < min(distance(best - 1e-4), distance(best + 1e-4))


@pytest.mark.parametrize("eta, n, variance", [(0, 18, ".729"), (1, 18, "1.00"), (1, 60, "1.00"), (2, 18, "1.81"), (2, 100, "1.158")])
def test_independent_error_of_the_size_of_the_mmse_keeps_eulers_variance(eta, n, variance):
    # variance of the recursion x' = m x + (s'/s - 1) * (-e): the error adds (1 - s'/s)^2 eta^2 mmse
    expected = 80.0**2 + S**2 * (eta == 1)  # started at the true variance, eta = 1 keeps it at every step
    for sigma, sigma_next in zip(grid(n)[:-1], grid(n)[1:]):
        keep = 1 + (sigma_next / sigma - 1) * sigma**2 / (S**2 + sigma**2)
        mmse = S**2 * sigma**2 / (S**2 + sigma**2)
        expected = keep**2 * expected + (1 - sigma_next / sigma) ** 2 * eta**2 * mmse
    if eta == 1:
        assert expected == pytest.approx(S**2, rel=1e-9)
    else:
        assert printed(expected / S**2, variance)
    images = 20_000
    spoilt = noise_error(linear_denoiser([S**2] * 4), lambda sigma: eta * S * sigma / (S**2 + sigma**2) ** 0.5, torch.Generator().manual_seed(1))
    got = sample(spoilt, (80.0**2 + S**2 * (eta == 1)) ** 0.5 * unit(images, 1, 1, 4), edm_sigmas(n), solver="euler").var().item()
    assert got == pytest.approx(expected, rel=5 * math.sqrt(2 / (4 * images)))


# ---- the variance identity on a mixture

@pytest.mark.parametrize("sigma, sigma_next", [(3.257, 1.923), (1.088, 0.585), (0.296, 0.140), (0.060, 0.023)])
def test_variance_identity_on_a_mixture(sigma, sigma_next):
    n = 40_000
    mix = GaussianMixture(0.7 * unit(4, 1, 2, 2), [1, 2, 3, 4], cov=torch.eye(4)[None] * torch.tensor([0.3, 0.1, 0.05, 0.01]).reshape(4, 1, 1))
    clean, noise = mix.sample(n, 0.0, torch.Generator().manual_seed(1)), unit(n, 1, 2, 2, seed=2)
    x = clean + sigma * noise
    denoised = mix.denoise(x, sigma)
    slope = (x - denoised) / sigma

    def excess(step, *noises):
        "Variance per pixel beyond that of the true noisy images, with a standard error: images with the same noise are compared."
        got, truth = (step - mix.mean).square(), (clean + sigma_next * noise - mix.mean).square()
        per_image = (got - truth).mean((1, 2, 3))
        for z in (noise, *noises):  # products of image and noise average to 0 and only add scatter: regressed out
            known = ((clean - mix.mean) * z).mean((1, 2, 3))
            per_image = per_image - (per_image @ known) / (known @ known) * known
        return per_image.mean().item(), per_image.std().item() / math.sqrt(n)

    mmse = (denoised - clean).square().mean().item()
    expected = euler_variance_loss(sigma, sigma_next, mmse)
    assert expected == pytest.approx(-((1 - sigma_next / sigma) ** 2) * mmse)
    got, error = excess(x + (sigma_next - sigma) * slope)
    assert error < abs(expected) / 15  # it resolves the sign and the size
    assert abs(got - expected) < 4 * error
    # an independent error of the size of the mmse pays the loss back
    extra = unit(n, 1, 2, 2, seed=3)
    got, error = excess(x + (sigma_next - sigma) * (slope + math.sqrt(mmse) / sigma * extra), extra)
    assert abs(got) < 4 * error < abs(expected) / 3


# ---- norms and variance in sampling and in training

def standardised(n, d, seed=0):
    "Unit noise whose pixels have mean 0 and variance 1 exactly, so that sums over images are their expectations."
    z = unit(n, 1, 1, d, seed=seed)
    return (z - z.mean(0)) / z.std(0)


@pytest.mark.parametrize("n, euler, heun", [(5, ".46", "2.09"), (10, ".74", "1.19"), (18, ".854", "1.049"), (35, ".924", "1.011")])
def test_norm_ratio_of_an_exact_gaussian_is_the_root_of_its_variance_ratio(n, euler, heun):
    z, sigmas = standardised(50, 6), edm_sigmas(n)
    norm = z.flatten(1).norm(dim=1).mean()
    # epsilon of a training image is sigma / (S^2 + sigma^2) x with x of variance S^2 + sigma^2
    scale = sigmas[:-1] / (S**2 + sigmas[:-1] ** 2).sqrt()
    training = {"sigma": sigmas[:-1], "norm": scale * norm, "error": torch.zeros(n, dtype=torch.float64), "n": 50}
    for solver, cell in (("euler", euler), ("heun", heun)):
        trace = Trace()
        sample(linear_denoiser([S**2] * 6), sigmas[0] * z, sigmas, solver=solver, callback=trace)
        ratio, variance = eps_ratio(trace, training), variance_ratio(trace, S**2)
        assert_close(ratio["sigma"], sigmas[:-1])
        assert_close(ratio["ratio"] ** 2, variance["ratio"], rtol=1e-10, atol=0)
        assert printed(ratio["ratio"][-1].item(), cell)
        # closed form of the state before the last step
        state = abs(sigmas[0].item() * product(solver, grid(n)[:-1]))
        assert ratio["ratio"][-1].item() == pytest.approx(state / math.hypot(S, sigmas[-2].item()), rel=1e-10)


def chi_mean(d):
    return math.sqrt(2) * math.exp(math.lgamma((d + 1) / 2) - math.lgamma(d / 2))


def test_training_norms_of_a_gaussian():
    d, n, sigmas = 6, 4000, edm_sigmas(6)
    images = S * unit(n, 1, 1, d, seed=5)
    norms = eps_norms(linear_denoiser([S**2] * d), images, sigmas, generator=torch.Generator().manual_seed(0), batch=700)
    scale = sigmas[:-1] / (S**2 + sigmas[:-1] ** 2).sqrt()
    assert torch.equal(norms["sigma"], sigmas[:-1]) and norms["n"] == n and norms["norm"].dtype == torch.float64
    assert_close(norms["error"], scale * math.sqrt((d - chi_mean(d) ** 2) / n), rtol=0.06, atol=0)
    assert ((norms["norm"] - scale * chi_mean(d)).abs() < 4.5 * norms["error"]).all()


def test_training_norms_do_not_depend_on_the_batch_and_hand_labels_on():
    def function(x, sigma, class_labels):
        return x - sigma * class_labels.reshape(-1, 1, 1, 1)  # epsilon is the label in every pixel

    labels = torch.tensor([1.0, 2.0, 3.0, 6.0, 8.0])
    for batch in (1, 2, 5, 64):
        norms = eps_norms(Denoiser(function, (1, 2, 2), 1.0), unit(5, 1, 2, 2), [3.0, 1.0, 0.0], class_labels=labels, batch=batch)
        assert_close(norms["norm"], torch.tensor([8.0, 8.0], dtype=torch.float64))  # 2 * mean label
        assert_close(norms["error"], 2 * (labels.std() / math.sqrt(5)).to(torch.float64).expand(2), rtol=1e-6, atol=0)


def test_ratio_of_exact_samples_is_one_within_its_error():
    # many fine Heun steps: sampling and training agree
    d, n, sigmas = 6, 3000, edm_sigmas(80)
    trace = Trace()
    sample(linear_denoiser([S**2] * d), (sigmas[0] ** 2 + S**2).sqrt() * unit(n, 1, 1, d, seed=1), sigmas, callback=trace)
    training = eps_norms(linear_denoiser([S**2] * d), S * unit(n, 1, 1, d, seed=2), sigmas, generator=torch.Generator().manual_seed(3))
    result = eps_ratio(trace, training)
    expected = math.sqrt(2 * (d - chi_mean(d) ** 2) / n) / chi_mean(d)
    assert_close(result["error"], torch.full((80,), expected, dtype=torch.float64), rtol=0.06, atol=0)
    assert ((result["ratio"] - 1).abs() < 4.5 * result["error"]).all()


def test_error_of_a_ratio_adds_both_sides():
    trace, sigmas = Trace(), edm_sigmas(3)
    sample(linear_denoiser([S**2] * 4), 80 * unit(20, 1, 1, 4), sigmas, solver="euler", callback=trace)
    mean, error = trace.column("eps")
    training = {"sigma": sigmas[:-1].flip(0), "norm": 2 * mean.flip(0), "error": 0.3 * mean.flip(0), "n": 9}  # levels in another order
    result = eps_ratio(trace, training)
    assert_close(result["ratio"], torch.full((3,), 0.5, dtype=torch.float64))
    assert_close(result["error"], 0.5 * ((error / mean) ** 2 + 0.15**2).sqrt())


def test_ratio_of_a_later_stage_compares_equal_levels():
    trace, sigmas = Trace(), edm_sigmas(4)
    sample(linear_denoiser([S**2] * 4), 80 * unit(20, 1, 1, 4), sigmas, callback=trace)
    training = {"sigma": sigmas[:-1], "norm": torch.tensor([1.0, 2.0, 4.0, 8.0], dtype=torch.float64), "error": torch.zeros(4), "n": 9}
    result = eps_ratio(trace, training, stage=1)
    assert_close(result["sigma"], sigmas[1:4])
    assert_close(result["ratio"], trace.column("eps", 1)[0] / torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64))
    assert_close(variance_ratio(trace, S**2, stage=1)["ratio"], trace.variance(1)[0] / (S**2 + sigmas[1:4] ** 2))


# ---- Trace

def guidance(x, sigma, class_labels=None, *, step, stage):
    return (0.1 * x * sigma.reshape(-1, 1, 1, 1) if stage == 0 else 0.0), None


def traced(z, center=0.0, solver="heun", parts=None, churn=None, **arguments):
    "A trace of a run, or of its parts one after the other, and the states it saw."
    trace, states = Trace(center), []

    def callback(info):
        trace(info)
        states.append(info)

    for part in z.split(parts or len(z)):
        sample(linear_denoiser([1.0, 0.3, 0.1]), 80 * part, edm_sigmas(5), solver=solver, callback=callback, guidance=guidance, scaling=1.1,
               churn=churn, **arguments)
    return trace, states


@pytest.mark.parametrize("parts", [None, 7])
def test_trace_equals_the_stored_states(parts):
    center = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64).reshape(1, 1, 3)
    trace, states = traced(unit(20, 1, 1, 3), center, parts=parts)
    assert trace.stages() == [0, 1]
    for stage, steps in ((0, 5), (1, 4)):
        def stored(name, step):
            return torch.cat([info[name] for info in states if (info["step"], info["stage"]) == (step, stage)])

        for name in ("eps", "slope"):
            mean, error = trace.column(name, stage)
            assert mean.dtype == error.dtype == torch.float64 and mean.shape == error.shape == (steps,)
            for step in range(steps):
                norms = stored(name, step).flatten(1).norm(dim=1)
                assert mean[step].item() == pytest.approx(norms.mean().item(), rel=1e-12)
                assert error[step].item() == pytest.approx(norms.std().item() / math.sqrt(20), rel=1e-9)
        variance, error = trace.variance(stage)
        square, _ = trace.column("square", stage)
        for step in range(steps):
            x = stored("x", step)
            assert variance[step].item() == pytest.approx(x.var(0).mean().item(), rel=1e-10)
            squares = (x - center).square().flatten(1).mean(1)
            assert square[step].item() == pytest.approx(squares.mean().item(), rel=1e-12)
            assert error[step].item() == pytest.approx(squares.std().item() / math.sqrt(20), rel=1e-9)
        assert_close(trace.column("sigma", stage)[0], edm_sigmas(5)[stage:5] if stage else edm_sigmas(5)[:5])


def test_trace_keeps_guidance_as_a_slope():
    trace, states = traced(unit(20, 1, 1, 3))
    mean, _ = trace.column("guidance")
    expected = [info["g"].div(info["sigma"]).flatten(1).norm(dim=1).mean() for info in states if info["stage"] == 0]
    assert_close(mean, torch.stack(expected))
    first = [info for info in states if info["stage"] == 0][2]
    assert_close(first["slope"], first["eps"] / 1.1 + first["g"] / first["sigma"])


def test_trace_with_levels_per_image():
    # boosted churn gives every image its own level; the trace keeps their mean
    trace, sigmas = Trace(), edm_sigmas(12)
    seen = {}
    guidance = DiscriminatorGuidance(lambda u, tau, labels=None: 0.01 * u.flatten(1).sum(1), 1.0, boost=True)
    sample(linear_denoiser([1.0, 0.3, 0.1]), 80 * unit(16, 1, 1, 3), sigmas, solver="euler", guidance=guidance,
           callback=lambda info: (trace(info), seen.setdefault(info["step"], info)))
    mixed = [step for step, info in seen.items() if info["sigma"].ndim]
    assert mixed == [5, 10]
    means, guided = trace.column("sigma")[0], trace.column("guidance")[0]
    for step in mixed:
        levels = seen[step]["sigma"]
        assert len(levels.unique()) == 2 and means[step].item() == pytest.approx(levels.mean().item(), rel=1e-12)
        norms = (seen[step]["g"] / levels.reshape(-1, 1, 1, 1)).flatten(1).norm(dim=1)
        assert guided[step].item() == pytest.approx(norms.mean().item(), rel=1e-12)


@settings(max_examples=15)
@given(cut=st.integers(1, 19), solver=st.sampled_from(["euler", "heun"]))
def test_merged_halves_are_the_whole(cut, solver):
    z = unit(20, 1, 1, 3)
    whole, _ = traced(z, solver=solver)
    merged = Trace().merge(traced(z[:cut], solver=solver)[0]).merge(traced(z[cut:], solver=solver)[0])
    assert merged.stages() == whole.stages()
    for stage in whole.stages():
        for name in ("eps", "slope", "square", "sigma", "guidance")[:4 if stage else 5]:
            for got, expected in zip(merged.column(name, stage), whole.column(name, stage)):
                assert_close(got, expected, rtol=1e-9, atol=1e-7 if name == "sigma" else 1e-9)
        for got, expected in zip(merged.variance(stage), whole.variance(stage)):
            assert_close(got, expected, rtol=1e-9, atol=0)


def test_merging_leaves_the_other_trace_alone():
    first, second = traced(unit(5, 1, 1, 3))[0], traced(unit(6, 1, 1, 3, seed=1))[0]
    before = second.column("eps")[0].clone()
    fresh = Trace().merge(second)
    fresh.merge(first).merge(first)
    assert torch.equal(second.column("eps")[0], before)


def test_trace_through_micro_batches_counts_every_image_once():
    denoiser, trace, states = linear_denoiser([1.0, 0.3, 0.1]), Trace(), []
    sample_seeds(denoiser, range(10), edm_sigmas(4), shape=(1, 1, 3), micro_batch=4, callback=lambda info: (trace(info), states.append(info)))
    last = torch.cat([info["eps"] for info in states if info["step"] == 3])
    assert len(last) == 10
    mean, error = trace.column("eps")
    norms = last.flatten(1).norm(dim=1)
    assert mean[3].item() == pytest.approx(norms.mean().item()) and error[3].item() == pytest.approx(norms.std().item() / math.sqrt(10))


def test_trace_does_not_grow_with_the_number_of_images():
    def stored(trace):
        tensors = [t for sums in trace.sums.values() for t in sums.values()] + list(trace.pixels.values())
        return sum(t.untyped_storage().nbytes() for t in tensors), {t.dtype for t in tensors}

    small, large = traced(unit(3, 1, 1, 3))[0], traced(unit(3000, 1, 1, 3), parts=500)[0]
    assert stored(small) == stored(large)
    size, dtypes = stored(large)
    assert dtypes == {torch.float64} and size < 9 * 8 * (5 * 3 + 2 * 3 + 1)  # 9 evaluations: 5 moments of 3 numbers, 2 sums of 3 pixels


def test_full_trace_gives_mean_and_covariance_around_any_center():
    start, states = unit(40, 1, 2, 2), []
    for center in (0.0, 0.7, unit(1, 2, 2, seed=3)):
        whole, parts, states = Trace(center, full=True), [Trace(center, full=True), Trace(center, full=True)], []
        denoiser = linear_denoiser([1.0, 0.3, 0.1, 0.6])
        flat = lambda x, sigma: denoiser(x.reshape(-1, 1, 1, 4), sigma).reshape(x.shape)
        sample(flat, 80 * start, edm_sigmas(4), callback=lambda info: (whole(info), states.append((info["step"], info["stage"], info["x"]))))
        for trace, rows in zip(parts, start.split(15)):
            sample(flat, 80 * rows, edm_sigmas(4), callback=trace)
        sample(flat, 80 * start[30:], edm_sigmas(4), callback=parts[0])
        merged = parts[0].merge(parts[1])
        for step, stage, x in states:
            want = x.flatten(1).mean(0), x.flatten(1).T.cov()
            assert_close(whole.moments(step, stage), want, rtol=1e-9, atol=1e-9 * float(want[1].abs().max()))
            assert_close(merged.moments(step, stage), want, rtol=1e-9, atol=1e-9 * float(want[1].abs().max()))
        assert_close(whole.moments(-1), whole.moments(3))


def test_a_trace_without_covariances_says_so():
    trace = traced(unit(5, 1, 1, 3))[0]
    with pytest.raises(ValueError, match="full=True"):
        trace.moments(0)
    other = Trace(full=True)
    sample(linear_denoiser([1.0, 0.3, 0.1]), 80 * unit(5, 1, 1, 3), edm_sigmas(4), callback=other)
    with pytest.raises(ValueError, match="step 9, stage 0"):
        other.moments(9)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_trace_of_every_kth_step(every):
    all_steps, some = Trace(), Trace(every=every)
    sample(linear_denoiser([1.0, 0.3, 0.1]), 80 * unit(9, 1, 1, 3), edm_sigmas(8), solver="heun", callback=lambda info: (all_steps(info), some(info)))
    assert torch.equal(some.column("eps")[0], all_steps.column("eps")[0][::every])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Trace(every=0)


def _trace_of(seeds):
    trace = Trace(0.1, full=True)
    sample_seeds(linear_denoiser([1.0, 0.3, 0.1]), seeds, edm_sigmas(5), shape=(1, 1, 3), micro_batch=4, callback=trace)
    return trace


def _one_rank(rank, store, results):
    "One of two processes: sample half of the seeds, then add what both saw."
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    gathered = [None, None]
    torch.distributed.all_gather_object(gathered, _trace_of(range(rank, 20, 2)))
    torch.save(gathered[0].merge(gathered[1]).__dict__, os.path.join(results, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def test_traces_merge_across_processes(tmp_path):
    torch.multiprocessing.spawn(_one_rank, (tmp_path / "store", str(tmp_path)), nprocs=2)
    alone = _trace_of(range(20))
    for rank in range(2):
        both = Trace(0.1, full=True)
        both.__dict__.update(torch.load(tmp_path / f"{rank}.pt", weights_only=True))
        for stage in (0, 1):
            assert_close(both.column("eps", stage), alone.column("eps", stage), rtol=1e-12, atol=1e-12)
            assert_close(both.variance(stage), alone.variance(stage), rtol=1e-10, atol=1e-12)
        assert_close(both.moments(-1), alone.moments(-1), rtol=1e-10, atol=1e-12)


# ---- splitting a drift

@given(st.lists(st.floats(0.002, 150), min_size=2, max_size=8, unique=True), st.integers(1, 5))
def test_refined_grids_keep_their_levels(levels, factor):
    levels = sorted(levels, reverse=True)
    if any(a - b < 1e-6 * a for a, b in zip(levels, levels[1:])):
        return  # closer than a refined grid can tell apart
    sigmas = torch.tensor([*levels, 0.0], dtype=torch.float64)
    fine = refine_sigmas(sigmas, factor)
    assert len(fine) == (len(levels) - 1) * factor + 2 and torch.equal(fine[:-1:factor], sigmas[:-1])
    assert (fine.diff() < 0).all()


@pytest.mark.parametrize("factor", [0, -1, 1.5, True])
def test_refining_needs_a_whole_factor(factor):
    with pytest.raises(ValueError, match="factor must be an integer of at least 1"):
        refine_sigmas([1.0, 0.1, 0.0], factor)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_profile_of_a_gaussians_drift(solver):
    "Everything is linear in the start, so each part's norms and variances are known exactly."
    v = torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
    denoiser, sigmas, seeds, factor = scale_error(linear_denoiser(v), 0.98), edm_sigmas(9), range(20), 3
    levels = sigmas[:-1]
    training = {"sigma": levels, "norm": 1 + levels, "error": 0.01 * (1 + levels)}
    found = drift_profile(denoiser, seeds, sigmas, training, v.mean().item(), solver=solver, factor=factor, parts=4, shape=(1, 1, 3), micro_batch=5)
    start = torch.stack([torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(seed)).double().flatten() for seed in seeds])

    def excess(part, grid, solver, every):
        states = [80 * start[part]]
        rate = lambda sigma, x: (x - 0.98 * v / (v + sigma**2) * x) / sigma
        for sigma, after in zip(grid[:-1], grid[1:]):
            first = rate(sigma, states[-1])
            step = states[-1] + (after - sigma) * first
            states.append(step if solver == "euler" or after == 0 else states[-1] + (after - sigma) * (first + rate(after, step)) / 2)
        states = states[:-1][::every]
        norms = torch.stack([rate(sigma, x).norm(dim=1).mean() for sigma, x in zip(levels, states)]) / training["norm"]
        return torch.stack([norms, torch.stack([x.var(0).mean() for x in states]) / (v.mean() + levels**2)]) - 1

    parts = [torch.arange(k, 20, 4) for k in range(4)]
    total = torch.stack([excess(part, sigmas, solver, 1) for part in parts])
    network = torch.stack([excess(part, refine_sigmas(sigmas, factor), "heun", factor) for part in parts])
    assert_close(found["sigma"], levels)
    for k, name in enumerate(("norm", "variance")):
        for share, values, own in (("total", total, 0.01), ("network", network, 0.01), ("discretisation", total - network, 0.0)):
            own = own if name == "norm" else 0.0
            assert_close(found[name][share], values[:, k].mean(0), rtol=1e-9, atol=1e-12)
            assert_close(found[name][share + "_error"], (values[:, k].var(0) / 4 + (own * (1 + values[:, k].mean(0))) ** 2).sqrt(), rtol=1e-9, atol=1e-12)


def test_a_profile_needs_parts():
    training = {"sigma": edm_sigmas(4)[:-1], "norm": torch.ones(4), "error": torch.zeros(4)}
    for seeds, parts in ((range(10), 1), (range(3), 2), ([], 2)):
        with pytest.raises(ValueError, match="at least 2 parts of at least 2 seeds"):
            drift_profile(linear_denoiser([1.0]), seeds, edm_sigmas(4), training, 1.0, parts=parts, shape=(1, 1, 1))


@pytest.mark.parametrize("shrink", [1.0, 0.98])
def test_split_of_a_gaussians_drift(shrink):
    variances = torch.tensor([1.0, 0.3, 0.1], dtype=torch.float64)
    denoiser, seeds, sigmas = scale_error(linear_denoiser(variances), shrink), range(6), edm_sigmas(10)
    start = torch.stack([torch.randn(1, 1, 3, generator=torch.Generator().manual_seed(seed)).double() for seed in seeds])

    def measure(images):
        return (images / start).square().mean(0).flatten()  # variance per direction: images are linear in their start

    split = drift_split(denoiser, seeds, sigmas, measure, solver="euler", converged=60, shape=(1, 1, 3), micro_batch=6)
    total = gaussian_variance(variances, sigmas, denoiser, solver="euler")
    network = gaussian_variance(variances, edm_sigmas(60), denoiser, solver="heun")
    assert_close(split["total"], total, rtol=1e-9, atol=0)
    assert_close(split["network"], network, rtol=1e-9, atol=0)
    assert_close(split["discretisation"], total - network, rtol=1e-9, atol=1e-12)
    assert (split["discretisation"] < -0.05 * variances).all()  # Euler loses variance either way
    relative = (split["network"] / variances - 1).abs().max()
    assert relative < 0.02 if shrink == 1 else relative > 0.1


def test_split_keeps_the_range_of_levels():
    seen = []
    denoiser = Denoiser(lambda x, sigma: seen.append(float(sigma)) or x * 0, (1, 2, 2), 1.0)
    drift_split(denoiser, [0], [5.0, 1.0, 0.1, 0.0], lambda images: images.mean().item(), converged=9, micro_batch=1)
    assert seen[:3] == [5.0, 1.0, 0.1] and len(seen) == 3 + 17
    assert (max(seen[3:]), min(seen[3:])) == pytest.approx((5.0, 0.002))  # converged means fine steps at low noise too


# ---- bad input

def test_traces_of_different_runs_are_not_merged():
    five, four, euler = traced(unit(3, 1, 1, 3))[0], Trace(), traced(unit(3, 1, 1, 3), solver="euler")[0]
    sample(linear_denoiser([1.0]), 80 * unit(2, 1, 1, 1), edm_sigmas(4), callback=four)
    with pytest.raises(ValueError, match="different runs cannot be merged: 9 and 7 evaluations"):
        five.merge(four)
    with pytest.raises(ValueError, match="different runs cannot be merged: 9 and 5 evaluations"):
        five.merge(euler)


def test_ratio_of_different_grids_is_refused():
    trace = traced(unit(3, 1, 1, 3))[0]
    training = eps_norms(linear_denoiser([1.0, 0.3, 0.1]), unit(4, 1, 1, 3), vp_sigmas(5))
    with pytest.raises(ValueError, match=r"different noise levels: \[80.*\] and \[152\.1"):
        eps_ratio(trace, training)
    churned = traced(unit(3, 1, 1, 3), churn=Churn(1.0), noise=torch.randn_like)[0]
    with pytest.raises(ValueError, match=r"different noise levels: \[96"):
        eps_ratio(churned, eps_norms(linear_denoiser([1.0, 0.3, 0.1]), unit(4, 1, 1, 3), edm_sigmas(5)))


def test_an_empty_trace_and_a_stage_that_never_was():
    with pytest.raises(ValueError, match="no evaluation of stage 0: pass it to sample"):
        Trace().column("eps")
    euler = traced(unit(3, 1, 1, 3), solver="euler")[0]
    with pytest.raises(ValueError, match="no evaluation of stage 1"):
        euler.column("eps", 1)
    assert euler.stages() == [0] and Trace().stages() == []


def test_too_few_images_and_bad_grids():
    denoiser = linear_denoiser([1.0])
    with pytest.raises(ValueError, match="at least 2 images .*got 1"):
        eps_norms(denoiser, unit(1, 1, 1, 1), edm_sigmas(3))
    for call in (lambda sigmas: eps_norms(denoiser, unit(2, 1, 1, 1), sigmas), lambda sigmas: gaussian_variance([1.0], sigmas),
                 lambda sigmas: neutral_lambda([1.0], sigmas), lambda sigmas: drift_split(denoiser, [0], sigmas, torch.mean)):
        with pytest.raises(ValueError, match="decrease strictly"):
            call([1.0, 2.0, 0.0])
    with pytest.raises(ValueError, match="unknown solver 'rk4'"):
        gaussian_variance([1.0], edm_sigmas(3), solver="rk4")




@pytest.mark.parametrize("other, message", [
    (dict(sigmas=vp_sigmas(5)), "other noise levels"),   # as many steps on another grid: the mean of both levels is kept
    (dict(center=1.0), "different centers"),         # sums about different centres are added
], ids=["grid", "center"])
def test_traces_on_other_levels_or_about_other_centres_are_not_merged(other, message):
    traces = []
    for settings_ in ({}, other):
        trace = Trace(settings_.get("center", 0.0))
        sigmas = settings_.get("sigmas", edm_sigmas(5))
        sample(linear_denoiser([1.0]), sigmas[0] * unit(4, 1, 1, 1), sigmas, callback=trace)
        traces.append(trace)
    with pytest.raises(ValueError, match=message):
        traces[0].merge(traces[1])


@pytest.mark.parametrize("name, message", [("guidance", "guidance"), ("norm", "'norm'.*eps.*slope")])
def test_a_quantity_that_was_not_recorded_is_named(name, message):
    trace = Trace()
    sample(linear_denoiser([1.0]), 80 * unit(4, 1, 1, 1), edm_sigmas(5), callback=trace)
    with pytest.raises(ValueError, match=message):
        trace.column(name)


@pytest.mark.parametrize("trace, stage", [(Trace(), 0), (traced(unit(3, 1, 1, 3), solver="euler")[0], 1)])
def test_variance_of_an_empty_trace_or_stage(trace, stage):
    with pytest.raises(ValueError, match=f"no evaluation of stage {stage}"):
        trace.variance(stage)


@pytest.mark.parametrize("call, message", [
    (lambda: neutral_lambda([S**2], edm_sigmas(2), solver="heun"), "bounds"),           # returns the edge of its range as if it were the answer
    (lambda: gaussian_variance([S**2], edm_sigmas(5), churn=Churn(9.0)), "churn"),      # a random number as closed form
    (lambda: gaussian_variance([-1.0], edm_sigmas(5)), "variance"),
], ids=["edge", "churn", "negative"])
def test_closed_forms_that_are_none(call, message):
    with pytest.raises(ValueError, match=message):
        call()
