"Laws and oracles of sedm_kit.sampler."
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from sedm_kit.analytic import Denoiser, GaussianMixture, gaussian_flow
from sedm_kit.discriminator import DiscriminatorGuidance
from sedm_kit.networks import EDMPrecond, PatchLogRatio, seeded
from sedm_kit.noise import edm_sigmas, iddpm_sigmas, ve_sigmas, vp_sigmas
from sedm_kit.sampler import (MULTISTEP, SOLVERS, Churn, ConstantScaling, LinearScaling, SeedStreams, check_seeds, count_evaluations, find_solver, lambda_table,
                              sample, sample_seeds)

GOLDEN = {name: torch.from_numpy(np.asarray(value)) for name, value in np.load(Path(__file__).parent / "golden" / "samplers.npz").items()}
STEPS = int(GOLDEN["num_steps"])
MIXTURE = GaussianMixture(GOLDEN["means"], GOLDEN["weights"], float(GOLDEN["std"]))


def midpoint_step(slope, x, sigma, sigma_next, memory):
    "A user's own solver: the slope at the geometric mean of both levels; at the end an Euler step."
    d = slope(x, sigma, 0)
    if sigma_next == 0:
        return x + (sigma_next - sigma) * d
    middle = (sigma * sigma_next) ** 0.5
    return x + (sigma_next - sigma) * slope(x + (middle - sigma) * d, middle, 1)


ALL_SOLVERS = [*SOLVERS, midpoint_step]


def can_stir(solver):
    "Multistep solvers refuse fresh noise."
    return SOLVERS.get(solver) not in MULTISTEP if isinstance(solver, str) else True



def analytic_log_ratio(u, tau, class_labels=None):
    "The discriminator of the golden file, in float64 on float32 input."
    u = u.to(torch.float64).flatten(1)
    return u @ GOLDEN["disc_b"] + GOLDEN["disc_c"] * tau - GOLDEN["disc_q"] * u.square().mean(1) / 2


def random_mixture(seed, shape=(1, 2, 2), k=3):
    rng = np.random.default_rng(seed)
    return GaussianMixture(torch.from_numpy(rng.normal(size=(k, *shape))), torch.from_numpy(rng.uniform(0.2, 2, k)), float(rng.uniform(0.1, 1)))


def unit(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stream(seed):
    generator = torch.Generator().manual_seed(seed)
    return lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)


# ---- golden numbers

CHURN = Churn(30, 0.01, 1, 1.007)
PLAIN = {"heun": {}, "euler": dict(solver="euler"), "heun_churn": dict(churn=CHURN), "heun_es_churn_1.0034": dict(churn=CHURN, scaling=1.0034),
         "heun_steps_vp": dict(sigmas=vp_sigmas(STEPS)), "heun_steps_ve": dict(sigmas=ve_sigmas(STEPS)),
         "heun_steps_iddpm": dict(sigmas=iddpm_sigmas(STEPS)),
         **{f"{solver}_es_{b}": dict(solver=solver, scaling=float(b)) for solver in ("euler", "heun") for b in ("1.0034", "0.9985", "1.02")}}
GUIDED = {"heun_dg_w2_0": (2.0, {}, {}), "heun_dg_w1_1": ((1, 1), {}, {}), "heun_dg_w1.5_0_boost": (1.5, dict(boost=True), {}),
          "heun_dg_window": ((2, 1), dict(window=(0.1, 0.8)), {}), "heun_dg_churn": ((2, 0), {}, dict(churn=CHURN)),
          "sedm_heun_const": (1.67, {}, dict(scaling=1.004)), "sedm_heun_linear": (1.67, {}, dict(scaling=LinearScaling(1.001, 0.0007))),
          "sedm_euler_const": (1.2, {}, dict(scaling=ConstantScaling(1.0048), solver="euler")),
          "sedm_heun_boost": (1.67, dict(boost=True), dict(scaling=1.004))}


def run_golden(sigmas=edm_sigmas(STEPS), **arguments):
    noise = iter(GOLDEN["noise"])
    images = sample(MIXTURE.denoiser(), GOLDEN["latents"] * sigmas[0], sigmas, noise=lambda x: next(noise), **arguments)
    assert next(noise, None) is None, "one draw per step, used or not"
    return images


def relative(images, expected):
    return ((images - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name", PLAIN)
def test_golden_edm_and_epsilon_scaling(name):
    # the reference computes iDDPM's levels partly in float32
    assert relative(run_golden(**PLAIN[name]), GOLDEN[name]) < (1e-6 if name == "heun_steps_iddpm" else 1e-12)


@pytest.mark.parametrize("name", GUIDED)
def test_golden_guidance_and_sedm(name):
    weight, options, arguments = GUIDED[name]
    guidance = DiscriminatorGuidance(analytic_log_ratio, weight, **options)
    assert relative(run_golden(guidance=guidance, **arguments), GOLDEN[name]) < 1e-6  # both evaluate the discriminator in float32


def test_golden_entries_are_all_used_and_tell_the_settings_apart():
    unused = {"heun_vp_full", "euler_ve_full"}  # these need a signal scale
    inputs = {"means", "weights", "std", "latents", "noise", "num_steps", "disc_b", "disc_c", "disc_q"}
    corrections = {name for name in GOLDEN if name.startswith("corr")}
    assert set(GOLDEN) == {*PLAIN, *GUIDED} | unused | inputs | corrections
    results = [GOLDEN[name] for name in (*PLAIN, *GUIDED)]
    closest = min(relative(a, b) for i, a in enumerate(results) for b in results[:i])
    assert closest > 1e-4  # so none passes by standing in for another


# ---- laws

@settings(max_examples=60)
@given(seed=st.integers(0, 9999), n=st.integers(1, 8), solver=st.sampled_from(ALL_SOLVERS), s_churn=st.sampled_from([0.0, 0.5, 40.0]),
       neutral=st.sampled_from([1, 1.0, ConstantScaling(), LinearScaling(1.0, 0.0), "list", torch.tensor(1.0), np.float64(1)]),
       weight=st.sampled_from([None, 0, 0.0, (0.0, 0.0)]), boost=st.booleans())
def test_lambda_one_and_weight_zero_are_the_plain_sampler_bit_for_bit(seed, n, solver, s_churn, neutral, weight, boost):
    mix, sigmas, s_churn, boost = random_mixture(seed), edm_sigmas(n), s_churn * can_stir(solver), boost and can_stir(solver)
    x, churn = 80 * unit(3, 1, 2, 2, seed=seed), Churn(s_churn, 0.0, 50.0, 1.003)
    plain = sample(mix.denoiser(), x, sigmas, solver=solver, churn=churn, noise=stream(seed))
    guidance = None if weight is None else DiscriminatorGuidance(lambda u, tau, labels: u.sum((1, 2, 3)), weight, boost=boost)
    scaling = [1.0] * n if neutral == "list" else neutral
    assert torch.equal(sample(mix.denoiser(), x, sigmas, solver=solver, churn=churn, noise=stream(seed), scaling=scaling, guidance=guidance), plain)
    # ... and the knobs are alive
    if n > 1:
        assert not torch.equal(sample(mix.denoiser(), x, sigmas, solver=solver, churn=churn, noise=stream(seed), scaling=1.01), plain)
        live = DiscriminatorGuidance(lambda u, tau, labels: u.sum((1, 2, 3)), 0.5)
        assert not torch.equal(sample(mix.denoiser(), x, sigmas, solver=solver, churn=churn, noise=stream(seed), guidance=live), plain)


@settings(max_examples=60)
@given(seed=st.integers(0, 9999), n=st.integers(1, 30), solver=st.sampled_from(ALL_SOLVERS), s_churn=st.sampled_from([0.0, 40.0]),
       size=st.floats(0, 100))
def test_a_one_point_data_set_is_sampled_exactly(seed, n, solver, s_churn, size):
    point = size * unit(1, 1, 2, 2, seed=seed)
    images = sample(GaussianMixture(point, [1.0], 0.0).denoiser(), 80 * unit(3, 1, 2, 2, seed=seed + 1), edm_sigmas(n), solver=solver,
                    churn=Churn(s_churn * can_stir(solver)), noise=stream(seed))
    assert_close(images, point.expand_as(images), rtol=0, atol=1e-13 * (80 + size))  # rounding of the start, no more


@settings(max_examples=40)
@given(seed=st.integers(0, 9999), n=st.integers(1, 12), solver=st.sampled_from(ALL_SOLVERS), factor=st.floats(0.05, 20), shift=st.floats(-5, 5),
       lam=st.sampled_from([1.0, 1.02, 0.98]))
def test_sampling_commutes_with_a_change_of_units(seed, n, solver, factor, shift, lam):
    mix, sigmas, x = random_mixture(seed), edm_sigmas(n), 80 * unit(3, 1, 2, 2, seed=seed)
    means = mix.means.reshape(-1, 1, 2, 2)
    moved = GaussianMixture(factor * means + shift, mix.weights, factor * mix.variances[0, 0].sqrt().item())
    images = sample(mix.denoiser(), x, sigmas, solver=solver, scaling=lam)
    same = sample(moved.denoiser(), factor * x + shift, factor * sigmas, solver=solver, scaling=lam)
    assert_close((same - shift) / factor, images, rtol=1e-7, atol=1e-7 * (1 + abs(shift) / factor))


def test_images_do_not_depend_on_their_neighbours():
    x = 80 * unit(4, 1, 4, 4)
    together = sample(MIXTURE.denoiser(), x, edm_sigmas(9), scaling=1.01, guidance=DiscriminatorGuidance(analytic_log_ratio, 2.0))
    alone = torch.cat([sample(MIXTURE.denoiser(), x[i:i + 1], edm_sigmas(9), scaling=1.01, guidance=DiscriminatorGuidance(analytic_log_ratio, 2.0))
                       for i in range(4)])
    assert_close(together, alone, rtol=1e-7, atol=1e-7)


# ---- algorithm 2, written out once more for one image

def algorithm_2(denoiser, x, sigmas, churn, lambdas, noise):
    n = len(sigmas) - 1
    for i, (sigma, sigma_next) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        gamma = min(churn.s_churn / n, math.sqrt(2) - 1) if churn.s_min <= sigma <= churn.s_max else 0
        hat = sigma + gamma * sigma
        x = x + math.sqrt(hat**2 - sigma**2) * churn.s_noise * noise(x)
        d = (x - denoiser(x, hat)) / hat / lambdas[i]
        ahead = x + (sigma_next - hat) * d
        if sigma_next > 0:
            ahead = x + (sigma_next - hat) * (d / 2 + (ahead - denoiser(ahead, sigma_next)) / sigma_next / lambdas[i] / 2)
        x = ahead
    return x


@settings(max_examples=25)
@given(seed=st.integers(0, 9999), n=st.integers(1, 10), s_churn=st.floats(0, 60), s_min=st.floats(0, 1), s_max=st.floats(1, 100),
       s_noise=st.floats(0.9, 1.1), b=st.floats(0.95, 1.05), k=st.floats(-0.005, 0.005))
def test_heun_with_churn_and_scaling_is_algorithm_2(seed, n, s_churn, s_min, s_max, s_noise, b, k):
    mix, sigmas, x = random_mixture(seed), edm_sigmas(n), 80 * unit(2, 1, 2, 2, seed=seed)
    churn = Churn(s_churn, s_min, s_max, s_noise)
    expected = algorithm_2(mix.denoise, x, sigmas.tolist(), churn, [b + k * i for i in range(n)], stream(seed))
    got = sample(mix.denoiser(), x, sigmas, churn=churn, scaling=LinearScaling(b, k), noise=stream(seed))
    assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_noise_is_asked_once_per_step_whether_used_or_not():
    for churn in (None, Churn(), Churn(10.0, 0.1, 1.0)):
        asked = []
        sample(MIXTURE.denoiser(), 80 * unit(2, 1, 4, 4), edm_sigmas(6), churn=churn, noise=lambda x: (asked.append(x.shape), torch.randn_like(x))[1])
        assert asked == [(2, 1, 4, 4)] * 6


def test_churned_level_is_rounded_to_one_the_denoiser_knows():
    denoiser, seen = MIXTURE.denoiser(), []
    denoiser.round_sigma = lambda sigma: (torch.as_tensor(sigma) * 4).round() / 4
    sample(denoiser, 80 * unit(1, 1, 4, 4), [8.0, 4.0, 2.0, 0.0], solver="euler", churn=Churn(0.5),
           callback=lambda info: seen.append(info["sigma"].item()))
    assert seen == [round(sigma * (1 + 0.5 / 3) * 4) / 4 for sigma in (8.0, 4.0, 2.0)] == [9.25, 4.75, 2.25]


@pytest.mark.filterwarnings("ignore:Casting complex")
def test_rounding_down_a_churned_level_never_leaves_the_real_numbers():
    denoiser = MIXTURE.denoiser()
    denoiser.round_sigma = lambda sigma: torch.as_tensor(sigma).round()
    try:
        images = sample(denoiser, 80 * unit(1, 1, 4, 4), [80.0, 10.4, 0.0], solver="euler", churn=Churn(0.01))
    except ValueError as error:
        assert "10.4" in str(error)
    else:
        assert images.dtype == torch.float64


# ---- scaling

def test_lambda_table_starts_at_the_highest_noise():
    sigmas = edm_sigmas(4)
    assert lambda_table(LinearScaling(1.001, 0.5), sigmas) == [1.001, 1.501, 2.001, 2.501]
    assert lambda_table(ConstantScaling(1.02), sigmas) == lambda_table(1.02, sigmas) == [1.02] * 4
    seen = []
    assert lambda_table(lambda step, sigma: seen.append((step, sigma)) or 1 + sigma, sigmas) == [1 + sigma for sigma in sigmas[:-1].tolist()]
    assert seen == list(enumerate(sigmas[:-1].tolist())) and seen[0][1] == pytest.approx(80)
    values = [1.1, 1.2, 1.3, 1.4]
    for given_values in (values, tuple(values), np.array(values), torch.tensor(values, dtype=torch.float64)):
        assert lambda_table(given_values, sigmas) == values


@pytest.mark.parametrize("solver", ALL_SOLVERS)
def test_lambda_divides_epsilon_at_every_evaluation_of_its_step(solver):
    seen, lambdas = [], [1.0, 1.1, 1.25, 0.9]
    sample(MIXTURE.denoiser(), 80 * unit(2, 1, 4, 4), edm_sigmas(4), solver=solver, scaling=lambdas, callback=seen.append)
    stages = {"euler": 1, "ab2": 1, "dpmpp2m": 1, "rk3": 3}.get(solver, 2)
    last = 1 if solver in ("heun", midpoint_step) else stages  # those two do not look beyond the last step
    assert [info["step"] for info in seen] == [step for step in range(4) for _ in range(stages if step < 3 else last)]
    for info in seen:
        assert info["lambda"] == lambdas[info["step"]]
        assert_close(info["eps"], (info["x"] - info["denoised"]) / info["sigma"])  # eps is raw
        assert_close(info["slope"], info["eps"] / lambdas[info["step"]])
        assert_close(info["denoised"], MIXTURE.denoise(info["x"], info["sigma"]))


def test_a_late_lambda_leaves_the_early_steps_alone():
    x, plain, late = 80 * unit(2, 1, 4, 4), [], []
    sample(MIXTURE.denoiser(), x, edm_sigmas(4), callback=plain.append)
    sample(MIXTURE.denoiser(), x, edm_sigmas(4), callback=late.append, scaling=[1, 1, 1.1, 1])
    same = [torch.equal(a["x"], b["x"]) for a, b in zip(plain, late)]
    assert same == [True] * 5 + [False] * 2  # step 2 starts at the same x; its corrector and step 3 differ


@pytest.mark.parametrize("solver", ALL_SOLVERS)
def test_guidance_is_not_divided_by_lambda(solver):
    seen = []

    def guidance(x, sigma, class_labels=None, *, step, stage):
        return 0.3 * x + stage + step, None

    sample(MIXTURE.denoiser(), 80 * unit(2, 1, 4, 4), edm_sigmas(4), solver=solver, scaling=1.25, guidance=guidance, callback=seen.append)
    for info in seen:
        assert_close(info["g"], 0.3 * info["x"] + info["stage"] + info["step"])
        assert_close(info["slope"], info["eps"] / 1.25 + info["g"] / info["sigma"])


# ---- the solver seam

def test_a_users_solver_gets_its_own_memory_and_the_grid():
    seen = []

    def step(slope, x, sigma, sigma_next, memory):
        memory["steps"] = memory.get("steps", 0) + 1
        seen.append((sigma, sigma_next, memory["steps"]))
        return x + (sigma_next - sigma) * slope(x, sigma)  # stage 0 unless said

    x = 80 * unit(2, 1, 4, 4)
    for _ in range(2):  # a new run starts with an empty memory
        images = sample(MIXTURE.denoiser(), x, edm_sigmas(3), solver=step)
    levels = edm_sigmas(3).tolist()
    assert seen == 2 * [(levels[0], levels[1], 1), (levels[1], levels[2], 2), (levels[2], 0.0, 3)]
    assert torch.equal(images, sample(MIXTURE.denoiser(), x, edm_sigmas(3), solver="euler"))


def test_midpoint_is_what_it_says():
    x, lam = 80 * unit(2, 1, 4, 4), 1.03
    got = sample(MIXTURE.denoiser(), x, edm_sigmas(6), solver=midpoint_step, scaling=lam)
    levels = edm_sigmas(6).tolist()
    for sigma, sigma_next in zip(levels[:-1], levels[1:]):
        where, middle = x, sigma
        if sigma_next > 0:
            middle = math.sqrt(sigma * sigma_next)
            where = x + (middle - sigma) * (x - MIXTURE.denoise(x, sigma)) / sigma / lam
        x = x + (sigma_next - sigma) * (where - MIXTURE.denoise(where, middle)) / middle / lam
    assert_close(got, x, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("heun", 2), (midpoint_step, 2)])
def test_measured_order_of_convergence(solver, order):
    gaussian = GaussianMixture(torch.ones(1, 1, 2, 2), [1.0], 0.75)
    x = 1 + 10 * unit(16, 1, 2, 2)
    exact = gaussian_flow(gaussian, x, 10.0)
    errors = [(sample(gaussian.denoiser(), x, edm_sigmas(n, 1e-4, 10.0), solver=solver) - exact).norm().item() for n in (100, 200, 400)]
    orders = [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:])]
    assert orders == pytest.approx([order] * 2, abs=0.1)


def test_count_evaluations():
    assert [count_evaluations("euler", n) for n in (1, 2, 18)] == [1, 2, 18]
    assert [count_evaluations("heun", n) for n in (1, 2, 18)] == [1, 3, 35]
    assert count_evaluations(midpoint_step, 5) == 9
    with pytest.raises(ValueError, match="at least two levels"):
        count_evaluations("euler", 0)
    for solver in ALL_SOLVERS:  # what it says is what a run does
        calls = []
        sample(lambda x, sigma: calls.append(1) or x * 0, torch.ones(1, 1, 1, 1), edm_sigmas(7), solver=solver)
        assert len(calls) == count_evaluations(solver, 7)


def test_a_function_of_two_arguments_is_a_denoiser():
    x, sigmas = 80 * unit(2, 1, 4, 4), edm_sigmas(4)
    assert torch.equal(sample(lambda x, sigma: MIXTURE.denoise(x, sigma), x, sigmas), sample(MIXTURE.denoiser(), x, sigmas))


def test_the_denoiser_gets_float64_and_may_answer_in_float32():
    seen = []

    def denoiser(x, sigma, class_labels):
        seen.append((x.dtype, sigma.dtype, sigma.shape, class_labels))
        return (x * 0.5).to(torch.float32)

    images = sample(denoiser, torch.ones(2, 1, 2, 2, dtype=torch.float32), [4.0, 2.0, 0.0], class_labels="labels")
    assert images.dtype == torch.float64 and seen == [(torch.float64, torch.float64, (), "labels")] * 3


# ---- seeds

@pytest.fixture(scope="module")
def networks():
    "A denoiser and a log-ratio with the shipped networks' architecture, random in every layer."
    with seeded(0):
        models = EDMPrecond(8, 1, model_type="PatchNet", channels=16, blocks=2).eval(), PatchLogRatio(8, 1, channels=16, blocks=1).eval()
        for model, std in zip(models, (0.1, 0.3)):
            for parameter in model.parameters():
                if not parameter.any():  # layers start at zero; a network whose answer is zero would hide everything
                    torch.nn.init.normal_(parameter, std=std)
    return models


def seed_settings(networks, name):
    guidance = DiscriminatorGuidance(networks[1], (1.5, 0.5), boost=True)
    return {"plain": {}, "euler": dict(solver="euler"),
            "everything": dict(churn=Churn(2.0, 0.01, 50, 1.003), guidance=guidance, scaling=1.01)}[name]


def levels(images):
    "EDM's 8-bit image."
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8).int()


@pytest.mark.parametrize("name", ["plain", "euler", "everything"])
def test_a_seed_means_an_image_bit_for_bit_in_any_order_and_subset(networks, name):
    settings, sigmas = seed_settings(networks, name), edm_sigmas(7)
    images = sample_seeds(networks[0], range(11), sigmas, micro_batch=4, **settings)
    assert images.dtype == torch.float64 and len(images.unique(dim=0)) == 11 and images.std() > 0.1
    order = [7, 2, 10, 0, 5, 1, 9, 3, 8, 6, 4]
    for subset in (order, [3], [10, 3], range(4, 9), [5, 6, 7, 8]):
        assert torch.equal(sample_seeds(networks[0], subset, sigmas, micro_batch=4, **settings), images[list(subset)])


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_a_seed_means_an_image_to_one_level_across_micro_batch_sizes(networks, name):
    images = [sample_seeds(networks[0], range(11), edm_sigmas(7), micro_batch=size, **seed_settings(networks, name)) for size in (3, 8, 64)]
    assert levels(images[0]).unique().numel() > 20  # of some contrast
    for other in images[1:]:
        assert (levels(other) - levels(images[0])).abs().max() <= 1
        assert_close(other, images[0], rtol=0, atol=1e-3)


@pytest.mark.parametrize("full", [False, True])
def test_exact_denoisers_keep_the_promise_at_multiples_of_four(full):
    half = unit(3, 16, 16)
    mix = GaussianMixture(unit(3, 1, 4, 4), [1, 2, 3], **{"cov": half @ half.mT / 16} if full else {"std": 0.3})
    images = sample_seeds(mix.denoiser(), range(11), edm_sigmas(5), micro_batch=8, churn=Churn(2.0))
    for subset in ([10, 3], range(10, -1, -1)):
        assert torch.equal(sample_seeds(mix.denoiser(), subset, edm_sigmas(5), micro_batch=8, churn=Churn(2.0)), images[list(subset)])


def test_exact_denoisers_keep_the_promise_at_any_micro_batch():
    half = unit(3, 64, 64)
    mix = GaussianMixture(unit(3, 1, 8, 8), [1, 2, 3], cov=half @ half.mT / 64)
    for size in (5, 6, 7, 9):
        images = sample_seeds(mix.denoiser(), range(9), edm_sigmas(5), micro_batch=size)
        assert torch.equal(sample_seeds(mix.denoiser(), range(8, -1, -1), edm_sigmas(5), micro_batch=size), images.flip(0))


def test_streams_draw_in_edms_order():
    seeds = [3, 2**64 + 5, 0]
    streams, x = SeedStreams(seeds), torch.zeros(3, 2, 4, 4, dtype=torch.float64)
    latents, labels, noises = streams.latents((2, 4, 4)), streams.labels(1000), [streams.noise(x), streams.noise(x)]
    assert (latents.dtype, labels.dtype, labels.shape) == (torch.float32, torch.int64, (3,))
    for i, seed in enumerate([3, 5, 0]):  # modulo 2^32
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(latents[i], torch.randn(2, 4, 4, generator=generator))
        assert labels[i] == torch.randint(1000, (), generator=generator)
        for noise in noises:
            assert torch.equal(noise[i], torch.randn(2, 4, 4, generator=generator, dtype=torch.float64))


def labelled(shape=(1, 2, 2), classes=10, seen=None):
    "A denoiser whose images are N(label, 0.3^2): labels show in the samples."
    def function(x, sigma, class_labels):
        if seen is not None:
            seen.append(class_labels.clone())
        mean, share = class_labels.to(x.dtype).reshape(-1, 1, 1, 1), 0.09 / (0.09 + sigma.reshape(-1, 1, 1, 1) ** 2)
        return mean + share * (x - mean)
    return Denoiser(function, shape, sigma_data=1.0, label_dim=classes)


def by_hand(seeds, sigmas, churn, labels=None, draw=True):
    "The samples of `labelled`, one after the other, with EDM's order of draws."
    images, drawn = [], []
    for i, seed in enumerate(seeds):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(1, 1, 2, 2, generator=generator).to(torch.float64) * sigmas[0]
        label = torch.randint(10, (), generator=generator) if draw else None
        drawn.append(int(label) if labels is None else int(labels[i]))
        images.append(algorithm_2(lambda x, sigma: labelled()(x, torch.tensor(sigma, dtype=torch.float64), torch.tensor(drawn[-1])), x,
                                  sigmas.tolist(), churn, [1.0] * (len(sigmas) - 1),
                                  lambda x: torch.randn(x.shape, generator=generator, dtype=x.dtype)))
    return torch.cat(images), drawn


def test_labels_are_drawn_between_latents_and_noise():
    seeds, churn, seen = [4, 17, 0, 2, 9], Churn(4.0, 0.05, 50.0, 1.01), []
    expected, drawn = by_hand(seeds, edm_sigmas(5), churn)
    images = sample_seeds(labelled(seen=seen), seeds, edm_sigmas(5), micro_batch=3, churn=churn)
    assert_close(images, expected, rtol=1e-10, atol=1e-10)
    assert seen[0].tolist()[:3] == drawn[:3] and seen[9].tolist()[:2] == drawn[3:] and len(set(drawn)) > 2
    assert (images.mean((1, 2, 3)) - torch.tensor(drawn)).abs().max() < 1  # and the labels matter


def test_given_labels_go_to_their_images():
    labels = torch.tensor([7, 1, 4, 4, 9])
    for given_labels in (labels, torch.nn.functional.one_hot(labels, 10)):
        seen = []
        denoiser = Denoiser(lambda x, sigma, class_labels=None: seen.append(class_labels) or x * 0, (1, 2, 2), sigma_data=1.0, label_dim=10)
        sample_seeds(denoiser, [4, 17, 0, 2, 9], [1.0, 0.0], micro_batch=2, class_labels=given_labels)
        assert torch.cat([part[:2] for part in seen])[:5].tolist() == given_labels.tolist()
        assert {len(part) for part in seen} == {8}  # the filling has labels too


def test_given_labels_leave_the_noise_of_a_seed_alone():
    churn, labels = Churn(4.0, 0.05, 50.0, 1.01), torch.tensor([7, 1])
    expected, _ = by_hand([4, 17], edm_sigmas(5), churn, labels=labels)
    assert_close(sample_seeds(labelled(), [4, 17], edm_sigmas(5), micro_batch=2, churn=churn, class_labels=labels), expected, rtol=1e-10, atol=1e-10)


def test_the_callback_sees_no_filling(networks):
    seen = []
    images = sample_seeds(networks[0], range(7), edm_sigmas(7), micro_batch=4, callback=seen.append, **seed_settings(networks, "everything"))
    assert len(seen) == 2 * 13
    for number, infos in ((4, seen[:13]), (3, seen[13:])):
        for info in infos:
            assert {len(info[name]) for name in ("x", "denoised", "eps", "slope", "g", "L")} == {number}
            assert all(len(info[name]) == number for name in ("sigma", "sigma_hat") if getattr(info[name], "ndim", 0))
    boosted = [info for info in seen if getattr(info["sigma"], "ndim", 0)]
    assert boosted, "no step had a noise level per image, so the test saw nothing of it"
    final = [info for info in seen if info["step"] == 6]
    rebuilt = torch.cat([info["x"] - info["sigma_hat"] * info["slope"] for info in final])
    assert_close(rebuilt, images, rtol=1e-12, atol=1e-12)


def test_noise_streams_do_not_depend_on_the_amount_of_churn():
    # a step outside the churned range asks for noise and does not use it, so a later step meets the same noise
    whole, late = [], []
    denoiser = MIXTURE.denoiser()
    sample_seeds(denoiser, [1, 2], edm_sigmas(6), micro_batch=2, churn=Churn(2.0), callback=whole.append)
    sample_seeds(denoiser, [1, 2], edm_sigmas(6), micro_batch=2, churn=Churn(2.0, 0.0, 0.0021), callback=late.append)
    last, hat = edm_sigmas(6)[5].item(), edm_sigmas(6)[5].item() * (1 + 2 / 6)
    noise = SeedStreams([1, 2])
    noise.latents((1, 4, 4))
    z = [noise.noise(torch.zeros(2, 1, 4, 4, dtype=torch.float64)) for _ in range(6)][5]
    for infos in (whole, late):
        before, after = infos[-2], infos[-1]  # the corrector of step 4, and step 5
        predictor = infos[-3]
        x = predictor["x"] + (last - predictor["sigma_hat"]) * (predictor["slope"] + before["slope"]) / 2
        assert_close(after["x"], x + math.sqrt(hat**2 - last**2) * z, rtol=1e-10, atol=1e-10)


# ---- boosting in the sampler

def test_boosting_stirs_doubtful_images_at_every_fifth_step():
    def log_ratio(u, tau, class_labels=None):
        return 0 * u.sum((1, 2, 3)) + torch.tensor([-1.0, 1.0, -2.0])  # images 0 and 2 look fake

    seen = {}
    guidance = DiscriminatorGuidance(log_ratio, 1.0, window=(0.1, 0.9), boost=True)
    sigmas = edm_sigmas(18)
    sample(MIXTURE.denoiser(), 80 * unit(3, 1, 4, 4), sigmas, solver="euler", guidance=guidance, noise=stream(0), churn=Churn(0.9, 0.3, 50.0, 1.5),
           callback=lambda info: seen.setdefault(info["step"], info))
    common, boosted = 1 + 0.9 / 18, 1 + 4 / 18
    for step, info in seen.items():
        sigma, stirred = sigmas[step].item(), 0.3 <= sigmas[step] <= 50
        doubtful = step % 5 == 0 and step > 0 and seen[step - 1]["L"].tolist() == [-1.0, 1.0, -2.0]
        factors = [boosted, common, boosted] if doubtful and stirred else [common if stirred else 1.0] * 3
        assert_close(info["sigma"].expand(3), sigma * torch.tensor(factors, dtype=torch.float64), rtol=1e-12, atol=0)
    assert [step for step, info in seen.items() if info["sigma"].ndim and len(set(info["sigma"].tolist())) > 1] == [5, 10]
    # the boosted images' noise is not inflated, the others' is
    before, after, draws = seen[4], seen[5], stream(0)
    x = before["x"] + (sigmas[5] - before["sigma_hat"]) * before["slope"]
    z = [draws(x) for _ in range(6)][5]
    hat = after["sigma"].reshape(-1, 1, 1, 1)
    inflation = torch.tensor([1.0, 1.5, 1.0], dtype=torch.float64).reshape(-1, 1, 1, 1)
    assert_close(after["x"], x + (hat**2 - sigmas[5] ** 2).sqrt() * inflation * z, rtol=1e-12, atol=1e-12)


def test_a_guidances_churn_hears_the_first_evaluation_of_the_step_before_and_is_capped():
    class Guidance:
        heard = []

        def __call__(self, x, sigma, class_labels=None, *, step, stage):
            return 0.0, torch.tensor([-1.0, 1.0]) * (10 * step + 1 if stage == 0 else -100)

        def churn(self, step, last_L):
            self.heard.append((step, None if last_L is None else last_L.tolist()))
            return None if last_L is None or step != 2 else torch.tensor([4.0, 0.0], dtype=torch.float64)

    guidance, sigmas, seen = Guidance(), edm_sigmas(4), {}
    sample(MIXTURE.denoiser(), 80 * unit(2, 1, 4, 4), sigmas, guidance=guidance, noise=stream(0), callback=lambda info: seen.setdefault(info["step"], info))
    assert guidance.heard == [(0, None), (1, [-1.0, 1.0]), (2, [-11.0, 11.0]), (3, [-21.0, 21.0])]
    expected = sigmas[2] * torch.tensor([math.sqrt(2), 1.0], dtype=torch.float64)  # 4 / 4 is more than the cap, sqrt 2 - 1
    assert_close(seen[2]["sigma"], expected, rtol=1e-14, atol=0)
    assert all(seen[step]["sigma"].ndim == 0 for step in (0, 1, 3))
    seen.clear()  # outside the range of levels that may be stirred nothing is
    sample(MIXTURE.denoiser(), 80 * unit(2, 1, 4, 4), sigmas, guidance=guidance, noise=stream(0), churn=Churn(0.0, 5.0, 50.0),
           callback=lambda info: seen.setdefault(info["step"], info))
    assert 0.1 < sigmas[2] < 5 and torch.equal(seen[2]["sigma"], sigmas[2])


# ---- bad input

class Counting:
    "A denoiser that counts its calls."
    def __init__(self, answer=lambda x, sigma: 0 * x):
        self.answer, self.calls = answer, 0
        self.img_channels, self.img_resolution, self.label_dim = 1, 2, 0

    def __call__(self, x, sigma, class_labels=None):
        self.calls += 1
        return self.answer(x, sigma)


START = torch.ones(2, 1, 2, 2)


@pytest.mark.parametrize("arguments, error, message", [
    (dict(solver="rk4"), ValueError, "unknown solver 'rk4'; known: 'euler', 'heun', .*or a step function"),
    (dict(solver=None), ValueError, "unknown solver None; known: 'euler', 'heun'"),
    (dict(sigmas=[0.0]), ValueError, "at least two levels"),
    (dict(sigmas=[2.0, 1.0]), ValueError, "end in 0 .*got 1"),
    (dict(sigmas=[2.0, 2.0, 0.0]), ValueError, r"decrease strictly, but sigmas\[0\] = 2 is followed by 2"),
    (dict(sigmas=[1.0, 2.0, 0.0]), ValueError, r"decrease strictly, but sigmas\[0\] = 1 is followed by 2"),
    (dict(sigmas=[2.0, -1.0, 0.0]), ValueError, r"not negative, got \[2.0, -1.0, 0.0\]"),
    (dict(sigmas=[2.0, math.nan, 0.0]), ValueError, "finite .*nan"),
    (dict(scaling=0), ValueError, "finite and positive .*got 0.0 at step 0"),
    (dict(scaling=-1.0), ValueError, "finite and positive .*got -1.0 at step 0"),
    (dict(scaling=math.nan), ValueError, "finite and positive .*got nan"),
    (dict(scaling=math.inf), ValueError, "finite and positive .*got inf"),
    (dict(scaling=[1.0, 0.0, 1.0]), ValueError, "finite and positive .*got 0.0 at step 1"),
    (dict(scaling=lambda step, sigma: 1.0 - step), ValueError, "finite and positive .*got 0.0 at step 1"),
    (dict(scaling=LinearScaling(1.0, -0.5)), ValueError, "finite and positive .*got 0.0 at step 2"),
    (dict(scaling=[1.0, 1.0]), ValueError, "scaling has 2 values for 3 steps; one per step is needed"),
    (dict(scaling=[]), ValueError, "scaling has 0 values for 3 steps"),
    (dict(x=torch.ones(1, 2, 2)), ValueError, r"floating-point tensor \(b,c,h,w\) .*got torch.float32 of shape \(1, 2, 2\)"),
    (dict(x=torch.ones(1, 1, 2, 2, dtype=torch.int64)), ValueError, r"floating-point tensor .*got torch.int64 of shape \(1, 1, 2, 2\)"),
    (dict(x=np.ones((1, 1, 2, 2))), ValueError, "floating-point tensor .*got ndarray"),
], ids=str)
def test_bad_arguments_are_named_before_any_evaluation(arguments, error, message):
    denoiser = Counting()
    call = dict(x=START, sigmas=[4.0, 2.0, 1.0, 0.0]) | arguments
    with pytest.raises(error, match=message):
        sample(denoiser, call.pop("x"), call.pop("sigmas"), **call)
    assert denoiser.calls == 0


@pytest.mark.parametrize("settings, message", [
    (dict(s_churn=-1.0), "s_churn and s_noise must be finite and not negative, got -1.0 and 1.0"),
    (dict(s_churn=math.nan), "finite and not negative, got nan"),
    (dict(s_churn=math.inf), "finite and not negative, got inf"),
    (dict(s_churn=1.0, s_noise=-0.1), "finite and not negative, got 1.0 and -0.1"),
    (dict(s_churn=1.0, s_noise=math.nan), "finite and not negative, got 1.0 and nan"),
    (dict(s_min=2.0, s_max=1.0), "0 <= s_min <= s_max, got 2.0 and 1.0"),
    (dict(s_min=-1.0), "0 <= s_min <= s_max, got -1.0"),
    (dict(s_max=math.nan), "0 <= s_min <= s_max, got 0.0 and nan"),
])
def test_bad_churn(settings, message):
    with pytest.raises(ValueError, match=message):
        Churn(**settings)


@pytest.mark.parametrize("answer, message", [
    (lambda x, sigma: x[:, :, :1], r"its input's shape, \(2, 1, 2, 2\), got \(2, 1, 1, 2\)"),
    (lambda x, sigma: x.mean(0), r"its input's shape, \(2, 1, 2, 2\), got \(1, 2, 2\)"),
    (lambda x, sigma: x * math.nan, "NaN or infinity at the first evaluation, noise level 4"),
    (lambda x, sigma: x.index_fill(0, torch.tensor(1), math.inf), "NaN or infinity at the first evaluation, noise level 4"),
])
def test_a_broken_denoiser_is_found_at_the_first_evaluation(answer, message):
    denoiser, seen = Counting(answer), []
    with pytest.raises(ValueError, match=message):
        sample(denoiser, START, [4.0, 2.0, 1.0, 0.0], callback=seen.append)
    assert denoiser.calls == 1 and not seen


@pytest.mark.parametrize("answer, message", [
    (lambda x, sigma: x * math.nan if sigma < 3 else x * 0, "2 of 2 images became NaN or infinite"),
    (lambda x, sigma: x.index_fill(0, torch.tensor(1), math.nan) if sigma < 3 else x * 0, "1 of 2 images became NaN or infinite"),
    (lambda x, sigma: x[:1] if sigma < 3 else x * 0, r"its input's shape, \(2, 1, 2, 2\), got \(1, 1, 2, 2\)"),
])
def test_a_denoiser_that_breaks_later_gives_no_images(answer, message):
    with pytest.raises(ValueError, match=message):
        sample(Counting(answer), START, [4.0, 2.0, 1.0, 0.0])


def test_guidance_that_breaks_gives_no_images():
    with pytest.raises(ValueError, match="1 of 2 images became NaN or infinite: the denoiser, the guidance or lambda"):
        sample(Counting(), START, [4.0, 2.0, 0.0], guidance=lambda x, sigma, labels=None, **where: (x.index_fill(0, torch.tensor(0), math.nan), None))


@pytest.mark.parametrize("seeds, message", [([], "list of seeds is empty; at least one"), (range(0), "list of seeds is empty"),
                                            ([1, 2, 1], "seed 1 occurs more than once"), (torch.tensor([5, 5]), "seed 5 occurs more than once")])
def test_bad_seeds(seeds, message):
    denoiser = Counting()
    for call in (check_seeds, SeedStreams, lambda seeds: sample_seeds(denoiser, seeds, [1.0, 0.0], micro_batch=2)):
        with pytest.raises(ValueError, match=message):
            call(seeds)
    assert denoiser.calls == 0


@pytest.mark.parametrize("arguments, message", [(dict(solver="rk4"), "unknown solver 'rk4'"), (dict(scaling=0.0), "finite and positive"),
                                                (dict(sigmas=[1.0, 2.0, 0.0]), "decrease strictly"), (dict(scaling=[1.0, 1.0]), "2 values for 1 steps")])
def test_sample_seeds_refuses_before_any_evaluation(arguments, message):
    denoiser = Counting()
    arguments = dict(sigmas=[1.0, 0.0]) | arguments
    with pytest.raises(ValueError, match=message):
        sample_seeds(denoiser, range(3), arguments.pop("sigmas"), micro_batch=2, **arguments)
    assert denoiser.calls == 0




@pytest.mark.parametrize("seeds, message", [([0, 2**32], "seed .*more than once|2\\^32"), ([1.5, 2.7], "integer.*1.5"), (["3.5"], "integer.*3.5")])
def test_seeds_that_mean_the_same_image_or_none(seeds, message):
    with pytest.raises(ValueError) as caught:
        check_seeds(seeds)
    assert re.search(message, str(caught.value))


@pytest.mark.parametrize("size", [0, -1, 2.5])
def test_a_bad_micro_batch(size):
    with pytest.raises(Exception) as caught:
        sample_seeds(Counting(), [0, 1], [1.0, 0.0], micro_batch=size)
    assert caught.type in (ValueError, TypeError) and re.search(f"micro_batch.*{size}", str(caught.value))


def test_labels_for_fewer_images_than_seeds():
    with pytest.raises(ValueError, match="class_labels.*3.*5"):  # the last two images get the first one's label
        sample_seeds(labelled(), range(5), [1.0, 0.0], micro_batch=8, class_labels=torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("arguments, message", [(dict(solver=["heun"]), "unknown solver"), (dict(scaling="1.0x"), "lambda|scaling"),
                                                (dict(scaling=None), "lambda|scaling")])
def test_arguments_of_another_type(arguments, message):
    with pytest.raises(Exception) as caught:
        sample(Counting(), START, [4.0, 0.0], **arguments)
    assert caught.type in (ValueError, TypeError) and re.search(message, str(caught.value))


def test_a_denoiser_that_returns_no_tensor():
    with pytest.raises(Exception) as caught:
        sample(Counting(lambda x, sigma: (x, x)), START, [4.0, 0.0])
    assert caught.type in (ValueError, TypeError) and "tuple" in str(caught.value) and "denoiser" in str(caught.value)


def test_find_solver_hands_a_step_function_back():
    assert find_solver(midpoint_step) is midpoint_step and find_solver("heun") is SOLVERS["heun"]


@pytest.mark.parametrize("solver", ["ab2", "dpmpp2m"])
def test_solvers_with_memory_are_not_stirred(solver):
    with pytest.raises(ValueError, match=f"{solver}_step uses slopes of earlier steps"):
        sample(MIXTURE.denoiser(), START, [4.0, 1.0, 0.0], solver=solver, churn=Churn(1.0))


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_scales_each_evaluation(solver):
    "Dividing epsilon by lambda at every evaluation is sampling with the denoiser x - (x - D) / lambda."
    denoiser, lambdas = MIXTURE.denoiser(), [1.03, 0.98, 1.1, 1.0, 1.02]
    grid = edm_sigmas(5)
    def scaled(x, sigma):
        return x - (x - denoiser(x, sigma)) / 1.03
    start = 80 * unit(3, 1, 4, 4, seed=1)
    assert_close(sample(denoiser, start, grid, solver=solver, scaling=1.03), sample(scaled, start, grid, solver=solver), rtol=1e-10, atol=1e-10)
    assert (sample(denoiser, start, grid, solver=solver, scaling=lambdas) - sample(denoiser, start, grid, solver=solver)).abs().max() > 1e-3
