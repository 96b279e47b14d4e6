"What the figures of the diagnostics show: the content of their axes, and clear errors for what cannot be drawn."
from itertools import combinations

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from sedm_kit import diagnostic_plots as plots

K = 6
SIGMA = torch.logspace(1.9, -2.6, K, dtype=torch.float64)
ONE, SMALL = torch.ones(K, dtype=torch.float64), torch.full((K,), 0.01, dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_figure_at_most():
    plt.close("all")
    yield
    assert len(plt.get_fignums()) <= 1
    plt.close("all")


def run(by=1.0, guided=False):
    curve = {"sigma": SIGMA, "eps": 8 * by * ONE, "slope": 8 * ONE, "ratio": by * ONE, "variance": ONE, **({"guidance": 0.8 * ONE} if guided else {})}
    return curve | {f"{key}_error": SMALL for key in list(curve) if key != "sigma"}


NORMS = {"training": {"sigma": SIGMA, "norm": 8 * ONE, "error": SMALL}, "arms": {"plain": {0: run(), 1: run(1.1)}, "DG": {0: run(1.05, True)}}}
BANDS = {"frequencies": {"sigma": SIGMA, "ratio": torch.stack([ONE, 0.5 * ONE], 1), "error": torch.stack([SMALL, SMALL], 1), "labels": ["low", "high"]}}
STEPS = {"training images": {"sigma": SIGMA, "paper": 0.5 * ONE, "change": -0.5 * ONE, "error": SMALL, "inner": 0 * ONE, "inner_error": SMALL}}
DELTA = {"trained network": {"sigma": SIGMA, **{key: ONE for key in ("paired", "unpaired", "excess", "paired_error", "unpaired_error", "excess_error")}}}
TESTS = {"kinds": {"one step": {"sigma": SIGMA, "share": 0.4 * ONE, "share_fdr": 0.3 * ONE, "share_error": SMALL, "share_fdr_error": SMALL, "effect": SMALL, "effect_error": SMALL, "chance": 0.06 * ONE, "chance_spread": 0.02 * ONE}}, "alpha": 0.05, "band": (0.0, 0.11), "n": 100, "power": {"Laplace": (0.8, 0.01)}}
POINTS = {0.5: {"theory": SIGMA.flip(0), "median": SIGMA.flip(0), "low": -ONE, "high": ONE, "n": K}}
TARGETS = {"sigma": SIGMA, "v_dsm": ONE, "v_dsm_error": SMALL, "divergence": ONE, "n": 100, "references": [2, 8], "v_stf": torch.stack([ONE / 2, ONE / 8]), "v_stf_error": torch.stack([SMALL, SMALL]), "phases": (0.5, 5.0)}
ERRORS = {"parts": {"training images": {"sigma": SIGMA, "x0": SIGMA**2, "x0_error": SMALL, "eps": ONE, "eps_error": SMALL}}, "data_variance": 0.3}
EVERY = {"norms_plot": NORMS, "band_plot": BANDS, "step_plot": STEPS, "delta_plot": DELTA, "normality_plot": TESTS, "qq_plot": POINTS, "target_variance_plot": TARGETS, "error_plot": ERRORS}


def lines(ax):
    return {line.get_label(): line for line in ax.get_lines()}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("columns", [1, 2])
def test_every_figure_has_labelled_axes_and_readable_text(name, columns):
    figure = getattr(plots, name)(EVERY[name], columns=columns)
    figure.canvas.draw()
    for ax in (ax for ax in figure.axes if ax.axison):
        assert ax.get_xlabel() and ax.get_ylabel() and ax.get_title(loc="left") + ax.get_title()
        assert all(text.get_fontsize() >= 8 for text in (*ax.get_xticklabels(), *ax.get_yticklabels(), ax.xaxis.label, ax.yaxis.label))
    assert (figure.get_figwidth() == plots.NARROW) == (columns == 1)


@pytest.mark.parametrize("name", [name for name in EVERY if name != "qq_plot"])
def test_noise_falls_from_left_to_right(name):
    assert all(ax.xaxis_inverted() and ax.get_xscale() == "log" for ax in getattr(plots, name)(EVERY[name]).axes)


def test_norms_show_evaluations_apart_and_the_guidance_term():
    norm, ratio, slope, guidance = plots.norms_plot(NORMS).axes
    assert lines(norm)["plain, evaluation 2"].get_linestyle() == "--" and lines(norm)["plain"].get_linestyle() == "-"
    np.testing.assert_allclose(lines(ratio)["plain, evaluation 2"].get_ydata(), 1.1)
    np.testing.assert_allclose(lines(slope)["DG"].get_ydata(), 1.0)          # 8 over the training norm of 8
    np.testing.assert_allclose(lines(guidance)["DG"].get_ydata(), 0.8 / 8.4)  # over its own epsilon
    assert "plain" not in lines(guidance)
    assert len(plots.norms_plot({**NORMS, "arms": {"plain": {0: run()}}}).axes) == 3 and not plt.close()


def test_single_steps_are_drawn_where_they_say_something():
    ax = plots.step_plot(STEPS, span=(0.02, 5.0)).axes[0]
    drawn = ax.get_lines()[0].get_xdata()
    assert drawn.max() <= 5 and drawn.min() >= 0.02
    np.testing.assert_allclose(ax.get_lines()[0].get_ydata(), -1.0)  # in units of the paper's formula


def test_the_null_line_the_power_and_the_phases_are_there():
    shown = lines(plots.normality_plot(TESTS).axes[0])
    assert {"α = 0.05", "chance + 2 sd, correlated as each kind is", "if all errors were Laplace"} <= set(shown)
    np.testing.assert_allclose(shown["_chance, one step"].get_ydata(), 0.1)
    plt.close()
    borders = [line.get_xdata()[0] for line in plots.target_variance_plot(TARGETS).axes[0].get_lines() if len(line.get_xdata()) == 2]
    assert borders == [0.5, 5.0]


def test_every_kind_of_errors_has_its_own_line_of_chance_and_bands():
    two = {**TESTS, "kinds": {"one step": TESTS["kinds"]["one step"], "free run": TESTS["kinds"]["one step"] | {"chance": 0.2 * ONE}}}
    axes = plots.normality_plot(two).axes
    shown = lines(axes[0])
    np.testing.assert_allclose(shown["_chance, free run"].get_ydata(), 0.24)
    assert shown["_chance, free run"].get_color() == shown["free run"].get_color() != shown["one step"].get_color()
    assert [sum(type(drawn).__name__ == "FillBetweenPolyCollection" or type(drawn).__name__ == "PolyCollection" for drawn in ax.collections) for ax in axes] == [2, 2, 2]


def test_targets_are_held_against_the_mean_of_n_different_images():
    images = torch.randn(12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for n in (1, 2, 5, 12):  # by hand: all subsets of n
        means = images[torch.tensor(list(combinations(range(12), n)))].mean(1)
        assert abs(means.var(correction=0) / images.var(correction=0) - plots.reference_share(n, 12)) < 1e-12
    dotted = [line.get_ydata()[0] for line in plots.target_variance_plot({**TARGETS, "references": [2, 100]}).axes[1].get_lines() if len(line.get_xdata()) == 2]
    np.testing.assert_allclose(dotted, [98 / 99 / 2])  # none for all images: 0 has no place on a logarithmic axis


@pytest.mark.parametrize("name", EVERY)
def test_nothing_to_draw_is_said(name):
    empty = {"norms_plot": {**NORMS, "arms": {}}, "normality_plot": {**TESTS, "kinds": {}}, "error_plot": {**ERRORS, "parts": {}}}.get(name, {})
    with pytest.raises((ValueError, KeyError), match="nothing to draw" if name != "target_variance_plot" else "sigma"):
        getattr(plots, name)(empty)


def test_lengths_that_do_not_fit_are_said():
    with pytest.raises(ValueError, match="one label per band"):
        plots.band_plot({"frequencies": BANDS["frequencies"] | {"labels": ["one"]}})
    plt.close()
    with pytest.raises(ValueError, match=r"sigma > 0, got shapes \(5,\) and \(6,\)"):
        plots.norms_plot({**NORMS, "arms": {"plain": {0: run() | {"sigma": SIGMA[1:]}}}})
