"""Automatic lambda: on Gaussian data every method must find the closed form; schedules, guidance, prices and refusals."""
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.testing import assert_close

from sedm_kit.analytic import GaussianMixture, scale_error
from sedm_kit.angle import AngleStep, scalar_modes
from sedm_kit.calibration import Calibration, calibrate_lambda, walk_together
from sedm_kit.diagnostics import gaussian_variance, linear_denoiser, neutral_lambda
from sedm_kit.metrics import FeatureStats
from sedm_kit.noise import edm_sigmas
from sedm_kit.sampler import sample

torch.set_num_threads(1)
SEEDS = range(3_380_000, 3_380_048)


def white(v=0.5):
    return GaussianMixture(torch.zeros(1, 1, 4, 4), [1.0], std=v**0.5)


@given(st.floats(0.05, 3.0), st.sampled_from([("euler", 18), ("euler", 30), ("heun", 18), ("dpmpp2m", 18)]))
@settings(deadline=None, max_examples=8)
def test_the_constant_of_a_white_gaussian_is_the_closed_form(v, how):
    (solver, n), world = how, white(v)
    found = calibrate_lambda(world.denoiser(), world, edm_sigmas(n), solver=solver, seeds=SEEDS, tolerance=1e-5)
    assert_close(gaussian_variance([v], edm_sigmas(n), solver=solver, scaling=found.scaling).item(), v, rtol=1e-3, atol=0)
    assert_close(found.scaling, neutral_lambda([v], edm_sigmas(n), solver=solver), rtol=0, atol=3e-4)


@given(st.floats(0.05, 3.0))
@settings(deadline=None, max_examples=8)
def test_the_schedule_of_a_white_gaussian_is_the_closed_form(v):
    world, sigmas = white(v), edm_sigmas(14)
    found = calibrate_lambda(world.denoiser(), world, sigmas, method="per_step_variance", seeds=SEEDS, bounds=(0.5, 3.0))
    s, s_next = sigmas[:-1], sigmas[1:]
    closed = (1 - s_next / s) * s**2 / (v + s**2) / (1 - ((v + s_next**2) / (v + s**2)).sqrt())
    assert_close(torch.tensor(found.scaling).double()[:11], closed[:11], rtol=0, atol=1e-3)  # lower down rounding decides
    images, _ = walk_together(world.denoiser(), scalar_modes(world), sigmas, seeds=SEEDS, **found.settings(sigmas))
    assert_close(images.var(0, correction=0).mean().item(), v, rtol=1e-3, atol=0)


def test_shrinkage_is_seen_by_the_variance_and_not_by_the_spectrum():
    world, sigmas = white(), edm_sigmas(18)
    shrunk = scale_error(world.denoiser(), 0.98)
    found = {m: calibrate_lambda(shrunk, world, sigmas, method=m, seeds=SEEDS).scaling for m in ("variance", "spectrum")}
    assert_close(found["variance"], neutral_lambda([0.5], sigmas, scale_error(linear_denoiser([0.5]), 0.98), solver="euler"), rtol=0, atol=1e-3)
    assert found["variance"] > found["spectrum"] + 0.01


def test_norms_of_an_exact_denoiser_in_many_steps_are_one():
    world, sigmas = white(), edm_sigmas(60)
    images = world.sample(400, generator=torch.Generator().manual_seed(0))
    found = calibrate_lambda(world.denoiser(), images, sigmas, solver="heun", method="per_step_norm", seeds=SEEDS)
    assert max(abs(lam - 1) for lam in found.scaling) < 0.08 and len(found.error) == 60 and found.note
    assert found.evaluations == 48 * 119 + 48 * 60


@pytest.mark.parametrize("solver", ["heun", "ab2"])
def test_a_schedule_restores_the_variance_with_any_solver(solver):
    world, sigmas = white(), edm_sigmas(12)
    found = calibrate_lambda(world.denoiser(), world, sigmas, solver=solver, method="per_step_variance", seeds=SEEDS, bounds=(0.3, 3.0))
    images, _ = walk_together(world.denoiser(), scalar_modes(world), sigmas, seeds=SEEDS, **found.settings(sigmas))
    assert abs(images.var(0, correction=0).mean().item() / 0.5 - 1) < 0.02


def test_guidance_moves_lambda_and_scaling_leaves_it_alone():
    world, sigmas = white(), edm_sigmas(18)
    outwards = lambda x, sigma, labels, *, step, stage: (-0.02 * x * sigma**2 / (0.5 + sigma**2), None)
    plain, guided = (calibrate_lambda(world.denoiser(), world, sigmas, seeds=SEEDS, **how) for how in ({}, {"guidance": outwards}))
    assert guided.scaling < plain.scaling - 0.005
    images, _ = walk_together(world.denoiser(), scalar_modes(world), sigmas, seeds=SEEDS, guidance=outwards, **guided.settings(sigmas))
    assert_close(images.var(0, correction=0).mean().item(), 0.5, rtol=5e-3, atol=0)
    schedule = calibrate_lambda(world.denoiser(), world, sigmas, seeds=SEEDS, guidance=outwards, method="per_step_variance")
    images, _ = walk_together(world.denoiser(), scalar_modes(world), sigmas, seeds=SEEDS, guidance=outwards, **schedule.settings(sigmas))
    assert_close(images.var(0, correction=0).mean().item(), 0.5, rtol=5e-3, atol=0)


def test_stats_serve_as_well_as_images():
    images = white().sample(3000, generator=torch.Generator().manual_seed(0))
    a, b = (calibrate_lambda(white().denoiser(), data, edm_sigmas(18), method="spectrum") for data in (images, FeatureStats.of(images)))
    assert_close(a.scaling, b.scaling)
    assert a.error > 0 and math.isnan(b.error) and a.evaluations == 0
    a, b = (calibrate_lambda(white().denoiser(), data, edm_sigmas(18), seeds=SEEDS) for data in (images, FeatureStats.of(images)))
    assert_close(a.scaling, b.scaling, rtol=0, atol=2e-3)


def test_classes_are_drawn_from_the_seeds():
    denoiser, seen = white().denoiser(), []
    class Labelled:
        shape, label_dim, img_channels, img_resolution = (1, 4, 4), 3, 1, 4
        def __call__(self, x, sigma, class_labels):
            seen.append((len(x), len(class_labels)))
            return denoiser(x, sigma)
    walk_together(Labelled(), scalar_modes(white()), edm_sigmas(3), seeds=SEEDS, batch=20, solver="euler")
    assert seen == [(20, 20), (20, 20), (8, 8)] * 3


def test_the_error_bar_covers_the_truth():
    "Over 12 calibrations of a mixture, the constant's scatter and its error bar agree within a factor of two."
    root = torch.randn(16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) / 4
    cov = root.T @ root + 0.02 * torch.eye(16).double()
    mixture = GaussianMixture(torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(2)), [0.5, 0.5], cov=torch.stack([cov, cov * 2]))
    found = [calibrate_lambda(mixture.denoiser(), mixture, edm_sigmas(10), seeds=range(9000 + 40 * k, 9040 + 40 * k), tolerance=2e-3) for k in range(12)]
    scatter, claimed = torch.tensor([f.scaling for f in found]).std().item(), torch.tensor([f.error for f in found]).square().mean().sqrt().item()
    assert 0.5 < scatter / claimed < 2


# ---- bad input

def test_bad_input():
    world, sigmas = white(), edm_sigmas(6)
    ask = lambda **how: calibrate_lambda(world.denoiser(), world, sigmas, **{"seeds": SEEDS, **how})
    with pytest.raises(ValueError, match="unknown method"):
        ask(method="guess")
    with pytest.raises(ValueError, match="empty"):
        ask(seeds=())
    with pytest.raises(ValueError, match="more than once"):
        ask(seeds=[1, 1, 2, 3, 4, 5, 6, 7])
    with pytest.raises(ValueError, match="blocks of at least 2"):
        ask(seeds=range(5))
    with pytest.raises(ValueError, match="widen the bracket"):
        ask(bracket=(0.9, 0.95))
    with pytest.raises(ValueError, match="give neither"):
        ask(scaling=1.02)
    with pytest.raises(ValueError, match="knows nothing of guidance"):
        ask(method="spectrum", guidance=lambda *a, **k: (0.0, None))
    with pytest.raises(ValueError, match="needs images"):
        ask(method="per_step_norm")
    with pytest.raises(ValueError, match="unknown solver"):
        ask(solver="eular")


@pytest.mark.parametrize("how,message", [
    ({"bracket": (1.1, 0.9)}, "bracket must be"), ({"bounds": (1.5, 0.8)}, "bounds must be"), ({"bracket": (float("nan"), 1.0)}, "bracket must be"),
    ({"data": torch.zeros(5, 1, 4, 4, dtype=torch.uint8)}, "8-bit"), ({"data": torch.zeros(1, 1, 4, 4)}, "at least 2 finite"),
    ({"data": torch.full((5, 1, 4, 4), float("nan"))}, "finite"), ({"data": torch.zeros(5, 1, 8, 8)}, "makes images of shape")])
@pytest.mark.parametrize("method", ["spectrum", "variance"])
def test_data_and_limits_are_checked_first(how, message, method):
    world = GaussianMixture(torch.zeros(1, 1, 4, 4), [1.0], std=0.5)
    with pytest.raises(ValueError, match=message):
        calibrate_lambda(world.denoiser(), sigmas=edm_sigmas(6), method=method, seeds=SEEDS, **({"data": world} | how))


def test_another_grid_is_refused():
    found = Calibration("variance", "euler", edm_sigmas(18), 1.02, 0.001, 0)
    assert found.settings(edm_sigmas(18)) == {"solver": "euler", "scaling": 1.02}
    for grid in (edm_sigmas(10), edm_sigmas(18, rho=5.0)):
        with pytest.raises(ValueError, match="calibrate it on the grid"):
            found.settings(grid)


def test_it_works_for_the_angle_step_too():
    "Nothing to repair: the constant is 1."
    world, sigmas = white(), edm_sigmas(8)
    found = calibrate_lambda(world.denoiser(), world, sigmas, solver=AngleStep(scalar_modes(world)), seeds=SEEDS)
    assert abs(found.scaling - 1) < 1e-3
    assert sample(world.denoiser(), torch.ones(1, 1, 4, 4), sigmas, **found.settings(sigmas)).isfinite().all()
