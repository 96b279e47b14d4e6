"Laws and oracles of sedm_kit.metrics, sedm_kit.resampling and sedm_kit.two_samples."
import json
import time
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedm_kit.metrics import (Difference, Estimate, FeatureStats, Moments, covariance_factor, fd, fd_blocks, fd_of_rows, fd_with_error, frechet_distance, match_moments,
                              moment_map, paired_difference, real_floor, shape_sliced_wasserstein, symmetric_root)
from sedm_kit.resampling import bootstrap_fds, check_sizes, fd_change, fd_infinity, fd_score, influence
from sedm_kit.two_samples import c2st, kid, neighbours


def normal(n, d, seed=0, scale=1.0, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, scale, (n, d)))


def covariance(d, seed, rank=None):
    half = np.random.default_rng(seed).normal(size=(d, rank or 2 * d))
    return half @ half.T / (rank or 2 * d)


def rotation(d, seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(d, d)))[0]


def by_sqrtm(mu1, a, mu2, b):
    return float(np.sum((mu1 - mu2) ** 2) + np.trace(a) + np.trace(b) - 2 * np.trace(scipy.linalg.sqrtm(a @ b)).real)


# ---- FeatureStats

@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(2, 40), d=st.integers(1, 5), offset=st.sampled_from([0.0, 1e3, -1e6]), seed=st.integers(0, 999))
def test_any_split_and_any_merge_order_give_numpys_covariance(data, n, d, offset, seed):
    rows = normal(n, d, seed) + offset
    cuts = sorted(data.draw(st.lists(st.integers(0, n), max_size=5)))
    parts = [FeatureStats.of(rows[low:high], batch=data.draw(st.integers(1, 9))) for low, high in zip([0, *cuts], [*cuts, n])]
    parts = data.draw(st.permutations(parts))
    while len(parts) > 1:  # merge a random neighbouring pair: any tree, not only a chain
        k = data.draw(st.integers(0, len(parts) - 2))
        parts[k: k + 2] = [parts[k].merge(parts[k + 1])]
    found = parts[0]
    assert found.n == n
    tolerance = 1e-9 if offset else 1e-12
    np.testing.assert_allclose(found.mean, rows.numpy().mean(0), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found.cov, np.cov(rows.numpy(), rowvar=False).reshape(d, d), rtol=tolerance, atol=tolerance)


def test_stats_take_images_arrays_and_float32():
    images = torch.rand(30, 3, 4, 4)
    flat = FeatureStats.of(images.flatten(1).numpy())
    assert torch.equal(FeatureStats.of(images).cov, flat.cov)
    assert flat.cov.dtype == flat.mean.dtype == torch.float64 and flat.dim == 48
    assert repr(flat) == "FeatureStats(n=30, dim=48)" and repr(FeatureStats()) == "FeatureStats(n=0, dim=unknown)"


def test_merge_leaves_the_other_and_earlier_results_unchanged():
    first, second, empty = FeatureStats.of(normal(9, 3)), FeatureStats.of(normal(7, 3, 1)), FeatureStats()
    kept, before = second.cov.clone(), first.mean
    held = before.clone()
    empty.merge(second).update(normal(5, 3, 2))
    first.merge(second).merge(FeatureStats())
    assert torch.equal(second.cov, kept) and second.n == 7 and first.n == 16 and torch.equal(before, held)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_named(value):
    rows = normal(6, 3)
    rows[4, 1] = value
    with pytest.raises(ValueError, match="1 of 6 feature rows hold NaN or infinity, the first is row 4"):
        FeatureStats().update(rows)


def test_stats_errors():
    with pytest.raises(ValueError, match=r"shape \(3, 4, 5\)"):
        FeatureStats().update(torch.zeros(3, 4, 5))
    with pytest.raises(ValueError, match="have 4 dimensions, but these statistics hold 3"):
        FeatureStats.of(normal(5, 3)).update(normal(5, 4))
    with pytest.raises(ValueError, match="have 4 dimensions, but these statistics hold 3"):
        FeatureStats.of(normal(5, 3)).merge(FeatureStats.of(normal(5, 4)))
    with pytest.raises(ValueError, match="seen 0 rows, expected at least 1"):
        FeatureStats().mean
    with pytest.raises(ValueError, match="seen 1 rows, expected at least 2"):
        FeatureStats.of(normal(1, 3)).cov


# ---- Frechet distance

@settings(max_examples=25, deadline=None)
@given(d=st.integers(1, 8), seed=st.integers(0, 10_000))
def test_frechet_agrees_with_sqrtm_is_symmetric_and_rotation_invariant(d, seed):
    rng = np.random.default_rng(seed)
    mu1, mu2, a, b, q = rng.normal(size=d), rng.normal(size=d), covariance(d, seed + 1), covariance(d, seed + 2), rotation(d, seed)
    value = frechet_distance(mu1, a, mu2, b)
    assert value == pytest.approx(by_sqrtm(mu1, a, mu2, b), abs=1e-8)
    assert value == pytest.approx(frechet_distance(mu2, b, mu1, a), abs=1e-8)
    assert value == pytest.approx(frechet_distance(q @ mu1, q @ a @ q.T, torch.from_numpy(q @ mu2), torch.from_numpy(q @ b @ q.T)), abs=1e-8)
    assert frechet_distance(mu1, a, mu1, a) == pytest.approx(0, abs=1e-7)


def test_commuting_covariances_in_closed_form():
    q, s, t = rotation(6, 3), np.array([0, 0.5, 1, 2, 3, 4.0]), np.array([1, 0, 2, 1, 0.1, 4.0])
    value = frechet_distance(np.zeros(6), q * s**2 @ q.T, np.full(6, 0.5), q * t**2 @ q.T)
    assert value == pytest.approx(6 * 0.25 + np.sum((s - t) ** 2), rel=1e-7)
    assert frechet_distance([0.0], [[4.0]], [1.0], [[9.0]]) == pytest.approx(2.0)


def test_rank_deficient_covariances_stay_real_and_right():
    a, b = covariance(60, 0, rank=20), covariance(60, 1, rank=15)
    root = np.linalg.svd(np.random.default_rng(1).normal(size=(60, 15)).T @ np.random.default_rng(0).normal(size=(60, 20)), compute_uv=False).sum() / 300**0.5
    value = frechet_distance(np.zeros(60), a, np.zeros(60), b)  # with A = G G', B = H H' the cross term is the nuclear norm of H'G
    assert isinstance(value, float) and value == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, abs=1e-5)
    assert frechet_distance(np.zeros(60), a, np.zeros(60), np.zeros((60, 60))) == pytest.approx(np.trace(a))


def test_symmetric_root_and_given_root():
    a, b = torch.from_numpy(covariance(7, 0)), covariance(7, 1)
    root = symmetric_root(a)
    torch.testing.assert_close(root @ root, a)
    torch.testing.assert_close(root, root.T)
    assert frechet_distance(np.zeros(7), a, np.ones(7), b, root1=root) == pytest.approx(frechet_distance(np.zeros(7), a, np.ones(7), b), rel=1e-12)
    factor, flat = covariance_factor(a), torch.from_numpy(covariance(7, 2, rank=3))
    torch.testing.assert_close(factor @ factor.T, a)
    narrow = covariance_factor(flat - 1e-15 * torch.eye(7))  # not even semi-definite
    assert factor[0, 1] == 0 and narrow.shape == (7, 3)
    torch.testing.assert_close(narrow @ narrow.T, flat)
    assert frechet_distance(np.zeros(7), np.zeros((7, 7)), np.zeros(7), b) == pytest.approx(np.trace(b))


@pytest.mark.parametrize("arguments, message", [
    ((np.zeros(3), np.eye(2), np.zeros(3), np.eye(3)), r"mu1 \(f,\) and cov1 \(f, f\), got \(3,\) and \(2, 2\)"),
    ((np.zeros(3), np.eye(3), np.zeros((3, 1)), np.eye(3)), "mu2"),
    ((np.zeros(3), np.eye(3), np.zeros(2), np.eye(2)), "3 with 2 feature dimensions"),
    ((np.zeros(2), np.eye(2), np.zeros(2), np.array([[1, np.nan], [np.nan, 1]])), "cov2 holds NaN"),
    ((np.zeros(2), np.array([[1, 0.5], [0, 1]]), np.zeros(2), np.eye(2)), "cov1 is not symmetric"),
    ((np.zeros(2), np.eye(2), np.zeros(2), -np.eye(2)), "cov2 is no covariance: its eigenvalues reach from -1 to -1, and the lowest entry of its diagonal is -1; expected none below 0"),
    ((np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]]), np.zeros(2), np.eye(2)), "cov1 is no covariance: its eigenvalues reach from -1 to 3"),
    ((np.zeros(2), np.diag([1e9, -1e-9]), np.zeros(2), np.eye(2)), "lowest entry of its diagonal is -1e-09"),
])
def test_frechet_errors(arguments, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(*arguments)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(2, 12), m=st.integers(2, 12), d=st.integers(1, 12), seed=st.integers(0, 999))
def test_the_form_without_covariances_is_the_same_distance(n, m, d, seed):
    x, y = normal(n, d, seed, shift=1.0), normal(m, d, seed + 1, scale=2.0)
    assert fd_of_rows(x, y) == pytest.approx(fd(FeatureStats.of(x), FeatureStats.of(y)), rel=1e-6, abs=1e-6)
    assert fd_of_rows(x, y) == pytest.approx(fd_of_rows(y, x), rel=1e-9, abs=1e-9)
    assert fd_of_rows(x, FeatureStats.of(y)) == pytest.approx(fd_of_rows(x, y), rel=1e-6, abs=1e-6)
    assert fd_of_rows(x, x) == pytest.approx(0, abs=1e-12 * d * n)


def test_few_rows_are_exact():
    x, y = normal(6, 300), normal(5, 300, 1)
    nuclear = np.linalg.svd((x - x.mean(0)).numpy() @ (y - y.mean(0)).numpy().T, compute_uv=False).sum() / 20**0.5
    exact = float((x.mean(0) - y.mean(0)).square().sum() + x.var(0).sum() + y.var(0).sum()) - 2 * nuclear
    assert fd_of_rows(x, y) == pytest.approx(exact, rel=1e-13)
    with pytest.raises(ValueError, match="at least 2 rows and equal dimensions, got 6 rows of 300 and 5 of 299"):
        fd_of_rows(x, y[:, 1:])


def test_given_moments_are_checked_and_used():
    exact = Moments([0.0, 0.0], np.eye(2), n=7, variant="two")
    assert exact.mean.dtype == exact.cov.dtype == torch.float64 and exact.dim == 2
    rows = normal(50, 2)
    assert fd_blocks([rows], exact)[0] == pytest.approx(fd(FeatureStats.of(rows), exact))
    with pytest.raises(ValueError, match="not symmetric"):
        Moments([0.0, 0.0], [[1.0, 2.0], [0.0, 1.0]])


@settings(max_examples=40, deadline=None)
@given(d=st.integers(2, 12), lowest=st.floats(-3e-6, 1.0), seed=st.integers(0, 999))
def test_a_matrix_is_a_covariance_up_to_a_millionth(d, lowest, seed):
    q = np.linalg.qr(np.random.default_rng(seed).standard_normal((d, d)))[0]
    values = np.linspace(lowest, 1, d)
    cov = q * values @ q.T
    if lowest < -1.01e-6 or (np.diag(cov) < 0).any():
        with pytest.raises(ValueError, match="no covariance"):
            Moments(np.zeros(d), (cov + cov.T) / 2)
    elif lowest > -0.99e-6:
        assert Moments(np.zeros(d), (cov + cov.T) / 2).dim == d
    assert Moments(np.zeros(d), np.zeros((d, d))).dim == d  # constant images


def test_faster_than_sqrtm_and_the_same_at_256_dimensions():
    rng = np.random.default_rng(0)
    for rank in (512, 100):
        a, b = (covariance(256, seed, rank) for seed in (1, 2))
        mu1, mu2 = rng.normal(size=(2, 256))
        started = time.perf_counter()
        value = frechet_distance(mu1, a, mu2, b)
        ours = time.perf_counter() - started
        started = time.perf_counter()
        root = scipy.linalg.sqrtm(a @ b)
        theirs = time.perf_counter() - started
        assert isinstance(value, float)
        if rank == 512:
            assert value == pytest.approx(np.sum((mu1 - mu2) ** 2) + np.trace(a) + np.trace(b) - 2 * np.trace(root).real, rel=1e-8)
            assert ours < theirs  # the factor is measured at 2048 dimensions by bench/bench.py
        else:  # a = G G', b = H H': the cross term is the nuclear norm of H'G; scipy's root is complex and 1e-8 off
            halves = [np.random.default_rng(seed).normal(size=(256, rank)) for seed in (1, 2)]
            exact = np.sum((mu1 - mu2) ** 2) + np.trace(a) + np.trace(b) - 2 * np.linalg.svd(halves[0].T @ halves[1], compute_uv=False).sum() / rank
            assert value == pytest.approx(exact, rel=1e-10) and np.iscomplexobj(root)


# ---- error bars

def test_estimate_numbers_and_print():
    found = Estimate([0.40, 0.41, 0.42, 0.43, 0.40], 100)
    assert found.mean == pytest.approx(0.412) and found.n_blocks == 5
    assert found.error == pytest.approx(np.std(found.values, ddof=1) / 5**0.5)
    assert found.ci == pytest.approx(2.776445 * found.error, rel=1e-6)
    assert repr(found) == "0.4120 ± 0.0058 (5 blocks)"
    assert repr(Estimate([1, 1])) == "1.0000 ± 0.0000 (2 blocks)" and repr(Estimate([100, 150, 200])) == "150 ± 29 (3 blocks)"
    assert json.loads(json.dumps(found.as_dict()))["block_size"] == 100 and "measure" not in found.as_dict()
    named = Estimate(found.values, 100, "IS", "Inception", "0-499")
    assert repr(named) == "IS 0.4120 ± 0.0058 (5 blocks of 100 images; Inception; seeds 0-499)" and named.as_dict()["variant"] == "Inception"


@pytest.mark.parametrize("values", [[], [1.0], [1.0, float("nan")]])
def test_estimate_needs_two_finite_blocks(values):
    with pytest.raises(ValueError, match="at least 2 finite block values"):
        Estimate(values)


def test_blocks_agree_with_one_at_a_time():
    reference, blocks = FeatureStats.of(normal(300, 5, 9)), normal(120, 5).view(4, 30, 5)
    expected = [fd(FeatureStats.of(block), reference) for block in blocks]
    np.testing.assert_allclose(fd_blocks(blocks, reference), expected, rtol=1e-10)
    np.testing.assert_allclose(fd_blocks([FeatureStats.of(block) for block in blocks], normal(300, 5, 9)), expected, rtol=1e-10)
    assert fd_with_error(blocks, reference).block_size == 30


def test_unequal_blocks_and_single_blocks_are_refused():
    reference = FeatureStats.of(normal(50, 3))
    with pytest.raises(ValueError, match=r"equal size, got \[20, 21\]"):
        fd_with_error([normal(20, 3), normal(21, 3)], reference)
    for blocks in ([], [normal(20, 3)]):
        with pytest.raises(ValueError, match="at least 2"):
            fd_with_error(blocks, reference)


def heard(call, *arguments, **options):
    "Messages of the warnings that a call gives."
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*arguments, **options)
    return [str(one.message) for one in caught]


def test_few_images_are_said_once_with_the_remedy():
    reference, few, enough = FeatureStats.of(normal(90, 8)), [normal(8, 8, seed) for seed in range(3)], [normal(9, 8, seed) for seed in range(3)]
    expected = ["8 images for 8 feature dimensions: the covariance is singular and most of the distance is bias; take more than 8 images, fewer dimensions, or the unbiased kernel distance (KD, KID), which needs no covariance"]
    assert heard(fd_blocks, few, reference) == heard(fd_with_error, few, reference) == expected
    assert heard(real_floor, normal(60, 8), 8) == heard(real_floor, normal(60, 8), 8, reference=reference) == heard(real_floor, normal(60, 8), 8, reference="others") == expected
    assert heard(fd_infinity, torch.stack(few), reference, parts=(1, 2))[0].startswith("4 images for 8") and len(heard(fd_infinity, torch.stack(few), reference, parts=(1, 2))) == 1
    assert heard(fd_blocks, enough, reference) == heard(real_floor, normal(60, 8), 9) == heard(real_floor, normal(60, 8), 9, reference="others") == []


def test_intervals_cover_the_truth_at_the_nominal_rate():
    repeats, blocks, n, d = 600, 5, 100, 3
    reference = Moments(torch.zeros(d), torch.eye(d))
    values = fd_blocks(normal(repeats * blocks * n, d, 5, scale=1.1).view(-1, n, d), reference).reshape(repeats, blocks)
    truth = values.mean()  # of FD at this n; its own error is 55 times smaller than an interval's
    covered = np.mean([abs(found.mean - truth) < found.ci for found in map(Estimate, values)])
    assert abs(covered - 0.95) < 0.03  # three standard deviations of the simulation: 3 sqrt(.95 * .05 / 600) = .027
    within_error = np.mean([abs(found.mean - truth) < found.error for found in map(Estimate, values)])
    assert abs(within_error - 0.626) < 0.06  # one standard error, t with 4 degrees of freedom: 62.6 %


def test_pairing_under_common_seeds_beats_separate_seeds():
    reference = FeatureStats.of(normal(5000, 4, 77))
    draws = [normal(200, 4, seed) for seed in range(6)]
    a, b = (fd_with_error([scale * rows for rows in draws], reference) for scale in (1.05, 1.04))
    change = paired_difference(a, b)
    assert isinstance(change, Difference) and change.mean == pytest.approx(a.mean - b.mean)
    assert change.unpaired_error == pytest.approx(np.hypot(a.error, b.error))
    assert change.gain > 5 and change.error < change.unpaired_error / 5
    assert change.unpaired_ci == pytest.approx(2.228139 * change.unpaired_error, rel=1e-6)
    assert change.as_dict()["unpaired_error"] == change.unpaired_error
    assert repr(change).endswith(")") and "(6 blocks, unpaired ± " in repr(change)
    assert paired_difference(a.values, b.values).values == change.values
    assert paired_difference(a, a).gain == float("inf")


def test_pairs_must_match():
    with pytest.raises(ValueError, match="2 blocks of 10 images against 3 blocks of 10"):
        paired_difference(Estimate([1, 2], 10), Estimate([1, 2, 3], 10))
    with pytest.raises(ValueError, match="2 blocks of 10 images against 2 blocks of 20"):
        paired_difference(Estimate([1, 2], 10), Estimate([1, 2], 20))


# ---- floor and control

def test_floor_is_what_fresh_samples_of_the_empirical_law_show():
    real = normal(400, 4, 1)
    floor = real_floor(real, n=100, blocks=40, seed=3)
    leading = 4 / 100 + (4 * 5 / 2) / (4 * 100) * 2 * 1.0  # tr(cov)/n + E[|cov error|^2]/4 with unit covariance: d/n + d(d+1)/4n
    assert floor.block_size == 100 and floor.n_blocks == 40
    assert floor.mean == pytest.approx(leading, rel=0.25)
    assert real_floor(real, n=100, blocks=40, seed=3) == floor != real_floor(real, n=100, blocks=40, seed=4)
    assert real_floor(real, n=1600, blocks=10).mean < floor.mean / 10  # with replacement beyond what is there


def test_floor_against_a_separate_reference_uses_every_image_once():
    real, reference = normal(60, 2, 1), FeatureStats.of(normal(500, 2, 2))
    floor = real_floor(real, n=20, blocks=3, seed=0, reference=reference)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0)).view(3, 20)
    np.testing.assert_allclose(floor.values, fd_blocks(real[order], reference), rtol=1e-12)
    assert sorted(order.flatten().tolist()) == list(range(60))
    with pytest.raises(ValueError, match="n=1 and blocks=3"):
        real_floor(real, n=1, blocks=3)


def test_floor_of_two_disjoint_halves_has_the_bias_of_both():
    real = normal(2000, 4, 1)
    both = real_floor(real, n=500, blocks=20, reference="others")
    assert both.block_size == 500 and both.mean == pytest.approx(2 * real_floor(real, n=500, blocks=20).mean, rel=0.25)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(4))
    assert real_floor(real, n=1000, blocks=2, seed=4, reference="others").values[0] == pytest.approx(fd_of_rows(real[order[:1000]], real[order[1000:]]))
    copies = real_floor(torch.ones(10, 1, 2, 2), n=5, blocks=2, reference="others")
    assert copies.values == (0.0, 0.0)
    for n, reference in ((1001, "others"), (100, "halves")):
        with pytest.raises(ValueError, match="at least 2 n images"):
            real_floor(real, n=n, reference=reference)


@settings(max_examples=20, deadline=None)
@given(d=st.integers(1, 8), seed=st.integers(0, 1000))
def test_full_match_is_exact_and_the_optimal_transport(d, seed):
    images, reference = normal(60, d, seed) @ torch.from_numpy(rotation(d, seed)) + 2, FeatureStats.of(normal(80, d, seed + 1, scale=0.3))
    moved = match_moments(images, reference)
    found = FeatureStats.of(moved)
    torch.testing.assert_close(found.mean, reference.mean, rtol=0, atol=1e-8)
    torch.testing.assert_close(found.cov, reference.cov, rtol=0, atol=1e-8)
    source = FeatureStats.of(images)
    cost = float((moved - images).square().sum(1).sum() / (len(images) - 1) - len(images) / (len(images) - 1) * (source.mean - reference.mean).square().sum())
    frechet = fd(source, reference) - float((source.mean - reference.mean).square().sum())
    assert cost == pytest.approx(frechet, abs=1e-8)  # no other affine map is cheaper: the cost is the distance itself


def test_diagonal_match_scales_the_references_modes_only():
    images, reference = normal(500, 5, 0), FeatureStats.of(normal(500, 5, 1) * torch.arange(1, 6))
    found = FeatureStats.of(match_moments(images, reference, "diagonal"))
    values, modes = torch.linalg.eigh(reference.cov)
    torch.testing.assert_close((modes.T @ found.cov @ modes).diagonal(), values)
    assert (found.cov - reference.cov).abs().max() > 1e-3  # correlations between modes stay
    assert fd(found, reference) < fd(FeatureStats.of(images), reference) / 10


def test_match_with_another_source_keeps_shape_and_constant_pixels():
    images = torch.randn(50, 1, 3, 3, generator=torch.Generator().manual_seed(0))
    real = torch.randn(90, 1, 3, 3, generator=torch.Generator().manual_seed(1))
    real[:, 0, 0, 0] = -1.0
    reference, source = FeatureStats.of(real), FeatureStats.of(torch.randn(70, 1, 3, 3, generator=torch.Generator().manual_seed(2)))
    moved = match_moments(images, reference, source=source)
    assert moved.shape == images.shape and moved.dtype == torch.float64
    torch.testing.assert_close(moved[:, 0, 0, 0], torch.full((50,), -1.0, dtype=torch.float64), atol=1e-7, rtol=0)
    matrix = moment_map(source, reference)
    torch.testing.assert_close(matrix @ source.cov @ matrix, reference.cov, rtol=0, atol=1e-8)
    assert fd(FeatureStats.of(moved), reference) > 1e-3  # other images than the map was fitted on: not zero by construction


@pytest.mark.parametrize("basis", ["full", "diagonal"])
def test_match_errors(basis):
    reference = FeatureStats.of(normal(50, 4, 1))
    with pytest.raises(ValueError, match="3 images to be moved do not span the reference's 4 modes"):
        match_moments(normal(3, 4) * torch.tensor([1.0, 1, 0, 0]) @ symmetric_root(reference.cov).inverse() if basis == "full"
                      else torch.zeros(3, 4), reference, basis)
    with pytest.raises(ValueError, match="images have 5 dimensions"):
        match_moments(normal(9, 5), reference, basis)
    with pytest.raises(ValueError, match="unknown basis 'pca'"):
        match_moments(normal(9, 4), reference, "pca")


# ---- shape

def test_shape_measure_is_blind_to_second_moments_and_sees_shape():
    a, b = normal(4000, 6, 0), normal(4000, 6, 1)
    floor = shape_sliced_wasserstein(a, b)
    stretched = shape_sliced_wasserstein(a @ torch.from_numpy(covariance(6, 2)) + 3, b)
    two_peaked = shape_sliced_wasserstein(a.sign() * 0.9 + 0.1 * a, b)
    assert floor < 0.035 and stretched < 0.045 and two_peaked > 3 * floor
    assert shape_sliced_wasserstein(a, a) == 0 and shape_sliced_wasserstein(a, 5 * a - 2) < 1e-12


def test_shape_measure_against_scipy_and_with_unequal_sizes():
    a, b = normal(300, 1, 0).exp(), normal(300, 1, 1)
    standard = [((rows - rows.mean()) / rows.std()).flatten().numpy() for rows in (a, b)]
    expected = scipy.stats.wasserstein_distance(*standard)
    mirrored = scipy.stats.wasserstein_distance(-standard[0], -standard[1])
    assert expected == pytest.approx(mirrored)
    assert shape_sliced_wasserstein(a, b, directions=5) == pytest.approx(expected, rel=1e-9)
    assert shape_sliced_wasserstein(a[:200], b) == pytest.approx(shape_sliced_wasserstein(b, a[:200]), rel=1e-9)
    assert abs(shape_sliced_wasserstein(a, b[:150]) - expected) < 0.15
    with pytest.raises(ValueError, match="equal dimensions"):
        shape_sliced_wasserstein(a, normal(10, 2))


# ---- errors from single images

def pair_of_samplers(n, seed, d=4):
    "Two samplers with common seeds that share most of their luck, and the true difference of their FDs to N(0, 1)."
    z, other = normal(n, d, seed), normal(n, d, seed + 500_000)
    covariances = [torch.eye(d, dtype=torch.float64) * (scale**2 + 0.1**2) for scale in (1.3, 1.25)]
    exact = Moments(torch.zeros(d), torch.eye(d))
    truth = fd(Moments(torch.zeros(d), covariances[0]), exact) - fd(Moments(torch.zeros(d), covariances[1]), exact)
    return 1.3 * z + 0.1 * other, 1.25 * z + 0.1 * other.flip(0), exact, truth


def test_influence_is_the_derivative_with_respect_to_weights():
    rows, reference = normal(60, 4, 0, scale=1.5, shift=0.3), FeatureStats.of(normal(80, 4, 1))
    found, own, h = influence(rows, reference), FeatureStats.of(rows), 1e-6
    assert float(found.mean()) == pytest.approx(0, abs=1e-12)
    rates = []
    for row in rows:
        step = row - own.mean
        heavier = Moments(own.mean + h * step, (1 - h) * own.cov + h * (1 - h) * torch.outer(step, step))
        rates.append((fd(heavier, reference) - fd(own, reference)) / h)
    rates = torch.tensor(rates, dtype=torch.float64)
    torch.testing.assert_close(found, rates - rates.mean(), rtol=1e-4, atol=1e-4)


def test_influence_with_fewer_rows_than_dimensions_is_the_same():
    rows, other = normal(12, 5, 0) @ torch.from_numpy(np.eye(5, 30)), normal(20, 30, 1)
    wide, narrow = influence(rows, other), influence(rows[:, :5], other[:, :5])
    shift = 2 * rows[:, :5] @ (other[:, :5].mean(0) - rows[:, :5].mean(0))  # the five dimensions see the same means
    torch.testing.assert_close(wide + shift - shift.mean(), narrow + shift - shift.mean(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(wide, influence(rows, FeatureStats.of(other)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["bootstrap", "influence"])
def test_paired_intervals_cover_the_true_difference_at_their_nominal_rate(method):
    repeats, hits, unpaired, resolved = 400, 0, [], []
    for k in range(repeats):
        a, b, exact, truth = pair_of_samplers(200, k)
        change = fd_change(a, b, exact, method, **(dict(draws=60, seed=k) if method == "bootstrap" else {}))
        hits += abs(change.value - truth) < 1.96 * change.error
        unpaired.append(change.unpaired_error)
        resolved.append(change.error)
    # 3 standard deviations of the simulation are .033; 60 draws know a standard deviation to 9 %, which costs .005
    assert abs(hits / repeats - 0.95) < 0.035
    assert np.mean(unpaired) > 5 * np.mean(resolved)


def test_single_scores_cover_the_truth_with_a_fixed_and_with_a_sampled_reference():
    exact, repeats, hits = Moments(torch.zeros(3), torch.eye(3)), 300, np.zeros(2)
    truth = 3 * 0.5**2 + 0.4**2 * 3  # standard deviation 1.5 and mean 0.4 in each of three directions
    for k in range(repeats):
        rows, real = normal(300, 3, k, scale=1.5, shift=0.4), normal(300, 3, 10_000 + k)
        for j, reference in enumerate((exact, real)):
            score = fd_score(rows, reference)
            hits[j] += abs(score.value - truth) < 1.96 * score.error
    assert np.all(abs(hits / repeats - 0.95) < 0.04), hits / repeats


def test_extrapolation_takes_the_bias_away_and_covers_the_truth():
    exact, truth, found, plain = Moments(torch.zeros(4), torch.eye(4)), 4 * 0.2**2, [], []
    for k in range(150):
        blocks = normal(5 * 200, 4, k, scale=1.2).view(5, 200, 4)
        found.append(fd_infinity(blocks, exact))
        plain.append(fd_with_error(blocks, exact))
    covered = np.mean([abs(one.mean - truth) < one.ci for one in found])
    assert abs(covered - 0.95) < 0.055
    error = np.std([one.mean for one in found]) / 150**0.5
    assert abs(np.mean([one.mean for one in found]) - truth) < 3 * error
    assert np.mean([one.mean for one in plain]) - truth > 10 * error  # the bias that was taken away


def test_extrapolation_of_both_sides_takes_both_biases_away():
    truth, found, one_sided = 4 * 0.2**2, [], []
    for k in range(100):
        blocks, real = normal(5 * 200, 4, k, scale=1.2).view(5, 200, 4), normal(5 * 200, 4, 7000 + k).view(5, 200, 4)
        found.append(fd_infinity(blocks, real))
        one_sided.append(fd_with_error(blocks, Moments(torch.zeros(4), torch.eye(4))))
    error = np.std([one.mean for one in found]) / 100**0.5
    assert abs(np.mean([one.mean for one in found]) - truth) < 3 * error
    assert abs(np.mean([abs(one.mean - truth) < one.ci for one in found]) - 0.95) < 0.07
    assert np.mean([one.mean for one in one_sided]) - truth > 5 * error
    with pytest.raises(ValueError, match="blocks of real images of the same shapes"):
        fd_infinity(blocks, real[:4])


def test_bootstrap_draws_groups_together_and_shares_draws():
    rows, exact = normal(30, 2), Moments(torch.zeros(2), torch.eye(2))
    both = bootstrap_fds([rows, rows], exact, draws=7)
    assert both.shape == (2, 7) and torch.equal(both[0], both[1])
    whole = bootstrap_fds([rows], exact, draws=5, group=30)
    torch.testing.assert_close(whole[0], torch.full((5,), fd(FeatureStats.of(rows), exact), dtype=torch.float64), rtol=1e-9, atol=1e-9)
    counted = FeatureStats.of(rows[torch.tensor([0, 0, 3, *range(27)])])
    picks = torch.zeros(1, 30, dtype=torch.float64).index_add_(1, torch.tensor([0, 0, 3, *range(27)]), torch.ones(1, 30, dtype=torch.float64))
    from sedm_kit.resampling import _redrawn
    torch.testing.assert_close(_redrawn(rows, picks, exact, torch.eye(2, dtype=torch.float64)), torch.tensor([fd(counted, exact)], dtype=torch.float64))
    with pytest.raises(ValueError, match="a group that divides n and draws >= 2"):
        bootstrap_fds([rows], exact, group=7)


def test_changes_and_scores_print_and_serialise():
    a, b, exact, _ = pair_of_samplers(100, 0)
    change, score = fd_change(a, b, exact, "influence"), fd_score(a, exact, variant="normals", seeds="0 to 99")
    assert json.loads(json.dumps(change.as_dict()))["n"] == 100 and "paired by influence; unpaired" in repr(change)
    assert change.resolution == change.value / change.error and fd_change(a, a, exact).resolution == 0
    assert json.loads(json.dumps(score.as_dict()))["variant"] == "normals"
    assert repr(score).startswith("FD 0.") and "(100 images against a fixed reference; normals; seeds 0 to 99)" in repr(score)


def test_the_same_images_are_at_a_plain_zero():
    rows = normal(50, 4)
    for other in (rows, rows.flip(0), rows + 1e-9):
        score = fd_score(rows, other)
        assert score.value == score.error == 0 and repr(score) == "FD 0 (50 images against 50 images; seeds not recorded)"
    small = fd_score(1e-6 * rows, 1e-6 * rows + 1e-8)
    assert small.value > 0 and "e-1" in repr(small)  # small is not the same, and not a row of zeros


def test_sizes_are_checked():
    with pytest.raises(ValueError, match=r"20 images against 30.*take 20 of both \(n=20\), or allow it \(unequal=True, --unequal\)"):
        fd_score(normal(20, 3), normal(30, 3))
    assert fd_score(normal(20, 3), normal(30, 3), unequal=True).n_reference == 30
    with pytest.warns(UserWarning, match="5 images for 8 feature dimensions.*more than 8 images, fewer dimensions, or the unbiased kernel distance"):
        few = fd_score(normal(5, 8), normal(5, 8, 1))
    assert np.isfinite(few.error) and few.value == pytest.approx(fd_of_rows(normal(5, 8), normal(5, 8, 1)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_sizes(9, 9, 8)
    with pytest.raises(ValueError, match="3 feature dimensions, the reference 2"):
        fd_score(normal(20, 3), Moments([0.0, 0.0], np.eye(2)))
    with pytest.raises(ValueError, match="unknown method 'delta'"):
        fd_change(normal(9, 2), normal(9, 2, 1), Moments([0.0, 0.0], np.eye(2)), "delta")
    with pytest.raises(ValueError, match="9 images cannot be divided into 8 parts|blocks of 9 images cannot"):
        fd_infinity([normal(9, 2), normal(9, 2, 1)], Moments([0.0, 0.0], np.eye(2)), parts=(1, 8))
    with pytest.raises(ValueError, match="at least 2 blocks of one shape"):
        fd_infinity([normal(9, 2)], Moments([0.0, 0.0], np.eye(2)))


# ---- beyond two moments

def cubic(x, y):
    return (x @ y.T / x.shape[1] + 1) ** 3


@settings(max_examples=20, deadline=None)
@given(n=st.integers(3, 9), m=st.integers(3, 9), d=st.integers(1, 4), seed=st.integers(0, 999))
def test_kernel_distance_and_its_jackknife_are_those_of_the_definition(n, m, d, seed):
    x, y = normal(n, d, seed), normal(m, d, seed + 1, shift=0.5)

    def direct(x, y):
        off = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (cubic(x, x), cubic(y, y))]
        return float(sum(off) - 2 * cubic(x, y).mean())

    def jackknife(values):
        return (len(values) - 1) * np.var(values)
    keep = lambda rows, k: torch.cat([rows[:k], rows[k + 1:]])
    found = kid(x, y, seeds="0")
    assert found.value == pytest.approx(direct(x, y), rel=1e-9, abs=1e-9) and found.measure == "KD" and found.n_reference == m
    variance = jackknife([direct(keep(x, k), y) for k in range(n)]) + jackknife([direct(x, keep(y, k)) for k in range(m)])
    assert found.error == pytest.approx(variance**0.5, rel=1e-6, abs=1e-9)


def test_kernel_distance_is_unbiased_and_its_interval_covers():
    def mean_kernel(m1, s1, m2, s2):  # E (x y + 1)^3 for independent normals
        first, second, third = (lambda m, s: m), (lambda m, s: m * m + s * s), (lambda m, s: m**3 + 3 * m * s * s)
        return third(m1, s1) * third(m2, s2) + 3 * second(m1, s1) * second(m2, s2) + 3 * first(m1, s1) * first(m2, s2) + 1
    truth = mean_kernel(0.3, 0.6, 0.3, 0.6) + mean_kernel(0, 0.5, 0, 0.5) - 2 * mean_kernel(0.3, 0.6, 0, 0.5)
    found = [kid(normal(200, 1, k, scale=0.6, shift=0.3), normal(250, 1, 5000 + k, scale=0.5)) for k in range(400)]
    covered = np.mean([abs(one.value - truth) < 1.96 * one.error for one in found])
    assert abs(np.mean([one.value for one in found]) - truth) < 3 * np.std([one.value for one in found]) / 20
    assert abs(covered - 0.95) < 0.035
    null = [kid(normal(100, 2, k), normal(100, 2, 9000 + k)) for k in range(200)]
    assert abs(np.mean([one.value for one in null])) < 3 * np.std([one.value for one in null]) / 200**0.5  # unbiased at zero too
    assert np.mean([abs(one.value) < 1.96 * one.error for one in null]) > 0.93  # conservative there


def test_a_collapsed_and_a_noisy_sampler_tell_precision_from_recall():
    real, fresh = normal(300, 4, 0), normal(300, 4, 1)
    collapsed, noisy = fresh[:1].repeat(300, 1) * 0 + 0.01 * normal(300, 4, 2), fresh * 4
    one, two, floor = (neighbours(rows, real) for rows in (collapsed, noisy, fresh))
    assert one.precision.value > 0.99 and one.recall.value < 0.1 and one.coverage.value < 0.5
    assert two.recall.value > 0.95 and two.precision.value < 0.5
    assert floor.precision.value > 0.85 and floor.recall.value > 0.85 and floor.coverage.value > 0.85 and abs(floor.density.value - 1) < 0.25
    swapped = neighbours(real, collapsed)
    assert (swapped.precision.value, swapped.recall.value) == (one.recall.value, one.precision.value)


@pytest.mark.parametrize("d, scale", [(3, 1.0), (16, 1.2)])
def test_errors_of_shares_are_their_scatter_or_a_little_more(d, scale):
    found = [neighbours(normal(150, d, 2 * seed, scale=scale), normal(150, d, 2 * seed + 1)) for seed in range(60)]
    for shares in zip(*found):
        ratio = np.mean([share.error**2 for share in shares]) ** 0.5 / np.std([share.value for share in shares], ddof=1)
        assert 0.75 < ratio < 1.75, (shares[0].measure, ratio)  # 60 repeats know a scatter to 9 per cent


def test_shares_carry_their_numbers_and_repeat():
    shares = neighbours(normal(40, 2), normal(40, 2, 1), variant="pixels", seeds="0-39")
    assert shares == neighbours(normal(40, 2), normal(40, 2, 1), variant="pixels", seeds="0-39") and shares._fields == tuple(share.measure for share in shares)
    assert {(share.n, share.n_reference, share.variant, share.seeds) for share in shares} == {(40, 40, "pixels; k = 3", "0-39")}
    assert neighbours(normal(40, 2), normal(40, 2, 1), seed=5).precision.error != shares.precision.error
    assert neighbours(normal(40, 2) + 99, normal(40, 2, 1)).precision.error == 1 / 40  # none inside: known to one image


def test_neighbours_against_all_distances_written_out(monkeypatch):
    x, y, k = normal(40, 3, 0), normal(40, 3, 1), 2
    within = lambda rows: np.sort(np.linalg.norm(rows[:, None] - rows[None], axis=2), 1)[:, k]
    across = np.linalg.norm(x.numpy()[:, None] - y.numpy()[None], axis=2)
    inside, recalled = across <= within(y.numpy()), across <= within(x.numpy())[:, None]
    expected = (inside.any(1).mean(), recalled.any(0).mean(), inside.sum() / (40 * k), inside.any(0).mean())
    whole = neighbours(x, y, k)
    np.testing.assert_allclose([share.value for share in whole], expected, rtol=1e-12)
    import sedm_kit.two_samples as module
    cut = module._distances
    monkeypatch.setattr(module, "_distances", lambda rows, others: cut(rows, others, chunk=200))
    assert neighbours(x, y, k) == whole  # chunks change nothing, errors included


def test_identical_copies_lie_in_each_others_balls():
    copies = torch.ones(20, 50, dtype=torch.float64) * 0.1
    assert [share.value for share in neighbours(copies, copies)] == [1.0, 1.0, 20 / 3, 1.0]


def test_neighbours_errors():
    with pytest.raises(ValueError, match=r"20 generated against 30 real images.*take 20 of both, or allow it \(unequal=True, --unequal\)"):
        neighbours(normal(20, 2), normal(30, 2))
    assert neighbours(normal(20, 2), normal(30, 2), unequal=True).precision.value > 0.5
    for arguments in ((normal(20, 2), normal(20, 3)), (normal(6, 2), normal(6, 2), 3)):
        with pytest.raises(ValueError, match="equal dimensions and 1 <= k < half their sizes"):
            neighbours(*arguments)
    with pytest.raises(ValueError, match="at least 3 rows and equal dimensions"):
        kid(normal(2, 2), normal(9, 2))
    for measure in (kid, neighbours, c2st):
        with pytest.raises(ValueError, match="hold NaN or infinity"):
            measure(torch.full((20, 2), float("nan")), normal(20, 2))


def test_a_classifier_finds_what_moments_hide_and_nothing_where_there_is_nothing():
    real, ring = normal(500, 3, 0), torch.nn.functional.normalize(normal(500, 3, 1), dim=1)
    moved = match_moments(ring, FeatureStats.of(real))
    assert fd_of_rows(moved, real) < 1e-6
    found = c2st(moved, real)
    assert found.mean > 0.7 and found.mean - 0.5 > 5 * found.error and found.n_blocks == 5 and found.block_size == 100
    assert c2st(moved, real).values == found.values  # the same seed, the same halves
    null = [c2st(normal(150, 3, 2 * k), normal(150, 3, 2 * k + 1)) for k in range(40)]
    assert abs(np.mean([one.mean for one in null]) - 0.5) < 3 * np.std([one.mean for one in null]) / 40**0.5
    assert np.mean([abs(one.mean - 0.5) < one.ci for one in null]) > 0.85
    with pytest.raises(ValueError, match="as many images of each"):
        c2st(normal(50, 3), normal(51, 3))
