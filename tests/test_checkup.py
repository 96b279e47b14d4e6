"The checkup: complete, reproducible, strict about bad input, and sparing where a measurement would be slow; and what its numbers say."
import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch

from sedm_kit.analytic import Denoiser, GaussianMixture, per_image
from sedm_kit.checkup import Subject, bound, checkup, error_curves, frequency_bands, principal_bands, single_steps, watch
from sedm_kit.diagnostics import Trace, eps_norms
from sedm_kit.findings import about_bands, about_errors, about_normality, about_scaling, about_targets, findings, verdict, with_error
from sedm_kit.images import write_npz
from sedm_kit.networks import EDMPrecond
from sedm_kit.noise import edm_sigmas
from sedm_kit.report import plain
from sedm_kit.sampler import sample_seeds
from sedm_kit.variance import dct_basis
from sedm_kit.worlds import load_world, world_from

KEYS = ("norms", "bands", "steps", "delta", "normality", "targets", "errors")
SIGMAS = edm_sigmas(5)
SMALL = dict(seeds=range(3_000_000, 3_000_040), images=40, errors=30, micro_batch=20, progress=False)
ARMS = {"euler": {"plain": {}, "ES": dict(scaling=1.05)}, "heun": {"plain": {}}}


@pytest.fixture(scope="module")
def world():
    return load_world("digits")


@pytest.fixture(scope="module")
def found(world):
    return checkup(world, SIGMAS, arms=ARMS, **SMALL)


def smooth_world(folder, c, size, denoiser=None, n=60):
    "A world of smooth random images in an npz, with a linear denoiser of our own and no discriminators."
    images = torch.nn.functional.interpolate(torch.randn(n, c, 2, 2, generator=torch.Generator().manual_seed(0)), size=size, mode="bilinear").clamp(-1, 1)
    write_npz(folder / "images.npz", ((images + 1) * 127.5).round().to(torch.uint8))
    return world_from(folder / "images.npz", denoiser or Denoiser(lambda x, sigma, class_labels=None: x * 0.2 / (0.2 + per_image(sigma, x.ndim, x) ** 2), (c, size, size), sigma_data=0.45))


def test_every_diagnostic_is_there_and_json_able(found):
    assert not found["failed"] and not found["skipped"] and all(key in found for key in KEYS)
    json.dumps(plain(found), allow_nan=False)
    assert set(found["norms"]) == {"euler", "heun"} and set(found["norms"]["heun"]["arms"]["plain"]) == {0, 1}
    assert set(found["bands"]["euler"]) == {"plain", "ES"} and set(found["bands"]["euler"]["plain"]) == {"all directions", "principal axes", "frequencies"}
    assert set(found["normality"]["kinds"]) == {"one step", "one step, held-out images", "free run, 8 Heun steps"}
    for run in found["norms"]["euler"]["arms"].values():
        assert all((run[0][f"{key}_error"] > 0).all() for key in ("eps", "slope", "ratio", "variance"))


def test_the_same_seeds_give_the_same_numbers_whatever_else_runs(world, found):
    again = checkup(world, SIGMAS, arms={"euler": {"plain": {}}}, **SMALL)
    for key in ("steps", "delta", "normality", "targets", "errors"):
        assert json.dumps(plain(again[key])) == json.dumps(plain(found[key]))
    torch.testing.assert_close(again["bands"]["euler"]["plain"]["frequencies"]["ratio"], found["bands"]["euler"]["plain"]["frequencies"]["ratio"], rtol=0, atol=0)


def test_bands_are_variances_of_the_samples(world):
    subject = Subject(world, SIGMAS, range(3_000_000, 3_000_040), {"euler": {"plain": {}}}, micro_batch=20)
    curve, states = watch(subject, "euler", "plain")[1], []
    sample_seeds(world.denoiser, subject.seeds, SIGMAS, solver="euler", micro_batch=4, callback=lambda info: states.append(info["x"]) if info["step"] == 4 else None)
    x, truth = torch.cat(states).flatten(1), world.train.double().flatten(1)
    by_hand = x.var(0, correction=0).mean() / (truth.var(0, correction=0).mean() + SIGMAS[4] ** 2)
    torch.testing.assert_close(curve["all directions"]["ratio"][-1, 0], by_hand, rtol=1e-4, atol=0)
    torch.testing.assert_close(curve["frequencies"]["move"].sum(0), curve["frequencies"]["ratio"][-1] - curve["frequencies"]["ratio"][0])


def test_traces_of_a_study_are_not_sampled_again(world):
    trace = Trace(world.train.double().mean(0))
    sample_seeds(world.denoiser, range(30), SIGMAS, solver="heun", micro_batch=30, callback=trace)
    found = checkup(world, SIGMAS, arms={"heun": {"plain": {}}}, traces={"heun": {"plain": trace}}, **SMALL)
    torch.testing.assert_close(found["norms"]["heun"]["arms"]["plain"][1]["eps"], trace.column("eps", 1)[0], rtol=0, atol=0)
    assert found["norms"]["heun"]["n"] == 30


def test_bad_input_surfaces_and_costs_only_itself(world):
    empty = checkup(world, SIGMAS, arms={"euler": {"plain": {}}}, traces={"euler": {"plain": Trace()}}, **SMALL)
    assert set(empty["failed"]) == {"norms"} and "the trace holds no evaluation of stage 0" in empty["failed"]["norms"]
    trace = Trace(world.train.double().mean(0))
    sample_seeds(world.denoiser, range(10), SIGMAS, solver="euler", micro_batch=10, callback=trace)
    other = checkup(world, SIGMAS, arms={"euler": {"plain": {}}}, traces={"euler": {"plain": trace}}, training={"euler": eps_norms(world.denoiser, world.train[:50], edm_sigmas(4))}, **SMALL)
    assert "measured on different noise levels" in other["failed"]["norms"] and all(key in other for key in KEYS[1:])
    assert findings(other) and not any("norm of ε" in said["claim"] for said in findings(other))


def test_a_denoiser_that_breaks_late_is_reported(world):
    def broken(x, sigma, class_labels=None):
        if len(x) == 7:
            raise RuntimeError("out of memory")
        return world.denoiser(x, sigma)
    broken.img_channels, broken.img_resolution = 1, 8
    mine = SimpleNamespace(**{name: getattr(world, name) for name in ("name", "train", "held_out", "shape", "train_labels", "held_out_labels", "card")}, denoiser=broken)
    found = checkup(mine, SIGMAS, **SMALL | {"micro_batch": 7})
    assert "RuntimeError: out of memory" in found["failed"]["steps"] and "targets" in found and not set(found["failed"]) & set(found)


@pytest.mark.parametrize("wrong, message", [(dict(images=4), "at least 8 images and 4 seeds"), (dict(seeds=range(2)), "got 40 and 2")])
def test_too_little_to_measure_is_refused(world, wrong, message):
    with pytest.raises(ValueError, match=message):
        checkup(world, SIGMAS, **SMALL | wrong)


def test_a_grid_that_is_none_is_refused(world):
    with pytest.raises(ValueError):
        checkup(world, [1.0, 2.0, 0.0], **SMALL)


@pytest.mark.parametrize("size, left_out", [(8, set()), (20, {"principal axes", "ideal denoiser"})])
def test_own_images_of_any_size(size, left_out, tmp_path):
    found = checkup(smooth_world(tmp_path, 3, size), SIGMAS, **SMALL | {"images": 30})
    assert not found["failed"] and left_out <= set(found["skipped"]) and all(str(3 * size**2) in found["skipped"][name] for name in left_out)
    assert ("principal axes" in found["bands"]["euler"]["plain"]) == (not left_out) and found["normality"]["tests"] == min(512, 3 * size**2)
    assert findings(found)


def test_a_network_for_larger_images(tmp_path):
    torch.manual_seed(0)
    net = EDMPrecond(32, 3, model_type="PatchNet", sigma_data=0.45, sigma_max=40.0, channels=8, blocks=1).eval()  # random: nobody trained it
    found = checkup(smooth_world(tmp_path, 3, 32, net, n=20), edm_sigmas(3, sigma_max=40.0), range(3_000_000, 3_000_006), images=8, errors=8, micro_batch=8, progress=False)
    assert not found["failed"] and all(key in found for key in KEYS) and found["normality"]["tests"] == 512 and found["normality"]["pixels"] == 3072
    assert "3072 x 3072 eigenproblem" in found["skipped"]["principal axes"] and "3072 x 3072" in found["skipped"]["ideal denoiser"]
    assert "2 images are too few" in found["skipped"]["normality, one step, held-out images"]
    assert set(found["bands"]["heun"]["plain"]) == {"all directions", "frequencies"} and set(found["delta"]) == {"trained network"}
    assert findings(found) and not any(said["verdict"] == "holds" for said in findings(found) if "Gaussian" in said["claim"])  # eight errors show nothing
    json.dumps(plain(found), allow_nan=False)


def test_levels_that_a_denoiser_does_not_know_are_left_out(world):
    narrow = Denoiser(lambda x, sigma, class_labels=None: world.denoiser(x, sigma), (1, 8, 8), sigma_data=0.75, sigma_min=0.01, sigma_max=10.0)
    mine = SimpleNamespace(**{name: getattr(world, name) for name in ("train", "held_out", "train_labels", "held_out_labels")}, denoiser=narrow)
    subject = Subject(mine, edm_sigmas(8), range(3_000_000, 3_000_008), {}, images=20)
    assert subject.knows(10.0) and not subject.knows(10.1) and subject.knows(torch.tensor([0.001, 0.01, 11.0])).tolist() == [False, True, False]
    sigma = error_curves(subject)["parts"]["training images"]["sigma"]
    assert len(sigma) and sigma.max() <= 10 and sigma.min() >= 0.01


def test_labels_reach_a_denoiser_with_classes():
    images, labels = torch.randn(12, 1, 4, 4), torch.arange(12) % 3
    seen = []
    D = bound(lambda x, sigma, class_labels: seen.append((class_labels, sigma)) or x, labels, batch=5)
    torch.testing.assert_close(D(images, torch.arange(12.0)), images)
    assert torch.equal(torch.cat([label for label, _ in seen]), labels) and torch.equal(torch.cat([sigma for _, sigma in seen]), torch.arange(12.0)) and len(seen) == 3
    with pytest.raises(ValueError, match="labels of 12 images, got 4"):
        D(images[:4], 1.0)


def test_an_exact_denoiser_obeys_the_bayes_identity():
    mixture = GaussianMixture(torch.zeros(1, 1, 4, 4), torch.ones(1), std=0.7)
    images = mixture.sample(3000, generator=torch.Generator().manual_seed(0))
    world = SimpleNamespace(train=images, held_out=images[:500], train_labels=None, held_out_labels=None, denoiser=mixture.denoiser())
    part = single_steps(Subject(world, edm_sigmas(8, sigma_max=4.0), range(3_000_000, 3_000_008), {}, images=3000))["training images"]
    assert ((part["change"] - part["bayes"]).abs() < 4 * part["error"]).all() and (part["inner"].abs() < 4 * part["inner_error"]).all()


def test_bands_cover_every_direction_once():
    bands, labels = principal_bands(torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5, 0.0]))
    assert [k for band in bands for k in range(6)[band]] == list(range(5)) and labels[0] == "axis 1"
    assert principal_bands(torch.tensor([1.0, 0.0]))[1] == ["axis 1"]
    rings, names = frequency_bands(dct_basis((3, 8, 8))[1])
    assert torch.cat(rings).sort().values.tolist() == list(range(192)) and len(names) == len(rings) == 4


def test_sentences_follow_the_numbers(found):
    norms = copy.deepcopy(found["norms"]["euler"])
    restored, far = norms["arms"]["ES"][0], norms["arms"]["plain"][0]
    far["ratio"], restored["ratio"] = torch.full_like(far["ratio"], 1.3), torch.ones_like(far["ratio"])
    assert about_scaling("euler", norms)[0]["verdict"] == "holds"
    restored["ratio"] = torch.full_like(far["ratio"], 1.6)
    assert about_scaling("euler", norms)[0]["verdict"] == "does not hold" and "0.60" in about_scaling("euler", norms)[0]["evidence"]
    restored["ratio"] = far["ratio"]
    assert about_scaling("euler", norms)[0]["verdict"] == "undecided"
    norms["scaling"]["ES"] = 1.0
    assert about_scaling("euler", norms) == []


@pytest.mark.parametrize("share, power, decided", [([0.06, 0.05], 0.6, "holds"), ([0.06, 0.05], 0.1, "undecided"), ([0.6, 0.05], 0.6, "holds in part"), ([0.6, 0.05], 0.1, "does not hold"), ([0.6, 0.2], 0.6, "does not hold")])
def test_silence_is_no_proof_without_power(share, power, decided):
    two = lambda *values: torch.tensor(values, dtype=torch.float64)
    curve = {"sigma": two(0.1, 1.0), "share": two(*share), "share_error": two(0.02, 0.02), "chance": two(0.05, 0.05), "chance_spread": two(0.03, 0.03), "effect": two(0.001, 0.002), "effect_error": two(0.001, 0.001), "n": 100}
    said = about_normality({"kinds": {"one step": curve}, "power": {"Laplace": (power, 0.01)}, "tests": 64})[0]
    assert said["verdict"] == decided and "n = 100" in said["evidence"] and ("might not stand out" in said["evidence"]) == (power == 0.1)


@pytest.mark.parametrize("low, high, error, decided", [(1.0, 0.8, 0.01, "holds"), (1.014, 0.902, 0.022, "undecided"), (0.9715, 0.9246, 0.01, "holds in part"), (0.95, 0.75, 0.01, "holds in part"), (0.785, 0.736, 0.008, "does not hold"), (0.8, 0.9, 0.01, "does not hold"),
                                                       (1.0, 1.1, 0.01, "does not hold"), (0.95, 0.8, 0.1, "undecided"), (0.96, 0.85, 0.03, "undecided"), (1.0, 1.0, 0.01, "undecided")])
def test_low_frequencies_that_are_lost_too_count(low, high, error, decided):
    row = lambda *values: torch.tensor([values], dtype=torch.float64)
    said = about_bands("euler", {"plain": {"frequencies": {"ratio": row(low, 0.8, high), "error": row(error, error, error), "labels": ["low", "middle", "high"]}}})[0]
    assert said["verdict"] == decided and "% at high" in said["evidence"] and ("as much as the highest" in said["evidence"]) == (low < 1 and high < 1 - 2 * error)


@pytest.mark.parametrize("power, error, decided", [(0.0, 0.01, "does not hold"), (0.07, 0.01, "does not hold"), (2.0, 0.01, "holds"), (1.0, 0.5, "undecided")])
def test_errors_must_grow_as_the_amplification_does(power, error, decided):
    sigma = torch.tensor([80.0, 10.0, 1.0], dtype=torch.float64)
    x0 = 0.3 * (sigma / 10) ** power
    part = {"sigma": sigma, "x0": x0, "x0_error": error * x0, "eps": x0 / sigma**2, "eps_error": error * x0 / sigma**2}
    said = about_errors({"parts": {"training images": part}, "data_variance": 0.3})
    assert [one["verdict"] for one in said] == [decided] and "from 100 to 6400" in said[0]["evidence"]
    assert about_errors({"parts": {"training images": {key: value[1:] for key, value in part.items()}}, "data_variance": 0.3}) == []  # does not reach low SNR


@pytest.mark.parametrize("few, many, error, decided", [(0.498, 0.2, 0.01, "does not hold"), (0.99, 0.0025, 0.0001, "holds"), (0.498, 0.0025, 0.0001, "holds in part"), (0.8, 0.2, 0.3, "undecided")])
def test_a_small_reference_tells_one_over_n_from_one_over_n_less_one(few, many, error, decided):
    pair = lambda *values: torch.tensor(values, dtype=torch.float64)
    targets = {"references": [2, 200, 400], "n": 400, "sigma": pair(100.0, 1.0), "v_dsm": pair(1.0, 5.0), "v_dsm_error": pair(0.0, 0.0), "v_stf": torch.stack([pair(few, 5.0), pair(0.0025, 5 * many), pair(0.0, 0.0)]), "v_stf_error": torch.full((3, 2), error).double() * pair(1.0, 5.0)}
    said = about_targets(targets)[0]
    assert said["verdict"] == decided and "has 0.499" in said["evidence"] and "n = 200" in said["evidence"]
    assert about_targets(targets | {"references": [400]}) == []


def test_every_sentence_has_a_number_and_an_error(found):
    for said in findings(found):
        assert said["verdict"] in ("holds", "does not hold", "holds in part", "undecided")
        assert "±" in said["evidence"] or "chance" in said["evidence"] or "n = " in said["evidence"], said
    assert verdict(True, True) == "holds in part" and with_error(-1.2345, 0.012) == "−1.234 ± 0.012" and "nan" in with_error(math.nan, 1.0)
