"""Figures of tuning: what is drawn where there is no optimum to draw."""
import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest

from sedm_kit.response import Fit, polynomial
from sedm_kit.tuning import ridge
from sedm_kit.tuning_plots import fitted_ridge, heat_map, ridge_plot

matplotlib.use("agg")


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def surface(best, noise=0.01):
    "Parabolas in lambda whose lowest points are given, one per weight, with ten groups."
    lambdas, weights = np.linspace(0.98, 1.02, 5), np.arange(float(len(best)))
    values = 1 + 100 * (lambdas[:, None] - np.array(best)) ** 2
    parts = values[..., None] + noise * np.random.default_rng(0).normal(size=10)
    return {"lambdas": lambdas, "weights": weights, "parts": {"pixel": parts}, "n": 1000}


def test_weights_at_either_end_of_the_grid_are_arrows():
    ax = heat_map(surface([1.05, 1.003, 0.95]))
    markers = {line.get_marker(): line.get_xydata().tolist() for line in ax.lines if line.get_marker() in "<>"}
    assert markers == {"<": [[0.98, 2.0]], ">": [[1.02, 0.0]]}
    assert ax.containers[0].lines[0].get_xydata()[:, 1].tolist() == [1.0]


def test_a_whole_ridge_has_no_arrows():
    ax = heat_map(surface([1.012, 1.003, 0.995]))
    assert not [line for line in ax.lines if line.get_marker() in ("<", ">")]


def test_ridge_plot_names_the_weights_that_it_leaves_out():
    drawn = ridge_plot({"one": ridge(surface([1.05, 1.003, 0.995]))})
    assert "not shown: w = 0" in drawn.get_legend().get_texts()[0].get_text()
    whole = ridge_plot({"one": ridge(surface([1.012, 1.003, 0.995]))})
    assert "not shown" not in whole.get_legend().get_texts()[0].get_text()


def quadratic(function, names=("lambda", "w", "w_later")):
    "A fit whose coefficients are those of this function of z; its lowest point is not looked for."
    z = np.random.default_rng(0).normal(size=(40, len(names)))
    center, half = np.array([1.0, 2.0, 0.5]), np.array([0.05, 1.0, 0.5])
    return Fit(list(names), center, half, 100, z, z, np.linalg.lstsq(polynomial(z), function(*z.T), rcond=None)[0], best=center + 0.2 * half)


def test_fitted_ridge_follows_the_valley_with_the_others_at_their_best():
    line = fitted_ridge(quadratic(lambda a, b, c: (a + 0.5 * b - 0.25 * c) ** 2 + 0.1 * b**2))
    a, b = (line - np.array([1.0, 2.0])).T / np.array([[0.05], [1.0]])
    np.testing.assert_allclose(a, -0.5 * b + 0.25 * 0.2, atol=1e-8)
    assert len(line) == 60


def test_fitted_ridge_ends_where_the_region_ends_and_is_empty_on_a_hill():
    steep = fitted_ridge(quadratic(lambda a, b, c: (a + 3 * b) ** 2 + b**2 + c**2))
    assert 0 < len(steep) < 60 and (abs(steep[:, 0] - 1) <= 1.2 * 0.05 + 1e-9).all()
    assert fitted_ridge(quadratic(lambda a, b, c: -(a**2) + b**2 + c**2)).shape == (0, 2)
