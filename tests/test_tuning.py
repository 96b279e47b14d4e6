"""Tuning: response surfaces, coverage of their error bars, the search on a world, its log, and bad input."""
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch.testing import assert_close

from sedm_kit.analytic import GaussianMixture
from sedm_kit.command import main
from sedm_kit.diagnostics import gaussian_variance, neutral_lambda
from sedm_kit.discriminator import correction
from sedm_kit.metrics import fd
from sedm_kit.noise import edm_sigmas, vp_scale, vp_sigma
from sedm_kit.response import REACH, check_box, check_budget, curvature, doehlert, jackknifed, lowest_point, polynomial, quantile_95, search, stages
from sedm_kit.ridge import linear_guidance
from sedm_kit.sampler import SeedStreams, sample_seeds
from sedm_kit.tuning import NEUTRAL, distances, grid, guidance_cautions, ridge, sampler_settings, targets, world_stats
from sedm_kit.tuning_report import read_parameters, tune_plan, tuned_page, tuned_sentences
from sedm_kit.tuning_plots import heat_map
from sedm_kit.tuning_search import Log, tune
from sedm_kit.plan import Plan
from sedm_kit.worlds import World, load_world

SEEDS = range(3_390_000, 3_390_160)
BOX = {"lambda": (0.98, 1.05), "w": (0.0, 3.0)}


@pytest.fixture(scope="module")
def world():
    return load_world("digits")


# ---- response surfaces

@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(0, 10_000))
def test_a_quadratic_is_found_exactly(d, seed):
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(d, d))
    hessian, place = root @ root.T + np.eye(d), rng.uniform(-0.8, 0.8, d)
    value = lambda z: 1 + 0.5 * np.einsum("pi,ij,pj->p", z - place, hessian, z - place)
    coefficients = np.linalg.lstsq(polynomial(doehlert(d)), value(doehlert(d)), rcond=None)[0]
    assert_close(curvature(coefficients, d), hessian, atol=1e-8, rtol=1e-8)
    assert_close(lowest_point(coefficients, np.array([[-1.0, 1.0]] * d)), place, atol=2e-4, rtol=0)


def test_jackknife_of_a_ratio():
    rng = np.random.default_rng(1)
    parts = rng.normal([[2.0], [4.0]], 0.1, (2, 12))
    found = jackknifed(lambda mean: mean[0] / mean[1], parts)
    a, b = parts.mean(1)
    linear = (parts[0] - a) / b - a / b**2 * (parts[1] - b)
    assert_close(found.std(ddof=1), linear.std(ddof=1), rtol=0.05, atol=0)


def test_stages_double():
    assert stages(2000) == [500, 1000, 2000] and stages(160) == [80, 160] and stages(16_000)[0] >= 400


def noisy(rng, size=1.0):
    "A surface like that of digits (units of the box), with common and with separate noise of the measured size."
    tilt = rng.normal(size=(6, 40)) * np.array([0.09, 0.02, 0.02, 0.008, 0.008, 0.008])[:, None] * size
    def measure(points, n):
        x, y = np.array([(p["x"], p["y"]) for p in points]).T
        z = np.stack([x, y], 1)
        truth = 0.16 + 0.105 * (x + 0.05 + 0.45 * (y + 0.05)) ** 2 + 0.05 * (y + 0.05) ** 2 + 0.015 * x**3 - 0.01 * y**3
        noise = (polynomial(z) @ tilt)[:, :n // 50].reshape(len(z), 10, -1).mean(-1)
        return list(truth[:, None] + noise + 0.001 * rng.normal(size=(len(z), 10)))
    return measure


def true_optimum():
    z = np.stack(np.meshgrid(np.linspace(-0.2, 0.2, 801), np.linspace(-0.2, 0.2, 801)), -1).reshape(-1, 2)
    x, y = z.T
    return z[(0.105 * (x + 0.05 + 0.45 * (y + 0.05)) ** 2 + 0.05 * (y + 0.05) ** 2 + 0.015 * x**3 - 0.01 * y**3).argmin()]


def test_error_bars_cover_the_truth_at_their_rate():
    truth, inside, joint, runs = true_optimum(), [], [], 60
    for k in range(runs):
        fits, _ = search(noisy(np.random.default_rng(k)), {"x": (-1, 1), "y": (-1, 1)}, [500, 1000, 2000], loss_tolerance=0)
        fit = fits[-1]
        off = fit.best - truth
        inside.append(abs(off) <= quantile_95(fit) * np.sqrt(np.diag(fit.covariance)))
        joint.append(off @ np.linalg.solve(fit.covariance, off) <= 2 * 9 / 8 * stats.f.ppf(0.95, 2, 8))
    low = stats.binom.ppf(0.001, runs, 0.95) / runs
    assert np.mean(inside, 0).min() >= low and np.mean(joint) >= low
    assert np.mean(inside) < 1.0 - 1e-9 or np.mean(joint) < 1.0  # and are not simply huge


def test_an_optimum_outside_the_first_regions_is_followed():
    far = lambda points, n: [np.full(10, 1 + (p["x"] - 6) ** 2) for p in points]
    fits, why = search(far, {"x": (-1, 1)}, [100, 200], hard={}, loss_tolerance=1e-6, moves=9)
    assert abs(fits[-1].best[0] - 6) < 1e-3 and why == "loss"
    fits, _ = search(far, {"x": (-1, 1)}, [100, 200])
    assert fits[-1].best[0] == pytest.approx(1)


def cost(fits):
    return sum(fit.n * len(fit.points) for fit in fits)


def test_a_budget_is_kept_and_costs_no_coverage():
    truth, inside, ends, free, runs = true_optimum(), [], [], [], 60
    for k in range(runs):  # three times the noise: regions are left
        settings = dict(box={"x": (-1, 1), "y": (-1, 1)}, images=[500, 1000, 2000], loss_tolerance=0)
        fits, ended = search(noisy(np.random.default_rng(k), 3.0), **settings, max_images=24_500)
        assert cost(fits) == 24_500 and fits[-1].n == 2000
        ends.append(ended)
        inside.append(abs(fits[-1].best - truth) <= quantile_95(fits[-1]) * np.sqrt(np.diag(fits[-1].covariance)))
        free.append(cost(search(noisy(np.random.default_rng(k), 3.0), **settings)[0]))
    assert max(free) > 24_500 and set(ends) <= {"seeds", "images"}
    assert np.mean(inside, 0).min() >= stats.binom.ppf(0.001, runs, 0.95) / runs


def test_moves_are_made_as_far_as_the_budget_goes():
    far = lambda points, n: [np.full(10, 1 + (p["x"] - 6) ** 2) for p in points]
    search_far = lambda most: search(far, {"x": (-1, 1)}, [100, 200], hard={}, loss_tolerance=1e-6, moves=9, max_images=most)
    fits, why = search_far(900)  # two regions as planned
    assert [fit.n for fit in fits] == [100, 200] and why == "images" and (fits[1].half == fits[0].half).all()
    fits, why = search_far(1600)  # a move costs 300 in the first stage
    assert [fit.n for fit in fits] == [100, 100, 100, 200] and cost(fits) == 1500
    assert check_budget(None, [100, 200], 1) == np.inf and check_budget(1600, [100, 200], 1, aside=600) == 1000
    with pytest.raises(ValueError, match="at least the 900 images"):
        search_far(899)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.97, 1.05), st.floats(-2500, 2500))
def test_in_one_variable_the_third_power_is_part_of_the_answer(place, third):
    skewed = lambda points, n: [np.full(10, 0.2 + 500 * (p["x"] - place) ** 2 + third * (p["x"] - place) ** 3) for p in points]
    fits, _ = search(skewed, {"x": (0.92, 1.08)}, [300, 600], loss_tolerance=0)
    last = fits[-1]
    quadratic = last.center + last.half * lowest_point(last.coefficients, np.array([[-REACH, REACH]]))
    assert_close(last.best, np.array([place]), atol=2e-5, rtol=0)
    assert_close(last.model[0, 0] ** 0.5, abs(last.best - quadratic)[0] / 2, atol=1e-5, rtol=0)  # what the third power moved is in the error


# ---- exact worlds: the whole tune against a truth in closed form

class GaussianLogRatio(torch.nn.Module):
    "The best possible discriminator of two zero-mean Gaussians with common axes."
    def __init__(self, axes, data, fakes):
        super().__init__()
        self.axes, self.data, self.fakes = axes, data, fakes

    def forward(self, u, tau, class_labels=None):
        sigma = vp_sigma(tau.double())[:, None]
        z2 = ((u.double().flatten(1) / vp_scale(sigma)) @ self.axes).square()
        v, f = self.data + sigma**2, self.fakes + sigma**2
        return (z2 / f - z2 / v + (f / v).log()).sum(1) / 2


def exact_world(world, steps):
    "Gaussian data with the covariance of a world's centred images, exact networks; its spectrum and that of Euler's samples."
    images = world.train.double() - world.train.double().mean(0)
    cov = torch.cov(images.flatten(1).T)
    variances, axes = torch.linalg.eigh(cov)
    variances = variances.clamp(min=0)
    fakes = gaussian_variance(variances, edm_sigmas(steps), solver="euler")
    denoiser = GaussianMixture(torch.zeros(1, *world.shape), torch.ones(1), cov=cov[None]).denoiser()
    return World("Gaussian", images.float(), images[:8].float(), denoiser, {"euler": GaussianLogRatio(axes, variances, fakes)}, lambda x: x.flatten(1)[:, :4], {}), variances, fakes


def test_guided_sampling_of_an_exact_world_is_linear(world):
    exact, variances, fakes = exact_world(world, 18)
    log_ratio, seeds = exact.log_ratio["euler"], range(3_795_000, 3_795_064)
    start = SeedStreams(seeds, "cpu").latents(exact.shape).double().flatten(1) @ log_ratio.axes
    for sigma in (0.01, 1.0, 80.0):
        level = torch.tensor(sigma, dtype=torch.float64)
        x = start * (variances + sigma**2).sqrt()
        g, _ = correction(log_ratio, (x @ log_ratio.axes.T).reshape(-1, *exact.shape), level.expand(len(x)))
        assert_close(g.flatten(1) @ log_ratio.axes, linear_guidance(variances, fakes)(x.reshape(-1, 1, 1, 64), level)[0].flatten(1), atol=1e-6, rtol=0)
    images = sample_seeds(exact.denoiser, seeds, edm_sigmas(18), shape=exact.shape, solver="euler", **sampler_settings({"lambda": 1.002, "w": 0.95, "window_low": 0.0}, log_ratio))
    made = gaussian_variance(variances, edm_sigmas(18), solver="euler", scaling=1.002, guidance=linear_guidance(variances, fakes, 0.95)).sqrt()
    assert_close(images.flatten(1) @ log_ratio.axes, start * made, atol=1e-5, rtol=0)


def test_tune_covers_the_truth_of_an_exact_world(world):
    exact, variances, _ = exact_world(world, 10)
    truth, runs, off, error = neutral_lambda(variances, edm_sigmas(10), solver="euler"), 15, [], []
    for k in range(runs):
        found = tune(exact, range(3_780_000 + 1200 * k, 3_780_000 + 1200 * (k + 1)), edm_sigmas(10), box={"lambda": (0.92, 1.08)}, fixed={"w": 0.0}, loss_tolerance=0, progress=False)
        off.append(found.fits[-1].best[0] - truth)
        error.append(found.ci["lambda"])
    off, error = np.array(off), np.array(error)
    assert (abs(off) <= error).mean() >= stats.binom.ppf(0.001, runs, 0.95) / runs
    assert abs(off.mean()) < 0.001 and error.mean() < 0.006  # a quadratic alone is 0.004 too low


def test_tune_of_lambda_and_weight_comes_close_to_what_is_best_in_an_exact_world(world):
    exact, variances, fakes = exact_world(world, 18)
    made = lambda lam, w: gaussian_variance(variances, edm_sigmas(18), solver="euler", scaling=lam, guidance=linear_guidance(variances, fakes, w))
    distance = lambda lam, w: (made(lam, w).sqrt() - variances.sqrt()).square().sum()
    for first in (3_798_000, 3_799_000):
        found = tune(exact, range(first, first + 1000), edm_sigmas(18), box={"lambda": (0.985, 1.045), "w": (0.0, 3.0)}, fixed={"window_low": 0.0}, loss_tolerance=0, progress=False)
        assert distance(found.best["lambda"], found.best["w"]) < 0.05 * distance(1.0, 0.0)


# ---- points and grids

def test_distances_match_the_metrics(world):
    images = world.held_out[:100]
    found = distances(world, images, targets(world), groups=5)
    real, made = world_stats(world, world.train), world_stats(world, images)
    for space in ("pixel", "feature"):
        assert_close(found[space]["fd"], fd(made[space], real[space]), rtol=1e-6, atol=1e-8)
        assert found[space]["parts"].shape == (5,)


def test_neutral_point_is_the_plain_sampler(world):
    assert sampler_settings(NEUTRAL) == {"scaling": 1.0, "guidance": None}
    guided = sampler_settings({"w_later": 1.0, "window_high": 0.5}, world.log_ratio["euler"])["guidance"]
    assert guided.weights == (0.0, 1.0) and guided.window == (0.01, 0.5)


def test_grid_and_ridge(world):
    surface = grid(world, SEEDS[:40], edm_sigmas(6), lambdas=[1.0, 1.05, 1.1], weights=[0.0, 1.0], groups=4, progress=False)
    assert surface["parts"]["pixel"].shape == (3, 2, 4) and surface["seeds"] == [SEEDS[0], SEEDS[39]]
    line = ridge(surface)
    assert len(line["lambda"]) == 2 and line["lambda"][0].n_blocks == 4
    other = grid(world, SEEDS[:40], edm_sigmas(6), lambdas=[1.0], weights=[0.0, 1.0], guide="heun", groups=4, progress=False)
    assert other["pixel"][0, 0] == surface["pixel"][0, 0] and other["pixel"][0, 1] != surface["pixel"][0, 1]


def test_heat_map_draws_distances_without_bias():
    parts = np.random.default_rng(0).normal(size=(4, 3, 5)) + np.arange(4)[:, None, None] ** 2
    surface = {"lambdas": np.arange(4.0), "weights": np.arange(3.0), "n": 50, "pixel": parts.mean(-1) + 100, "parts": {"pixel": parts}}
    ax = heat_map(surface)
    assert_close(np.asarray(ax.collections[0].get_array()).reshape(3, 4), parts.mean(-1).T)
    plt.close(ax.figure)


def test_cautions(world):
    assert guidance_cautions(world, "euler", 18) == []
    assert "near chance" in guidance_cautions(world, "heun", 18)[0]
    assert any("samples of heun" in text for text in guidance_cautions(world, "euler", 18, guide="heun"))
    assert "18 euler steps" in guidance_cautions(world, "euler", 10)[0]


# ---- the search on a world

@pytest.fixture(scope="module")
def found(world, tmp_path_factory):
    log = tmp_path_factory.mktemp("tune") / "tune.jsonl"
    return log, tune(world, SEEDS, edm_sigmas(6), box=BOX, loss_tolerance=0, log=log, progress=False)


def test_result_says_what_it_cost_and_how_sure_it_is(found):
    _, result = found
    assert result.ended in ("seeds", "moves") and not result.resolved
    assert result.cost["images"] == sum(fit.n * len(fit.points) for fit in result.fits) + 2 * 80
    assert result.cost["denoiser_evaluations"] == 6 * result.cost["images"]
    assert result.check["seeds"] == [SEEDS[80], SEEDS[-1]] and result.check["pixel"]["difference"].n_blocks == 10
    assert result.ellipse().shape == (100, 2) and set(result.error) == {"lambda", "w"}
    json.dumps(result.as_dict())
    page = tuned_page(result, {})
    assert "Caution" in page and "http" not in page and len(tuned_sentences(result)) >= 5


def test_restart_measures_nothing_twice(world, found):
    log, result = found
    lines = log.read_text().splitlines()
    again = tune(world, SEEDS, edm_sigmas(6), box=BOX, loss_tolerance=0, log=log, progress=False)
    assert again.cost["sampled_now"] == 0 and again.best == result.best and again.error == result.error
    log.write_text("\n".join(lines[:-3]) + "\n")  # as if interrupted
    again = tune(world, SEEDS, edm_sigmas(6), box=BOX, loss_tolerance=0, log=log, progress=False)
    assert again.best == result.best and 0 < again.cost["sampled_now"] < result.cost["images"]


@pytest.mark.parametrize("change,named", [({"by": "feature"}, "by was 'pixel'"), ({"box": {"lambda": (0.97, 1.05)}}, "box was"), ({"guide": "heun"}, "guide was 'euler'"), ({"max_images": 5000}, "max_images was None")])
def test_another_setting_is_refused(world, found, change, named):
    log, _ = found
    before = log.read_bytes()
    with pytest.raises(ValueError, match=named):
        tune(world, SEEDS, edm_sigmas(6), **({"box": BOX, "loss_tolerance": 0} | change), log=log, progress=False)
    assert log.read_bytes() == before


def test_a_file_that_is_no_log_is_left_alone(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    with pytest.raises(ValueError, match="no log of a search"):
        Log(path, {})
    assert path.read_text() == "hello\n"


def test_four_parameters_at_once(world):
    box = {"lambda": (1.0, 1.1), "w": (0.0, 3.0), "w_later": (0.0, 2.0), "window_high": (0.3, 1.0)}
    result = tune(world, SEEDS[:100], edm_sigmas(4), solver="heun", box=box, groups=8, progress=False)
    assert set(result.best) == set(box) and len(result.fits[0].points) == 21
    assert any("no more than the 64 dimensions" in text for text in result.cautions)
    assert result.ellipse("w", "w_later").shape == (100, 2)


def test_edges_are_said(world):
    result = tune(world, SEEDS, edm_sigmas(18), box={"lambda": (0.9, 0.96)}, progress=False)
    assert "edge and no optimum" in result.edges[0] and result.best == {"lambda": 0.96}


@pytest.mark.parametrize("settings,message", [
    ({"box": {}}, "search box is empty"), ({"box": {"lambda": (1.0, 1.0)}}, "interior"), ({"box": {"lambda": (1.1, 1.0)}}, "interior"),
    ({"box": {"lambda": (float("nan"), 1.0)}}, "interior"), ({"box": {"w": (-1.0, 2.0)}}, "between 0 and"), ({"box": {"lamda": (0.9, 1.1)}}, "unknown parameter 'lamda'; known: lambda"),
    ({"box": BOX, "fixed": {"w": 1.0}}, "both searched and fixed"), ({"by": "fid"}, "'pixel' or 'feature'"), ({"solver": "rk45"}, "unknown solver"),
    ({"box": BOX, "position_tolerance": {"w_later": 1.0}}, "position_tolerance"), ({"box": BOX, "guide": "nobody"}, "no discriminator named 'nobody'; it has"),
    ({"max_images": 999}, "at least the 1000 images"), ({"max_images": float("nan")}, "max_images must be"),
    ({"loss_tolerance": -0.1}, "share of the distance"), ({"loss_tolerance": float("nan")}, "share of the distance"),
    ({"box": {"w": (0.0, 2.0), "window_low": (0.5, 0.6), "window_high": (0.2, 0.3)}}, "window must satisfy")])
def test_mistakes_are_found_before_work_starts(world, settings, message):
    with pytest.raises(ValueError, match=message):
        tune(world, SEEDS, edm_sigmas(6), progress=False, **settings)


@pytest.mark.parametrize("seeds,message", [([], "empty"), ([1, 1], "more than once"), (range(20), "too few")])
def test_seeds_must_be_enough_and_distinct(world, seeds, message):
    with pytest.raises(ValueError, match=message):
        tune(world, seeds, edm_sigmas(6), box=BOX, progress=False)


# ---- the command

def test_parameters_of_the_command():
    assert read_parameters("lambda=0.98:1.06, w=0:3,w_later=1") == ({"lambda": (0.98, 1.06), "w": (0.0, 3.0)}, {"w_later": 1.0})
    for wrong in ("lambda", "lambda=a:b", "w=1:2:3"):
        with pytest.raises(ValueError, match="name=low:high"):
            read_parameters(wrong)
    with pytest.raises(ValueError, match="one solver"):
        tune_plan(Plan(solvers=("euler", "heun"), blocks=2))


def test_command_writes_a_report_and_resumes(tmp_path, capsys):
    words = ["tune", "--seeds", "160", "--steps", "5", "--search", "lambda=1.0:1.12,w=1", "--out", str(tmp_path / "found")]
    assert main(words) == 0
    first = capsys.readouterr().out
    assert "λ" in first or "lambda" in first
    assert {"report.html", "results.json", "tune.jsonl", "steps.png"} <= {path.name for path in (tmp_path / "found").iterdir()}
    assert main(words) == 0 and "(0 images in this run" in capsys.readouterr().out
    assert main([*words, "--by", "feature"]) == 2 and "other settings" in capsys.readouterr().err
    assert main(["tune", "--search", "w=2:1"]) == 2 and "interior" in capsys.readouterr().err
    assert main(["tune", "--max-images", "0"]) == 2 and "--max-images: expected a whole number, 1 or above" in capsys.readouterr().err
    for most, status, said in (("519", 2, "at least the 520 images"), ("520", 0, "")):  # three points on 40 and on 80 seeds, and twice 80 to compare
        limited = [*words[:-2], "--max-images", most, "--out", str(tmp_path / most)]
        assert main(limited) == status and said in capsys.readouterr().err
    assert json.loads((tmp_path / "520" / "results.json").read_text())["cost"]["images"] == 520
