"""Steps in the angle: exact for Gaussians on any grid, Euler in every limit, the order that the theory says, and the slope seam."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from sedm_kit.analytic import GaussianMixture, gaussian_flow
from sedm_kit.angle import AngleStep, Modes, angle_weights, arc, cosine_axis, dct_modes, principal_modes, scalar_modes, typical_start
from sedm_kit.noise import edm_sigmas
from sedm_kit.sampler import Churn, sample

torch.set_num_threads(1)
levels = st.floats(1e-4, 1e2)


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def gaussian():
    "One Gaussian of 3-channel 2x3 images with a full covariance."
    root = draw(18, 18) * torch.logspace(-2, 1, 18, dtype=torch.float64)
    return GaussianMixture(draw(1, 3, 2, 3), [1.0], cov=(root.T @ root / 18)[None])


@pytest.fixture(scope="module")
def mixture():
    "Two Gaussians of 1x4x4 images."
    roots = [draw(16, 16, seed=k) / 6 for k in (1, 2)]
    return GaussianMixture(draw(2, 1, 4, 4, seed=3), [0.4, 0.6], cov=torch.stack([r.T @ r + 0.01 * torch.eye(16).double() for r in roots]))


# ---- the identity behind the step

@given(levels, st.floats(0, 1), st.floats(1e-8, 1e8))
@settings(deadline=None, max_examples=60)
def test_arc_is_the_difference_of_the_angles_and_euler_is_a_rotation(sigma, share, v):
    s, v = sigma * share, torch.tensor(v, dtype=torch.float64)
    keep, take, delta = angle_weights(v, sigma, s)
    assert_close(delta, torch.atan(sigma / v.sqrt()) - torch.atan(s / v.sqrt()), rtol=1e-7, atol=1e-7)
    kappa = v / (v + sigma**2)
    assert_close(keep * delta.cos(), s / sigma + (1 - s / sigma) * kappa, rtol=1e-9, atol=1e-12)  # plain Euler keeps cos(delta) of it
    assert_close(((v + s**2) * (v + sigma**2)).sqrt() * delta.sin(), v.sqrt() * (sigma - s), rtol=1e-9, atol=1e-12)
    assert 1 - 1e-12 <= take / max(1 - s / sigma, 1e-300) <= math.pi / 2 + 1e-9 or share == 1


@given(levels, st.floats(0.0, 0.999))
@settings(deadline=None)
def test_no_variance_and_infinite_variance_are_euler(sigma, share):
    s = sigma * share
    for v in (0.0, 1e12 * sigma**2):
        v = torch.tensor(v, dtype=torch.float64)
        keep, take, _ = angle_weights(v, sigma, s)
        assert_close(take, torch.tensor(1 - share).double(), rtol=1e-5, atol=1e-9)
        assert_close(keep - take * v / (v + sigma**2), torch.tensor(share).double(), rtol=1e-5, atol=1e-5)


def test_a_coordinate_without_variance_takes_eulers_last_step():
    keep, take, delta = angle_weights(torch.zeros(1).double(), 0.002, 0.0)
    assert (keep.item(), take.item(), delta.item()) == (0.0, 1.0, 0.0)


@pytest.mark.parametrize("v", [1e-3, 0.5, 40.0])
def test_small_steps_tend_to_euler_quadratically(v):
    v, gaps = torch.tensor(v, dtype=torch.float64), []
    for h in (1e-2, 1e-3):
        keep, take, delta = angle_weights(v, 1.0, 1.0 - h)
        gaps.append((keep - keep * delta.cos()).abs().item() + (take - h).abs().item())
    assert gaps[1] < gaps[0] / 90


# ---- exactness

@given(st.lists(st.floats(1e-3, 80.0), min_size=0, max_size=4, unique=True), st.sampled_from([0.0, 0.5, 1.0]))
@settings(deadline=None, max_examples=30)
def test_exact_for_a_gaussian_on_any_grid(gaussian, between, eta):
    grid = [100.0, *sorted(between, reverse=True), 0.0]
    x = 100 * draw(5, 3, 2, 3, seed=7)
    end = sample(gaussian.denoiser(), x, grid, solver=AngleStep(principal_modes(gaussian), eta))
    assert_close(end, gaussian_flow(gaussian, x, 100.0), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("make", [scalar_modes, dct_modes, principal_modes])
def test_white_data_are_exact_in_every_basis(make):
    white = GaussianMixture(draw(1, 3, 4, 4), [1.0], std=0.6)
    x = 80 * draw(4, 3, 4, 4, seed=1)
    assert_close(sample(white.denoiser(), x, [80, 0.5, 0], solver=AngleStep(make(white), 0.5)), gaussian_flow(white, x, 80.0))


def test_bands_are_exact_where_the_covariance_is_diagonal_in_them():
    c = dct_modes(draw(50, 1, 6, 4))
    power = c.variance.new_tensor(range(1, int(c.group.max()) + 2))[c.group]
    columns = c.synthesise((power.sqrt() * torch.eye(24).double().reshape(24, 1, 6, 4))).flatten(1)  # rows: scaled basis images
    data = GaussianMixture(draw(1, 1, 6, 4, seed=5), [1.0], cov=(columns.T @ columns)[None])
    modes, x = dct_modes(data), 80 * draw(4, 1, 6, 4, seed=2)
    assert_close(modes.variance, power)
    assert_close(sample(data.denoiser(), x, [80, 0], solver=AngleStep(modes)), gaussian_flow(data, x, 80.0))


# ---- order

@pytest.mark.parametrize("eta, order", [(0.0, 1), (0.5, 1), (1.0, 2)])
def test_order_of_convergence(mixture, eta, order):
    x = 80 * draw(24, 1, 4, 4, seed=9)
    truth, modes = sample(mixture.denoiser(), x, edm_sigmas(768), solver="rk3"), principal_modes(mixture)
    errors = [(sample(mixture.denoiser(), x, edm_sigmas(n), solver=AngleStep(modes, eta)) - truth).flatten(1).norm(dim=1).median() for n in (64, 256)]
    assert abs(math.log(errors[0] / errors[1]) / math.log(4) - order) < 0.3


def test_it_is_an_identity_for_any_variances(mixture):
    "The flow does not depend on the modes: with wrong variances the step converges to the same end."
    x, right = 80 * draw(8, 1, 4, 4), principal_modes(mixture)
    wrong = Modes(right.mean + 1, right.variance * 3 + 0.1, right.group, right.axes)
    ends = [sample(mixture.denoiser(), x, edm_sigmas(400), solver=AngleStep(modes, 1.0)) for modes in (right, wrong)]
    assert (ends[0] - ends[1]).flatten(1).norm(dim=1).median() < 3e-3


# ---- scaling and guidance

@given(st.floats(0.9, 1.1), st.floats(-0.5, 0.5), st.sampled_from([0.0, 0.5]))
@settings(deadline=None, max_examples=15)
def test_scaling_and_guidance_act_as_a_changed_denoiser(mixture, lam, w, eta):
    denoiser, solver, x = mixture.denoiser(), AngleStep(dct_modes(mixture), eta), 80 * draw(4, 1, 4, 4)
    push = lambda x, sigma: w * sigma.reshape(-1, 1, 1, 1) * torch.tanh(x)
    guided = sample(denoiser, x, edm_sigmas(6), solver=solver, scaling=lam, guidance=lambda x, s, labels, *, step, stage: (push(x, s), None))
    changed = denoiser.like(lambda x, s, labels=None: x - (x - denoiser(x, s)) / lam - push(x, s))
    assert_close(guided, sample(changed, x, edm_sigmas(6), solver=solver), rtol=1e-9, atol=1e-9)


def test_churn_is_for_the_form_without_memory(mixture):
    x, modes = 80 * draw(3, 1, 4, 4), scalar_modes(mixture)
    assert sample(mixture.denoiser(), x, edm_sigmas(5), solver=AngleStep(modes), churn=Churn(2.0)).isfinite().all()
    with pytest.raises(ValueError, match="stale"):
        sample(mixture.denoiser(), x, edm_sigmas(5), solver=AngleStep(modes, 0.5), churn=Churn(2.0))


# ---- modes

@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 4, 6), (2, 5, 1), (3, 32, 32)])
def test_the_transform_is_orthonormal_and_small(shape):
    x = draw(3, *shape)
    modes = dct_modes(x)
    assert_close(modes.synthesise(modes.analyse(x)), x)
    assert_close(modes.analyse(x).flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))
    assert max(max(axis.shape) for axis in modes.axes) == max(shape)


def test_cosine_waves():
    waves = cosine_axis(5)
    assert_close(waves.T @ waves, torch.eye(5).double())
    assert_close(waves[:, 0], torch.full((5,), 5**-0.5).double())
    assert [int((waves[:, k].sign().diff() != 0).sum()) for k in range(5)] == [0, 1, 2, 3, 4] or waves[2, 1].abs() < 1e-12


@pytest.mark.parametrize("make", [scalar_modes, dct_modes, principal_modes])
def test_images_and_exact_moments_agree(make, gaussian):
    images = gaussian.sample(40_000, generator=torch.Generator().manual_seed(0))
    measured, exact = make(images), make(gaussian)
    assert_close(measured.average(measured.variance), exact.average(exact.variance), rtol=0.05, atol=2e-4)
    assert_close(exact.variance.sum(), gaussian.cov.trace())


def test_own_bands_and_averages():
    x = draw(100, 2, 4, 4)
    bands = torch.arange(4)[:, None].expand(4, 4).clone()
    modes = dct_modes(x, bands)
    assert modes.group.shape == (2, 4, 4) and int(modes.group.max()) == 7
    assert_close(modes.average(modes.group.double()), torch.arange(8).double())


def test_a_typical_start_has_no_chance_left():
    modes = dct_modes(draw(60, 3, 4, 4))
    x = typical_start(modes, draw(10, 3, 4, 4, seed=1).float(), 2.0)
    assert_close(x.mean(0), modes.mean)
    assert_close(modes.average(modes.analyse(x - modes.mean).square()), modes.average(modes.variance) + 4)


# ---- bad input

def test_bad_input():
    x = draw(10, 1, 4, 4)
    modes = dct_modes(x)
    with pytest.raises(ValueError, match="not negative"):
        Modes(modes.mean, modes.variance - 100, modes.group, modes.axes)
    with pytest.raises(ValueError, match="do not fit"):
        Modes(modes.mean, modes.variance, modes.group, (torch.eye(3),))
    with pytest.raises(ValueError, match="shape"):
        Modes(modes.mean, modes.variance[:, :2], modes.group, modes.axes)
    for bands in (torch.zeros(3, 4, dtype=torch.int64), torch.full((4, 4), 2), torch.zeros(4, 4)):
        with pytest.raises(ValueError, match="bands"):
            dct_modes(x, bands)
    with pytest.raises(ValueError, match="at least 2 finite images"):
        scalar_modes(x[:1])
    with pytest.raises(ValueError, match="at least 2 finite images"):
        principal_modes(x * torch.nan)
    with pytest.raises(ValueError, match=r"\(1, 4, 4\)"):
        AngleStep(modes)(lambda x, s, stage: x, draw(2, 1, 8, 8), 1.0, 0.5, {})
    with pytest.raises(ValueError, match="between 0 and 1"):
        AngleStep(modes, 2.0)
    with pytest.raises(TypeError, match="Modes"):
        AngleStep(x)
    with pytest.raises(ValueError, match="at least 2"):
        typical_start(modes, x[:1], 1.0)


def test_arc_of_images_with_levels_of_their_own():
    v = torch.rand(1, 4, 4, dtype=torch.float64)
    both = arc(v, torch.tensor([1.0, 2.0]).reshape(2, 1, 1, 1), 0.5)
    assert_close(both, torch.stack([arc(v, 1.0, 0.5), arc(v, 2.0, 0.5)]))
