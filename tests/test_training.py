"Heavy numerics of sedm_kit.train_loss and sedm_kit.training: loss by hand and in every form, laws of noise, cures, averages, repeatability, errors."
import copy
import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sedm_kit.analytic import GaussianMixture
from sedm_kit.networks import EDMPrecond, PatchFeatures, VPPrecond, seeded
from sedm_kit.noise import ddpm_alphas_cumprod, sigma_from_alphas, snr
from sedm_kit.perturbation import FORMS
from sedm_kit.targets import ideal_denoiser
from sedm_kit.train_loss import Objective, chain_sigmas, level_weight
from sedm_kit.training import (PRECISIONS, classification_accuracy, cosine_lr, denoising_loss, edm_weight, ema_decay, half_life_decay, held_out_losses,
                               log_normal_sigmas, ramp_lr, train_denoiser, train_features, typical_sigmas, update_average)
from sedm_kit.weights import PREDICTIONS, SCHEMES, loss_weight
from sedm_kit.worlds import load_images
from tiny import images, small


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
    update_average(average, model, ema_decay(10**6, 0.9))
    assert_close(average.weight.item(), 0.9 * 1 + 0.1 * 3, rtol=1e-6, atol=0)
    update_average(average, model, ema_decay(0, 0.9))  # the memory is short at first: 1/10 old, 9/10 new
    assert_close(average.weight.item(), 0.1 * 1.2 + 0.9 * 3, rtol=1e-6, atol=0)


def test_half_life_and_ramps_of_edm():
    "0.5^(batch / min(half-life, 0.05 images)); the rate rises linearly over the ramp."
    assert half_life_decay(10**8, 512, 500_000) == pytest.approx(0.5 ** (512 / 500_000))
    assert half_life_decay(10**6, 512, 500_000) == pytest.approx(0.5 ** (512 / 50_000))
    assert half_life_decay(10**6, 512, 500_000, ramp=None) == pytest.approx(0.5 ** (512 / 500_000))
    assert half_life_decay(0, 512, 500_000) == 0.0  # the first average is the first network
    assert [ramp_lr(images, 1000, 2.0) for images in (0, 250, 1000, 5000)] == [0.0, 0.5, 2.0, 2.0] and ramp_lr(0, 0, 2.0) == 2.0


def test_average_takes_buffers_over():
    model, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2).requires_grad_(False)
    model.running_mean.fill_(5.0)
    update_average(average, model, 0.999)
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


@pytest.mark.parametrize("steps, checks, expected", [(10, 3, [3, 7, 10]), (39, 20, None), (5, 20, [1, 2, 3, 4, 5]), (12, 4, [3, 6, 9, 12]), (7, 1, [7])])
def test_evaluations_are_as_many_as_asked_for_and_the_last_is_at_the_end(steps, checks, expected):
    _, history = train_denoiser(small(), images(), steps=steps, batch=8, checks=checks, progress=False)
    _, every = train_denoiser(small(), images(), steps=steps, batch=8, checks=steps, progress=False)
    assert len(history["step"]) == min(checks, steps) and history["step"][-1] == steps and expected in (None, history["step"])
    for first, last, loss in zip([0, *history["step"]], history["step"], history["loss"]):  # the mean over the steps in between
        assert loss == pytest.approx(sum(every["loss"][first:last]) / (last - first), rel=1e-5)


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


def test_a_loss_that_is_no_number_names_its_step_and_level():
    def weight(sigma, sigma_data):
        return sigma.where(sigma < 1, torch.nan)
    with pytest.raises(FloatingPointError, match=r"training loss at step \d+ is nan, first at noise level sigma = [1-9]"):
        train_denoiser(small(), images(), steps=50, batch=32, weight=lambda sigma, sigma_data: weight(sigma, sigma_data) if len(sigma) > 2 else sigma, progress=False)


def test_a_loss_that_explodes_does_not_spoil_the_weights():
    model = small()
    weight = lambda sigma, sigma_data: sigma * math.inf
    with pytest.raises(FloatingPointError, match="step 0 is inf"):
        train_denoiser(model, images(), steps=5, batch=8, weight=weight, progress=False)
    assert all(p.isfinite().all() for p in model.parameters())


# ---- the default path is the loop that the shipped worlds were trained with

def plain_loop(denoiser, data, steps, batch, lr, ema, seed, held_out, checks):
    "The loop as it stood before it learned anything else, in one piece."
    average = copy.deepcopy(denoiser).eval().requires_grad_(False)
    optimizer, losses, looks, total = torch.optim.Adam(denoiser.train().parameters(), lr=lr), [], [], torch.zeros(())
    with seeded(seed):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = lr * min((step + 1) / max(steps // 50, 1), 0.5 + 0.5 * math.cos(math.pi * step / steps))
            clean = data[torch.randint(len(data), (batch,))]
            sigma = (-1.2 + 1.2 * torch.randn(batch)).exp()
            noise = torch.randn_like(clean)
            weight = (sigma**2 + denoiser.sigma_data**2) / (sigma * denoiser.sigma_data) ** 2
            loss = (weight * (denoiser(clean + sigma.reshape(-1, 1, 1, 1) * noise, sigma) - clean).square().mean((1, 2, 3))).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay = min(ema, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(average.parameters()), list(denoiser.parameters()), 1 - decay)
            total += loss.detach()
            if (step + 1) % (steps // checks) == 0:
                losses.append(total.item() / (steps // checks))
                looks.append(held_out_losses(average, held_out, typical_sigmas()).mean().item())
                total.zero_()
    return average, losses, looks


def test_default_arguments_train_the_same_weights_to_the_last_bit():
    digits = load_images("digits")
    def network(): return small(sigma_data=round(digits.train.std().item(), 4), channels=48, blocks=3)
    settings = dict(steps=30, batch=128, lr=2e-3, ema=0.999, seed=0, held_out=digits.held_out, checks=3)
    one, two = network(), network()
    average, losses, looks = plain_loop(one, digits.train, **settings)
    model, history = train_denoiser(two, digits.train, **settings, progress=False)
    for mine, other in ((average, model), (one, two)):
        assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), other.parameters()))
    assert history["loss"] == losses and history["held_out"] == looks


# ---- weights and objectives

class Tiny(torch.nn.Module):
    "A denoiser around a raw network F, in float64."
    def __init__(self, sigma_data=0.5):
        super().__init__()
        torch.manual_seed(0)
        self.raw, self.sigma_data = torch.nn.Linear(16, 16).double(), sigma_data

    def forward(self, x, sigma):
        s, d = sigma.reshape(-1, 1, 1, 1), self.sigma_data
        return d**2 / (s**2 + d**2) * x + s * d / (s**2 + d**2).sqrt() * self.raw((x / (s**2 + d**2).sqrt()).flatten(1)).reshape(x.shape)


def in_form(form, denoised, x, sigma, sigma_data):
    "What this denoiser's answer is in another form of prediction."
    s, alpha = sigma.reshape(-1, 1, 1, 1), (1 + sigma**2).rsqrt().reshape(-1, 1, 1, 1)
    eps = (x - denoised) / s
    total = s**2 + sigma_data**2
    return {"x0": denoised, "eps": eps, "v": alpha * eps - s * alpha * denoised, "F": (denoised - sigma_data**2 / total * x) * total.sqrt() / (s * sigma_data)}[form]


@pytest.mark.parametrize("name", SCHEMES)
def test_every_weight_gives_the_same_gradient_in_its_four_forms(name):
    model, data = Tiny(), torch.randn(20, 1, 4, 4, dtype=torch.float64)
    noise, sigma = torch.randn_like(data), torch.logspace(-2, 1.5, 20, dtype=torch.float64)
    x = data + sigma.reshape(-1, 1, 1, 1) * noise
    def gradient(loss): return torch.autograd.grad(loss.mean(), model.raw.weight)[0]
    ours = gradient(denoising_loss(model, data, noise, sigma, name))
    for form in PREDICTIONS:
        error = (in_form(form, model(x, sigma), x, sigma, 0.5) - in_form(form, data, x, sigma, 0.5)).square().mean((1, 2, 3))
        assert_close(gradient(loss_weight(name, snr(sigma), form, sigma_data=0.5) * error), ours, rtol=1e-9, atol=1e-12)


@settings(max_examples=30)
@given(sigma=st.floats(1e-3, 1e3), sigma_data=st.floats(0.05, 3.0))
def test_edm_weight_is_the_table_s(sigma, sigma_data):
    sigma = torch.tensor([sigma], dtype=torch.float64)
    assert_close(edm_weight(sigma, sigma_data), loss_weight("edm", snr(sigma), "x0", sigma_data=sigma_data))
    assert torch.equal(level_weight("edm", sigma.float(), sigma_data), edm_weight(sigma.float(), sigma_data))


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", ["constant", "min_snr", "debias"])
def test_discrete_epsilon_objective_is_a_noise_law(schedule, name):
    "DDPM's own loss, w(t) |eps_theta(x_t, t) - eps|^2 over a uniform t, and its gradient."
    with seeded(0):
        model = VPPrecond(8, 1, model_type="PatchNet", channels=8, blocks=1)
        torch.nn.init.normal_(model.model.head.weight, std=0.1)
        noise = torch.randn(16, 1, 8, 8)
    abar, data = ddpm_alphas_cumprod(schedule)[:-1], images(16)
    with seeded(4): t = torch.randint(len(abar), (16,))
    with seeded(4): sigma = chain_sigmas(16, abar)
    assert_close(sigma.double(), sigma_from_alphas(abar)[t], rtol=1e-6, atol=0)
    alpha, level = abar[t].sqrt().float().reshape(-1, 1, 1, 1), (1 - abar[t]).sqrt().float().reshape(-1, 1, 1, 1)
    eps = model.model(alpha * data + level * noise, model.coefficients(sigma)[3])
    ddpm = (loss_weight(name, abar[t] / (1 - abar[t])).float() * (eps - noise).square().mean((1, 2, 3))).mean()
    ours = denoising_loss(model, data, noise, sigma, name).mean()
    assert_close(ours, ddpm, rtol=2e-4, atol=0)
    for a, b in zip(*(torch.autograd.grad(loss, list(model.parameters()), retain_graph=True) for loss in (ours, ddpm))):
        assert_close(a, b, rtol=2e-3, atol=2e-3 * b.abs().max().item())


def test_training_on_a_chain_draws_its_levels():
    abar, found = ddpm_alphas_cumprod("linear", 50), []
    def weight(sigma, sigma_data):
        found.append(sigma)
        return loss_weight("constant", snr(sigma), "x0").to(sigma)
    _, history = train_denoiser(small(), images(), steps=20, batch=16, alphas_cumprod=abar, weight=weight, held_out=images(8), progress=False)
    levels = sigma_from_alphas(abar).float()
    assert all(torch.isin(sigma, levels).all() for sigma in found if len(sigma) == 16)
    assert torch.isin(torch.tensor(history["sigmas"]), levels).all()


# ---- cures

def exact(data):
    return ideal_denoiser(data)


def test_stable_target_with_all_images_is_the_posterior_mean():
    data, sigma = images(40).double(), torch.full((8,), 4.0, dtype=torch.float64)
    noise = torch.randn(8, 1, 8, 8, dtype=torch.float64)
    assert denoising_loss(exact(data), data[:8], noise, sigma, reference=data).max() < 1e-24
    assert denoising_loss(exact(data), data[:8], noise, sigma).min() > 1e-3


@pytest.mark.parametrize("form", FORMS)
def test_stable_target_of_a_perturbed_input_is_what_its_targets_average_to(form):
    "With all images as the reference: the mean loss over many noises is the scatter plus the loss against the stable target."
    data, n, gamma = images(3, seed=3).double()[..., :2, :2].contiguous(), 60_000, 0.6
    clean, level = data.repeat(n // 3, 1, 1, 1), torch.full((n,), 0.9, dtype=torch.float64)
    with seeded(5): noise, extra = torch.randn(2, n, 1, 2, 2, dtype=torch.float64)
    def halve(x, sigma): return 0.5 * x
    def zero(x, sigma): return 0.0 * x
    halve.sigma_data = zero.sigma_data = 0.5
    def loss(denoiser, **reference):
        parts = [denoising_loss(denoiser, *batch, gamma=gamma, perturbation=form, extra=more, **reference)
                 for *batch, more in zip(clean.split(300), noise.split(300), level.split(300), extra.split(300))]
        return torch.cat(parts).mean().item()
    plain, stable = (loss(halve, **r) - loss(zero, **r) for r in ({}, {"reference": clean[:300]}))  # in a difference of two denoisers the scatter drops out
    assert stable == pytest.approx(plain, rel=0.03)


def test_gradient_penalty_of_a_linear_denoiser_by_hand():
    "D = a x: eps = (1-a)/sigma x, Jacobian norm per pixel (1-a)^2/sigma^2, times 1 + sigma^2 in the scale of x_t."
    def linear(x, sigma): return 0.3 * x
    linear.sigma_data = 0.5
    clean, noise, projection = torch.randn(3, 6, 1, 2, 2, dtype=torch.float64)
    sigma = torch.logspace(-1, 1, 6, dtype=torch.float64)
    plain, penalised = (denoising_loss(linear, clean, noise, sigma, gradient_penalty=g, projection=projection) for g in (0.0, 0.1))
    assert_close(penalised - plain, 0.1 * (1 + sigma**2) * 0.49 / sigma**2 * projection.square().mean((1, 2, 3)))


def test_weight_decay_adds_twice_the_weights_to_the_gradient():
    def gradient(**cure):
        model = small()
        before = copy.deepcopy(model)
        train_denoiser(model, images(), steps=1, batch=8, progress=False, **cure)
        return before, dict((name, p.grad) for name, p in model.named_parameters())
    before, plain = gradient()
    _, decayed = gradient(weight_decay=0.05)
    for name, value in before.named_parameters():
        assert_close(decayed[name], plain[name] + 0.1 * value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cure", [dict(gamma=0.1), dict(gamma=lambda sigma: 0.1 * sigma / (1 + sigma)), dict(gamma=0.1, perturbation="naive", reference=32),
                                  dict(reference="all"), dict(gradient_penalty=1e-2), dict(weight="debias", sanitise=True), dict(precision="bf16"),
                                  dict(precision="fp16"), dict(labels=torch.arange(64) % 4, reference=16)], ids=repr)
def test_every_cure_trains_repeatably(cure):
    def result():
        model = small(label_dim=4 if "labels" in cure else 0)
        return torch.cat([p.detach().flatten() for p in train_denoiser(model, images(), steps=8, batch=8, progress=False, **cure)[0].parameters()])
    first = result()
    assert first.isfinite().all() and torch.equal(first, result())
    if "labels" not in cure:
        plain, _ = train_denoiser(small(), images(), steps=8, batch=8, progress=False)
        assert not torch.equal(first, torch.cat([p.flatten() for p in plain.parameters()]))


def test_half_precision_stays_near_full_precision():
    losses = {name: train_denoiser(small(), images(), steps=30, batch=32, checks=1, precision=name, progress=False)[1]["loss"][0] for name in PRECISIONS}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.01) and losses["fp16"] == pytest.approx(losses["fp32"], rel=0.01)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_training_changes_the_same_weights(monkeypatch, precision):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    plain, compiled = small(), small()
    for model, on in ((plain, False), (compiled, True)):
        train_denoiser(model, images(), steps=3, batch=8, compile=on, precision=precision, progress=False)
    for a, b in zip(plain.parameters(), compiled.parameters()):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("reference", [None, 16, "all"])
def test_augmented_training_tells_the_network(reference):
    with seeded(0):
        model = EDMPrecond(8, 1, model_type="SongUNet", sigma_data=0.5, augment_dim=9, model_channels=16, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    before = model.model.map_augment.weight.detach().clone()
    train_denoiser(model, images(32), steps=3, batch=8, augment=0.5, reference=reference, progress=False)
    assert not torch.equal(before, model.model.map_augment.weight)


def test_stable_target_of_augmented_images_contains_them():
    streams = tuple(torch.Generator().manual_seed(k) for k in range(2))
    with seeded(0): batch = Objective(augment=0.5, reference=24).draw(images(40), torch.arange(40), 16, streams)
    assert torch.equal(batch["reference"][:16], batch["clean"]) and torch.equal(batch["reference_labels"][:16], batch["class_labels"])
    others = batch["reference_labels"][16:]
    assert len(others.unique()) == len(others) and not torch.isin(others, batch["class_labels"]).any()


def test_gradients_that_are_no_numbers_are_sanitised_on_request():
    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x): return x.clone()
        @staticmethod
        def backward(ctx, g): return g * torch.tensor([math.nan] + [1.0] * 7).reshape(-1, 1, 1, 1)
    class Model(torch.nn.Module):
        sigma_data = 0.5
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(8, 1, 1, 1))
        def forward(self, x, sigma): return Spoilt.apply(x * self.scale[:len(x)])
    kept, lost = Model(), Model()
    train_denoiser(kept, images(), steps=1, batch=8, sanitise=True, progress=False)
    train_denoiser(lost, images(), steps=1, batch=8, progress=False)
    assert kept.scale.isfinite().all() and kept.scale[0] == 1.0 and lost.scale[0].isnan()


# ---- what is refused before the first step

@pytest.mark.parametrize("wrong, message", [
    (dict(weight="snr"), "unknown weight 'snr'; known: constant, edm"),
    (dict(gamma=-0.1), "gamma must be finite and not negative, got -0.1"),
    (dict(gamma=lambda sigma: -sigma), "gamma must be finite and not negative"),
    (dict(perturbation="eps"), "unknown form of perturbation 'eps'; known: ip, ddpm_y, naive"),
    (dict(reference=7), "reference must have at least the batch's 8 images and at most all 64, got 7"),
    (dict(reference=65), "at most all 64, got 65"),
    (dict(reference="some"), "reference must be a number of images, 'all' or None, got 'some'"),
    (dict(gradient_penalty=-1.0), "gradient_penalty must be finite and not negative, got -1.0"),
    (dict(weight_decay=math.nan), "weight_decay must be finite and not negative, got nan"),
    (dict(augment=1.5), "probability between 0 and 1, got 1.5"),
    (dict(augment=0.1), "build it with augment_dim=9, got 0"),
    (dict(precision="half"), "unknown precision 'half'; known: fp32, bf16, fp16"),
    (dict(compile=True, gradient_penalty=0.1), "differentiates twice"),
    (dict(steps=0), "steps must be at least 1, got 0"),
    (dict(batch=0), "batch must be at least 1"),
    (dict(checks=0), "checks must be at least 1"),
    (dict(labels=torch.zeros(64, dtype=torch.long)), "this denoiser is unconditional"),
    (dict(alphas_cumprod=[0.9, 1.1]), "alphas_cumprod must lie in"),
    (dict(ema=2), "ema, the share of the old average that stays, must be from 0 to 1, got 2"),
    (dict(ema=math.nan), "must be from 0 to 1, got nan"),
    (dict(ema_half_life=-5), "ema_half_life must be positive and finite, got -5"),
    (dict(ema_ramp=0), "ema_ramp must be positive and finite, got 0"),
    (dict(lr=0.0), "lr must be positive and finite, got 0.0"),
    (dict(lr=math.nan), "lr must be positive and finite, got nan"),
    (dict(lr_ramp=-1), "lr_ramp must be finite and not negative, got -1"),
    (dict(weight={"name": "debias", "k": 2.0}), "the weight 'debias' has no parameter 'k'; known: snr_min"),
    (dict(weight={"name": "edm", "cap": 2.0}), "the weight 'edm' has no parameter 'cap'; known: none"),
    (dict(weight={"name": "p2", "k": "2"}), "k of the weight 'p2' must be a number, got '2'"),
    (dict(weight={"name": "p2", "gamma": -1.0}), "gamma must be finite and not negative, got -1.0"),
    (dict(weight={"name": "p3", "k": 2.0}), "unknown weight 'p3'"),
    (dict(weight=("p2", 1.0)), "weight must be a name, a dict such as"),
    (dict(held_out=(images(8), torch.zeros(8, dtype=torch.long))), "held-out labels were given, but this denoiser is unconditional"),
])
def test_settings_that_do_not_fit_are_refused_at_once(wrong, message):
    model = small()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        train_denoiser(model, images(), **{"steps": 5, "batch": 8, "progress": False, **wrong})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))


def test_edm_weight_needs_a_data_standard_deviation():
    with seeded(0): model = VPPrecond(8, 1, model_type="PatchNet", channels=8, blocks=1)
    with pytest.raises(ValueError, match="needs the denoiser's sigma_data"):
        train_denoiser(model, images(), steps=1, batch=8, progress=False)
    train_denoiser(model, images(), steps=1, batch=8, weight="constant", held_out=images(8), progress=False)


def test_unknown_prediction_and_bad_ratio_are_refused():
    with pytest.raises(ValueError, match="unknown prediction 'noise'"):
        loss_weight("edm", 1.0, "noise")
    for ratio in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="snr must be finite and positive"):
            level_weight("debias", torch.tensor([ratio]).rsqrt() if ratio > 0 else torch.tensor([math.inf if ratio == 0 else math.nan]), 0.5)


def test_a_network_with_classes_needs_labels():
    labels = torch.arange(64) % 4
    with pytest.raises(ValueError, match="this denoiser has label_dim = 4 classes: give labels"):
        train_denoiser(small(label_dim=4), images(), steps=1, batch=8, progress=False)
    with pytest.raises(ValueError, match="give held-out labels"):
        train_denoiser(small(label_dim=4), images(), steps=1, batch=8, labels=labels, held_out=images(8), progress=False)
    train_denoiser(small(label_dim=4), images(), steps=1, batch=8, labels=labels, held_out=(images(8), labels[:8]), progress=False)


@pytest.mark.parametrize("weight", [dict(name="p2", k=2.0, gamma=0.5), dict(name="min_snr", cap=3.0), dict(name="inverse_snr", snr_min=0.1), dict(name="p2")], ids=repr)
def test_parameters_of_a_weight_go_with_its_name(weight):
    sigma, parameters = torch.logspace(-2, 1.5, 20, dtype=torch.float64), {key: value for key, value in weight.items() if key != "name"}
    assert torch.equal(level_weight(weight, sigma, 0.5), loss_weight(weight["name"], snr(sigma), "x0", **parameters))
    def trained(weight): return train_denoiser(small(), images(), steps=3, batch=8, weight=weight, held_out=images(8, seed=1), progress=False)
    (one, its), (two, other) = trained(weight), trained(lambda sigma, sigma_data: loss_weight(weight["name"], snr(sigma), "x0", **parameters).to(sigma))
    assert its == other and all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters()))


@pytest.mark.parametrize("labels", [torch.zeros(63, dtype=torch.long), torch.full((64,), 4), torch.full((64,), -1), torch.zeros(64)])
def test_labels_that_do_not_fit(labels):
    with pytest.raises(ValueError, match="labels must be 64 whole numbers from 0 to 3"):
        train_denoiser(small(label_dim=4), images(), steps=1, batch=8, labels=labels, progress=False)


def test_images_that_cannot_be_learned_from():
    bad = images()
    bad[5, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match="finite, got shape .64, 1, 8, 8. with 1 values that are not finite"):
        train_denoiser(small(), bad, steps=1, progress=False)
    with pytest.raises(TypeError, match="floating point, from -1 to 1, got torch.uint8"):
        train_denoiser(small(), torch.zeros(4, 1, 8, 8, dtype=torch.uint8), steps=1, progress=False)
    with pytest.raises(ValueError, match="must be .n,c,h,w."):
        train_denoiser(small(), images()[:0], steps=1, progress=False)


# ---- features

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


def test_on_check_sees_the_average_and_disturbs_nothing():
    images, seen = torch.rand(40, 1, 8, 8) * 2 - 1, []
    def look(step, average):
        torch.randn(1000)  # draws that must not reach the run
        seen.append((step, average.training, torch.cat([p.flatten().clone() for p in average.parameters()])))
    def train(**settings):
        with seeded(0):
            net = EDMPrecond(img_resolution=8, img_channels=1, sigma_data=0.5, model_type="PatchNet", channels=8, blocks=1)
        return train_denoiser(net, images, steps=6, batch=8, checks=3, progress=False, **settings)[0]
    watched, alone = train(on_check=look), train()
    flat = lambda net: torch.cat([p.flatten() for p in net.parameters()])
    assert [step for step, *_ in seen] == [2, 4, 6] and not any(training for _, training, _ in seen)
    assert torch.equal(flat(watched), flat(alone)) and torch.equal(seen[-1][2], flat(watched)) and not torch.equal(seen[0][2], seen[1][2])
