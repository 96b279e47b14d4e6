"Laws and oracles of sedm_kit.discriminator."
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from sedm_kit.analytic import GaussianMixture
from sedm_kit.discriminator import (CLOSED, SATURATION, DiscriminatorGuidance, accuracy_per_level, correction, log_ratio_loss, train_discriminator,
                                    vp_input)
from sedm_kit.networks import PatchLogRatio, seeded
from sedm_kit.noise import edm_sigmas, vp_scale, vp_sigma, vp_time
from sedm_kit.sampler import sample

GOLDEN = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(Path(__file__).parent / "golden" / "samplers.npz").items()}


def golden_log_ratio(u, tau, class_labels=None):
    u = u.to(torch.float64).flatten(1)
    return u @ GOLDEN["disc_b"] + GOLDEN["disc_c"] * tau - GOLDEN["disc_q"] * u.square().mean(1) / 2


def unit(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def linear(scale):
    "A log-ratio with a gradient everywhere: scale times the sum of the pixels."
    return lambda u, tau, class_labels=None: scale * u.flatten(1).sum(1)


def level(*sigmas):
    return torch.tensor(sigmas, dtype=torch.float64)


# ---- the correction

def test_golden_corrections():
    g, L = DiscriminatorGuidance(golden_log_ratio, 1.0)(GOLDEN["corr_x"], GOLDEN["corr_sigma"])
    assert g[0].count_nonzero() == 0 and L[0] == CLOSED == 1e7 and GOLDEN["corr"][0].count_nonzero() == 0  # sigma 0.01: closed
    for got, expected in zip(g[1:], GOLDEN["corr"][1:]):
        assert ((got - expected).abs().max() / expected.abs().max()) < 1e-6
    assert_close(L[1:], GOLDEN["corr_log_ratio"][1:], rtol=0, atol=1e-7)
    assert_close(vp_scale(GOLDEN["corr_sigma"]), GOLDEN["corr_vp_mean"], rtol=1e-14, atol=0)
    assert_close(vp_time(GOLDEN["corr_sigma"]), GOLDEN["corr_vp_tau"], rtol=1e-10, atol=0)


def small_network(seed):
    "A random convolutional log-ratio in float64, so that finite differences resolve its gradient."
    with seeded(seed):
        body = nn.Sequential(nn.Conv2d(2, 5, 3, padding=1), nn.SiLU(), nn.Conv2d(5, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(16, 1)).double()

    def log_ratio(u, tau, class_labels=None):
        time = tau.to(torch.float64).reshape(-1, 1, 1, 1).expand(len(u), 1, *u.shape[2:])
        return 3 * body(torch.cat([u.to(torch.float64), time], 1)).squeeze(1)
    return log_ratio


@settings(max_examples=20)
@given(seed=st.integers(0, 999), sigmas=st.lists(st.floats(0.06, 50), min_size=3, max_size=3))
def test_correction_against_finite_differences(seed, sigmas):
    log_ratio, sigma = small_network(seed), level(*sigmas)
    size = (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)
    x = size * unit(3, 1, 4, 4, seed=seed)

    def L(x):
        "The log-ratio as a function of the noisy image in data units, without any rounding."
        return log_ratio(x / size, vp_time(sigma))

    step = 1e-4 * size
    gradient = torch.zeros_like(x)
    for pixel in range(16):
        change = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
        change.view(-1)[pixel] = 1
        gradient += change * ((L(x + step * change) - L(x - step * change)).reshape(-1, 1, 1, 1) / (2 * step))
    g, log_ratios = correction(log_ratio, x, sigma)
    expected = -(sigma**2).reshape(-1, 1, 1, 1) * gradient
    for got, want in zip(g, expected):  # float32 input: seven digits of the largest
        assert (got - want).abs().max() <= 2e-6 * want.abs().max() + 1e-12
    assert_close(log_ratios.to(torch.float64), L(x), rtol=0, atol=3e-6)
    together, _ = DiscriminatorGuidance(log_ratio, (1.7, 0.4), window=(0, 2))(x, sigma)
    later, _ = DiscriminatorGuidance(log_ratio, (1.7, 0.4), window=(0, 2))(x, sigma, stage=1)
    assert torch.equal(together, 1.7 * g) and torch.equal(later, 0.4 * g)


def test_the_network_is_asked_in_float32_and_vp_scale_and_gets_no_gradient():
    seen, network = [], PatchLogRatio(8, 1, channels=8, blocks=1).eval()

    def spy(u, tau, class_labels):
        seen.append((u.detach().clone(), tau, class_labels))
        return network(u, tau)

    x, sigma = 2 * unit(3, 1, 8, 8), level(0.1, 1.0, 2.0)
    with torch.no_grad():  # as in the sampler
        g, L = correction(spy, x, sigma, "labels")
    (u, tau, labels), = seen
    assert (u.dtype, tau.dtype, tau.shape, labels) == (torch.float32, torch.float32, (3,), "labels")
    assert_close(u, (x / (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)).float())
    assert_close(tau, vp_time(sigma).float())
    assert not g.requires_grad and not L.requires_grad and all(p.grad is None for p in network.parameters())


@given(seed=st.integers(0, 99), sigma=st.floats(0.05, 100))
def test_one_level_for_all_and_the_same_level_for_each_give_the_same_bits(seed, sigma):
    guidance, x = DiscriminatorGuidance(small_network(seed), 1.5), (1 + sigma) * unit(3, 1, 4, 4, seed=seed)
    g, L = guidance(x, sigma)
    for same in (level(sigma).squeeze(), level(sigma, sigma, sigma)):
        again, L_again = guidance(x, same)
        assert torch.equal(again, g) and torch.equal(L_again, L)
    assert g.abs().max() > 0


def test_saturation():
    assert SATURATION == pytest.approx(11.513, abs=5e-4) and torch.tensor(SATURATION).sigmoid().item() == pytest.approx(1 - 1e-5, abs=1e-7)
    x = torch.tensor([-20.0, -12.0, -11.0, 0.5, 11.0, 12.0, 20.0], dtype=torch.float64).reshape(-1, 1, 1, 1) * math.sqrt(2)
    g, L = DiscriminatorGuidance(linear(1.0), 1.0)(x, 1.0)  # u = x / sqrt 2, L = u
    assert_close(L.to(torch.float64), level(-SATURATION, -SATURATION, -11, 0.5, 11, SATURATION, SATURATION), rtol=1e-6, atol=0)
    expected = -math.sqrt(0.5) * level(0, 0, 1, 1, 1, 0, 0)  # -sigma^2 alpha dL/du, zero where d is clipped
    assert_close(g.flatten(), expected, rtol=1e-6, atol=0)


# ---- window, weights, boost

def test_window_is_in_vp_time_and_per_image():
    guidance = DiscriminatorGuidance(linear(0.01), 1.0)
    edges = level(0.0446, 0.0448, 1.0, 152.1, 152.2)  # released defaults: 0.044688 to 152.167
    inside = [False, True, True, True, False]
    assert guidance.open(edges).tolist() == inside
    g, L = guidance(unit(5, 1, 2, 2), edges)
    assert (g.flatten(1).abs().amax(1) > 0).tolist() == inside
    assert (L == CLOSED).tolist() == [not there for there in inside]


def test_window_is_intersected_with_the_levels_of_the_discriminators_training():
    log_ratio = linear(0.01)
    log_ratio.sigma_range = (0.02, 3.0)
    for window, low, high in (((0.01, 1.0), 0.044688, 3.0), ((0.0, 0.1), 0.02, float(vp_sigma(0.1))),
                              ((0.02, 0.2), float(vp_sigma(0.02)), float(vp_sigma(0.2)))):
        guidance = DiscriminatorGuidance(log_ratio, 1.0, window=window)
        assert guidance.open(level(low * 0.999, low * 1.001, high * 0.999, high * 1.001)).tolist() == [False, True, True, False]


def test_a_closed_window_does_not_ask():
    def refuse(*arguments):
        raise AssertionError("asked")

    g, L = DiscriminatorGuidance(refuse, 1.0)(unit(3, 1, 2, 2), 0.01)
    assert g.shape == (3, 1, 2, 2) and g.count_nonzero() == 0 and L.tolist() == [CLOSED] * 3
    assert DiscriminatorGuidance(refuse, (0.0, 1.0))(unit(3, 1, 2, 2), 1.0) == (0.0, None)  # nor does a weight of 0
    assert DiscriminatorGuidance(refuse, 2.0)(unit(3, 1, 2, 2), 1.0, stage=1) == (0.0, None)
    assert DiscriminatorGuidance(refuse, 2.0)(unit(3, 1, 2, 2), 1.0, stage=2) == (0.0, None)


def test_a_number_weighs_the_first_evaluation_only_and_a_pair_both():
    x = unit(2, 1, 2, 2)
    raw, _ = correction(linear(0.1), x, torch.tensor(1.0))
    for weight, factors in ((2.0, (2, 0, 0)), ((1.5, 0.5), (1.5, 0.5, 0.5)), ([1, 1], (1, 1, 1)), (-1.0, (-1, 0, 0))):
        for stage, factor in enumerate(factors):
            g, _ = DiscriminatorGuidance(linear(0.1), weight)(x, 1.0, stage=stage)
            assert_close(torch.as_tensor(g, dtype=torch.float64).expand_as(x), factor * raw.to(torch.float64), rtol=1e-7, atol=0)


def test_boost_doubles_doubtful_images_at_even_steps():
    x = torch.tensor([-1.0, 1.0], dtype=torch.float64).reshape(2, 1, 1, 1)  # L < 0 and L > 0
    raw, L = DiscriminatorGuidance(linear(1.0), 1.5)(x, 1.0)
    assert (L < 0).tolist() == [True, False]
    for step in range(6):
        g, _ = DiscriminatorGuidance(linear(1.0), 1.5, boost=True)(x, 1.0, step=step)
        assert_close(g, raw * level(1 if step % 2 else 2, 1).reshape(2, 1, 1, 1))
        assert_close(DiscriminatorGuidance(linear(1.0), 1.5)(x, 1.0, step=step)[0], raw)  # only if asked for


def test_boost_stirs_doubtful_images_at_every_fifth_step():
    churn, last = DiscriminatorGuidance(linear(1.0), 1.5, boost=True).churn, level(-0.1, 0.1, CLOSED)
    assert churn(0, None) is None  # nothing was asked before the first step
    for step in range(12):
        stirred = churn(step, last)
        assert (stirred is None) == (step % 5 != 0)
        assert stirred is None or stirred.tolist() == [4.0, 0.0, 0.0]
    assert DiscriminatorGuidance(linear(1.0), 1.5).churn is None


@pytest.mark.parametrize("arguments, message", [
    (dict(weight=math.nan), r"finite number or a pair \(first, later\) of them, got nan"),
    (dict(weight=math.inf), "finite number .*got inf"),
    (dict(weight=(1.0, math.nan)), r"finite number .*got \(1.0, nan\)"),
    (dict(weight=(1.0, 2.0, 3.0)), r"pair .*got \(1.0, 2.0, 3.0\)"),
    (dict(weight=()), r"pair .*got \(\)"),
    (dict(window=(1.0, 0.01)), r"0 <= low < high in VP time, got \(1.0, 0.01\)"),
    (dict(window=(0.5, 0.5)), r"0 <= low < high in VP time, got \(0.5, 0.5\)"),
    (dict(window=(-0.1, 0.5)), r"0 <= low < high in VP time, got \(-0.1, 0.5\)"),
    (dict(window=(math.nan, 0.5)), "0 <= low < high in VP time, got .*nan"),
    (dict(window=(0.1, math.nan)), "0 <= low < high in VP time, got .*nan"),
], ids=str)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DiscriminatorGuidance(linear(1.0), **arguments)


def test_a_log_ratio_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(3, 1\)"):
        DiscriminatorGuidance(lambda u, tau, class_labels=None: u.flatten(1).sum(1, keepdim=True), 1.0)(unit(3, 1, 2, 2), 1.0)


# ---- guidance with the exact log-ratio

def exact_log_ratio(true, model):
    "ln p_true / p_model of noisy images, from VP input."
    def log_ratio(u, tau, class_labels=None):
        sigma = vp_sigma(tau.to(torch.float64))
        x = u.to(torch.float64) / vp_scale(sigma).reshape(-1, 1, 1, 1)
        return true.log_prob(x, sigma) - model.log_prob(x, sigma)
    return log_ratio


TRUE = GaussianMixture(0.3 * unit(1, 1, 2, 2), [1.0], 0.75)
WRONG = GaussianMixture(0.3 * unit(1, 1, 2, 2) + 0.05, [1.0], 0.70)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("lam", [1.0, 1.02])
def test_the_exact_log_ratio_turns_a_wrong_gaussian_score_into_the_right_one(solver, lam):
    x, seen = 80 * unit(32, 1, 2, 2), []
    guidance = DiscriminatorGuidance(exact_log_ratio(TRUE, WRONG), (1.0, 1.0), window=(0.0, 2.0))
    guided = sample(WRONG.denoiser(), x, edm_sigmas(18), solver=solver, guidance=guidance, callback=seen.append)
    right, wrong = (sample(mix.denoiser(), x, edm_sigmas(18), solver=solver) for mix in (TRUE, WRONG))
    assert max(info["L"].abs().max() for info in seen) < SATURATION  # else the law would not hold
    assert_close(guided, right, rtol=0, atol=1e-5)
    assert (wrong - right).abs().mean() > 0.02
    for info in seen:  # every slope is the true model's epsilon
        assert_close(info["slope"], -info["sigma"] * TRUE.score(info["x"], info["sigma"]), rtol=2e-5, atol=2e-5)


def test_one_weight_corrects_half_of_heun_and_both_correct_all():
    x = 80 * unit(32, 1, 2, 2)
    right, wrong = (sample(mix.denoiser(), x, edm_sigmas(100)) for mix in (TRUE, WRONG))
    share = {}
    for weight in ((1.0, 0.0), (2.0, 0.0), (1.0, 1.0)):
        guidance = DiscriminatorGuidance(exact_log_ratio(TRUE, WRONG), weight, window=(0.0, 2.0))
        guided = sample(WRONG.denoiser(), x, edm_sigmas(100), guidance=guidance)
        share[weight] = ((guided - wrong).flatten() @ (right - wrong).flatten() / (right - wrong).square().sum()).item()
    assert share[1.0, 0.0] == pytest.approx(0.5, abs=0.05)
    assert share[2.0, 0.0] == pytest.approx(1.0, abs=0.1)
    assert share[1.0, 1.0] == pytest.approx(1.0, abs=1e-4)


def test_the_exact_log_ratio_corrects_a_mixture_score():
    true = GaussianMixture(unit(3, 1, 2, 2), [1, 2, 3], 0.5)
    wrong = GaussianMixture(unit(3, 1, 2, 2) + 0.05, [2, 2, 2], 0.55)
    for sigma in (0.06, 0.3, 1.0, 10.0):
        x = true.sample(20, sigma, torch.Generator().manual_seed(0))
        g, L = DiscriminatorGuidance(exact_log_ratio(true, wrong), 1.0)(x, sigma)
        assert L.abs().max() < SATURATION
        assert_close(-g / sigma**2, true.score(x, sigma) - wrong.score(x, sigma), rtol=2e-5, atol=2e-5 / min(sigma, 1))


# ---- training

def test_vp_input_is_scaled_noise():
    x, sigma = unit(2, 1, 2, 2), level(0.5, 4.0)
    u, tau = vp_input(x, sigma)
    assert u.dtype == torch.float32 and tau.shape == (2,)
    assert_close(u, (x * level(1 / math.sqrt(1.25), 1 / math.sqrt(17)).reshape(2, 1, 1, 1)).float())
    assert_close(vp_sigma(tau), sigma, rtol=1e-12, atol=0)
    assert vp_input(x, 1.0)[1].shape == (1,)


def test_loss_is_the_cross_entropy_of_the_noisy_image():
    images, noise, sigma = unit(3, 1, 2, 2), unit(3, 1, 2, 2, seed=1), level(0.5, 1.0, 2.0)
    L = 0.7 * ((images + sigma.reshape(-1, 1, 1, 1) * noise) / (1 + sigma**2).sqrt().reshape(-1, 1, 1, 1)).flatten(1).sum(1)
    assert_close(log_ratio_loss(linear(0.7), images, True, sigma, noise).double(), -L.sigmoid().log(), rtol=1e-5, atol=1e-6)
    assert_close(log_ratio_loss(linear(0.7), images, False, sigma, noise).double(), -(1 - L.sigmoid()).log(), rtol=1e-5, atol=1e-6)


class Module(nn.Module):
    "A function as a network."
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, u, tau, class_labels=None):
        return self.function(u, tau, class_labels)


def test_accuracy_of_the_best_discriminator_of_two_gaussians():
    # N(+a, s^2) against N(-a, s^2) in one pixel: balanced accuracy Phi(a / sqrt(s^2 + sigma^2)) at the best threshold, 0
    a, s, n = 0.5, 0.4, 40_000
    real, fake = a + s * unit(n, 1, 1, 1, seed=1), -a + s * unit(n, 1, 1, 1, seed=2)  # seed 0 makes the noise

    @Module
    def best(u, tau, class_labels=None):
        sigma = vp_sigma(tau)
        return 2 * a * u.double().flatten() / vp_scale(sigma) / (s**2 + sigma**2)

    sigmas = [0.05, 0.5, 2.0]
    report = accuracy_per_level(best, real, fake, sigmas)
    assert report["sigma"] == sigmas and report["n"] == 2 * n
    for sigma, accuracy, error, bce in zip(sigmas, report["accuracy"], report["error"], report["bce"]):
        z = a / math.hypot(s, sigma)
        expected = 0.5 * (1 + math.erf(z / math.sqrt(2)))
        assert error == pytest.approx(math.sqrt(expected * (1 - expected) / (2 * n)), rel=0.05)
        assert abs(accuracy - expected) < 5 * error
        t = np.linspace(-10, 10, 20001)  # cross entropy E softplus(-L), L ~ N(2 z^2, 4 z^2)
        entropy = (np.exp(-t**2 / 2) / math.sqrt(2 * math.pi) * np.logaddexp(0, -(2 * z**2 + 2 * z * t))).sum() * 1e-3
        assert bce == pytest.approx(entropy, abs=0.01)
    assert accuracy_per_level(Module(lambda *inputs: -best(*inputs)), real, fake, [0.5])["accuracy"][0] < 0.3  # the signs matter


@pytest.fixture(scope="module")
def trained():
    "A discriminator of bright against dark noise images, its history, and the images it did not see."
    images = [0.5 * unit(600, 1, 8, 8, seed=seed) + shift for seed, shift in ((0, 0.15), (1, -0.15), (2, 0.15), (3, -0.15))]
    with seeded(0):
        log_ratio = PatchLogRatio(8, 1, channels=8, blocks=1, sigma_range=(0.05, 2.0))
    before = torch.random.get_rng_state()
    history = train_discriminator(log_ratio, images[0], images[1], steps=60, batch=64, lr=3e-3, checks=6, held_out=(images[2], images[3]), progress=False)
    assert torch.equal(torch.random.get_rng_state(), before)  # the caller's random numbers are untouched
    return log_ratio, history, images


def test_training_finds_the_difference(trained):
    log_ratio, history, images = trained
    assert history["held_out"][0] == pytest.approx(math.log(2), abs=1e-6)  # the untrained network is undecided
    assert min(history["held_out"]) < 0.6
    report = accuracy_per_level(log_ratio, images[2], images[3], [0.1, 2.0])
    assert report["accuracy"][0] > 0.75 and report["accuracy"][0] > report["accuracy"][1] > 0.5
    u, tau = vp_input(images[2], 0.1)
    assert log_ratio(u, tau).mean() > 0  # positive where real


def test_training_leaves_the_network_ready_for_use(trained):
    log_ratio, history, images = trained
    assert not log_ratio.training and not any(p.requires_grad for p in log_ratio.parameters())
    best = history["held_out"][history["step"].index(history["best_step"])]
    assert best == min(history["held_out"])


def test_training_stops_before_it_overfits_chance():
    # real and fake from one law: whatever it learns is chance, and the held-out images say so
    images = [0.5 * unit(40, 1, 8, 8, seed=seed) for seed in range(4)]
    with seeded(0):
        log_ratio = PatchLogRatio(8, 1, channels=16, blocks=1, dropout=0.0, sigma_range=(0.05, 0.5))
    history = train_discriminator(log_ratio, images[0], images[1], steps=60, batch=40, lr=1e-2, weight_decay=0.0, checks=6, held_out=(images[2], images[3]),
                                  progress=False)
    assert history["held_out"][-1] > 0.75 > math.log(2) + 1e-3 > min(history["held_out"])
    assert history["best_step"] < 60
    report = accuracy_per_level(log_ratio, images[2], images[3], history["sigmas"])  # the state kept is the best one, not the last
    assert sum(report["bce"]) / len(report["bce"]) == pytest.approx(min(history["held_out"]), abs=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_measuring_accuracy_leaves_the_mode_alone_and_drops_nothing(training):
    images, modes = [unit(20, 1, 8, 8, seed=seed) for seed in range(2)], []
    network = Module(lambda u, tau, labels: modes.append(network.training) or u.flatten(1).sum(1)).train(training)
    accuracy_per_level(network, *images, [0.1])
    assert network.training is training and modes == [False, False]


def test_training_repeats_with_its_seed():
    images = [0.5 * unit(100, 1, 8, 8, seed=seed) + seed for seed in range(2)]
    states = []
    for seed in (0, 0, 1):
        with seeded(0):
            log_ratio = PatchLogRatio(8, 1, channels=8, blocks=1)
        torch.rand(3)  # whatever the caller did before
        train_discriminator(log_ratio, *images, steps=4, batch=16, checks=2, seed=seed, progress=False)
        states.append(torch.cat([p.flatten() for p in log_ratio.parameters()]))
    assert torch.equal(states[0], states[1]) and not torch.equal(states[0], states[2])
