"""The recorded normalisation: arc limits, what the record restores, replay, the grid it belongs to, and guidance."""
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from sedm_kit.analytic import GaussianMixture, scale_error
from sedm_kit.angle import AngleStep, arc, dct_modes, principal_modes, scalar_modes
from sedm_kit.calibration import walk_together
from sedm_kit.noise import edm_sigmas
from sedm_kit.normalisation import NormalisedStep, arc_limited, normalise
from sedm_kit.sampler import Churn, sample, sample_seeds

torch.set_num_threads(1)
SEEDS, SIGMAS = range(3_370_000, 3_370_064), edm_sigmas(10)


def draw(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def gaussian():
    root = draw(16, 16) / 4
    return GaussianMixture(draw(1, 1, 4, 4), [1.0], cov=(root.T @ root + 0.01 * torch.eye(16).double())[None])


@given(st.floats(0.01, 50.0), st.floats(0.0, 1.0), st.floats(0.05, 20.0))
@settings(deadline=None, max_examples=100)
def test_factors_stay_within_the_arc_and_restore_within_it(sigma, share, size):
    modes, s = scalar_modes(draw(50, 1, 3, 3)), sigma * share
    z = size * draw(40, 1, 3, 3, seed=1)
    c, reach = arc_limited(modes, z, sigma, s), arc(modes.average(modes.variance), sigma, s).cos()
    assert (c >= reach * (1 - 1e-12)).all() and (c <= 1 / reach * (1 + 1e-12)).all()
    wanted = modes.average(modes.variance) + s**2
    free = (wanted / z.square().mean()).sqrt()
    if reach < free < 1 / reach:
        assert_close(c.square() * z.square().mean(), wanted)


def test_euler_on_a_gaussian_becomes_exact_in_variance(gaussian):
    "A plain Euler step loses exactly cos(arc) there, so the limit never binds: every mode ends with the data's variance."
    modes = principal_modes(gaussian)
    images, _ = walk_together(gaussian.denoiser(), modes, SIGMAS, seeds=SEEDS, solver=normalise(gaussian.denoiser(), modes, SIGMAS, seeds=SEEDS))
    assert_close(modes.average(modes.analyse(images - modes.mean).square()), modes.average(modes.variance))


def test_the_record_of_a_gaussian_is_the_arc_itself(gaussian):
    modes = principal_modes(gaussian)
    factors = normalise(gaussian.denoiser(), modes, SIGMAS, seeds=SEEDS).factors
    pairs = zip(SIGMAS.tolist(), SIGMAS.tolist()[1:])
    assert_close(factors, torch.stack([1 / arc(modes.average(modes.variance), *pair).cos() for pair in pairs]), rtol=1e-6, atol=1e-9)


def test_nothing_to_correct_where_the_solver_is_exact(gaussian):
    modes = principal_modes(gaussian)
    assert_close(normalise(gaussian.denoiser(), modes, SIGMAS, seeds=SEEDS, solver=AngleStep(modes, 0.5)).factors, torch.ones(10, 16).double())


def test_replay_is_the_recorded_run_and_costs_what_it_says(gaussian):
    modes, seen = dct_modes(gaussian), []
    normed = normalise(gaussian.denoiser(), modes, SIGMAS, seeds=SEEDS, solver="heun", callback=lambda info: seen.append(info["x"]), batch=24)
    replayed = []
    walk_together(gaussian.denoiser(), modes, SIGMAS, seeds=SEEDS, solver=normed, callback=lambda info: replayed.append(info["x"]))
    assert_close(torch.stack(replayed), torch.stack(seen))
    assert normed.evaluations == 19 * 64


@pytest.mark.parametrize("solver", ["euler", "heun", "midpoint", "rk3", "ab2", "dpmpp2m"])
def test_it_sits_on_any_solver(gaussian, solver):
    modes = dct_modes(gaussian)
    normed = normalise(scale_error(gaussian.denoiser(), 0.97, gaussian.mean), modes, SIGMAS, seeds=SEEDS, solver=solver)
    assert normed.factors.shape == (10, 5) and not torch.allclose(normed.factors, torch.ones(10, 5).double())
    assert sample_seeds(gaussian.denoiser(), range(3), SIGMAS, solver=normed).shape == (3, 1, 4, 4)


def test_guidance_and_scaling_are_part_of_the_record(gaussian):
    modes, push = dct_modes(gaussian), lambda x, s, labels, *, step, stage: (0.3 * s * torch.tanh(x), None)
    plain, guided, scaled = (normalise(gaussian.denoiser(), modes, SIGMAS, seeds=SEEDS, **how) for how in ({}, {"guidance": push}, {"scaling": 1.03}))
    assert (plain.factors - guided.factors).abs().max() > 1e-3 and (plain.factors - scaled.factors).abs().max() > 1e-3


def test_neutral_factors_change_nothing(gaussian):
    modes = dct_modes(gaussian)
    normed = NormalisedStep("dpmpp2m", modes, SIGMAS, torch.ones(10, 5))
    x = 80 * draw(4, 1, 4, 4)
    assert_close(sample(gaussian.denoiser(), x, SIGMAS, solver=normed), sample(gaussian.denoiser(), x, SIGMAS, solver="dpmpp2m"))
    assert sample(gaussian.denoiser(), x, SIGMAS, solver=NormalisedStep("euler", modes, SIGMAS, torch.ones(10, 5)), churn=Churn(1.0)).isfinite().all()


def test_bad_input(gaussian):
    modes, x = dct_modes(gaussian), 80 * draw(2, 1, 4, 4)
    normed = NormalisedStep("euler", modes, SIGMAS, torch.ones(10, 5))
    for grid in (edm_sigmas(9), edm_sigmas(11), edm_sigmas(10, rho=5.0)):
        with pytest.raises(ValueError, match="record it on the grid"):
            sample(gaussian.denoiser(), x, grid, solver=normed)
    for factors in (torch.ones(9, 5), torch.ones(10, 6), -torch.ones(10, 5), torch.full((10, 5), torch.nan)):
        with pytest.raises(ValueError, match="factors"):
            NormalisedStep("euler", modes, SIGMAS, factors)
    with pytest.raises(ValueError, match="empty"):
        normalise(gaussian.denoiser(), modes, SIGMAS, seeds=[])
    with pytest.raises(ValueError, match="at least 2"):
        normalise(gaussian.denoiser(), modes, SIGMAS, seeds=[1])
    with pytest.raises(ValueError, match="unknown solver"):
        normalise(gaussian.denoiser(), modes, SIGMAS, seeds=SEEDS, solver="eular")
    with pytest.raises(ValueError, match="shape"):
        sample(gaussian.denoiser(), 80 * draw(2, 1, 8, 8), SIGMAS, solver=normed)
