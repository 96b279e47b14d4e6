"Definitions, closed forms and bad input of sedm_kit.variance."
import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.fft import dctn
from torch.testing import assert_close

from sedm_kit.analytic import GaussianMixture
from sedm_kit.ddpm import chain_steps, chain_variance, in_data_units, respaced_steps, sample_ddpm
from sedm_kit.noise import ddpm_alphas_cumprod, edm_sigmas, sigma_from_alphas
from sedm_kit.sampler import sample
from sedm_kit.adapters import as_eps_model
from sedm_kit.variance import (BandVariance, RunningMoments, accumulated_error, dct_basis, delta_t, gaussian_delta_t, jackknife,
                               noisy_start, paper_variance, principal_basis, step_variance)

ABAR = ddpm_alphas_cumprod("linear", 1000)
KEPT = respaced_steps(1000, 20)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(std=0.6, size=4):
    return GaussianMixture(torch.zeros(1, 1, size, size), torch.ones(1), std=std)


def wobbly(x, t):
    "Some epsilon network that no world belongs to."
    return (x + 0.001 * t[:, None, None, None]).tanh() - 0.2 * x.roll(1, -1)


def test_delta_t_is_the_released_definition():
    "Against stored states and numpy's std, one batch, the same draws."
    images = gaussian().sample(40, generator=rng(1))
    got = delta_t(wobbly, images, ABAR, 20, generator=rng(2), batch=40)
    source, states = rng(2), []
    draw = lambda x: torch.randn(x.shape, generator=source, dtype=x.dtype)
    start = ABAR[999].sqrt() * images + (1 - ABAR[999]).sqrt() * draw(images)
    sample_ddpm(wobbly, start, ABAR, 20, noise=draw, callback=lambda info: states.append(info["x"].numpy()))
    for i in range(19, 0, -1):
        abar = ABAR[KEPT[i - 1]].item()
        x, x0 = states[20 - i], images.numpy()
        spread = np.std(x - math.sqrt(abar) * x0, axis=0, ddof=0).mean()
        missing = (x / math.sqrt(abar)).var(axis=0).mean() - x0.var(axis=0).mean()
        sigma = math.sqrt((1 - abar) / abar)
        row = 19 - i
        assert got["i"][row] == i
        np.testing.assert_allclose(got["paired"][row], (spread - math.sqrt(1 - abar)) ** 2, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(got["unpaired"][row], (math.sqrt(max(missing, 0)) - sigma) ** 2, rtol=1e-6, atol=1e-10)
        np.testing.assert_allclose(got["excess"][row], missing - sigma**2, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
@pytest.mark.parametrize("depth", [20, 9])
def test_ideal_delta_t_in_closed_form(eta, depth):
    world, steps = gaussian(), KEPT[:depth]
    got = delta_t(as_eps_model(world.denoiser(), ABAR), world.sample(6000, generator=rng(3)), ABAR, steps, eta=eta, clip=False, generator=rng(4))
    want = gaussian_delta_t(0.36, ABAR, steps, eta)
    assert_close(got["spread"], want["spread"], rtol=0.01, atol=0)
    small = got["sigma"] < 2
    assert_close(got["excess"][small], want["excess"][small], rtol=0, atol=0.06)


def test_delta_t_error_bars_are_what_other_seeds_show():
    "The jackknife's error against the scatter of 40 independent runs of 200 images."
    world, runs = gaussian(), []
    for seed in range(40):
        generator = rng(100 + seed)
        runs.append(delta_t(as_eps_model(world.denoiser(), ABAR), world.sample(200, generator=generator), ABAR, KEPT[:6], clip=False, generator=generator))
    for form in ("spread", "paired", "excess"):
        scatter, claimed = torch.stack([run[form] for run in runs]).std(0), torch.stack([run[form + "_error"] for run in runs]).square().mean(0).sqrt()
        assert ((claimed / scatter > 0.6) & (claimed / scatter < 1.7)).all(), (form, claimed / scatter)


def test_perfect_reconstruction_has_no_paired_delta_t():
    "A network that knows x0 puts q(x_t | x_0) back exactly; so does the closed form for data without variance."
    x0 = torch.linspace(-1, 1, 16, dtype=torch.float64).view(1, 1, 4, 4)
    known = as_eps_model(lambda x, sigma: x0.expand_as(x), ABAR)
    got = delta_t(known, x0.repeat(4000, 1, 1, 1), ABAR, 20, generator=rng(5))
    assert (got["paired"] < 2e-4).all()
    assert gaussian_delta_t(0.0, ABAR)["paired"].max() < 1e-25


def test_delta_t_does_not_depend_on_micro_batches():
    "The sums of unequal batches are those of one."
    rows, split, one = torch.randn(50, 3, 2, generator=rng(6)), RunningMoments(), RunningMoments()
    one.add("k", rows)
    for part in rows.split(16):
        other = RunningMoments()
        other.add("k", part)
        split.merge(other)
    for a, b in zip(split.moments("k"), one.moments("k")):
        assert_close(a, b, rtol=1e-12, atol=1e-14)
    assert_close(one.moments("k")[1], rows.double().flatten(1).var(0, correction=0))
    other.add("else", rows)
    with pytest.raises(ValueError, match="different runs"):
        one.merge(other)


@settings(max_examples=30)
@given(st.floats(0.01, 10), st.floats(-2, 2), st.floats(-2, 2), st.floats(-1.5, 1.5))
def test_step_algebra_holds_for_any_denoiser(sigma, on_x0, on_x, shrink):
    images = gaussian().sample(64, generator=rng(7)) + 0.3
    r = step_variance(lambda x, s: shrink * x.tanh() + 0.1, images, sigma, on_x0, on_x, center=0.3, generator=rng(8), batch=20)
    # on_x multiplies the same x in both, so this needs no relation between sigma, A and B
    want = -on_x0**2 * r["mse"] * (1 + 2 * r["inner"]) - 2 * on_x0 * on_x * r["inner_x"] * r["mse"]
    assert_close(r["change"], want, rtol=1e-8, atol=1e-10)


def test_step_variance_of_bayes_and_of_the_papers_world():
    world = gaussian()
    images, sigma, A, B = world.sample(40_000, generator=rng(9)), 0.5, 0.6, 0.4
    bayes = step_variance(world.denoiser(), images, sigma, A, B, generator=rng(10), batch=4000)
    assert_close(bayes["mse"], 0.36 * 0.25 / 0.61, rtol=0.01, atol=0)
    assert abs(bayes["change"] - bayes["bayes"]) < 4 * bayes["error"] and abs(bayes["inner"]) < 0.02
    noisy = step_variance(lambda x, s: images + 0.3 * torch.randn(images.shape, generator=rng(11), dtype=x.dtype), images, sigma, A, B, generator=rng(12), batch=40_000)
    assert abs(noisy["change"] - noisy["paper"]) < 4 * noisy["error"] and abs(noisy["inner"] + 1) < 0.02
    assert bayes["paper"] == -bayes["bayes"] > 0


def test_paper_variance():
    assert_close(paper_variance(ABAR, 20, 0.25)["chained"], chain_variance(ABAR, 20, 0.5)[1:])
    got, chain = paper_variance(ABAR, 20, torch.linspace(0.5, 0.1, 20)), chain_steps(ABAR, 20)
    abar, before = ABAR[KEPT[4]], ABAR[KEPT[5]]
    A = abar.sqrt() * (1 - before / abar) / (1 - before)
    e2 = torch.linspace(0.5, 0.1, 20)[14].double()  # step 14 goes from kept index 5 to 4
    assert chain[14].t == KEPT[5]
    assert_close(got["single"][14], 1 - abar + A**2 * e2)


def test_bands_of_euler_are_the_products_of_its_factors():
    "Each direction of Gaussian data is multiplied by 1 + (s'/s - 1)(1 - k) per step."
    d, sigmas = 16, edm_sigmas(18)
    variances = torch.logspace(0, -3, d, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=rng(13)))[0]
    world = GaussianMixture(torch.zeros(1, 1, 4, 4), torch.ones(1), cov=((mix * variances) @ mix.T)[None])
    real = world.sample(60_000, generator=rng(14))
    watch = BandVariance(mix, real)
    for part in range(2):
        start = sigmas[0] * torch.randn(4000, 1, 4, 4, dtype=torch.float64, generator=rng(15 + part))
        sample(world.denoiser(), start, sigmas, solver="euler", callback=watch)
    s, t = sigmas[:-1, None], sigmas[1:, None]
    factors = (1 + (t / s - 1) * s**2 / (s**2 + variances)).square()
    held = torch.cat([torch.full((1, d), 80.0**2), 80.0**2 * factors.cumprod(0)])[:-1]
    got = watch.ratio([slice(0, 5), slice(5, 16)])
    want = torch.stack([(held[:, b].mean(1)) / (variances + s**2)[:, b].mean(1) for b in (slice(0, 5), slice(5, 16))], 1)
    assert_close(got["ratio"], want, rtol=0.04, atol=0)
    assert_close(got["sigma"], sigmas[:-1])


def test_bases():
    cosines, radius = dct_basis((2, 4, 6))
    x = torch.randn(2, 4, 6, dtype=torch.float64, generator=rng(17))
    assert_close((x.flatten() @ cosines).view(2, 4, 6), torch.from_numpy(dctn(x.numpy(), axes=(1, 2), norm="ortho")))
    assert radius[0] == 0 and radius[24] == 0 and radius[1] == 1 / 12 and radius.max() < math.sqrt(0.5)
    images = gaussian().sample(200, generator=rng(18)) * torch.linspace(1, 2, 4)
    axes = principal_basis(images)
    spread = (images.flatten(1) @ axes).var(0)
    assert (spread.diff() <= 1e-9).all()
    assert_close(axes.T @ axes, torch.eye(16, dtype=torch.float64))


def watched(images, batch, basis=None):
    "Bands of the images themselves, seen in micro-batches."
    watch = BandVariance(torch.eye(16) if basis is None else basis, images)  # a float32 basis is taken too
    for part in images.split(batch):
        watch({"step": 0, "stage": 0, "sigma": torch.zeros((), dtype=torch.float64), "x": part})
    return watch


def test_band_errors_are_what_other_seeds_show():
    "The jackknife's error against the scatter of 60 sets of 200 images, whose true ratio is 1; micro-batches do not matter."
    bands, truth = [slice(0, 3), slice(3, 16)], gaussian().sample(50_000, generator=rng(30))
    runs = []
    for seed in range(60):
        watch = watched(truth, 50_000)
        watch.sums, watch.levels, watch.seen = RunningMoments(), {}, type(watch.seen)()
        for part in gaussian().sample(200, generator=rng(200 + seed)).split(50):
            watch({"step": 0, "stage": 0, "sigma": torch.zeros((), dtype=torch.float64), "x": part})
        runs.append(watch.ratio(bands))
    scatter, claimed = torch.stack([run["ratio"] for run in runs]).std(0), torch.stack([run["error"] for run in runs]).square().mean(0).sqrt()
    assert ((claimed / scatter > 0.7) & (claimed / scatter < 1.4)).all(), claimed / scatter
    for batch in (1, 7, 200):
        some = truth[:200]
        got = watched(some, batch).ratio(bands)
        assert_close(got["ratio"], watched(some, 50).ratio(bands)["ratio"])
        assert_close(got["error"], watched(some, 50).ratio(bands)["error"])


def test_few_images_and_merged_sums():
    "Fewer images than groups leave some empty; sums of parts of different sizes can still be added."
    images = gaussian().sample(5, generator=rng(31))
    template = BandVariance(torch.eye(16), images)
    parts = [copy.copy(template) for _ in range(2)]
    for part, some in zip(parts, (images[:2], images[2:])):
        part.sums, part.levels = RunningMoments(), {}
        part({"step": 0, "stage": 0, "sigma": torch.zeros((), dtype=torch.float64), "x": some})
        assert part.ratio([slice(None)])["error"].isfinite().all()
    whole = copy.copy(parts[0])
    whole.sums = RunningMoments().merge(parts[0].sums).merge(parts[1].sums)
    assert_close(whole.ratio([slice(None)])["ratio"], torch.ones(1, 1, dtype=torch.float64))


def test_bands_watch_a_discrete_chain_too():
    world = gaussian()
    watch = BandVariance(torch.eye(16, dtype=torch.float64), world.sample(5000, generator=rng(19)))
    x = noisy_start(world.sample(5000, generator=rng(20)), chain_steps(ABAR, 20)[0], rng(21))
    sample_ddpm(as_eps_model(world.denoiser(), ABAR), x, ABAR, 20, clip=False, callback=in_data_units(watch))
    got = watch.ratio([slice(None)])
    assert_close(got["sigma"], sigma_from_alphas(ABAR[KEPT.flip(0)]))
    excess = gaussian_delta_t(0.36, ABAR)["excess"]
    assert_close(got["ratio"][1:, 0], 1 + excess / (0.36 + got["sigma"][1:] ** 2), rtol=0.03, atol=0)
    assert excess[-1] < 0


def test_accumulated_error():
    "No error with a network that knows x0; one kept step is its own chain."
    x0 = torch.linspace(-0.9, 0.9, 16, dtype=torch.float64).view(1, 1, 4, 4)
    known = as_eps_model(lambda x, sigma: x0.expand_as(x), ABAR)
    got = accumulated_error(known, x0.repeat(10, 1, 1, 1), ABAR, KEPT, [0, 5, 19], generator=rng(22), batch=4)
    assert got["chain"].max() < 1e-9 and got["t"].tolist() == [0, KEPT[5], 999]
    one = accumulated_error(wobbly, gaussian().sample(10, generator=rng(23)), ABAR, KEPT, [0], generator=rng(24))
    assert_close(one["chain"], one["single"])
    assert (one["chain_error"] > 0).all()


def test_accumulated_error_takes_a_number_of_steps_and_noise():
    images = gaussian().sample(6, generator=rng(25))
    by_count, by_index = (accumulated_error(wobbly, images, ABAR, steps, [3, 19], generator=rng(26)) for steps in (20, KEPT))
    for name in by_count:
        assert_close(by_count[name], by_index[name])
    source = rng(27)
    noisy = accumulated_error(wobbly, images, ABAR, 20, [0, 19], generator=rng(26), noise=lambda x: torch.randn(x.shape, generator=source, dtype=x.dtype))
    quiet = accumulated_error(wobbly, images, ABAR, 20, [0, 19], generator=rng(26))
    assert_close(noisy["single"], quiet["single"])     # the last move draws none
    assert noisy["chain"][0] == quiet["chain"][0] and noisy["chain"][1] != quiet["chain"][1]


def test_bad_input():
    images = torch.zeros(4, 1, 4, 4)
    for bad in (images[:1], images * math.nan):
        with pytest.raises(ValueError, match="at least 2 finite images"):
            delta_t(wobbly, bad, ABAR, 20)
    with pytest.raises(ValueError, match="2 steps, got 4 images and 1 steps"):
        delta_t(wobbly, images, ABAR, 1)
    for settings in ({"parts": 1}, {"batch": 1}):
        with pytest.raises(ValueError, match="at least 2 parts"):
            delta_t(wobbly, images, ABAR, 20, **settings)
    for bad in (images[:1], images * math.nan):
        for function in (lambda x: step_variance(lambda x, s: x, x, 1.0, 0.5, 0.5), principal_basis, lambda x: BandVariance(torch.eye(16), x),
                         lambda x: accumulated_error(wobbly, x, ABAR, KEPT, [3])):
            with pytest.raises(ValueError, match="at least 2 finite images"):
                function(bad)
    with pytest.raises(ValueError, match=r"basis must be \(16, 16\)"):
        BandVariance(torch.eye(9), images)
    for mse in (torch.ones(7), -0.1, torch.ones(20, 1), math.nan):
        with pytest.raises(ValueError, match="one for each of the 20 steps"):
            paper_variance(ABAR, 20, mse)
    for depths in ([], [20], [-1], [0.5]):
        with pytest.raises(ValueError, match="depths must be positions from 0 to 19"):
            accumulated_error(wobbly, images, ABAR, 20, depths)
    with pytest.raises(ValueError, match="at least 2 groups"):
        jackknife(lambda sums: sums, [RunningMoments()])
    with pytest.raises(ValueError, match="no evaluation of stage 1"):
        BandVariance(torch.eye(16, dtype=torch.float64), images).ratio([slice(None)], stage=1)
