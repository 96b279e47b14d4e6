"Laws and oracles of sedm_kit.analytic."
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedm_kit.analytic import Denoiser, GaussianMixture, gaussian_flow, noise_error, scale_error, sigma_error

SHAPES = [(1, 1, 2), (1, 2, 2), (2, 1, 3)]


def random_mixture(seed, full, k=3, shape=(1, 2, 2)):
    rng = np.random.default_rng(seed)
    d = math.prod(shape)
    half = rng.normal(size=(k, d, d))
    spread = {"cov": half @ half.swapaxes(1, 2) / d + 0.05 * np.eye(d)} if full else {"std": float(rng.uniform(0.1, 1))}
    return GaussianMixture(torch.from_numpy(rng.normal(size=(k, *shape))), torch.from_numpy(rng.uniform(0.2, 2, k)),
                           **{name: torch.as_tensor(v, dtype=torch.float64) if name == "cov" else v for name, v in spread.items()})


def full_covariances(mix):
    "The covariances (k,d,d) as plain numpy, whichever way the mixture stores them."
    axes = np.broadcast_to(np.eye(mix.means.shape[1]), (len(mix.weights), *2 * mix.means.shape[1:])) if mix.basis is None else mix.basis.numpy()
    return np.einsum("kij,kj,klj->kil", axes, mix.variances.numpy(), axes)


def density(mix, x, sigma):
    "Density of one noisy image, written as in a textbook."
    total = 0.0
    for w, mean, cov in zip(mix.weights.numpy(), mix.means.numpy(), full_covariances(mix)):
        noisy = cov + sigma**2 * np.eye(len(mean))
        off = x - mean
        total += w * math.exp(-0.5 * off @ np.linalg.solve(noisy, off)) / math.sqrt(np.linalg.det(2 * math.pi * noisy))
    return total


def points(mix, n, sigma, seed=0):
    return mix.sample(n, sigma, torch.Generator().manual_seed(seed))


# ---- GaussianMixture

@settings(max_examples=30)
@given(seed=st.integers(0, 999), full=st.booleans(), shape=st.sampled_from(SHAPES), sigma=st.floats(0.05, 10))
def test_log_prob_is_the_textbook_density(seed, full, shape, sigma):
    mix = random_mixture(seed, full, shape=shape)
    x = points(mix, 3, sigma, seed)
    expected = [math.log(density(mix, image.numpy(), sigma)) for image in x.flatten(1)]
    torch.testing.assert_close(mix.log_prob(x, sigma), torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


def test_covariances_given_are_the_ones_used():
    cov = torch.tensor([[[2.0, 0.5], [0.5, 1.0]], [[0.3, -0.1], [-0.1, 0.2]]], dtype=torch.float64)
    mix = GaussianMixture(torch.zeros(2, 1, 1, 2), [1, 3], cov=cov)
    np.testing.assert_allclose(full_covariances(mix), cov, atol=1e-14)
    np.testing.assert_allclose(mix.cov, 0.25 * cov[0] + 0.75 * cov[1], atol=1e-14)
    assert mix.weights.tolist() == [0.25, 0.75]


@settings(max_examples=30)
@given(seed=st.integers(0, 999), full=st.booleans(), per_image=st.booleans(), sigma=st.floats(0.05, 20))
def test_score_is_the_gradient_of_log_prob(seed, full, per_image, sigma):
    mix = random_mixture(seed, full)
    level = sigma * torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64) if per_image else sigma
    x = (points(mix, 4, 1.0, seed) * 2).requires_grad_()
    gradient, = torch.autograd.grad(mix.log_prob(x, level).sum(), x)
    torch.testing.assert_close(mix.score(x.detach(), level), gradient, rtol=1e-8, atol=1e-9)


@given(seed=st.integers(0, 999), full=st.booleans(), sigma=st.floats(1e-3, 100))
def test_one_level_for_all_and_the_same_level_for_each_give_the_same_bits(seed, full, sigma):
    mix = random_mixture(seed, full)
    x = points(mix, 4, sigma, seed)
    plain = mix.denoise(x, sigma)
    for same in (torch.tensor(sigma, dtype=torch.float64), torch.full((4,), sigma, dtype=torch.float64)):
        assert torch.equal(mix.denoise(x, same), plain)
        assert torch.equal(mix.log_prob(x, same), mix.log_prob(x, sigma))
        assert torch.equal(mix.score(x, same), mix.score(x, sigma))


def test_each_image_is_denoised_at_its_own_level():
    mix, levels = random_mixture(3, True), torch.tensor([0.1, 0.7, 5.0], dtype=torch.float64)
    x = points(mix, 3, 1.0)
    singly = torch.cat([mix.denoise(x[i:i + 1], levels[i]) for i in range(3)])
    torch.testing.assert_close(mix.denoise(x, levels), singly, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("sigma", [0.3, 1.5])
def test_posterior_mean_by_brute_force_integration(full, sigma):
    # E[y | x] on a fine grid over the clean images: two pixels, step far below the widths.
    mix = random_mixture(11, full, shape=(1, 1, 2))
    axis = np.linspace(-8, 8, 641)
    clean = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    prior = sum(w * np.exp(-0.5 * np.einsum("ni,ij,nj->n", clean - m, np.linalg.inv(c), clean - m)) / math.sqrt(np.linalg.det(c))
                for w, m, c in zip(mix.weights.numpy(), mix.means.numpy(), full_covariances(mix)))
    x = points(mix, 5, sigma, 1)
    for image, denoised in zip(x.flatten(1).numpy(), mix.denoise(x, sigma).flatten(1).numpy()):
        posterior = prior * np.exp(-0.5 * ((clean - image) ** 2).sum(1) / sigma**2)
        np.testing.assert_allclose(denoised, posterior @ clean / posterior.sum(), rtol=0, atol=1e-8)


def test_posterior_mean_of_one_pixel_by_brute_force_integration():
    mix = GaussianMixture(torch.tensor([-1.0, 0.2, 2.0]).reshape(3, 1, 1, 1), [1, 2, 3], 0.3)
    clean, sigma = np.linspace(-6, 8, 20001), 0.8
    prior = sum(w * np.exp(-0.5 * ((clean - m) / 0.3) ** 2) for w, m in zip([1, 2, 3], [-1.0, 0.2, 2.0]))
    for value in (-3.0, 0.0, 1.1, 4.0):
        posterior = prior * np.exp(-0.5 * ((clean - value) / sigma) ** 2)
        got = mix.denoiser()(torch.full((1, 1, 1, 1), value, dtype=torch.float64), sigma).item()
        assert got == pytest.approx(posterior @ clean / posterior.sum(), abs=1e-7)


@pytest.mark.parametrize("full", [False, True])
def test_limits_of_the_denoiser(full):
    mix = random_mixture(5, full)
    x = points(mix, 6, 0.0)
    torch.testing.assert_close(mix.denoise(x, 1e-7), x, rtol=0, atol=1e-10)                    # no noise: the image itself
    torch.testing.assert_close(mix.denoise(x, 1e7), mix.mean.expand_as(x), rtol=0, atol=1e-6)   # nothing but noise: the mean
    # the approach to the mean is the linear denoiser's, cov / sigma^2 (x - mean), for noisy images, whose size is sigma
    x = points(mix, 6, 1e4)
    step = (x - mix.mean).flatten(1) @ mix.cov / 1e8
    torch.testing.assert_close(mix.denoise(x, 1e4).flatten(1) - mix.mean.flatten(), step, rtol=0, atol=1e-6)
    assert step.abs().mean() > 5e-5


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("sigma", [0.0, 0.8])
def test_samples_have_the_mixtures_moments(full, sigma):
    mix, n = random_mixture(7, full), 200_000
    x = points(mix, n, sigma).flatten(1)
    cov = mix.cov + sigma**2 * torch.eye(4)
    assert ((x.mean(0) - mix.mean.flatten()).abs() < 5 * (cov.diagonal() / n).sqrt()).all()
    scale = (cov.diagonal()[:, None] * cov.diagonal()).sqrt()
    assert ((x.T.cov() - cov).abs() < 5 * scale * math.sqrt(3 / n)).all()
    # third moments tell the mixture from one Gaussian: E[x_i^3] from the components
    mean, variance = mix.means, torch.from_numpy(full_covariances(mix)).diagonal(dim1=1, dim2=2) + sigma**2
    third = mix.weights @ (mean**3 + 3 * mean * variance)
    assert ((x**3).mean(0) - third).abs().max() < 5 * (x**3).std(0).max() / math.sqrt(n)


def test_samples_follow_the_generator():
    mix = random_mixture(2, True)
    assert torch.equal(points(mix, 5, 0.3, 4), points(mix, 5, 0.3, 4))
    assert not torch.equal(points(mix, 5, 0.3, 4), points(mix, 5, 0.3, 5))


def test_denoiser_carries_the_mixtures_attributes():
    mix = random_mixture(1, True, shape=(3, 2, 2))
    denoiser = mix.denoiser()
    assert (denoiser.img_channels, denoiser.img_resolution, denoiser.label_dim) == (3, 2, 0)
    assert denoiser.sigma_data == pytest.approx(math.sqrt(np.trace(mix.cov.numpy()) / 12))
    assert repr(denoiser).startswith("Denoiser(3x2x2, sigma_data=")
    x = points(mix, 2, 1.0)
    assert torch.equal(denoiser(x, 1.0), mix.denoise(x, 1.0))


# ---- gaussian_flow

@settings(max_examples=40)
@given(seed=st.integers(0, 999), full=st.booleans(), levels=st.lists(st.floats(0.01, 50), min_size=3, max_size=3))
def test_flow_composes(seed, full, levels):
    gaussian, (a, b, c) = random_mixture(seed, full, k=1), levels
    x = points(gaussian, 3, a, seed)
    via = gaussian_flow(gaussian, gaussian_flow(gaussian, x, a, b), b, c)
    torch.testing.assert_close(via, gaussian_flow(gaussian, x, a, c), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("full", [False, True])
def test_flow_solves_the_probability_flow_equation(full):
    gaussian = random_mixture(4, full, k=1)
    for sigma in (0.2, 1.0, 7.0):
        x, h = points(gaussian, 4, sigma), 1e-4 * sigma
        velocity = (gaussian_flow(gaussian, x, sigma, sigma + h) - gaussian_flow(gaussian, x, sigma, sigma - h)) / (2 * h)
        torch.testing.assert_close(velocity, -sigma * gaussian.score(x, sigma), rtol=1e-6, atol=1e-7)


def test_flow_keeps_the_density_of_each_level():
    # transport of mass: log p changes by minus the log-volume of the map
    gaussian = random_mixture(9, True, k=1)
    x = points(gaussian, 4, 2.0)
    cov = torch.from_numpy(full_covariances(gaussian))[0]
    volume = 0.5 * (torch.linalg.eigvalsh(cov + 0.25 * torch.eye(4)).log() - torch.linalg.eigvalsh(cov + 4 * torch.eye(4)).log()).sum()
    torch.testing.assert_close(gaussian.log_prob(gaussian_flow(gaussian, x, 2.0, 0.5), 0.5), gaussian.log_prob(x, 2.0) - volume, rtol=1e-10, atol=1e-10)


def test_flow_refuses_a_mixture():
    mix = random_mixture(0, False)
    with pytest.raises(ValueError, match="one Gaussian, not for a mixture of 3"):
        gaussian_flow(mix, points(mix, 1, 1.0), 1.0)


# ---- controlled errors

@given(factor=st.floats(0.5, 1.5), seed=st.integers(0, 99))
def test_scale_error_scales_the_distance_to_the_centre(factor, seed):
    mix = random_mixture(seed, False)
    x, center = points(mix, 3, 1.0), torch.from_numpy(np.random.default_rng(seed).normal(size=(1, 2, 2)))
    spoilt = scale_error(mix.denoiser(), factor, center)(x, 1.0)
    torch.testing.assert_close(spoilt - center, factor * (mix.denoise(x, 1.0) - center), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(scale_error(mix.denoiser(), factor)(x, 1.0), factor * mix.denoise(x, 1.0), rtol=1e-12, atol=1e-13)


def test_sigma_error_asks_at_another_level():
    mix = random_mixture(1, True)
    x, levels = points(mix, 3, 1.0), torch.tensor([0.2, 1.0, 3.0], dtype=torch.float64)
    assert torch.equal(sigma_error(mix.denoiser(), 1.5)(x, 1.0), mix.denoise(x, 1.5))
    assert torch.equal(sigma_error(mix.denoiser(), 1.5)(x, levels), mix.denoise(x, 1.5 * levels))


def test_noise_error_has_the_asked_size_and_is_fresh_at_every_call():
    mix = GaussianMixture(torch.zeros(1, 1, 2, 2), [1], 0.5)
    x = torch.zeros(20_000, 1, 2, 2, dtype=torch.float64)
    spoilt = noise_error(mix.denoiser(), 0.3, torch.Generator().manual_seed(0))
    first, second = spoilt(x, 1.0), spoilt(x, 1.0)
    for error in (first, second):
        assert error.std().item() == pytest.approx(0.3, rel=5 / math.sqrt(2 * error.numel()))
    assert torch.stack([first.flatten(), second.flatten()]).corrcoef()[0, 1].abs() < 5 / math.sqrt(first.numel())
    # a size per noise level, here one per image
    levels = torch.tensor([1.0, 2.0], dtype=torch.float64).repeat_interleave(10_000)
    error = noise_error(mix.denoiser(), lambda sigma: 0.1 * sigma, torch.Generator().manual_seed(0))(x, levels)
    for half, size in zip(error.chunk(2), (0.1, 0.2)):
        assert half.std().item() == pytest.approx(size, rel=5 / math.sqrt(2 * half.numel()))


def test_spoilt_denoisers_keep_the_attributes():
    denoiser = Denoiser(lambda x, sigma: x, (3, 8, 8), sigma_data=0.7, sigma_min=0.01, sigma_max=50.0, label_dim=4)
    for spoilt in (scale_error(denoiser, 0.9), noise_error(denoiser, 0.1), sigma_error(denoiser, 1.1)):
        assert (spoilt.img_channels, spoilt.img_resolution, spoilt.sigma_data, spoilt.sigma_min, spoilt.sigma_max, spoilt.label_dim) == \
               (3, 8, 0.7, 0.01, 50.0, 4)


def test_spoilt_denoisers_hand_the_labels_on():
    denoiser = Denoiser(lambda x, sigma, labels: x * 0 + labels.reshape(-1, 1, 1, 1), (1, 1, 1), sigma_data=1.0, label_dim=9)
    x, labels = torch.zeros(2, 1, 1, 1, dtype=torch.float64), torch.tensor([3.0, 7.0])
    for spoilt in (scale_error(denoiser, 1.0), noise_error(denoiser, 0.0), sigma_error(denoiser, 1.1)):
        assert spoilt(x, 1.0, labels).flatten().tolist() == [3.0, 7.0]


# ---- bad input

@pytest.mark.parametrize("arguments, message", [
    ((torch.zeros(2, 3), [1, 1], 0.1), r"means must be \(k,c,h,w\) and finite, got shape \(2, 3\)"),
    ((torch.zeros(2, 1, 2, 2), [1, 1, 1], 0.1), r"2 positive finite numbers, one per component, got \[1.0, 1.0, 1.0\]"),
    ((torch.zeros(2, 1, 2, 2), [1, 0], 0.1), r"positive finite numbers.*\[1.0, 0.0\]"),
    ((torch.zeros(2, 1, 2, 2), [1, -2], 0.1), r"positive finite numbers.*\[1.0, -2.0\]"),
    ((torch.zeros(2, 1, 2, 2), [1, math.nan], 0.1), r"positive finite numbers.*nan"),
    ((torch.zeros(1, 1, 2, 2), [1], -0.1), "std must be finite and not negative, got -0.1"),
    ((torch.zeros(1, 1, 2, 2), [1], math.nan), "std must be finite and not negative, got nan"),
    ((torch.zeros(1, 1, 2, 2), [1]), "either one std or full covariances"),
])
def test_bad_mixtures(arguments, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(*arguments)


def test_bad_covariances():
    with pytest.raises(ValueError, match="either one std or full covariances"):
        GaussianMixture(torch.zeros(1, 1, 1, 2), [1], 0.1, cov=torch.eye(2)[None])
    with pytest.raises(ValueError, match=r"cov must be \(2, 2, 2\) for these means, got \(1, 2, 2\)"):
        GaussianMixture(torch.zeros(2, 1, 1, 2), [1, 1], cov=torch.eye(2)[None])


@pytest.mark.parametrize("means, weights, cov, message", [
    ([math.nan, 0.0], [1], [[1.0, 0.0], [0.0, 1.0]], "means must be .* finite"),
    ([0.0, 0.0], [math.inf], [[1.0, 0.0], [0.0, 1.0]], "weights"),
    ([0.0, 0.0], [1], [[1.0, math.nan], [math.nan, 1.0]], "cov must be finite"),
    ([0.0, 0.0], [1], [[1.0, 0.9], [0.0, 1.0]], "symmetric"),
    ([0.0, 0.0], [1], [[1.0, 2.0], [2.0, 1.0]], "semi-definite"),
], ids=["nan means", "infinite weight", "nan cov", "asymmetric cov", "indefinite cov"])
def test_mixtures_that_are_none(means, weights, cov, message):
    with pytest.raises(ValueError, match=message):
        GaussianMixture(torch.tensor(means).reshape(1, 1, 1, 2), weights, cov=torch.tensor([cov]))
