"The tuner without a browser: every control, every button, every error, and what must stay flat."
import gc
import math
import os
import threading
from dataclasses import replace

import ipywidgets
import numpy as np
import pytest
import torch
from sedm_kit.live import Stale
from sedm_kit.live_controls import Number
from sedm_kit.previews import Knobs, Previews, automatic_lambda, best_found, code_of, first_levels, measured_surface, sampler_arguments, stored_surface, window_text
from sedm_kit.sampler import SOLVERS, Churn, LinearScaling, sample_seeds
from sedm_kit.widgets import OWN, Tuner, distance_table
from sedm_kit.worlds import load_world, world_from

DIGITS = load_world("digits")


# ---- the pure part

def test_a_preview_is_what_the_sampler_makes():
    knobs = Knobs(scaling=1.02, w=1.0, seed=5)
    found = Previews(DIGITS).run(knobs)
    made = sample_seeds(DIGITS.denoiser, range(5, 21), shape=DIGITS.shape, micro_batch=16, **sampler_arguments(knobs, DIGITS))
    torch.testing.assert_close(found.images, made, rtol=0, atol=0)
    plain = sample_seeds(DIGITS.denoiser, range(5, 21), shape=DIGITS.shape, micro_batch=16, **sampler_arguments(Knobs(seed=5), DIGITS))
    torch.testing.assert_close(found.plain.images, plain, rtol=0, atol=0)


def test_previews_remember_and_forget():
    previews = Previews(DIGITS, size=3)
    first = previews.run(Knobs())
    assert previews.run(Knobs()) is first
    for k in range(4):
        previews.run(Knobs(scaling=1.01 + 0.01 * k))
    assert len(previews.kept.kept) == 3


def test_a_check_that_raises_leaves_nothing_half_done():
    previews, asked = Previews(DIGITS), []
    def check():
        asked.append(1)
        if len(asked) > 5:
            raise Stale
    with pytest.raises(Stale):
        previews.run(Knobs(), check=check)
    assert not previews.kept.kept and previews.run(Knobs()).n == 16


@pytest.mark.parametrize("knobs", [Knobs(scaling=LinearScaling(1.01, -0.001)), Knobs("heun", 9, tuple(np.linspace(1.0, 1.02, 9).tolist()), 1.0, 0.5, (0.05, 0.7)),
                                   Knobs("rk3", 6, guide="euler", w=0.7), Knobs("euler", 12, churn=Churn(3.0, 0.05, 50.0, 1.01), seed=3)])
def test_code_makes_the_same_images(knobs):
    made = {}
    exec(code_of(knobs, DIGITS), made)
    torch.testing.assert_close(made["images"], Previews(DIGITS).run(knobs).images, rtol=0, atol=0)


def test_norms_are_compared_at_the_levels_after_churn():
    sigmas = sampler_arguments(Knobs(), DIGITS)["sigmas"]
    assert torch.equal(first_levels(sigmas, Churn(), DIGITS.denoiser), sigmas)
    raised = first_levels(sigmas, Churn(4.0), DIGITS.denoiser)
    torch.testing.assert_close(raised[:-1], sigmas[:-1] * (1 + 4 / 18))
    found = Previews(DIGITS).run(Knobs(churn=Churn(4.0, 0.05, 50.0)))
    torch.testing.assert_close(found.norm["sigma"], torch.where((sigmas[:-1] >= 0.05) & (sigmas[:-1] <= 50), sigmas[:-1] * (1 + 4 / 18), sigmas[:-1]))


def test_surfaces_and_choices():
    surface = stored_surface(DIGITS, Knobs())
    i, j = np.unravel_index(surface["pixel"].argmin(), surface["pixel"].shape)
    best = best_found(Knobs(steps=18, seed=9), surface)
    assert best.w == surface["weights"][j] and abs(best.scaling - surface["lambdas"][i]) < 0.011 and best.seed == 9
    for other in (dict(churn=Churn(1.0)), dict(guide="heun"), dict(window=(0.05, 1.0)), dict(w_later=0.5), dict(steps=17)):
        assert stored_surface(DIGITS, replace(Knobs(w=1.0), **other)) is None
    assert stored_surface(DIGITS, Knobs(scaling=1.03, w=2.0, seed=5)) is not None
    assert 1.02 < automatic_lambda(Knobs(), DIGITS).scaling < 1.035 < automatic_lambda(Knobs(steps=10), DIGITS).scaling


def test_measuring_a_surface_tells_and_stops():
    told = []
    found = measured_surface(DIGITS, Knobs("rk3", 2), told.append)
    assert found["pixel"].shape == (5, 1) and abs(told[-1] - 1) < 1e-9 and found["n"] == 200  # no discriminator for rk3: one weight
    def stop(share):
        raise Stale
    with pytest.raises(Stale):
        measured_surface(DIGITS, Knobs(), stop)


def test_large_images_are_compared_in_features():
    images = torch.rand(40, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    world = world_from(images, lambda x, sigma, class_labels=None: x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2), name="large")
    found = Previews(world).run(Knobs(steps=2, scaling=1.1), 128)
    assert set(found.distances) == {"feature"}
    surface = measured_surface(world, Knobs(steps=2))
    assert "pixel" not in surface and surface["feature"].shape == (5, 1)
    assert 0.97 <= best_found(Knobs(steps=2), surface).scaling <= 1.05
    with pytest.raises(ValueError, match="too large for their spectrum"):
        automatic_lambda(Knobs(), world)


def test_window_in_words():
    assert window_text(Knobs(), DIGITS) == "σ from 0.0447 to 3: 6 of 18 steps would be guided"  # where the discriminator was trained, too
    assert window_text(Knobs(w=1.0, window=(0.98, 0.99)), DIGITS).endswith("0 of 18 steps guided")


# ---- a number

def test_number_slides_types_and_refuses_nothing():
    number = Number("x", 2, 0, 10)
    assert isinstance(number.slider, ipywidgets.IntSlider) and isinstance(number.value, int)
    number.text.value = 2.7
    assert number.value == 2.7  # kept, to be refused by whoever needs an integer
    number.text.value = 3.0
    assert number.value == 3 and isinstance(number.value, int)
    number.slider.value = 4
    assert (number.value, number.text.value) == (4, 4)
    number.text.value = 40
    assert (number.value, number.slider.value) == (40, 10)
    number.value = math.nan
    assert math.isnan(number.value) and number.text.value == 40
    number.switch(False, "no reason")
    assert number.text.disabled and number.slider.disabled and "no reason" in number.slider.tooltip
    number.switch(True)
    assert not number.text.disabled and "off" not in number.slider.tooltip


# ---- the tuner

@pytest.fixture(scope="module")
def tuner(tmp_path_factory):
    return Tuner("digits", counts=(16, 128), folder=tmp_path_factory.mktemp("figures"))


@pytest.fixture(autouse=True)
def fresh(request):
    "Every test starts from the first setting."
    if "tuner" in request.fixturenames:
        tuner = request.getfixturevalue("tuner")
        tuner.set(lambda: setattr(tuner.controls.world, "value", "digits"))
        tuner.press_reset()
        tuner.view.value = "images"
        tuner.wait(60)


def after(tuner, change):
    "What is shown after a change, with the pictures before it."
    before = {name: getattr(tuner, name).value for name in ("images", "curves", "map")}
    change()
    tuner.wait(60)
    return tuner.shown[0].knobs, {name for name in before if getattr(tuner, name).value != before[name]}


CHANGES = {
    "lambda": (lambda c: setattr(c.lam.slider, "value", 1.03), dict(scaling=1.03), {"images", "curves", "map"}),
    "w": (lambda c: setattr(c.w.text, "value", 1.5), dict(w=1.5), {"images", "curves", "map"}),
    "steps": (lambda c: setattr(c.steps.slider, "value", 12), dict(steps=12), {"images", "curves", "map"}),
    "seed": (lambda c: setattr(c.seed.text, "value", 40), dict(seed=40), {"images", "curves"}),
    "linear": (lambda c: (setattr(c.shape, "value", "linear"), setattr(c.slope.slider, "value", 0.001)), dict(scaling=LinearScaling(1.0, 0.001)), {"images", "curves", "map"}),
    "churn": (lambda c: setattr(c.s_churn.slider, "value", 5.0), dict(churn=Churn(5.0, 0.0, 80.0, 1.0)), {"images", "curves", "map"}),
    "noise of churn": (lambda c: (setattr(c.s_churn.slider, "value", 5.0), setattr(c.s_noise, "value", 1.01), setattr(c.s_min, "value", 0.05), setattr(c.s_max, "value", 50.0)), dict(churn=Churn(5.0, 0.05, 50.0, 1.01)), {"images", "curves", "map"}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_controls_lead_to_their_knobs(tuner, name):
    change, expected, pictures = CHANGES[name]
    knobs, changed = after(tuner, lambda: change(tuner.controls))
    assert knobs == replace(Knobs(), **expected) and changed >= pictures


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver(tuner, solver):
    knobs, _ = after(tuner, lambda: setattr(tuner.controls.solver, "value", solver))
    assert knobs.solver == solver and f"{solver}, 18 steps" in tuner.status.value
    assert tuner.controls.w.text.disabled == (solver not in DIGITS.log_ratio)


def test_guidance_of_another_solver(tuner):
    tuner.controls.w.value = 1.0
    tuner.controls.solver.value = "midpoint"
    assert tuner.wait(60).shown[0].knobs.w == 0 and "no discriminator for midpoint" in tuner.controls.window_note.value  # a weight that is off counts as 0
    tuner.controls.guide.value = "euler"
    assert tuner.wait(60).shown[0].knobs == Knobs("midpoint", w=1.0, guide="euler") and "steps guided" in tuner.controls.window_note.value
    tuner.controls.w_later.value = 0.5
    assert tuner.wait(60).shown[0].knobs.w_later == 0.5
    assert "no map was measured" in tuner._surface(tuner.request)[1] and "w later" in tuner._surface(tuner.request)[1]
    tuner.controls.window.value = (0.2, 0.5)
    assert tuner.wait(60).shown[0].knobs.window == (0.2, 0.5)
    tuner.controls.guide.value = OWN


def test_handles_per_step(tuner):
    tuner.controls.lam.value = 1.01
    tuner.controls.shape.value = "per step"
    assert tuner.wait(60).shown[0].knobs.scaling == (1.01,) * 18 and len(tuner.controls.handles.children) == 18
    tuner.controls.handles.children[17].value = 1.05
    assert tuner.wait(60).shown[0].knobs.scaling == (1.01,) * 17 + (1.05,)
    tuner.controls.steps.value = 35
    table = tuner.wait(60).shown[0].knobs.scaling
    assert len(table) == 35 and table[0] == 1.01 and table[-1] == 1.05 and max(table[:32]) < 1.02  # the same curve
    tuner.press_reset()
    tuner.controls.lam.value = 1.2
    tuner.controls.shape.value = "per step"
    assert tuner.wait(60).shown[0].knobs.scaling == (1.2,) * 18  # from the lambda that was there, not from old handles


def test_handles_do_not_pile_up(tuner):
    tuner.controls.shape.value = "per step"
    tuner.wait(60)
    before = len(ipywidgets.widgets.widget._instances)
    for n in (17, 18) * 8:
        tuner.controls.steps.value = n
    tuner.wait(60)
    assert len(ipywidgets.widgets.widget._instances) <= before + 10


def test_inert_knobs_make_no_other_run(tuner):
    tuner.controls.window.value, tuner.controls.guide.value = (0.3, 0.5), "heun"
    assert tuner.wait(60).shown[0].knobs == Knobs() and "would be guided" in tuner.controls.window_note.value
    tuner.controls.w_later.value = 2.0
    assert tuner.wait(60).shown[0].knobs == Knobs() and tuner.controls.w_later.text.disabled  # Euler asks once per step
    tuner.controls.guide.value = "euler"
    tuner.controls.w.value = 1.0
    assert tuner.wait(60).shown[0].knobs.guide is None  # naming the solver's own is the same as leaving it

def test_views(tuner):
    tuner.controls.lam.value = 1.05
    tuner.wait(60)
    knobs, changed = after(tuner, lambda: setattr(tuner.view, "value", "difference to plain"))
    assert changed == {"images"} and knobs.scaling == 1.05


def test_worlds(tuner):
    knobs, changed = after(tuner, lambda: setattr(tuner.controls.world, "value", "patches"))
    assert changed == {"images", "curves", "map"} and tuner.read().world == "patches"


@pytest.mark.parametrize("change, words", [
    (lambda c: setattr(c.lam.text, "value", 0.0), "lambda must be finite and positive"),
    (lambda c: setattr(c.lam, "value", math.nan), "got nan"),
    (lambda c: setattr(c.lam.text, "value", -1.0), "got -1"),
    (lambda c: setattr(c.steps.text, "value", 0), "steps must be an integer from 1 to 200, got 0"),
    (lambda c: setattr(c.steps.text, "value", 5000), "got 5000"),
    (lambda c: setattr(c.seed.text, "value", -4), "the seed must be an integer that is not negative, got -4"),
    (lambda c: setattr(c.w, "value", math.inf), "guidance weight must be a finite number"),
    (lambda c: (setattr(c.w, "value", 1.0), setattr(c.window, "value", (0.5, 0.5))), "0 &lt;= low &lt; high"),
    (lambda c: (setattr(c.s_churn, "value", 2.0), setattr(c.s_noise, "value", -1.0)), "not negative"),
    (lambda c: (setattr(c.solver, "value", "ab2"), setattr(c.s_churn, "value", 2.0)), "fresh noise"),
])
def test_bad_input_is_told_and_the_last_good_picture_stays(tuner, change, words):
    picture = tuner.images.value
    tuner.set(lambda: change(tuner.controls))
    assert words in tuner.wait(60).status.value and 'role="alert"' in tuner.status.value and tuner.images.value == picture
    tuner.press_reset()
    assert 'role="status"' in tuner.wait(60).status.value


def test_buttons(tuner):
    tuner.buttons["automatic λ"].click()
    assert tuner.wait(60).shown[0].knobs.scaling == automatic_lambda(Knobs(), DIGITS).scaling and "Automatic λ" in tuner.status.value
    tuner.controls.lam.value = 1.001
    assert "Automatic" not in tuner.wait(60).status.value
    tuner.buttons["best found"].click()
    assert tuner.wait(60).shown[0].knobs == best_found(Knobs(), stored_surface(DIGITS, Knobs()))
    tuner.buttons["copy as code"].click()
    assert "scaling=1.0128" in tuner.code.value and tuner.code.layout.display is None
    tuner.buttons["copy as code"].click()
    assert tuner.code.layout.display == "none"
    for k in (1, 2):
        tuner.buttons["save figure"].click()
        assert (tuner.folder / f"sedm_tuner_{k:03}.png").read_bytes() == tuner.snapshot() and "saved" in tuner.status.value
    tuner.controls.w.value = 2.0
    tuner.buttons["automatic λ"].click()
    assert tuner.wait(60).shown[0].knobs.w == 2.0  # lambda only
    tuner.buttons["copy as code"].click()
    tuner.controls.lam.value = 1.04
    assert "scaling=1.04," in tuner.wait(60).code.value  # it follows
    tuner.buttons["measure surface"].click()
    assert "comes with a map for this setting" in tuner.status.value
    tuner.controls.world.value = "patches"
    tuner.buttons["best found"].click()
    assert "at the edge of the map" in tuner.wait(60).status.value
    tuner.buttons["reset"].click()
    assert tuner.wait(60).shown[0].knobs == Knobs() and tuner.read().world == "digits"
    tuner.buttons["copy as code"].click()


def test_a_worker_never_touches_the_controls(tuner, monkeypatch):
    "The end of a measurement, while the kernel moves controls: nothing may be left switched off."
    tuner.controls.steps.value = 3
    tuner.wait(60)
    threads, quietly = set(), tuner.set_quietly
    monkeypatch.setattr(tuner, "set_quietly", lambda change: (threads.add(threading.current_thread()), quietly(change)))
    tuner.buttons["measure surface"].click()
    for k in range(40):
        tuner.controls.lam.value = 1.0 + 0.001 * k
        tuner.measuring.wait(0.02)
    tuner.measuring.wait(60)
    tuner.wait(60)
    assert threads == {threading.main_thread()} and not tuner.paused
    tuner.controls.lam.value = 1.015
    assert tuner.wait(60).shown[0].knobs.scaling == 1.015


def test_measure_button(tuner):
    tuner.controls.steps.value = 4
    tuner.wait(60)
    tuner.buttons["best found"].click()
    assert "press &#x27;measure surface&#x27;" in tuner.status.value
    before = tuner.map.value
    tuner.buttons["measure surface"].click()
    tuner.measuring.wait(120)
    assert "Map of digits, euler, 4 steps measured" in tuner.wait(60).status.value and tuner.map.value != before and tuner.measured.layout.visibility == "hidden"
    tuner.buttons["best found"].click()
    assert "Best found" in tuner.wait(60).status.value and tuner.shown[0].knobs != Knobs(steps=4)
    tuner.controls.steps.value = 30
    tuner.buttons["measure surface"].click()
    tuner.buttons["measure surface"].click()  # stops
    assert tuner.measuring.wait(20) and tuner.buttons["measure surface"].description == "measure surface"


def test_a_hundred_quick_moves(tuner):
    shown, show = [], tuner.show
    tuner.show = lambda result, request: (shown.append(result.knobs.scaling), show(result, request))
    try:
        for lam in np.linspace(1.0, 1.05, 100):
            tuner.controls.lam.value = round(float(lam), 4)
        tuner.wait(60)
    finally:
        del tuner.show
    assert shown[-1] == 1.05 == tuner.shown[0].knobs.scaling and tuner.shown[0].n == 128
    assert len(shown) < 100 and shown.count(1.05) == 2  # preview and full result of the last value; most others were never begun


def test_memory_and_threads_stay_flat(tuner):
    def rounds():
        for k in range(150):
            tuner.controls.lam.value = 1.0 + 0.0005 * k
            tuner.latest.wait(0.01)
        tuner.wait(60)
        gc.collect()
        return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, len(ipywidgets.widgets.widget._instances)
    rounds()
    (before, widgets), (after, later) = rounds(), rounds()
    assert widgets == later and after - before < 20 and threading.active_count() < 20 and len(tuner.all["digits"].kept.kept) <= 64


def test_a_denoiser_that_fails_or_returns_nan():
    images = DIGITS.train[:40]
    def denoiser(x, sigma, class_labels=None):
        if mood["fail"]:
            raise RuntimeError("out of memory")
        return x * math.nan if mood["nan"] else x / (1 + sigma.reshape(-1, 1, 1, 1) ** 2)
    mood = {"fail": False, "nan": False}
    tuner = Tuner(world_from(images, denoiser, name="mine"), counts=(16,))
    assert "mine" in tuner.controls.world.options and "mine" == tuner.wait(60).read().world and tuner.shown is not None
    assert tuner.controls.w.text.disabled and "this world has none" in tuner.controls.window_note.value
    mood["nan"] = True
    tuner.controls.lam.value = 1.01
    assert "NaN or infinity" in tuner.wait(60).status.value
    mood.update(nan=False, fail=True)
    tuner.controls.lam.value = 1.02
    assert "RuntimeError: out of memory" in tuner.wait(60).status.value
    mood["fail"] = False
    tuner.controls.lam.value = 1.03
    assert tuner.wait(60).shown[0].knobs.scaling == 1.03 and 'role="status"' in tuner.status.value


def test_the_table_says_what_is_resolved(tuner):
    tuner.controls.lam.value = 1.03
    text = distance_table(tuner.wait(60).shown[0])
    assert "better" in text and "128 images from seed 0" in text
    assert "as soon as nothing moves" in distance_table(tuner.all["digits"].run(Knobs(scaling=1.03)))


def test_still_picture(tuner):
    bundle = tuner._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "image/png", "application/vnd.jupyter.widget-view+json"} and len(bundle["image/png"]) > 10_000


def test_controls_are_labelled(tuner):
    for control in tuner.controls.values:
        parts = (control.slider, control.text) if isinstance(control, Number) else (control,)
        assert all(part.tooltip for part in parts)
    assert all(button.tooltip for button in tuner.buttons.values())


# ---- sedm lab

def test_lab_needs_its_extra(monkeypatch, tmp_path, capsys):
    from sedm_kit import lab
    from sedm_kit.command import main
    monkeypatch.setattr(lab, "find_spec", lambda name: None)
    assert main(["lab", "--folder", str(tmp_path / "new")]) == 2
    assert "pip install 'sedm_kit[lab]'" in capsys.readouterr().err and not (tmp_path / "new").exists()


def test_lab_places_its_notebook_and_starts(monkeypatch, tmp_path, capsys):
    from sedm_kit import lab
    from sedm_kit.command import main
    called = []
    monkeypatch.setattr(lab, "find_spec", lambda name: True)
    monkeypatch.setattr(lab.subprocess, "call", lambda command: called.append(command) or len(called) - 1)
    assert main(["lab", "--folder", str(tmp_path), "--port", "9000", "--no-browser"]) == 0
    notebook = tmp_path / "tuner.ipynb"
    assert "Tuner" in notebook.read_text(encoding="utf-8") and str(notebook) in called[0] and "--ServerApp.port=9000" in called[0] and "--no-browser" in called[0]
    notebook.write_text("changed")
    assert main(["lab", "--folder", str(tmp_path)]) == 2 and notebook.read_text() == "changed" and "ended with status 1" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["lab", "--folder", str(tmp_path / "file")]) == 2 and "is a file" in capsys.readouterr().err
    assert main(["lab", "--port", "0"]) == 2 and "--port" in capsys.readouterr().err
