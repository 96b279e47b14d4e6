"Heavy numerics of sedm_kit.weights: golden numbers, the conversion table by autograd, limits, one-step errors, bad input."
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sedm_kit.analytic import GaussianMixture
from sedm_kit.networks import EDMPrecond
from sedm_kit.noise import ddpm_alphas_cumprod, sigma_from_alphas, snr
from sedm_kit.weights import (PREDICTIONS, SCHEMES, amplified_estimates, eps_per, error_amplification, loss_weight, one_step_estimates, one_step_mse,
                              weight_curves)

GOLDEN = Path(__file__).parent / "golden"
ratios = st.floats(1e-8, 1e8)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- numbers

@pytest.mark.parametrize("entry, name, form", [("p2", "p2", "eps"), ("min_snr_eps", "min_snr", "eps"), ("min_snr_x0", "min_snr", "x0"),
                                               ("debias", "debias", "eps"), ("inverse_snr", "inverse_snr", "eps")])
def test_golden(entry, name, form):
    file = {key: torch.from_numpy(value) for key, value in np.load(GOLDEN / "weights_linear.npz").items()}
    assert_close(loss_weight(name, file["snr"], form), file[entry], rtol=1e-9, atol=0)
    ours = snr(sigma_from_alphas(ddpm_alphas_cumprod("linear")))  # from the kit's own schedule
    assert_close(loss_weight(name, ours, form), file[entry], rtol=1e-9, atol=0)


def test_table_of_the_literature():
    s = torch.logspace(-6, 6, 49, dtype=torch.float64)
    table = {"constant": (1 + 0 * s, s, s / (s + 1)), "p2": (1 / (1 + s), s / (1 + s), s / (1 + s) ** 2),
             "min_snr": (s.clamp(max=5) / s, s.clamp(max=5), s.clamp(max=5) / (s + 1)), "inverse_snr": (1 / s, 1 + 0 * s, 1 / (s + 1)),
             "debias": (s**-0.5, s**0.5, s**0.5 / (s + 1))}
    for name, row in table.items():
        for form, expected in zip(("eps", "x0", "v"), row):
            assert_close(loss_weight(name, s, form), expected, rtol=1e-12, atol=0)


def test_f_form_is_edms_network():
    "c_out of the network itself, not of the table."
    sigma, sigma_data = torch.logspace(-3, 2, 21, dtype=torch.float64), 0.37
    model = EDMPrecond(8, 1, model_type="PatchNet", sigma_data=sigma_data, channels=8, blocks=1)
    c_out = model.coefficients(sigma)[1]
    assert_close(loss_weight("edm", snr(sigma), "x0", sigma_data=sigma_data), c_out**-2)
    for name in SCHEMES:
        x0, raw = (loss_weight(name, snr(sigma), form, sigma_data=sigma_data) for form in ("x0", "F"))
        assert_close(raw, x0 * c_out**2)


# ---- laws

def readings(x, alpha, sigma, sigma_data):
    "From an estimate of x0 to the other forms, at the same input; written from their definitions."
    level = sigma / alpha
    c_skip, c_out = sigma_data**2 / (level**2 + sigma_data**2), level * sigma_data / (level**2 + sigma_data**2).sqrt()
    eps = lambda x0: (x - alpha * x0) / sigma
    return {"x0": lambda x0: x0, "eps": eps, "v": lambda x0: alpha * eps(x0) - sigma * x0, "F": lambda x0: (x0 - c_skip * x / alpha) / c_out}


@settings(max_examples=40)
@given(name=st.sampled_from(SCHEMES), seed=st.integers(0, 10**6), level=st.floats(0.02, 50), sigma_data=st.floats(0.1, 2), cap=st.floats(0.5, 20),
       gamma=st.floats(0, 2), k=st.floats(0.1, 3), clamp=st.sampled_from([None, 1e-3, 1.0]))
def test_same_gradient_in_every_form(name, seed, level, sigma_data, cap, gamma, k, clamp):
    torch.manual_seed(seed)
    network, level = torch.nn.Linear(3, 3, dtype=torch.float64), torch.tensor(level, dtype=torch.float64)
    alpha, sigma = (1 + level**2).rsqrt(), level * (1 + level**2).rsqrt()
    x0, noise = torch.randn(2, 5, 3, dtype=torch.float64)
    x, gradients = alpha * x0 + sigma * noise, {}
    guess = network(x)
    for form, read in readings(x, alpha, sigma, sigma_data).items():
        weight = loss_weight(name, level**-2, form, sigma_data=sigma_data, cap=cap, gamma=gamma, k=k, snr_min=clamp)
        gradients[form] = torch.autograd.grad((weight * (read(guess) - read(x0)).square()).mean(), network.weight, retain_graph=True)[0]
    assert set(gradients) == set(PREDICTIONS)
    for gradient in gradients.values():
        assert_close(gradient, gradients["eps"], rtol=1e-8, atol=1e-12)


@settings(max_examples=60)
@given(s=ratios, name=st.sampled_from(SCHEMES), form=st.sampled_from(PREDICTIONS))
def test_weights_are_positive_and_finite(s, name, form):
    weight = loss_weight(name, s, form)
    assert weight.dtype == torch.float64 and weight.shape == () and 0 < weight.item() < math.inf


@settings(max_examples=60)
@given(s=ratios, cap=st.floats(0.1, 100))
def test_min_snr_is_a_minimum(s, cap):
    assert loss_weight("min_snr", s, cap=cap) <= 1 and loss_weight("min_snr", s, "x0", cap=cap) <= cap * (1 + 1e-12)
    assert_close(loss_weight("min_snr", s, "x0", cap=cap).item(), min(s, cap), rtol=1e-12, atol=0)


def test_parameters_reach_their_schemes():
    s = torch.tensor([0.1, 1.0, 30.0])
    assert_close(loss_weight("p2", s, gamma=0.0), loss_weight("constant", s))
    assert_close(loss_weight("p2", s, k=2.0, gamma=0.5), (2 + s.double()) ** -0.5)
    assert_close(loss_weight("p2", s, k=0, gamma=0.5), loss_weight("debias", s))
    assert_close(loss_weight("min_snr", s, cap=1e9), loss_weight("constant", s))
    assert_close(loss_weight("edm", s, sigma_data=1e9), loss_weight("constant", s))
    assert loss_weight("debias", s.reshape(3, 1)).shape == (3, 1)


def test_clamp_is_off_unless_asked():
    tiny = 1e-12
    assert_close(loss_weight("debias", tiny).item(), 1e6, rtol=1e-9, atol=0)
    assert_close(loss_weight("debias", tiny, snr_min=1e-4).item(), 1e2, rtol=1e-9, atol=0)
    assert_close(loss_weight("debias", tiny, "x0", snr_min=1e-4).item(), 1e2 * tiny, rtol=1e-9, atol=0)  # the conversion keeps the true ratio
    assert_close(loss_weight("debias", 0.5, snr_min=1e-4), loss_weight("debias", 0.5))
    assert_close(loss_weight("inverse_snr", torch.tensor([0.0, 1e-4, 2.0]), "x0", snr_min=1e-3), torch.tensor([0.0, 0.1, 1.0], dtype=torch.float64))  # clamped: no longer 1 everywhere
    for form, expected in (("eps", 1e2), ("x0", 0.0), ("v", 0.0), ("F", 0.0)):
        assert_close(loss_weight("debias", 0.0, form, snr_min=1e-4).item(), expected, rtol=1e-9, atol=0)


def test_curves_are_the_weights():
    s = torch.logspace(-2, 2, 5)
    curves = weight_curves(s, predictions=PREDICTIONS, cap=3.0)
    assert set(curves) == set(PREDICTIONS) and set(curves["v"]) == set(SCHEMES)
    assert torch.equal(curves["v"]["min_snr"], loss_weight("min_snr", s, "v", cap=3.0))


# ---- the image's error

def test_amplification_of_the_linear_schedule():
    ratio = snr(sigma_from_alphas(ddpm_alphas_cumprod("linear")))
    assert_close(error_amplification(ratio[[0, 499, 999]]), torch.tensor([0.010000500037502575, 3.4241366190440417, 157.40728081040757], dtype=torch.float64),
                 rtol=1e-9, atol=0)
    assert torch.equal(error_amplification(ratio), loss_weight("debias", ratio))


def test_amplified_estimates_by_hand():
    images = torch.rand(3, 1, 4, 4, generator=rng())
    made = amplified_estimates(images, [0.5, 2.0], size=0.2, generator=rng(1))
    error = torch.randn(3, 1, 4, 4, generator=rng(1), dtype=torch.float64)
    assert_close(made, torch.stack([images - 0.1 * error, images - 0.4 * error]))


def test_one_step_errors_of_the_exact_denoiser():
    "N(0, s^2): the image's error is s^2 sigma^2 / (s^2 + sigma^2), epsilon's s^2 / (s^2 + sigma^2)."
    mixture, levels = GaussianMixture(torch.zeros(1, 1, 4, 4), [1.0], std=0.6), torch.tensor([0.1, 1.0, 30.0], dtype=torch.float64)
    result = one_step_mse(mixture.denoiser(), mixture.sample(2000, generator=rng()), levels, generator=rng(1), batch=300)
    expected = 0.36 * levels**2 / (0.36 + levels**2)
    assert ((result["x0"] - expected).abs() < 5 * result["x0_error"]).all() and (result["x0_error"] < 0.02 * expected).all()
    assert_close(result["eps"], result["x0"] / levels**2)
    assert_close(result["snr"], snr(levels))


def test_one_step_estimates_share_their_noise():
    mixture = GaussianMixture(torch.zeros(1, 1, 2, 2), [1.0], std=1.0)
    images = mixture.sample(5, generator=rng())
    noisy, made = one_step_estimates(mixture.denoiser(), images, [0.5, 2.0], generator=rng(1))
    assert_close((noisy[1] - images) / 2.0, (noisy[0] - images) / 0.5)
    assert_close(made, noisy / (1 + torch.tensor([0.25, 4.0]).double().reshape(-1, 1, 1, 1, 1)))


def test_labels_follow_their_images():
    def denoiser(x, sigma, class_labels):
        return class_labels.to(x).reshape(-1, 1, 1, 1).expand_as(x)
    labels = torch.arange(7)
    images = labels.double().reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    assert one_step_mse(denoiser, images, [1.0], class_labels=labels, batch=3)["x0"].item() == 0.0


# ---- bad input

@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf, [1.0, 0.0]])
def test_bad_ratios(value):
    for function in (lambda: loss_weight("debias", value), lambda: loss_weight("constant", value, "x0")):
        with pytest.raises(ValueError, match="snr must be finite and positive, got .*snr_min"):
            function()
    with pytest.raises(ValueError, match="snr must be finite and positive, got"):
        error_amplification(value)
    if value != 0.0 and value != [1.0, 0.0]:
        with pytest.raises(ValueError, match="snr must be finite and not negative"):
            loss_weight("debias", value, snr_min=1e-3)


def test_bad_names_and_parameters():
    with pytest.raises(ValueError, match="unknown weight 'min-snr'; known: constant, edm, p2, min_snr, inverse_snr, debias"):
        loss_weight("min-snr", 1.0)
    with pytest.raises(ValueError, match="unknown prediction 'epsilon'; known: eps, x0, v, F"):
        loss_weight("debias", 1.0, "epsilon")
    with pytest.raises(ValueError, match="unknown prediction"):
        eps_per("score", 1.0)
    with pytest.raises(ValueError, match="snr must be finite and positive, got 0"):  # k = 0 opens no way to a division by zero
        loss_weight("p2", 0.0, k=0)
    for settings in ({"k": -1.0}, {"k": math.nan}, {"cap": -5.0}, {"sigma_data": 0.0}, {"gamma": -1.0}, {"gamma": math.nan}, {"gamma": math.inf}, {"snr_min": 0.0}, {"cap": math.nan}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            loss_weight("constant", 1.0, **settings)


def test_bad_one_step_input():
    denoiser, images = GaussianMixture(torch.zeros(1, 1, 2, 2), [1.0], std=1.0).denoiser(), torch.zeros(3, 1, 2, 2)
    with pytest.raises(ValueError, match="at least 2 images"):
        one_step_mse(denoiser, images[:1], [1.0])
    for sigmas in ([1.0, 0.0], -1.0, math.inf):
        for function in (one_step_mse, one_step_estimates):
            with pytest.raises(ValueError, match="sigmas must be positive and finite"):
                function(denoiser, images, sigmas)
        with pytest.raises(ValueError, match="sigmas must be positive and finite"):
            amplified_estimates(images, sigmas)
