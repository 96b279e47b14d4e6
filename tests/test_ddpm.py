"Golden numbers, laws and bad input of sedm_kit.ddpm."
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from sedm_kit.analytic import Denoiser, GaussianMixture
from sedm_kit.ddpm import (adm_es_scaling, ancestral_coefficients, chain_steps, chain_variance, ddim_coefficients, in_data_units, noise_std,
                           respaced_steps, sample_ddpm)
from sedm_kit.diagnostics import Trace
from sedm_kit.noise import ddpm_alphas_cumprod, sigma_from_alphas
from sedm_kit.sampler import LinearScaling, SeedStreams, lambda_table, sample

COSINE, LINEAR = ddpm_alphas_cumprod("cosine", 1000), ddpm_alphas_cumprod("linear", 1000)
WITH_ETA = pytest.mark.parametrize("eta", [None, 0.0, 0.5, 1.0])


def normal(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=shape))


def exact_eps(denoise, alphas):
    "The epsilon network that belongs to a denoiser in data units."
    def eps_model(x, t, class_labels=None):
        abar = alphas[t][:, None, None, None]
        sigma = sigma_from_alphas(abar)
        return (x / abar.sqrt() - denoise(x / abar.sqrt(), sigma.flatten())) / sigma
    return eps_model


def nonlinear(x, t):
    "Some epsilon network: bounded, smooth, different at every step."
    return (x + 0.001 * t[:, None, None, None]).tanh() - 0.3 * x.roll(1, -1)


@st.composite
def chains(draw):
    "A strictly decreasing alpha-bar of 2 to 30 steps."
    logits = draw(st.lists(st.floats(0.05, 0.9), min_size=2, max_size=30))
    return torch.tensor(logits, dtype=torch.float64).neg().exp().cumprod(0)


# ---- golden numbers

@pytest.fixture(scope="module")
def golden():
    with np.load(Path(__file__).parent / "golden" / "ddpm_side.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


RUNS = [(f"{kind}_{es}_clip{clip}", None if kind == "ddpm" else 0.0, es, bool(clip))
        for kind in ("ddpm", "ddim") for es in ("plain", "es") for clip in (0, 1)]
RUNS += [(f"ddim_eta0.5_{es}", 0.5, es, False) for es in ("plain", "es")]


def golden_model(golden):
    mixture = GaussianMixture(golden["means"], golden["weights"], golden["std"].item())
    eps_model = exact_eps(mixture.denoise, (1 - golden["betas"]).cumprod(0))
    return lambda x, t: torch.cat([eps_model(x, t), (golden["v"] + 0.3 * x.tanh()).clamp(-1, 1)], 1)


def by_the_book(golden, eta, scale, clip, dtype):
    "The same samplers, step by step in the papers' letters, with tables of a chosen precision."
    model, x = golden_model(golden), golden["latents"]
    full = (1 - golden["betas"]).cumprod(0)
    abar = full[golden["timestep_map"]].numpy()
    prev = np.append(1.0, abar[:-1])
    beta = 1 - abar / prev
    tilde = beta * (1 - prev) / (1 - abar)
    table = {"recip": np.sqrt(1 / abar), "recipm1": np.sqrt(1 / abar - 1), "abar": abar, "prev": prev, "c1": np.sqrt(prev) * beta / (1 - abar),
             "c2": np.sqrt(abar / prev) * (1 - prev) / (1 - abar), "high": np.log(beta), "low": np.log(np.append(tilde[1], tilde[1:]))}
    table = {name: torch.from_numpy(values).to(dtype) for name, values in table.items()}
    for k, i in enumerate(range(19, -1, -1)):
        c = {name: values[i] for name, values in table.items()}
        eps, v = model(x, golden["timestep_map"][i].expand(len(x))).chunk(2, 1)
        x0 = c["recip"] * x - c["recipm1"] * (eps / scale)
        x0 = x0.clamp(-1, 1) if clip else x0
        if eta is None:
            mean, std = c["c1"] * x0 + c["c2"] * x, (((v + 1) / 2 * c["high"] + (1 - v) / 2 * c["low"]) / 2).exp()
        else:
            std = eta * ((1 - c["prev"]) / (1 - c["abar"])).sqrt() * (1 - c["abar"] / c["prev"]).sqrt()
            mean = c["prev"].sqrt() * x0 + (1 - c["prev"] - std**2).sqrt() * (c["recip"] * x - x0) / c["recipm1"]
        x = mean + (std * golden["noise"][k] if i else 0)
    return x


def test_the_chain_and_its_respacing_are_the_references(golden):
    assert_close(ddpm_alphas_cumprod("cosine", 1000), (1 - golden["betas"]).cumprod(0), rtol=1e-12, atol=0)
    assert respaced_steps(1000, golden["steps"].item()).equal(golden["timestep_map"])


@pytest.mark.parametrize("name, eta, es, clip", RUNS)
def test_golden_samples(golden, name, eta, es, clip):
    noise, scale = iter(golden["noise"]), golden["lam"].item() if es == "es" else 1.0
    found = sample_ddpm(golden_model(golden), golden["latents"], COSINE, 20, eta=eta, scaling=scale, clip=clip, noise=lambda x: next(noise))
    tolerance = torch.full((5, 1, 1, 1), 1e-4, dtype=torch.float64)
    if name == "ddim_eta0.5_plain":
        tolerance[2] = 2e-4  # this image passes between two modes (0.48 to 0.52), which magnifies the reference's float32 tables
    assert ((found - golden[name]).abs() <= tolerance).all()
    assert_close(found, by_the_book(golden, eta, scale, clip, torch.float64), rtol=1e-8, atol=1e-9)
    assert_close(golden[name], by_the_book(golden, eta, scale, clip, torch.float32), rtol=1e-10, atol=1e-10)  # all of the difference is float32


# ---- steps

@settings(max_examples=200, deadline=None)
@given(data=st.data(), T=st.integers(1, 2000))
def test_respaced_steps_are_even_and_reach_both_ends(data, T):
    n = data.draw(st.integers(1, T))
    kept = respaced_steps(T, n)
    assert len(kept) == n and kept[-1] == T - 1 and (n == 1 or kept[0] == 0) and (kept.diff() > 0).all()
    if n > 1:
        assert (kept.diff() - (T - 1) / (n - 1)).abs().max() <= 1


def test_own_steps_are_taken():
    ts = []
    sample_ddpm(lambda x, t: ts.append(t) or x * 0, normal(2, 1, 2, 2), COSINE, [3, 40, 700])
    assert [t.tolist() for t in ts] == [[700, 700], [40, 40], [3, 3]] and all(t.dtype == torch.int64 for t in ts)
    assert chain_steps(COSINE, range(1000)) == chain_steps(COSINE, 1000)
    assert chain_steps(COSINE, torch.tensor([0, 500, 999])) == chain_steps(COSINE, 3) == chain_steps(COSINE, np.int64(3))


# ---- one step

@settings(max_examples=60, deadline=None)
@given(alphas=chains(), eta=st.none() | st.floats(0, 1))
def test_every_step_keeps_the_marginals_of_the_forward_process(alphas, eta):
    chain = chain_steps(alphas, len(alphas), eta)
    for step, after in zip(chain, [*chain[1:], None]):
        abar_prev = after.signal**2 if after else 1.0
        assert math.isclose(step.on_x0 + step.on_x * step.signal, math.sqrt(abar_prev), rel_tol=1e-9)  # mean sqrt(abar_prev) x0
        assert math.isclose((step.on_x * step.noise) ** 2 + step.std**2, 1 - abar_prev, rel_tol=1e-7, abs_tol=1e-12)
    assert chain[-1].on_x == chain[-1].std == 0 and chain[-1].on_x0 == 1


@settings(max_examples=60, deadline=None)
@given(alphas=chains())
def test_ddim_with_eta_one_is_ddpm_with_the_lower_variance(alphas):
    before, after = alphas[1:], alphas[:-1]
    for a, b in zip(ancestral_coefficients(before, after), ddim_coefficients(before, after, 1.0)):
        assert_close(a, b, rtol=1e-6, atol=1e-9)
    x, z = normal(3, 1, 2, 2), normal(len(alphas), 3, 1, 2, 2, seed=1)
    first, second = (sample_ddpm(nonlinear, x, alphas, len(alphas), eta=eta, noise=lambda _, it=iter(z): next(it)) for eta in (None, 1.0))
    assert_close(first, second, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("k", [0, 5, 12])
def test_one_ancestral_step_from_exact_states_has_the_papers_variance(k):
    chain, n, e, x0 = chain_steps(COSINE, 20), 40_000, 0.4, 0.6
    step, after = chain[k], chain[k + 1]
    x = step.signal * x0 + step.noise * normal(n, 1, 1, 1)
    beta, abar_prev = 1 - (step.signal / after.signal) ** 2, after.signal**2
    def eps_model(x, t):  # the epsilon whose x0 is off by e n
        return (x - step.signal * (x0 + e * normal(n, 1, 1, 1, seed=2))) / step.noise
    seen = []
    sample_ddpm(eps_model, x, COSINE, [0, step.t] if after.t == 0 else [after.t, step.t], clip=False, callback=seen.append)
    state, variance = seen[1]["x"], 1 - abar_prev + (math.sqrt(abar_prev) * beta / (1 - step.signal**2) * e) ** 2
    assert abs(state.mean() - math.sqrt(abar_prev) * x0) < 5 * math.sqrt(variance / n)
    assert abs(state.var() / variance - 1) < 5 * math.sqrt(2 / n)
    assert_close(seen[0]["mean"], step.on_x0 * seen[0]["x0"] + step.on_x * x)
    assert math.isclose(seen[0]["std"], math.sqrt((1 - abar_prev) / step.noise**2 * beta))


@given(v=st.floats(-1, 1), k=st.integers(0, 18))
@settings(max_examples=60, deadline=None)
def test_a_learned_variance_interpolates_logarithms_between_its_bounds(v, k):
    step = chain_steps(COSINE, 20)[k]
    std = noise_std(step, torch.full((1, 1, 1, 1), v, dtype=torch.float64)).item()
    assert step.std * (1 - 1e-12) <= std <= math.sqrt(step.beta) * (1 + 1e-12)
    share = (math.log(std) - math.log(step.std)) / (math.log(step.beta) / 2 - math.log(step.std))
    assert math.isclose(share, (v + 1) / 2, abs_tol=1e-6)


def test_learned_variance_acts_on_ddpms_noise_only():
    x, z = normal(2, 1, 2, 2), normal(20, 2, 1, 2, 2, seed=3)
    def run(v, eta=None):
        model = nonlinear if v is None else lambda x, t: torch.cat([nonlinear(x, t), torch.full_like(x, v)], 1)
        return sample_ddpm(model, x, COSINE, 20, noise=lambda _, it=iter(z): next(it), eta=eta)
    assert_close(run(-1.0), run(None), rtol=1e-12, atol=1e-12)  # the lower bound is the fixed variance
    assert not torch.allclose(run(1.0), run(None))
    for eta in (0.0, 0.5):
        assert run(1.0, eta=eta).equal(run(None, eta=eta))


# ---- epsilon scaling

@WITH_ETA
@pytest.mark.parametrize("clip", [True, False])
def test_lambda_one_changes_no_bit_and_every_form_of_a_schedule_is_one(eta, clip):
    def run(scaling):
        return sample_ddpm(nonlinear, SeedStreams([1, 2]).latents((1, 3, 3)), COSINE, 12, eta=eta, clip=clip, scaling=scaling,
                           noise=SeedStreams([5, 6]).noise)
    assert run(1.0).equal(run([1] * 12)) and run(1.0).equal(run(lambda step, sigma: 1.0)) and run(1.0).equal(run(LinearScaling()))
    assert not run(1.02).equal(run(1.0))
    assert run(LinearScaling(1.01, 0.002)).equal(run([1.01 + 0.002 * i for i in range(12)]))


@WITH_ETA
def test_scaling_sits_inside_x0_before_the_clip(eta):
    seen, scaling = [], LinearScaling(1.3, -0.02)
    sample_ddpm(nonlinear, normal(2, 1, 2, 2), COSINE, 8, eta=eta, scaling=scaling, callback=seen.append)
    for i, (info, step) in enumerate(zip(seen, chain_steps(COSINE, 8, eta))):
        t = torch.full((2,), step.t)
        assert_close(info["eps"], nonlinear(info["x"], t))  # recorded raw
        assert info["lambda"] == scaling(i, step.sigma) and info["t"] == step.t and info["step"] == i
        abar = COSINE[step.t]
        x0 = (info["x"] / abar.sqrt() - (1 / abar - 1).sqrt() * info["eps"] / info["lambda"]).clamp(-1, 1)
        assert_close(info["x0"], x0)
        assert_close(info["mean"], step.on_x0 * x0 + step.on_x * info["x"])
    assert max(info["x0"].abs().max() for info in seen) == 1  # the clip was at work


def test_a_schedule_may_look_at_sigma_and_step_zero_is_the_highest_noise():
    asked = []
    sample_ddpm(nonlinear, normal(1, 1, 2, 2), COSINE, 5, scaling=lambda step, sigma: asked.append((step, sigma)) or 1.0)
    assert [step for step, _ in asked] == list(range(5))
    assert_close([sigma for _, sigma in asked], sigma_from_alphas(COSINE[respaced_steps(1000, 5)]).flip(0).tolist())


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 100), k=st.floats(-0.003, 0.003), b=st.floats(0.9, 1.1))
def test_adm_es_schedules_count_from_the_clean_end(n, k, b):
    kit = lambda_table(adm_es_scaling(n, k, b), [0.0] * (n + 1)) if b + min(k * (n - 1), 0) > 0 else None
    index = [b + k * i for i in range(n)]  # of the respaced step, 0 = least noise
    assert kit is None or np.allclose(kit[::-1], index, rtol=1e-12)
    assert np.allclose(lambda_table(adm_es_scaling(n, k, mean=np.mean(index)), [0.0] * (n + 1))[::-1], index, rtol=1e-12)


@pytest.mark.parametrize("k, b, uniform", [(0.0008, 1.0034, 1.011), (0.0004, 1.0042, 1.008), (0.0002, 1.0041, 1.006), (0.00022, 1.00291, 1.005)])
def test_the_tables_of_adm_es_have_the_mean_of_its_uniform_lambda(k, b, uniform):
    assert abs(np.mean(lambda_table(adm_es_scaling(20, k, b), [0.0] * 21)) - uniform) < 5e-4


# ---- DDIM and the probability flow

@settings(max_examples=40, deadline=None)
@given(data=st.data(), alphas=chains())
def test_ddim_without_clip_is_eulers_probability_flow(data, alphas):
    n = data.draw(st.integers(1, len(alphas)))
    scaling = data.draw(st.lists(st.floats(0.9, 1.1), min_size=n, max_size=n))
    kept = respaced_steps(len(alphas), n).flip(0)
    levels = sigma_from_alphas(alphas)
    def denoise(x, sigma, labels=None):  # the denoiser in data units that belongs to the epsilon network
        t = (levels - sigma).abs().argmin()
        return x - sigma * nonlinear(x * alphas[t].sqrt(), t.expand(len(x)))
    paths, x = ([], []), normal(3, 1, 2, 2, seed=7)
    first = sample_ddpm(nonlinear, x, alphas, n, eta=0.0, clip=False, scaling=scaling, callback=lambda info: paths[0].append(info["x"] / info["signal"]))
    second = sample(Denoiser(denoise, (1, 2, 2), 0.5), x / alphas[-1].sqrt(), [*levels[kept].tolist(), 0.0], solver="euler", scaling=scaling,
                    callback=lambda info: paths[1].append(info["x"]))
    assert_close(torch.stack(paths[0]), torch.stack(paths[1]), rtol=1e-8, atol=1e-8)
    assert_close(first, second, rtol=1e-8, atol=1e-8)


def test_the_sigma_sides_callbacks_see_the_same_run():
    mixture = GaussianMixture(normal(2, 1, 2, 2) / 2, [0.5, 0.5], std=0.2)
    x, sigmas = normal(50, 1, 2, 2, seed=9), [*sigma_from_alphas(LINEAR[respaced_steps(1000, 15)]).flip(0).tolist(), 0.0]
    ours, theirs = Trace(mixture.mean), Trace(mixture.mean)
    sample_ddpm(exact_eps(mixture.denoise, LINEAR), x, LINEAR, 15, eta=0.0, clip=False, scaling=1.01, callback=in_data_units(ours))
    sample(mixture.denoiser(), x / LINEAR[-1].sqrt(), sigmas, solver="euler", scaling=1.01, callback=theirs)
    for name in ("eps", "slope", "square", "sigma"):
        assert_close(ours.column(name), theirs.column(name), rtol=1e-8, atol=1e-10)
    assert_close(ours.variance(), theirs.variance(), rtol=1e-8, atol=1e-10)


# ---- worlds with a known answer

@WITH_ETA
@pytest.mark.parametrize("scaling", [1.0, 1.02])
def test_variance_of_sampled_gaussian_data_in_closed_form(eta, scaling):
    "The exact epsilon of Gaussian data is linear, so each step multiplies the variance and adds its noise; impulses measure that to the last digit."
    variance, n = 0.3, 20
    eps_model = exact_eps(lambda x, sigma: x * (variance / (variance + sigma**2))[:, None, None, None], COSINE)
    expected = 1.0
    for step in chain_steps(COSINE, n, eta):
        shrink = variance * step.signal / (variance * step.signal**2 + step.noise**2)  # of the exact x0_hat
        shrink = (1 - (1 - step.signal * shrink) / scaling) / step.signal
        expected = (step.on_x0 * shrink + step.on_x) ** 2 * expected + step.std**2
    start, step = torch.zeros(n + 1, 1, 1, 1, dtype=torch.float64), iter(range(1, n + 1))
    start[0] = 1  # image 0 has a start and no noise, image i only the noise of step i
    def impulse(x):
        return torch.zeros_like(x).index_fill(0, torch.tensor(next(step)), 1)
    found = sample_ddpm(eps_model, start, COSINE, n, eta=eta, scaling=scaling, clip=False, noise=impulse)
    assert_close(found.square().sum().item(), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
def test_long_chains_sample_a_mixture(eta):
    mixture = GaussianMixture(torch.tensor([-0.6, 0.5]).reshape(2, 1, 1, 1), [0.3, 0.7], std=0.2)
    n = 3000
    found = {steps: sample_ddpm(exact_eps(mixture.denoise, COSINE), normal(n, 1, 1, 1, seed=11), COSINE, steps, eta=eta, clip=False,
                                noise=lambda x, g=np.random.default_rng(12): torch.from_numpy(g.normal(size=x.shape)))
             for steps in (20, 100, 400)}
    inside = {steps: torch.where(x > 0, x - 0.5, x + 0.6).square().mean().item() / 0.04 for steps, x in found.items()}
    assert abs((found[400] > 0).double().mean() - 0.7) < 5 * math.sqrt(0.21 / n)
    assert inside[20] < inside[100] < inside[400] < 1 + 5 * math.sqrt(2 / n) and inside[400] > 0.93


@settings(max_examples=40, deadline=None)
@given(alphas=chains(), e=st.floats(0, 1))
def test_chain_variance_without_error_is_the_forward_process(alphas, e):
    n = len(alphas)
    assert_close(chain_variance(alphas, n), torch.cat([1 - alphas.flip(0), alphas.new_zeros(1)]), rtol=1e-7, atol=1e-12)
    excess = chain_variance(alphas, n, e) - chain_variance(alphas, n)
    assert (excess >= -1e-12).all() and math.isclose(excess[-1], e**2, rel_tol=1e-6, abs_tol=1e-12)
    assert_close(chain_variance(alphas, n, 2 * e) - chain_variance(alphas, n), 4 * excess, rtol=1e-6, atol=1e-9)


# ---- the interface

@WITH_ETA
def test_noise_is_asked_once_per_step_whatever_the_settings(eta):
    asked = []
    sample_ddpm(nonlinear, normal(2, 1, 2, 2), COSINE, 7, eta=eta, noise=lambda x: asked.append(x.dtype) or torch.zeros_like(x))
    assert asked == [torch.float64] * 7


def test_an_image_belongs_to_its_seed():
    def run(seeds):
        streams = SeedStreams(seeds)
        return sample_ddpm(nonlinear, streams.latents((1, 3, 3)), COSINE, 10, noise=streams.noise)
    assert_close(run([4, 9, 2])[1:2], run([9]), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_network_gets_the_type_of_its_weights_and_the_state_stays_float64(dtype):
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 1).to(dtype)

        def forward(self, x, t, y=None):
            seen.add((x.dtype, t.dtype, None if y is None else tuple(y.tolist())))
            return self.conv(x)
    seen = set()
    images = sample_ddpm(Network(), torch.randn(2, 1, 4, 4), COSINE, 3, class_labels=torch.tensor([3, 1]))
    assert images.dtype == torch.float64 and not images.requires_grad and seen == {(dtype, torch.int64, (3, 1))}


def test_unlabelled_models_are_called_with_two_arguments_and_the_start_is_left_alone():
    x, calls = torch.randn(2, 1, 4, 4), []
    before = x.clone()
    sample_ddpm(lambda *args: calls.append(len(args)) or args[0] * 0, x, COSINE, 3)
    assert calls == [2] * 3 and x.equal(before)


@WITH_ETA
def test_a_chain_may_begin_without_noise_and_may_have_one_step(eta):
    assert sample_ddpm(nonlinear, normal(1, 1, 2, 2), [1.0, 0.9, 0.5], 3, eta=eta).isfinite().all()
    x = normal(1, 1, 2, 2)
    expected = (x - math.sqrt(0.5) * nonlinear(x, torch.tensor([2]))) / math.sqrt(0.5)
    assert_close(sample_ddpm(nonlinear, x, [1.0, 0.9, 0.5], 1, eta=eta, clip=False), expected)


# ---- bad input

@pytest.mark.parametrize("change, words", [
    (dict(steps=1001), "from 1 to 1000"), (dict(steps=0), "from 1 to 1000"), (dict(steps=-3), "from 1 to 1000"), (dict(steps=2.5), "2.5"),
    (dict(steps=True), "True"), (dict(steps="20"), "'20'"), (dict(steps=[5, 3]), "increase"), (dict(steps=[0, 1000]), "0 to 999"),
    (dict(steps=[]), "increase"), (dict(steps=[-1, 4]), "0 to 999"), (dict(steps=[0.5, 3]), "whole numbers"),
    (dict(eta=-0.1), "-0.1"), (dict(eta=1.5), "1.5"), (dict(eta=math.nan), "nan"), (dict(eta="1"), "'1'"),
    (dict(alphas_cumprod=[0.5, 0.9]), "decrease strictly"), (dict(alphas_cumprod=[0.9, 0.9, 0.5]), "alphas_cumprod[0] = 0.9"),
    (dict(alphas_cumprod=[1.1, 0.5]), "(0, 1]"), (dict(alphas_cumprod=[0.5, 0.0]), "alphas_cumprod[1] = 0"),
    (dict(alphas_cumprod=[0.5, -0.1]), "(0, 1]"), (dict(alphas_cumprod=[math.nan, 0.1]), "nan"), (dict(alphas_cumprod=[]), "at least one"),
    (dict(alphas_cumprod=torch.ones(2, 2) / 2), "(2, 2)"),
    (dict(scaling=0.0), "got 0.0 at step 0"), (dict(scaling=[1.0] * 19), "19 values for 20 steps"), (dict(scaling=LinearScaling(1.0, -0.06)), "step 17"),
    (dict(scaling=math.nan), "nan"), (dict(x=torch.zeros(2, 4, 4)), "(2, 4, 4)"), (dict(x=torch.zeros(2, 1, 4, 4).int()), "int32"), (dict(x=None), "NoneType"),
])
def test_bad_input_is_named_before_the_network_is_asked(change, words):
    asked = []
    arguments = dict(x=torch.zeros(2, 1, 4, 4), alphas_cumprod=COSINE, steps=20) | change
    if "alphas_cumprod" in change:
        arguments["steps"] = 1
    with pytest.raises(ValueError) as error:
        sample_ddpm(lambda x, t: asked.append(t) or x, **arguments)
    assert words in str(error.value) and not asked


@pytest.mark.parametrize("answer, kind, words", [
    (lambda x: x[:, :1], ValueError, "(2, 1, 4, 4)"), (lambda x: torch.cat([x] * 3, 1), ValueError, "(2, 9, 4, 4)"),
    (lambda x: x[:1], ValueError, "(1, 3, 4, 4)"), (lambda x: x * math.nan, ValueError, "first evaluation, step 999"),
    (lambda x: {"sample": x}, TypeError, "dict"), (lambda x: None, TypeError, "NoneType"),
])
def test_a_wrong_answer_of_the_network_is_named(answer, kind, words):
    with pytest.raises(kind) as error:
        sample_ddpm(lambda x, t: answer(x), torch.zeros(2, 3, 4, 4), COSINE, 20)
    assert words in str(error.value)


def test_images_that_become_nan_later_are_counted():
    with pytest.raises(ValueError, match="1 of 2 images"):
        sample_ddpm(lambda x, t: x if t[0] > 500 else torch.stack([x[0], x[1] * math.nan]), torch.zeros(2, 1, 2, 2), COSINE, 5)


@pytest.mark.parametrize("given_values", [{}, {"b": 1.0, "mean": 1.0}])
def test_an_adm_es_schedule_needs_exactly_one_of_start_and_mean(given_values):
    with pytest.raises(ValueError, match="not both or neither"):
        adm_es_scaling(20, 0.001, **given_values)
