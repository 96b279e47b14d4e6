"Oracles and laws of sedm_kit.normality: scipy, limits for large samples, invariances, rejection rates under the null, and bad input."
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate, stats
from torch.testing import assert_close

from sedm_kit.analytic import GaussianMixture
from sedm_kit.normality import (adjusted_p, dagostino_pearson, draw_samples, effect_size, moments, normal_scores, normality, normality_per_level, null_band,
                                null_median, null_share, power, prediction_errors, qq_points, royston_weights, shapiro_wilk)

LAWS = {
    "normal": lambda rng, size: rng.normal(size=size),
    "exponential": lambda rng, size: rng.exponential(size=size),
    "uniform": lambda rng, size: rng.uniform(size=size),
    "t": lambda rng, size: rng.standard_t(3, size=size),
    "lognormal": lambda rng, size: rng.lognormal(0, 0.3, size=size),
    "nearly normal": lambda rng, size: rng.standard_t(60, size=size),
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- Shapiro-Wilk against scipy

@pytest.mark.parametrize("law", LAWS)
def test_shapiro_wilk_equals_scipy(law):
    rng = np.random.default_rng(7)
    for n in [*range(4, 31), 49, 50, 51, 99, 100, 333, 1000, 2047, 3500, 4999, 5000]:
        x = LAWS[law](rng, (12 if n < 1000 else 5, n))
        W, p, *rest = shapiro_wilk(x)
        theirs = torch.tensor(np.array([tuple(stats.shapiro(row)) for row in x]))
        assert_close(W, theirs[:, 0], rtol=0, atol=1e-11)
        assert_close(p, theirs[:, 1], rtol=0, atol=1e-8)
        assert rest == [n, 0]


def test_small_p_values_keep_their_digits():
    x = np.random.default_rng(0).exponential(size=(20, 200))
    theirs = torch.tensor([stats.shapiro(row).pvalue for row in x])
    assert theirs.max() < 1e-4
    assert_close(shapiro_wilk(x).p, theirs, rtol=1e-8, atol=0)


def test_blocks_do_not_show():
    x = np.random.default_rng(1).normal(size=(700, 1000))  # several blocks, the last one incomplete
    whole = shapiro_wilk(x)
    for rows in (slice(0, 1), slice(130, 133), slice(699, 700)):
        part = shapiro_wilk(x[rows])
        assert_close(part.W, whole.W[rows], rtol=0, atol=1e-13)
        assert_close(part.p, whole.p[rows], rtol=0, atol=1e-11)


@pytest.mark.parametrize("kind", ["array", "float32", "transposed", "half", "integers", "read only", "gradient", "shaped"])
def test_any_input_is_tested_and_left_alone(kind):
    x = np.random.default_rng(2).normal(size=(6, 40)) * 20
    made = {"array": lambda: x, "float32": lambda: torch.tensor(x, dtype=torch.float32), "transposed": lambda: torch.tensor(x.T.copy()).T,
            "half": lambda: torch.tensor(x, dtype=torch.bfloat16), "integers": lambda: torch.tensor(x).long(), "read only": lambda: torch.tensor(x).expand(6, 40),
            "gradient": lambda: torch.tensor(x, requires_grad=True), "shaped": lambda: torch.tensor(x).view(1, 2, 3, 40)}[kind]()
    before = torch.as_tensor(made).detach().clone()
    found = shapiro_wilk(made)
    rows = before.double().reshape(6, 40).numpy()
    assert torch.equal(torch.as_tensor(made).detach(), before)
    assert found.W.dtype == torch.float64 and found.W.shape == before.shape[:-1] and not found.W.requires_grad
    assert_close(found.W.flatten(), torch.tensor([stats.shapiro(row).statistic for row in rows]), rtol=0, atol=1e-11)


@given(st.integers(4, 200), st.floats(-1e6, 1e6), st.floats(1e-3, 1e6), st.booleans(), st.integers(0, 2**31))
def test_affine_maps_mirrors_and_order_change_nothing(n, shift, scale, mirror, seed):
    x = torch.randn(3, n, dtype=torch.float64, generator=seeded(seed))
    moved = (x * scale * (-1 if mirror else 1) + shift)[:, torch.randperm(n, generator=seeded(seed))]
    rounding = 1e-9 + 1e-13 * abs(shift) / scale
    assert_close(shapiro_wilk(moved).W, shapiro_wilk(x).W, rtol=0, atol=rounding)
    assert_close(moments(moved).skewness, moments(x).skewness * (-1 if mirror else 1), rtol=0, atol=1e3 * rounding)
    assert (shapiro_wilk(x).W <= 1).all() and (shapiro_wilk(x).W > 0).all()


def test_extreme_scales():
    x = np.random.default_rng(3).normal(size=(4, 60))
    for scale in (1e-150, 1e150):
        assert_close(shapiro_wilk(x * scale).W, shapiro_wilk(x).W, rtol=0, atol=1e-12)


def test_weights():
    for n in (4, 5, 6, 7, 50, 5000):
        a = royston_weights(n)
        assert_close(a.norm(), torch.tensor(1.0).double())
        assert_close(a, -a.flip(0), rtol=0, atol=1e-15)
        assert (a.diff() > 0).all()
        assert abs(shapiro_wilk(a[None]).W.item() - 1) < 1e-12  # a sample in the weights' own shape is perfectly normal
        assert shapiro_wilk(a[None]).p.item() > 0.99
    assert_close(normal_scores(5000), torch.special.ndtri((torch.arange(1, 5001).double() - 0.375) / 5000.25), rtol=0, atol=1e-6)


def test_speed():
    "100x at n = 50 and 6x at n = 1000 is what the bench shows; half of that must hold on a busy machine."
    rng = np.random.default_rng(4)
    for n, least in ((50, 50), (1000, 3)):
        x = torch.from_numpy(rng.normal(size=(3072, n)))
        shapiro_wilk(x)
        ours = []
        for _ in range(5):
            started = time.process_time()
            shapiro_wilk(x)
            ours.append(time.process_time() - started)
        started = time.process_time()
        for row in x[:512].numpy():
            stats.shapiro(row)
        theirs = (time.process_time() - started) * 6
        assert theirs / min(ours) > least


# ---- under the null, and power

@pytest.mark.parametrize("n", [8, 11, 12, 50, 400])
def test_rejection_rate_is_alpha(n):
    tests = 20_000
    x = torch.randn(tests, n, dtype=torch.float64, generator=seeded(n))
    for alpha in (0.01, 0.05, 0.2):
        slack = 4 * math.sqrt(alpha * (1 - alpha) / tests) + 0.03 * alpha  # Royston's fit is good to a few percent of alpha
        assert abs((shapiro_wilk(x).p < alpha).double().mean().item() - alpha) < slack
        if n >= 50:
            assert abs((dagostino_pearson(x).p < alpha).double().mean().item() - alpha) < slack + 0.006


@pytest.mark.parametrize("n", [6, 11, 12, 100, 1000])
def test_null_median(n):
    x = torch.randn(8000, n, dtype=torch.float64, generator=seeded(n))
    assert abs((1 - shapiro_wilk(x).W > null_median(n)).double().mean().item() - 0.5) < 0.03


def test_power_grows_with_n_and_knows_its_error():
    values = [power(stats.t(5), n, tests=1500)[0] for n in (20, 100, 500)]
    assert values[0] < values[1] < values[2] and values[2] > 0.95
    share, error = power(stats.norm(), 30, tests=4000, alpha=0.1)
    assert abs(share - 0.1) < 4 * error and error == pytest.approx(math.sqrt(share * (1 - share) / 4000))
    with pytest.raises(ValueError, match="frozen"):
        power("t", 20)


def test_null_band_is_binomial():
    low, high = null_band(3072)
    assert low == stats.binom.ppf(0.025, 3072, 0.05) / 3072 and abs((high - low) / 2 - 1.96 * math.sqrt(0.05 * 0.95 / 3072)) < 1e-3
    for bad in ((0,), (10, 0.0), (10, 0.05, 1.0)):
        with pytest.raises(ValueError):
            null_band(*bad)


def test_null_share_knows_correlation():
    base = torch.randn(1, 300, dtype=torch.float64, generator=seeded(1))
    alone = torch.randn(60, 300, dtype=torch.float64, generator=seeded(2)).exp()  # far from normal: the twin is normal all the same
    together = base + 1e-3 * torch.randn(60, 300, dtype=torch.float64, generator=seeded(3))
    free, tied = (null_share(e, 300, draws=60, generator=seeded(4)) for e in (alone, together))
    assert abs(free.mean() - 0.05) < 0.02 and free.std() < 0.05
    assert tied.std() > 3 * free.std()  # copies of one pixel are rejected all at once or not at all


# ---- effect size

@pytest.mark.parametrize("law, exact", [
    (stats.uniform(), 1 - 3 / math.pi),
    (stats.laplace(), None), (stats.expon(), None),
])
def test_effect_is_the_wasserstein_distance_to_the_nearest_normal_law(law, exact):
    rho = integrate.quad(lambda z: law.ppf(stats.norm.cdf(z)) * z * stats.norm.pdf(z), -7, 7)[0] / law.std()
    assert exact is None or abs(1 - rho**2 - exact) < 1e-6
    x = law.rvs(size=(200, 5000), random_state=np.random.default_rng(0))
    W = shapiro_wilk(x).W
    assert abs(effect_size(W, 5000).mean().item() - (1 - rho**2)) < 0.02 * (1 - rho**2) + 5e-4


def test_effect_hardly_depends_on_n_and_vanishes_for_normal_errors():
    x = torch.from_numpy(stats.uniform().rvs(size=(2000, 1000), random_state=np.random.default_rng(1)))
    values = [effect_size(shapiro_wilk(x[:, :n]).W, n).mean().item() for n in (100, 300, 1000)]
    assert max(values) - min(values) < 0.15 * values[-1]
    normal = torch.randn(2000, 100, dtype=torch.float64, generator=seeded())
    assert abs(effect_size(shapiro_wilk(normal).W, 100).median().item()) < 1e-3


# ---- moments, D'Agostino and Pearson, false discoveries, quantiles

@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize("n", [8, 20, 101, 3000])
def test_moments_and_normaltest_equal_scipy(law, n):
    x = LAWS[law](np.random.default_rng(n), (9, n))
    m, found, theirs = moments(x), dagostino_pearson(x), stats.normaltest(x, axis=1)
    assert_close(m.mean, torch.from_numpy(x.mean(1)))
    assert_close(m.std, torch.from_numpy(x.std(1)))
    assert_close(m.skewness, torch.from_numpy(stats.skew(x, axis=1)), rtol=1e-9, atol=1e-11)
    assert_close(m.kurtosis, torch.from_numpy(stats.kurtosis(x, axis=1)), rtol=1e-9, atol=1e-11)
    assert_close(found.K2, torch.from_numpy(theirs.statistic), rtol=1e-8, atol=1e-9)
    assert_close(found.p, torch.from_numpy(theirs.pvalue), rtol=0, atol=1e-10)
    assert (found.n, found.constant) == (n, 0)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=40), st.sampled_from(["bh", "by"]))
def test_adjusted_p_equals_scipy(values, method):
    p = torch.tensor(values, dtype=torch.float64)
    found = adjusted_p(p, method)
    assert_close(found, torch.from_numpy(stats.false_discovery_control(p.numpy(), method=method)), rtol=1e-12, atol=1e-15)
    holes = adjusted_p(torch.cat([torch.tensor([math.nan]).double(), p]), method)
    assert holes[0].isnan() and torch.equal(holes[1:], found)


def test_adjusted_p_keeps_its_promise():
    "900 true nulls among 1000 tests: the mean share of false rejections is at most q times their share."
    rng, false = np.random.default_rng(0), []
    for _ in range(100):
        p = stats.norm.sf(np.r_[rng.normal(size=900), rng.normal(3, 1, 100)])
        rejected = adjusted_p(p.reshape(10, 100)).flatten() <= 0.1
        false.append((rejected[:900].sum() / rejected.sum().clamp(min=1)).item())
    assert 0.06 < np.mean(false) < 0.105
    for p, message in (([0.1, 1.2], "0 ... 1"), ([-0.1], "0 ... 1")):
        with pytest.raises(ValueError, match=message):
            adjusted_p(p)
    with pytest.raises(ValueError, match="unknown method"):
        adjusted_p([0.1], "bonferroni")
    assert adjusted_p([math.nan]).isnan().all()


def test_qq_points():
    x = torch.from_numpy(LAWS["exponential"](np.random.default_rng(0), (400, 300)))
    line = qq_points(torch.cat([3 + 2 * x, torch.ones(1, 300, dtype=torch.float64)]))
    assert (line["tests"], line["n"]) == (400, 300) and (line["low"] <= line["median"]).all() and (line["median"] <= line["high"]).all()
    exact = torch.from_numpy(stats.expon(-1).ppf((np.arange(300) + 0.5) / 300))
    assert_close(line["median"][:270], exact[:270], rtol=0, atol=0.12)
    with pytest.raises(ValueError, match="constant"):
        qq_points(torch.ones(2, 10))


# ---- bad input

BAD = [
    (torch.randn(5, 3), "4 to 5000"), (torch.randn(5, 5001), "4 to 5000"), (torch.randn(0, 50), "there must be a test"),
    (torch.full((3, 10), math.nan), "3 of 3 tests hold NaN"), (torch.tensor([[0.0, 1, 2, 3], [0, 1, 2, math.inf]]), "the first is row 1"),
]


@pytest.mark.parametrize("errors, message", BAD)
def test_what_cannot_be_tested(errors, message):
    with pytest.raises(ValueError, match=message):
        shapiro_wilk(errors)
    with pytest.raises(ValueError, match=message):
        normality(errors)


def test_other_kinds_of_input():
    for errors in (torch.randn(2, 9, dtype=torch.complex64), torch.ones(2, 9, dtype=torch.bool), torch.tensor(1.0)):
        with pytest.raises(TypeError, match="real numbers"):
            shapiro_wilk(errors)
    with pytest.raises(ValueError, match="at least 8 samples"):
        dagostino_pearson(torch.randn(2, 7))
    with pytest.raises(ValueError, match="all 3 tests are constant"):
        null_share(torch.ones(3, 20), 10)


@pytest.mark.parametrize("value", [0.0, 1.5, -1e-300, 1e9, 0.1])
def test_constant_rows_are_counted_and_not_tested(value):
    x = torch.randn(5, 30, dtype=torch.float64, generator=seeded())
    x[[1, 3]] = value
    x[3, 0] = math.nextafter(value, 2)  # constant up to rounding
    for found in (shapiro_wilk(x), dagostino_pearson(x)):
        assert found.constant == 2 and found[0].isnan().tolist() == found.p.isnan().tolist() == [False, True, False, True, False]
    summary = normality(x)
    assert (summary.tests, summary.constant) == (3, 2) and "2 constant" in repr(summary) and math.isfinite(summary.effect)
    nothing = normality(x[[1]])
    assert nothing.tests == 0 and math.isnan(nothing.share) and math.isnan(nothing.W)
    assert repr(nothing) == "n=30: 1 constant pixels, none tested"


# ---- errors of a denoiser

def world(n=200):
    "Gaussian data: the exact denoiser's one-step error is exactly normal."
    gauss = GaussianMixture(torch.zeros(1, 1, 2, 2).double(), [1.0], std=0.5)
    return gauss.denoiser(), gauss.sample(n, generator=seeded(9))


def test_draws_are_without_replacement_and_of_each_test():
    errors = torch.arange(600.0).view(3, 200)
    some = draw_samples(errors, 50, seeded())
    assert some.shape == (3, 50) and all(len(row.unique()) == 50 for row in some) and torch.equal((some / 200).floor(), torch.arange(3.0)[:, None].expand(3, 50))
    assert len({tuple((row % 200).sort().values.tolist()) for row in some}) == 3
    assert draw_samples(errors, 200) is errors
    for n in (0, 201):
        with pytest.raises(ValueError, match="cannot draw"):
            draw_samples(errors, n)


def test_one_step_errors_are_prediction_minus_image():
    denoiser, images = world()
    errors = prediction_errors(denoiser, images, 0.7, generator=seeded(), batch=64)
    assert errors.shape == (1, 2, 2, 200) and errors.is_contiguous()
    noise = torch.cat([torch.randn(part.shape, dtype=torch.float64, generator=g) for g in [seeded()] for part in images.split(64)])
    shrink = 0.25 / (0.25 + 0.49)
    assert_close(errors, (shrink * (images + 0.7 * noise) - images).movedim(0, -1), rtol=0, atol=1e-12)
    clipped = prediction_errors(denoiser, images * 3, 0.7, generator=seeded(), batch=64, clip=True)
    assert ((clipped.movedim(-1, 0) + images * 3).abs() <= 1 + 1e-12).all()


def test_a_free_run_ends_on_a_sample():
    "Exact denoiser of Gaussian data: the run maps y + sigma n linearly onto a sample of the right variance."
    denoiser, images = world(4000)
    errors = prediction_errors(denoiser, images, 2.0, steps=40, generator=seeded())
    made = errors.movedim(-1, 0) + images
    assert abs(made.var().item() / 0.25 - 1) < 0.05
    expected = 0.5 / math.sqrt(0.25 + 4)  # y -> y * s / sqrt(s^2 + sigma^2)
    assert abs((made * images).mean().item() / images.square().mean().item() - expected) < 0.03


def test_the_exact_gaussian_world_passes_and_a_mixture_does_not():
    denoiser, images = world(3000)
    found = normality_per_level(denoiser, images, (0.1, 1.0, 10.0), n=1000, generator=seeded())
    assert list(found) == [0.1, 1.0, 10.0] and all(r.n == 1000 and r.tests == 4 and r.share <= 0.25 and abs(r.effect) < 1e-3 for r in found.values())
    assert_close(torch.tensor(found[1.0].rms), torch.tensor(math.sqrt(0.25 / 1.25)), rtol=0.05, atol=0)
    two = GaussianMixture(torch.stack([torch.full((1, 2, 2), -1.0), torch.full((1, 2, 2), 1.0)]).double(), [0.5, 0.5], std=0.1)
    far = normality_per_level(two.denoiser(), two.sample(500, generator=seeded(1)), (50.0,), n=100, generator=seeded())[50.0]
    assert far.share == far.share_fdr == 1.0 and far.effect > 0.1 and far.kurtosis < -1
    assert "n=100" in repr(far) and "chance" in repr(far) and far.p.shape == (1, 2, 2)


def test_levels_and_counts_are_checked_before_work_starts():
    denoiser, images = world(50)
    def never(x, sigma):
        raise AssertionError("no evaluation before the input is checked")
    for n, levels in ((3, (1.0,)), (51, (1.0,)), (20, ())):
        with pytest.raises(ValueError, match="n from 4 to 50"):
            normality_per_level(never, images, levels, n=n)
    for sigma in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="noise level > 0"):
            prediction_errors(never, images, sigma)
    with pytest.raises(ValueError, match="0 images"):
        prediction_errors(never, images[:0], 1.0)
    same = [normality_per_level(denoiser, images, (1.0,), n=20, generator=seeded(3))[1.0].p for _ in range(2)]
    assert torch.equal(*same)
