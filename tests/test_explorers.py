"State of the explorers without a browser: every control, every button, bad values, failures, quick moves."
import base64
import gc
import html
import io
import math
import tracemalloc

import matplotlib.image
import pytest
import torch

from sedm_kit import explorers
from sedm_kit.analytic import GaussianMixture
from sedm_kit.explore import GRIDS, SCHEDULES, Grid, NetworkError, Run, Weighting, drift, repair, small_mixture, solver_errors, weights_at
from sedm_kit.explorers import KINDS, EpsilonExplorer, LogPlot, ScheduleExplorer, WeightExplorer, text_table
from sedm_kit.sampler import SOLVERS
from sedm_kit.weights import PREDICTIONS, SCHEMES

mixture = small_mixture()
MAKERS = {"epsilon": lambda: EpsilonExplorer(counts=(16, 32)), "weight": WeightExplorer, "schedule": lambda: ScheduleExplorer(count=8)}
# explorer, control, part that is moved, value, text that must be in the status line or table
MOVES = [
    ("epsilon", "scale", "slider", 0.98, "scale 0.98"), ("epsilon", "scale", "text", 1.3, "scale 1.3"), ("epsilon", "noise", "slider", 0.2, "noise 0.2"), ("epsilon", "noise", "text", 0.75, "noise 0.75"),
    ("epsilon", "level", "slider", 1.1, "told σ 1.1"), ("epsilon", "level", "text", 1.5, "told σ 1.5"), ("epsilon", "steps", "slider", 12, "12 steps"), ("epsilon", "steps", "text", 70, "70 steps"),
    ("epsilon", "lam", "slider", 1.02, "both, λ = 1.02"), ("epsilon", "lam", "text", 1.2, "both, λ = 1.2"), ("epsilon", "solver", None, "heun", "heun, 18 steps"),
    ("weight", "schedule", None, "DDPM cosine", "eps form on DDPM cosine"), ("weight", "prediction", None, "v", "v form on"), ("weight", "schemes", None, ("edm", "p2"), "p2"),
    ("weight", "k", "slider", 2.0, "0.3333"), ("weight", "k", "text", 9.0, "0.1<"), ("weight", "gamma", "slider", 2.0, "0.25<"), ("weight", "gamma", "text", 4.0, "0.0625"), ("weight", "cap", "slider", 0.5, "0.5<"),
    ("weight", "cap", "text", 0.05, "0.05<"), ("weight", "sigma_data", "slider", 1.0, ">2<"), ("weight", "sigma_data", "text", 4.0, "1.062"), ("weight", "clamp", None, True, "SNR clamped at 0.1"), ("weight", "sigma", "slider", 2.0, "the SNR is 0.25"), ("weight", "sigma", "text", 40.0, "× 40 in the image"),
    ("schedule", "grid", None, "VP", "VP, 18 steps"), ("schedule", "steps", "slider", 9, "9 steps"), ("schedule", "steps", "text", 64, "64 steps"), ("schedule", "rho", "slider", 4.0, "ρ 4,"), ("schedule", "rho", "text", 20.0, "ρ 20,"),
    ("schedule", "sigma_min", "slider", 0.05, "to 0.05"), ("schedule", "sigma_min", "text", 0.5, "to 0.5"), ("schedule", "sigma_max", "slider", 40.0, "from 40 "), ("schedule", "sigma_max", "text", 300.0, "from 300 "),
]
BAD = [
    ("epsilon", "lam", 0.0, "lambda must be finite and positive (1 is neutral), got 0.0"), ("epsilon", "lam", math.nan, "lambda must be finite and positive (1 is neutral), got nan"), ("epsilon", "scale", -1.0, "scale of a network error must be finite and positive, got -1.0"),
    ("epsilon", "noise", -0.1, "noise of a network error must be finite and not negative"), ("epsilon", "level", 0.0, "told level of a network error"), ("epsilon", "steps", 1, "N must be from 2 to 200 here, got 1"), ("epsilon", "steps", 100_000, "N must be from 2 to 200"),
    ("weight", "k", -1.0, "k must be finite and not negative, got -1.0"), ("weight", "gamma", math.nan, "gamma must be finite and not negative, got nan"), ("weight", "cap", 0.0, "cap must be positive and finite, got 0.0"), ("weight", "sigma_data", -0.5, "sigma_data must be positive and finite"),
    ("weight", "sigma", 0.0, "the noise level must be positive and finite, got 0.0"), ("schedule", "steps", 0, "N must be from 2 to 200 here, got 0"), ("schedule", "rho", 0.0, "rho must be finite and positive, got 0.0"), ("schedule", "rho", math.nan, "rho must be finite"),
    ("schedule", "sigma_min", -0.1, "0 < sigma_min < sigma_max < inf, got -0.1 and 80.0"), ("schedule", "sigma_max", 0.001, "0 < sigma_min < sigma_max"), ("schedule", "sigma_max", math.nan, "0 < sigma_min < sigma_max"),
]


def pictures(widget):
    return [picture.value for picture in vars(widget).values() if type(picture).__name__ == "Image"]


def said(widget):
    return html.unescape(widget.status.value + widget.table.value)


def move(widget, control, part, value):
    setattr(getattr(getattr(widget, control), part) if part else getattr(widget, control), "value", value)
    return widget.wait(60)


@pytest.fixture(scope="module")
def shared():
    return {name: make().wait(60) for name, make in MAKERS.items()}


@pytest.mark.parametrize("kind, control, part, value, text", MOVES)
def test_every_control_moves_picture_labels_and_values(kind, control, part, value, text):
    widget = MAKERS[kind]().wait(60)
    before, words = pictures(widget), said(widget)
    move(widget, control, part, value)
    assert getattr(widget, control).value == value and text in said(widget) and said(widget) != words and "role=\"alert\"" not in widget.status.value
    assert pictures(widget) != before and all(picture[:4] == b"\x89PNG" for picture in pictures(widget))
    if part:
        number = getattr(widget, control)
        assert number.text.value == value and number.slider.value == min(max(value, number.slider.min), number.slider.max)


@pytest.mark.parametrize("kind, control, value, text", BAD)
def test_a_bad_value_is_refused_in_words_and_the_picture_stays(shared, kind, control, value, text):
    widget = shared[kind]
    number, before, shown = getattr(widget, control), pictures(widget), widget.shown[0]
    good = number.value
    move(widget, control, "text", value)
    assert text in html.unescape(widget.status.value) and "role=\"alert\"" in widget.status.value
    assert pictures(widget) == before and widget.shown[0] == shown
    move(widget, control, "text", good)
    assert "role=\"alert\"" not in widget.status.value and widget.shown[0] == shown


def inside(widget):
    yield widget
    for child in getattr(widget, "children", ()):
        yield from inside(child)


@pytest.mark.parametrize("kind", MAKERS)
def test_controls_are_described_and_found_by_their_class(shared, kind):
    found = list(inside(shared[kind]))
    controls = [part for part in found if type(part).__name__ in ("Number", "Dropdown", "SelectMultiple", "Checkbox", "Button")]
    names = [name for part in controls for name in part._dom_classes if name.startswith("sedm-")]
    assert len(names) == len(set(names)) == len(controls) >= 6
    for part in controls:
        inner = part.text if type(part).__name__ == "Number" else part
        assert inner.description and inner.tooltip
    assert "sedm-status" in shared[kind].status._dom_classes and "Output" not in {type(part).__name__ for part in found}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_still_stands_beside_the_widget(shared, kind):
    bundle = shared[kind]._repr_mimebundle_()
    bundle = bundle[0] if isinstance(bundle, tuple) else bundle
    assert "application/vnd.jupyter.widget-view+json" in bundle
    still = matplotlib.image.imread(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert still.shape[0] > 300 and still.shape[1] >= 560 and still[..., :3].std() > 0.05
    assert base64.b64decode(bundle["image/png"]) == shared[kind].snapshot()


@pytest.mark.parametrize("kind, function", [("epsilon", "drift"), ("epsilon", "repair"), ("weight", "weight_panels"), ("schedule", "solver_errors"), ("schedule", "repair")])
def test_a_failure_is_shown_and_the_widget_stays_usable(shared, kind, function, monkeypatch):
    widget, control = shared[kind], {"epsilon": "scale", "weight": "gamma", "schedule": "rho"}[kind]
    good = getattr(widget, control).value
    def broken(*arguments, **settings):
        raise RuntimeError("the disk is full")
    with monkeypatch.context() as patch:
        patch.setattr(explorers, function, broken)
        before = pictures(widget)
        move(widget, control, "text", good * 1.01)
        assert "RuntimeError: the disk is full" in widget.status.value and "role=\"alert\"" in widget.status.value
        assert function == "repair" or pictures(widget) == before
    move(widget, control, "text", good)
    assert "role=\"alert\"" not in widget.status.value


@pytest.mark.parametrize("kind, control", [("epsilon", "scale"), ("weight", "gamma"), ("schedule", "rho")])
def test_a_hundred_quick_moves_leave_the_picture_of_the_last(kind, control):
    widget = MAKERS[kind]().wait(60)
    slider = getattr(widget, control).slider
    stops = round((slider.max - slider.min) / slider.step) + 1
    values = [slider.min + slider.step * (k % stops) for k in range(1, 101)]
    def drag():
        for value in values:
            slider.value = value
        widget.wait(60)
        gc.collect()
    drag()
    last, final = pictures(widget), widget.shown[0]
    assert values[-1] == {"epsilon": lambda: final.error.scale, "weight": lambda: final.gamma, "schedule": lambda: final.grid.rho}[kind]()
    slider.value = values[9]
    widget.wait(60)
    assert pictures(widget) != last
    slider.value = values[-1]
    assert pictures(widget.wait(60)) == last and widget.shown[0] == final
    tracemalloc.start()
    drag()
    held = tracemalloc.get_traced_memory()[0]
    for _ in range(3):
        drag()
    grown = tracemalloc.get_traced_memory()[0] - held
    tracemalloc.stop()
    assert grown < 1_000_000, grown
    assert all(len(ax.lines) <= 1 and not ax.collections for plot in vars(widget).values() if hasattr(plot, "panels") for ax in plot.panels)


# ---- epsilon

def test_numbers_and_lambdas_are_those_of_the_pure_functions(shared):
    widget = MAKERS["epsilon"]()
    move(widget, "scale", "slider", 1.02)
    runs = explorers.three_runs(NetworkError(scale=1.02), Grid(), "euler")
    for name, run in runs.items():
        found, best = drift(mixture, run, 32), repair(mixture, run, 32)
        assert all(f"{value:.{digits}f}" in widget.table.value for value, digits in ((found["variance"][-1], 3), (found["norm"][-1], 3), (found["fd"], 4)))
        assert html.escape(str(best)) in widget.table.value
        assert widget.buttons[name].description == f"repair {name}: λ = {best.scaling:.4f}" and not widget.buttons[name].disabled


@pytest.mark.parametrize("name", KINDS)
def test_a_found_lambda_is_tried_on_its_own_run(name):
    widget = MAKERS["epsilon"]()
    move(widget, "scale", "slider", 1.02)
    before = widget.curves.value
    widget.buttons[name].click()
    widget.wait(60)
    assert widget.target.value == name and widget.lam.value == widget.repairs[name].scaling and f"{name}, λ = " in widget.table.value
    assert widget.curves.value != before and widget.shown[1]["with λ"]["fd"] == pytest.approx(widget.repairs[name].after)
    assert widget.shown[1]["with λ"]["fd"] < 0.3 * widget.shown[1][name]["fd"]


def test_the_run_that_lambda_acts_on_can_be_chosen():
    widget = MAKERS["epsilon"]()
    move(widget, "lam", "slider", 1.02)
    for target in ("discretisation", "network", "both"):
        before = widget.shown[0]
        move(widget, "target", None, target)
        assert f"{target}, λ = 1.02" in widget.table.value and widget.shown[0] != before
    assert len(widget.shown[1]) == 4


def test_reset_goes_back_to_no_error():
    widget = MAKERS["epsilon"]().wait(60)
    first = widget.table.value
    for control, value in (("scale", 0.97), ("noise", 0.1), ("level", 1.1), ("lam", 1.03)):
        getattr(widget, control).slider.value = value
    widget.target.value = "network"
    widget.wait(60)
    widget.reset.click()
    widget.wait(60)
    assert widget.table.value == first and widget.shown[0].error == NetworkError() and widget.shown[0].scaling == 1
    assert "nothing to repair" in widget.table.value and widget.buttons["network"].description == "repair network" and widget.buttons["network"].disabled


def test_what_no_constant_repairs_is_said_and_its_button_is_off(monkeypatch):
    widget = MAKERS["epsilon"]()
    monkeypatch.setattr(explorers, "repair", lambda *arguments, **settings: explorers_repair_none)
    move(widget, "noise", "slider", 0.3)
    assert "no constant λ repairs it" in widget.table.value and all(button.disabled for button in widget.buttons.values())
    widget.press_repair("network")
    assert "no constant lambda repairs network" in widget.status.value and widget.lam.value == 1


explorers_repair_none = explorers.repair(mixture, Run(), 16, bounds=(0.999, 1.001))


def test_a_ruined_run_is_told():
    widget = MAKERS["epsilon"]().wait(60)
    before = widget.curves.value
    move(widget, "scale", "text", 1e300)
    assert "role=\"alert\"" in widget.status.value and widget.curves.value == before
    move(widget, "scale", "text", 1.0)
    assert "role=\"alert\"" not in widget.status.value


@pytest.mark.parametrize("kind, function", [("epsilon", "drift"), ("weight", "weight_panels"), ("schedule", "solver_errors")])
def test_a_widget_that_fails_from_the_start_can_still_be_shown(kind, function, monkeypatch):
    def broken(*arguments, **settings):
        raise RuntimeError("the disk is full")
    monkeypatch.setattr(explorers, function, broken)
    widget = MAKERS[kind]().wait(60)
    assert "the disk is full" in widget.status.value and matplotlib.image.imread(io.BytesIO(widget.still())).shape[1] == 580
    assert "image/png" in widget._repr_mimebundle_()


def test_ones_own_mixture_can_be_explored():
    own = GaussianMixture(torch.zeros(1, 1, 2, 2), [1.0], std=0.5)
    widget = EpsilonExplorer(own, counts=(16, 32)).wait(60)
    assert widget.shown[1]["both"]["fd"] == drift(own, Run(), 32)["fd"]
    assert ScheduleExplorer(own, count=8).wait(60).shown[1]["heun"]["here"] == solver_errors(own, Grid(), "heun", 8)["here"]


# ---- weights

@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_schedule_and_form_is_shown(schedule, prediction):
    widget = WeightExplorer()
    widget.schedule.value, widget.prediction.value = schedule, prediction
    widget.wait(60)
    assert widget.shown[0] == Weighting(schedule, prediction) and f"{prediction} form on {schedule}" in widget.status.value
    row = weights_at(Weighting(schedule, prediction), 1.0)["edm"]
    assert all(f"{value:.4g}" in widget.table.value for value in row.values())


def test_the_clamp_switches_its_number():
    widget = WeightExplorer().wait(60)
    assert widget.snr_min.slider.disabled and "not clamped" in widget.snr_min.slider.tooltip and widget.shown[0].snr_min is None
    widget.clamp.value = True
    move(widget, "snr_min", "slider", 0.5)
    assert not widget.snr_min.slider.disabled and widget.shown[0].snr_min == 0.5 and "SNR clamped at 0.5" in widget.status.value
    before = widget.curves.value
    move(widget, "snr_min", "text", 2.0)
    assert widget.curves.value != before and "SNR clamped at 2" in widget.status.value
    move(widget, "snr_min", "text", 0.0)
    assert "snr_min must be positive" in widget.status.value and widget.shown[0].snr_min == 2.0


def test_no_weight_at_all_is_refused():
    widget = WeightExplorer().wait(60)
    before = widget.curves.value
    move(widget, "schemes", None, ())
    assert "choose at least one weight" in widget.status.value and widget.curves.value == before
    move(widget, "schemes", None, ("debias",))
    assert widget.table.value.count("<tr>") == 2 and widget.curves.value != before


# ---- grids and solvers

@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_is_shown_with_its_lambda(grid):
    widget = MAKERS["schedule"]()
    move(widget, "grid", None, grid)
    best = repair(mixture, Run(grid=Grid(grid), solver="euler"), 64)
    assert str(best) in widget.status.value and widget.shown[0].grid == Grid(grid)
    assert widget.rho.slider.disabled == widget.rho.text.disabled == (grid != "EDM")


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_has_its_row_and_its_lambda(solver):
    widget = MAKERS["schedule"]()
    move(widget, "solver", None, solver)
    found = solver_errors(mixture, Grid(), solver, 8)
    assert f"{found['order']:.2f}" in widget.table.value and f"{found['here']:.3g}" in widget.table.value
    assert f"{solver}: {repair(mixture, Run(solver=solver), 64)}" in widget.status.value


def test_a_family_without_such_a_grid_is_left_out_unless_it_is_chosen():
    widget = MAKERS["schedule"]().wait(60)
    widget.sigma_min.text.value, widget.sigma_max.text.value = 0.5, 0.55
    widget.wait(60)
    assert set(widget._densities(widget.shown[0].grid)) == {"EDM", "VE", "iDDPM"} and "role=\"alert\"" not in widget.status.value
    move(widget, "grid", None, "VP")
    assert "sigmas must decrease strictly" in widget.status.value and "role=\"alert\"" in widget.status.value


def test_log_panels_keep_their_ends_while_a_value_moves_within_a_decade():
    plot = LogPlot(["one"], ["a", "b"], (300, 200), "value")
    draw = lambda value: plot.draw([{"a": ([1.0, 10.0], [value, 3.0], None), "b": ([2.0], [5.0], None)}])
    first = draw(1.5)
    limits = plot.limits
    assert draw(2.5) != first and plot.limits == limits and draw(1.5) == first
    draw(1e-20)
    assert plot.limits[1][0] == (-7.0, 1.0)  # eight decades from the top


def test_text_in_tables_is_text():
    assert "<script" not in text_table(["a"], [["<script>"]]) and 'scope="row"' in text_table(["a"], [["b"]])
