"Heavy numerics of sedm_kit.training: loss by hand, laws of noise, weights and averages, repeatability, errors."
import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sedm_kit.analytic import GaussianMixture
from sedm_kit.networks import EDMPrecond, PatchFeatures, seeded
from sedm_kit.training import (classification_accuracy, cosine_lr, denoising_loss, edm_weight, held_out_losses, log_normal_sigmas, train_denoiser,
                               train_features, typical_sigmas, update_average)


def small(seed=0, **settings):
    with seeded(seed):
        return EDMPrecond(8, 1, **{"model_type": "PatchNet", "sigma_data": 0.5, "channels": 8, "blocks": 1, **settings})


def images(n=64, seed=0):
    with seeded(seed):
        return torch.rand(n, 1, 8, 8) * 2 - 1


@settings(max_examples=30, deadline=None)
@given(sigma=st.floats(1e-3, 80.0), sigma_data=st.floats(0.05, 3.0))
def test_edm_weight_undoes_c_out(sigma, sigma_data):
    _, c_out, _, _ = small(sigma_data=sigma_data).coefficients(torch.tensor(sigma, dtype=torch.float64))
    assert_close(edm_weight(torch.tensor(sigma, dtype=torch.float64), sigma_data), c_out**-2)


def test_loss_by_hand():
    "One pixel pair, a denoiser that halves its input: everything can be worked out on paper."
    def halve(x, sigma): return x / 2
    halve.sigma_data = 0.5
    clean, noise, sigma = torch.tensor([1.0, -1.0]).reshape(1, 1, 1, 2), torch.tensor([2.0, 0.0]).reshape(1, 1, 1, 2), torch.tensor([0.5])
    # x = (2, -1), D = (1, -0.5), error = (0, 0.5), mean square 0.125; weight = (0.25 + 0.25) / 0.0625 = 8
    assert_close(denoising_loss(halve, clean, noise, sigma), torch.tensor([1.0]))
    assert_close(denoising_loss(halve, clean, noise, sigma, weight=lambda sigma, sigma_data: 3 * sigma), torch.tensor([0.1875]))


def test_loss_is_that_of_the_raw_network_against_the_effective_target():
    "EDM's loss equals the plain squared error of F (Karras et al. 2022, Eq. 8)."
    model = small()
    torch.nn.init.normal_(model.model.head.weight, std=0.3)
    clean, noise, sigma = images(5), torch.randn(5, 1, 8, 8), torch.tensor([0.01, 0.1, 0.5, 2.0, 20.0])
    level = sigma.reshape(-1, 1, 1, 1)
    c_skip, c_out, c_in, c_noise = model.coefficients(level)
    noisy = clean + level * noise
    raw = (model.model(c_in * noisy, c_noise.flatten()) - (clean - c_skip * noisy) / c_out).square().mean((1, 2, 3))
    assert_close(denoising_loss(model, clean, noise, sigma), raw, rtol=1e-4, atol=1e-5)


def test_exact_denoiser_reaches_the_known_loss():
    "For N(0, s^2) data the best loss is s^2 (sigma^2 + sd^2) / (sd^2 (sigma^2 + s^2))."
    mixture = GaussianMixture(torch.zeros(1, 1, 8, 8), [1.0], std=0.3)
    exact = mixture.denoiser()
    exact.sigma_data = 0.5
    data, sigmas = mixture.sample(4000, generator=torch.Generator().manual_seed(0)).float(), torch.tensor([0.1, 0.5, 3.0])
    expected = 0.09 * (sigmas**2 + 0.25) / (0.25 * (sigmas**2 + 0.09))
    assert_close(held_out_losses(exact, data, sigmas).float(), expected, rtol=0.02, atol=0)


def test_held_out_losses_are_fixed_and_need_no_gradient():
    model, data = small(), images(300)
    first = held_out_losses(model, data, [0.1, 1.0])
    assert torch.equal(first, held_out_losses(model, data, [0.1, 1.0])) and not first.requires_grad
    assert not torch.equal(first, held_out_losses(model, data, [0.1, 1.0], seed=1))
    assert first.dtype == torch.float64 and first.shape == (2,)


@settings(max_examples=15, deadline=None)
@given(n=st.integers(1, 50), p_mean=st.floats(-3, 1), p_std=st.floats(0.1, 2))
def test_typical_levels_are_symmetric_quantiles(n, p_mean, p_std):
    logs = typical_sigmas(n, p_mean, p_std).double().log()
    assert_close(logs.mean(), torch.tensor(p_mean, dtype=torch.float64), rtol=0, atol=1e-5)
    assert (logs.diff() > 0).all()


def test_training_levels_follow_the_law():
    with seeded(0): logs = log_normal_sigmas(200_000, -0.4, 0.8).log()
    assert_close(torch.stack([logs.mean(), logs.std()]), torch.tensor([-0.4, 0.8]), rtol=0, atol=0.01)
    assert_close(((logs + 0.4) / 0.8).pow(4).mean(), torch.tensor(3.0), rtol=0.03, atol=0)


@settings(max_examples=30, deadline=None)
@given(steps=st.integers(1, 5000), peak=st.floats(1e-5, 1))
def test_learning_rate_rises_then_falls(steps, peak):
    rates = [cosine_lr(step, steps, peak) for step in range(0, steps, max(steps // 100, 1))]
    top = rates.index(max(rates))
    assert all(0 < rate <= peak for rate in rates)
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)


def test_average_is_the_exponential_one():
    average, model = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    average.requires_grad_(False)
    average.weight.fill_(1.0)
    model.weight.data.fill_(3.0)
    update_average(average, model, decay=0.9, step=10**6)
    assert_close(average.weight.item(), 0.9 * 1 + 0.1 * 3, rtol=1e-6, atol=0)
    update_average(average, model, decay=0.9, step=0)  # the memory is short at first: 1/10 old, 9/10 new
    assert_close(average.weight.item(), 0.1 * 1.2 + 0.9 * 3, rtol=1e-6, atol=0)


def test_average_takes_buffers_over():
    model, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2).requires_grad_(False)
    model.running_mean.fill_(5.0)
    update_average(average, model, 0.999, step=0)
    assert torch.equal(average.running_mean, model.running_mean)


def test_first_step_by_hand():
    "Adam's first step moves every weight by the learning rate against the sign of its gradient."
    model, data = small(), images()
    reference, rate = copy.deepcopy(model), cosine_lr(0, 1, 1e-3)
    with seeded(7):
        clean = data[torch.randint(len(data), (16,))]
        sigma = log_normal_sigmas(16)
        denoising_loss(reference, clean, torch.randn_like(clean), sigma).mean().backward()
    train_denoiser(model, data, steps=1, batch=16, lr=1e-3, seed=7, progress=False)
    gradient = reference.model.head.weight.grad
    moved, strong = model.model.head.weight - reference.model.head.weight, gradient.abs() > 1e-5
    assert_close(moved[strong], -rate * gradient.sign()[strong], rtol=0.01, atol=0)


def test_training_is_a_function_of_its_seed():
    def result(seed):
        torch.manual_seed(torch.seed() % 2**31)  # whatever the caller's random numbers are
        return torch.cat([p.flatten() for p in train_denoiser(small(), images(), steps=10, batch=8, seed=seed, progress=False)[0].parameters()])
    assert torch.equal(result(0), result(0))
    assert not torch.equal(result(0), result(1))


def test_training_leaves_images_and_random_numbers_alone():
    data, torch_state = images(), torch.get_rng_state()
    before = data.clone()
    train_denoiser(small(), data, steps=3, batch=8, held_out=data, progress=False)
    assert torch.equal(data, before) and torch.equal(torch.get_rng_state(), torch_state)


def test_history():
    _, history = train_denoiser(small(), images(), steps=20, batch=8, held_out=images(32, seed=1), checks=4, progress=False)
    assert history["step"] == [5, 10, 15, 20]
    assert all(len(history[name]) == 4 for name in ("loss", "held_out", "held_out_per_level"))
    assert history["held_out"][-1] == pytest.approx(sum(history["held_out_per_level"][-1]) / len(history["sigmas"]))
    _, without = train_denoiser(small(), images(), steps=4, batch=8, checks=2, progress=False)
    assert without["step"] == [2, 4] and without["held_out"] == []


def test_looking_at_held_out_images_changes_nothing():
    with_look, _ = train_denoiser(small(), images(), steps=6, batch=8, held_out=images(16, seed=1), checks=3, progress=False)
    without, _ = train_denoiser(small(), images(), steps=6, batch=8, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(with_look.parameters(), without.parameters()))


def test_training_approaches_the_exact_denoiser():
    "Correlated Gaussian data: the loss must come close to the best possible one, which is known."
    factor = torch.randn(64, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / 4
    mixture = GaussianMixture(torch.zeros(1, 1, 8, 8), [1.0], cov=(factor @ factor.T + 1e-3 * torch.eye(64, dtype=torch.float64))[None])
    data = mixture.sample(4000, generator=torch.Generator().manual_seed(1)).float()
    fresh = mixture.sample(1000, generator=torch.Generator().manual_seed(2)).float()
    exact = mixture.denoiser()
    exact.sigma_data = sigma_data = round(data.std().item(), 3)
    model, history = train_denoiser(small(sigma_data=sigma_data, channels=24, blocks=2), data, steps=600, batch=64, lr=4e-3, ema=0.99, progress=False)
    levels = torch.tensor([0.1, 0.3, 1.0])
    best, reached = held_out_losses(exact, fresh, levels), held_out_losses(model, fresh, levels)
    assert (reached > 0.98 * best).all()  # nobody beats the exact denoiser
    assert (reached - best < 0.12).all(), (reached, best)


def test_a_loss_that_is_no_number_names_its_step():
    data = images()
    data[5] = math.nan
    with pytest.raises(FloatingPointError, match=r"training loss at step \d+ is nan"):
        train_denoiser(small(), data, steps=50, batch=32, progress=False)


def test_a_loss_that_explodes_does_not_spoil_the_weights():
    model = small()
    weight = lambda sigma, sigma_data: sigma * math.inf
    with pytest.raises(FloatingPointError, match="step 0 is inf"):
        train_denoiser(model, images(), steps=5, batch=8, weight=weight, progress=False)
    assert all(p.isfinite().all() for p in model.parameters())


def test_features_are_trained_and_scaled():
    with seeded(0):
        bright = torch.rand(400) > 0.5
        data = 0.3 * torch.randn(400, 1, 8, 8) + bright.float().reshape(-1, 1, 1, 1) - 0.5
    labels = bright.long()
    def trained():
        with seeded(1): features = PatchFeatures(8, 1, classes=2, channels=4)
        return features, train_features(features, data[:300], labels[:300], steps=60, held_out=(data[300:], labels[300:]), progress=False)
    features, history = trained()
    assert history["held_out_accuracy"] > 0.97 and len(history["loss"]) == 60
    assert history["held_out_accuracy"] == classification_accuracy(features, data[300:], labels[300:])
    assert not features.training
    assert_close(features(data[:300]).T.cov().trace(), torch.tensor(64.0), rtol=1e-3, atol=0)
    assert torch.equal(features(data), trained()[0](data))
