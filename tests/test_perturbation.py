"Heavy numerics of sedm_kit.perturbation: the three readings of a perturbed input against DDPM's own loss, the penalty by hand, errors."
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from sedm_kit.analytic import GaussianMixture
from sedm_kit.perturbation import FORMS, expected_target, gamma_at, gradient_penalty, perturb_input, squared_weights


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(n=6, seed=0):
    return normal(seed, n, 1, 4, 4), normal(seed + 1, n, 1, 4, 4), normal(seed + 2, n, 1, 4, 4), normal(seed + 3, n).exp()


def column(x):
    return x.reshape(-1, 1, 1, 1)


def ratio(x, y):
    return ((x * y).sum() / x.square().sum()).item()


@pytest.mark.parametrize("gamma", [0.1, 0.15, 1.0])
def test_noise_variance_is_one_plus_gamma_squared(gamma):
    clean, noise, extra = (normal(seed, 100_000, 1, 1, 1) for seed in range(3))
    sigma = torch.full((100_000,), 3.0, dtype=torch.float64)
    for form in FORMS:
        x, _ = perturb_input(clean, noise, sigma, gamma, form, extra=extra)
        assert_close(((x - clean) / 3).var().item(), 1 + gamma**2, rtol=0.02, atol=0)


@given(gamma=st.floats(0, 2), t=st.integers(0, 999))
def test_it_is_ddpm_ip_in_data_units(gamma, t):
    "y_t = sqrt(abar) x0 + sqrt(1-abar) (eps + gamma xi), target eps; DDPM-y: the noise of y_t at unit variance."
    abar = math.cos((t + 1) / 1010 * math.pi / 2) ** 2
    sigma = torch.full((6,), math.sqrt((1 - abar) / abar), dtype=torch.float64)
    x0, eps, xi, _ = batch()
    y_t = math.sqrt(abar) * x0 + math.sqrt(1 - abar) * (eps + gamma * xi)
    x, target = perturb_input(x0, eps, sigma, gamma, "ip", extra=xi)
    assert_close(math.sqrt(abar) * x, y_t)
    assert_close((x - target) / column(sigma), eps)
    eps_theta = normal(9, *eps.shape)  # any network's answer
    denoised = x - column(sigma) * eps_theta
    assert_close((denoised - target).square() / column(sigma) ** 2, (eps_theta - eps).square())
    _, target_y = perturb_input(x0, eps, sigma, gamma, "ddpm_y", extra=xi)
    assert_close((x - target_y) / column(sigma), (eps + gamma * xi) / math.sqrt(1 + gamma**2), rtol=1e-6, atol=1e-9)


def test_naive_keeps_the_clean_image_and_zero_strength_changes_nothing():
    clean, noise, extra, sigma = batch()
    assert torch.equal(perturb_input(clean, noise, sigma, 0.7, "naive", extra=extra)[1], clean)
    for form in FORMS:
        x, target = perturb_input(clean, noise, sigma, 0.0, form, extra=extra)
        assert torch.equal(x, clean + column(sigma) * noise) and torch.equal(target, clean)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gamma", [0.15, 0.8])
def test_expected_target_is_the_regression_on_x(form, gamma):
    gauss = GaussianMixture(torch.zeros(1, 1, 1, 1), [1.0], std=0.7)
    n, sigma = 400_000, 1.3
    clean, noise, extra = 0.7 * normal(0, n, 1, 1, 1), normal(1, n, 1, 1, 1), normal(2, n, 1, 1, 1)
    x, target = perturb_input(clean, noise, torch.full((n,), sigma, dtype=torch.float64), gamma, form, extra=extra)
    mean = gauss.denoiser()(x, sigma * math.sqrt(1 + gamma**2))
    expected = expected_target(x, mean, torch.full((n,), gamma, dtype=torch.float64), form)
    assert_close(ratio(x, target), ratio(x, expected), rtol=0, atol=0.006)
    left = (target - expected).flatten()  # what x does not tell is uncorrelated with any function of x
    assert abs((left * x.flatten().tanh()).mean()) < 0.006


def test_strength_by_schedule():
    clean, noise, extra, sigma = batch()
    schedule = lambda sigma: 0.2 * sigma / (1 + sigma)
    x, _ = perturb_input(clean, noise, sigma, schedule, extra=extra)
    assert_close(x, clean + column(sigma) * (noise + column(schedule(sigma)) * extra))
    assert_close(gamma_at(lambda sigma: 0.3, sigma), torch.full((6,), 0.3, dtype=torch.float64))


@pytest.mark.parametrize("gamma", [-0.1, math.nan, math.inf, lambda sigma: 0.1 - sigma])
def test_strengths_that_are_none(gamma):
    clean, noise, extra, sigma = batch()
    with pytest.raises(ValueError, match="gamma must be finite and not negative, got"):
        perturb_input(clean, noise, sigma, gamma, extra=extra)


def test_unknown_form_is_named():
    clean, noise, extra, sigma = batch()
    with pytest.raises(ValueError, match="unknown form of perturbation 'edm'; known: ip, ddpm_y, naive"):
        perturb_input(clean, noise, sigma, 0.1, "edm")
    with pytest.raises(ValueError, match="unknown form"):
        expected_target(clean, clean, sigma, "ipp")


def test_penalty_of_a_linear_model_by_hand():
    "eps = A x and one projection v: |A' v|^2, with gradient 2 v v' A."
    A, v = normal(0, 5, 5).requires_grad_(), normal(1, 3, 5)
    x = normal(2, 3, 5).requires_grad_()
    penalty = gradient_penalty(x @ A.T, x, v)
    assert_close(penalty, (v @ A).square().sum(1))
    slope, = torch.autograd.grad(penalty.sum(), A)
    assert_close(slope, 2 * v.T @ v @ A)


def test_penalty_is_unbiased_for_a_network():
    "The mean over projections is the norm of the full Jacobian, and the gradients agree too."
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.SiLU(), torch.nn.Linear(16, 4)).double()
    x = normal(3, 1, 4)
    full = torch.autograd.functional.jacobian(lambda x: network(x)[0], x, create_graph=True).square().sum()
    many = x.expand(50_000, -1).detach().requires_grad_()
    estimate = gradient_penalty(network(many), many, normal(4, 50_000, 4)).mean()
    assert_close(estimate, full, rtol=0.03, atol=0)
    weight = network[0].weight
    exact, found = (torch.autograd.grad(value, weight)[0] for value in (full, estimate))
    assert_close(found, exact, rtol=0, atol=0.03 * exact.abs().max().item())


def test_penalty_says_what_it_cannot_differentiate():
    x, weight = normal(0, 3, 4), normal(1, 4, 4).requires_grad_()
    for eps in (x, x @ weight):  # x without a gradient
        with pytest.raises(ValueError, match="x must have requires_grad when eps is calculated from it"):
            gradient_penalty(eps, x)
    x.requires_grad_()
    with torch.no_grad(), pytest.raises(ValueError, match="outside of torch.no_grad"):
        gradient_penalty(x @ weight, x)
    with pytest.raises(ValueError, match="eps was not calculated from this x"):
        gradient_penalty(normal(2, 3, 4) @ weight, x)


def test_a_frozen_model_has_no_weights_to_decay():
    with pytest.raises(ValueError, match="this Linear has no trainable parameter"):
        squared_weights(torch.nn.Linear(3, 2).requires_grad_(False))


def test_squared_weights_leave_frozen_ones_out():
    layer = torch.nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    assert_close(squared_weights(layer), layer.weight.square().sum())
