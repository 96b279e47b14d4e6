"What the figures show: the content of the axes, not merely that they draw."
import itertools

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from sedm_kit import plots
from sedm_kit.metrics import Estimate, paired_difference

SIGMA = torch.tensor([80.0, 5.0, 0.5, 0.01], dtype=torch.float64)


@pytest.fixture(autouse=True)
def one_figure_at_most():
    "Every call opens at most one figure, and closing that leaves none behind."
    plt.close("all")
    yield
    assert len(plt.get_fignums()) <= 1
    plt.close("all")


def curves(key="ratio"):
    return {"plain": {"sigma": SIGMA, key: torch.tensor([0.6, 0.7, 0.8, 0.9]), "error": torch.full((4,), 0.02)},
            "ES": {"sigma": SIGMA.numpy(), key: [0.9, 0.8, 0.7, 0.6]}}


def legend(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def line(ax, label):
    return next(found for found in ax.get_lines() if found.get_label() == label)


def images(n=5, c=1, size=8):
    return torch.rand(n, c, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


EVERY = {
    "image_grid": lambda **ax: plots.image_grid(images(), **ax),
    "compare_grids": lambda **ax: plots.compare_grids({"plain": images(), "ES": images()}, **ax),
    "ratio_curves": lambda **ax: plots.ratio_curves(curves(), **ax),
    "variance_curves": lambda **ax: plots.variance_curves(curves(), **ax),
    "accuracy_curve": lambda **ax: plots.accuracy_curve(curves("accuracy"), **ax),
    "difference_plot": lambda **ax: plots.difference_plot({"ES − plain": (-0.1, 0.02)}, **ax),
    "drift_split_plot": lambda **ax: plots.drift_split_plot(dict(sigma=SIGMA, discretisation=[1, 2, 3, 4], network=[0, 1, 0, 1]), **ax),
    "loss_curve": lambda **ax: plots.loss_curve(dict(step=[1, 2], loss=[2.0, 1.0]), **ax),
    "sigma_grids": lambda **ax: plots.sigma_grids({"EDM": [2.0, 1.0, 0.0]}, **ax),
    "lambda_schedules": lambda **ax: plots.lambda_schedules({"ES": [1.0, 1.1]}, **ax),
}


@pytest.mark.parametrize("name", EVERY)
def test_axes_come_back_and_no_figure_leaks(name):
    found = EVERY[name]()
    assert isinstance(found, Axes) and plt.get_fignums() == [found.figure.number]
    found.figure.canvas.draw()
    plt.close(found.figure)
    assert plt.get_fignums() == []
    figure, ax = plt.subplots()
    assert EVERY[name](ax=ax) is ax and plt.get_fignums() == [figure.number]


@pytest.mark.parametrize("call", [plots.compare_grids, plots.ratio_curves, plots.accuracy_curve, plots.difference_plot, plots.sigma_grids, plots.lambda_schedules, plots.fd_bars])
def test_nothing_to_draw_is_an_error_and_opens_no_figure(call):
    with pytest.raises(ValueError, match="nothing to draw"):
        call([] if call is plots.fd_bars else {})


# ---- look

def test_samplers_keep_their_look_and_others_take_the_next():
    alone, among = plots.looks(["ES"]), plots.looks(["new", "ES", "newer"])
    assert alone["ES"] == among["ES"] == plots.SAMPLERS["ES"]
    colors = [look["color"] for look in plots.looks([*plots.SAMPLERS, *"abcde"]).values()]
    assert len(set(colors)) == len(colors)
    assert len(plots.looks([str(k) for k in range(23)])) == 23
    assert len({look["marker"] for look in plots.SAMPLERS.values()}) == len(plots.SAMPLERS)


def test_sampler_colours_stay_apart_for_colour_blind_eyes():
    simulation = {  # Machado, Oliveira & Fernandes 2009, full severity, linear RGB
        "normal": np.eye(3),
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    }

    def lab(rgb):
        xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb / [0.9505, 1, 1.089]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    def linear(color):
        rgb = np.array(to_rgb(color))
        return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)

    for eyes, matrix in simulation.items():
        seen = {name: lab(np.clip(np.array(matrix) @ linear(look["color"]), 0, 1)) for name, look in plots.SAMPLERS.items()}
        for a, b in itertools.combinations(seen, 2):
            assert np.linalg.norm(seen[a] - seen[b]) > 15, (eyes, a, b)


def test_style_changes_the_settings_and_scales_text():
    with matplotlib.rc_context():
        plots.style()
        small = plt.rcParams["font.size"]
        assert plt.rcParams["legend.frameon"] is False and plt.rcParams["figure.constrained_layout.use"]
        plots.style(1.5)
        assert plt.rcParams["font.size"] == pytest.approx(1.5 * small)


# ---- images

@pytest.mark.parametrize("c", [1, 3])
def test_mosaic_holds_every_pixel(c):
    batch = images(5, c) * 1.3  # some values outside [-1, 1]
    picture = plots.mosaic(batch, 3)
    assert picture.shape == (2 * 34, 3 * 34, c)
    for k in range(5):
        row, column = divmod(k, 3)
        tile = picture[row * 34 + 1: row * 34 + 33, column * 34 + 1: column * 34 + 33]
        np.testing.assert_allclose(tile[2::4, 1::4], (batch[k].clamp(-1, 1) / 2 + 0.5).permute(1, 2, 0).numpy(), atol=1e-6)
        np.testing.assert_array_equal(tile[0::4], tile[3::4])
    assert (picture[34:, 68:] == 1).all() and (picture[0] == 1).all()  # the missing sixth image and the gaps are white


def test_image_grid_shows_the_mosaic_without_axes():
    ax = plots.image_grid(images(9), columns=4, title="nine")
    shown = ax.get_images()[0]
    assert shown.get_interpolation() == "nearest" and ax.get_title(loc=plt.rcParams["axes.titlelocation"]) == "nine"
    np.testing.assert_array_equal(shown.get_array()[..., 0], plots.mosaic(images(9), 4)[..., 0])
    np.testing.assert_array_equal(shown.get_array()[..., 0], shown.get_array()[..., 2])
    assert len(ax.get_xticks()) == len(ax.get_yticks()) == 0


@pytest.mark.parametrize("bad", [torch.zeros(0, 1, 8, 8), torch.zeros(3, 8, 8), torch.zeros(3, 2, 8, 8)])
def test_image_shapes_are_checked(bad):
    with pytest.raises(ValueError, match="expected images"):
        plots.image_grid(bad)


def test_compare_grids_has_samplers_as_rows_and_seeds_as_columns():
    grids = {"plain": images(12), "ES": -images(12), "SEDM-G++": images(11)}
    ax = plots.compare_grids(grids, columns=4, seeds=[7, 8, 9, 10, 11])
    picture = ax.get_images()[0].get_array()
    assert picture.shape == (3 * 34, 4 * 34, 3)
    np.testing.assert_array_equal(picture[34:68, :, :1], plots.mosaic(-images(12)[:4], 4))
    assert [text.get_text() for text in ax.get_yticklabels()] == list(grids)
    assert [text.get_text() for text in ax.get_xticklabels()] == ["7", "8", "9", "10"]
    assert [text.get_color() for text in ax.get_yticklabels()] == [plots.SAMPLERS[name]["color"] for name in grids]
    np.testing.assert_allclose(ax.get_yticks(), [16.5, 50.5, 84.5])
    assert plots.compare_grids({"plain": images(3)}, ax=ax).get_images()[-1].get_array().shape[1] == 3 * 34
    with pytest.raises(ValueError, match="one shape"):
        plots.compare_grids({"plain": images(), "ES": images(size=16)}, ax=ax)


# ---- curves

@pytest.mark.parametrize("call, key, reference, label, ylabel", [
    (plots.ratio_curves, "ratio", 1.0, "training", "‖ε‖ sampling / training"),
    (plots.variance_curves, "ratio", 1.0, "noised data", "variance / variance of noised data"),
    (plots.accuracy_curve, "accuracy", 0.5, "chance", "held-out accuracy"),
])
def test_curves_show_their_data(call, key, reference, label, ylabel):
    ax = call(curves(key))
    for name, curve in curves(key).items():
        np.testing.assert_allclose(line(ax, name).get_xdata(), SIGMA)
        np.testing.assert_allclose(line(ax, name).get_ydata(), np.asarray(curve[key]))
        assert line(ax, name).get_color() == plots.SAMPLERS[name]["color"] and line(ax, name).get_marker() == plots.SAMPLERS[name]["marker"]
    assert list(line(ax, label).get_ydata()) == [reference, reference]
    assert legend(ax) == ["plain", "ES", label]
    assert ax.get_xlabel() == "noise level σ (data units)" and ax.get_ylabel() == ylabel
    assert ax.get_xscale() == "log" and ax.xaxis_inverted()
    (band,) = ax.collections  # ES has no error
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(0.58) and heights.max() == pytest.approx(0.92)
    assert call(curves(key), ax=ax).xaxis_inverted()  # drawing twice does not turn the axis back


@pytest.mark.parametrize("curve", [dict(sigma=[1.0, 0.0], ratio=[1.0, 1.0]), dict(sigma=[1.0, 0.5], ratio=[1.0])])
def test_curve_errors_name_the_curve(curve):
    with pytest.raises(ValueError, match="mine: expected sigma and ratio"):
        plots.ratio_curves({"mine": curve})


# ---- distances

def table():
    return [dict(sampler="plain", solver="euler", fd_pixel=(0.4, 0.02), fd_feature=Estimate([1.0, 1.2])),
            dict(sampler="ES", solver="euler", fd_pixel=(0.2, 0.01), fd_feature=(0.9, 0.1)),
            dict(sampler="plain", solver="heun", fd_pixel=(0.1, 0.01), fd_feature=(0.5, 0.1)),
            dict(sampler="ES", solver="heun", fd_pixel=(0.11, 0.01), fd_feature=(0.6, 0.1)),
            dict(sampler="real", fd_pixel=(0.05, 0.004), fd_feature=(0.3, 0.02))]


def bars(ax):
    return [container[0] for container in ax.containers if isinstance(container, matplotlib.container.BarContainer)]


def test_fd_bars_heights_errors_groups_and_floor():
    figure = plots.fd_bars(table())
    assert isinstance(figure, Figure) and [ax.get_ylabel() for ax in figure.axes] == ["FD, pixels", "FD, features"]
    pixel, feature = figure.axes
    assert [bar.get_height() for bar in bars(pixel)] == [0.4, 0.2, 0.1, 0.11]
    np.testing.assert_allclose([bar.get_height() for bar in bars(feature)], [1.1, 0.9, 0.5, 0.6])
    assert [to_hex(bar.get_facecolor()) for bar in bars(pixel)] == [plots.SAMPLERS[name]["color"] for name in ("plain", "ES")] * 2
    middles = [bar.get_x() + bar.get_width() / 2 for bar in bars(pixel)]
    assert [round(middle) for middle in middles] == [0, 0, 1, 1] and sorted(middles) == middles
    assert [text.get_text() for text in pixel.get_xticklabels()] == ["euler", "heun"]
    segments = [found.get_segments()[0][:, 1] for found in feature.collections]
    np.testing.assert_allclose(segments[0], [1.0, 1.2])  # mean 1.1, standard error 0.1
    assert list(line(pixel, "floor of real images").get_ydata()) == [0.05, 0.05]
    band = [patch for patch in pixel.patches if patch not in bars(pixel)][0]
    assert band.get_extents().transformed(pixel.transData.inverted()).height == pytest.approx(0.008)
    assert sorted(text.get_text() for text in figure.legends[0].get_texts()) == ["ES", "floor of real images", "plain"]
    assert "0.110" in [text.get_text() for text in pixel.texts]
    plt.close(figure)
    assert plt.get_fignums() == []


def test_fd_bars_with_one_distance_and_bad_rows():
    rows = [dict(sampler="plain", fd_pixel=(0.4, 0.02)), dict(sampler="DG", fd_pixel=(0.3, 0.02))]
    assert len(plots.fd_bars(rows).axes) == 1
    for bad in ([dict(sampler="plain")], [*rows, dict(sampler="ES")], [dict(fd_pixel=(1, 1))]):
        with pytest.raises(ValueError, match="every row needs sampler"):
            plots.fd_bars(bad)


def test_difference_plot_intervals_fill_and_unpaired_bar():
    paired = paired_difference([1.0, 2.0, 3.0], [1.5, 2.6, 3.4])
    ax = plots.difference_plot({"ES − plain": paired, "DG − plain": (0.1, 0.3)}, "difference in pixel FD")
    points = [found.lines[0] for found in ax.containers]
    assert [point.get_xdata()[0] for point in points] == pytest.approx([paired.mean, 0.1])
    assert points[0].get_markerfacecolor() == points[0].get_color() and points[1].get_markerfacecolor() == "white"
    segments = [found.get_segments()[0][:, 0] for container in ax.containers for found in container.lines[2]]
    np.testing.assert_allclose(segments, [[paired.mean - paired.ci, paired.mean + paired.ci], [-0.2, 0.4]])
    pale = [found for found in ax.get_lines() if found.get_color() == "0.85"]
    assert len(pale) == 1 and pale[0].get_xdata() == pytest.approx([paired.mean - paired.unpaired_ci, paired.mean + paired.unpaired_ci])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["ES − plain", "DG − plain"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1] and ax.get_xlabel().startswith("difference in pixel FD, 95 % interval")
    assert any(list(found.get_xdata()) == [0, 0] for found in ax.get_lines())


# ---- drift, training, grids

def test_drift_split_stacks_by_sign():
    ax = plots.drift_split_plot(dict(sigma=SIGMA, discretisation=[-1.0, -1, 2, 2], network=[-0.5, 0.5, 1, -1]))
    discretisation, network = ax.containers
    assert [bar.get_height() for bar in discretisation] == [-1, -1, 2, 2] and [bar.get_height() for bar in network] == [-0.5, 0.5, 1, -1]
    assert [bar.get_y() for bar in network] == [-1, 0, 2, 0]  # stacked where the signs agree, from zero where they do not
    assert list(line(ax, "total").get_ydata()) == [-1.5, -0.5, 3, 1]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["80", "5", "0.5", "0.01"]
    plt.close(ax.figure)
    ax = plots.drift_split_plot(dict(labels=["euler", "heun"], discretisation=[1, 2], network=[1, 1], total=[5, 6]), ylabel="FD")
    assert list(line(ax, "total").get_ydata()) == [5, 6] and ax.get_ylabel() == "FD" and ax.get_xlabel() == ""
    with pytest.raises(ValueError, match=r"per level \(4\)"):
        plots.drift_split_plot(dict(sigma=SIGMA, discretisation=[1], network=[1, 2, 3, 4]), ax=ax)


def test_loss_curve_shows_both_losses_and_marks_the_lowest():
    history = dict(sigmas=[1, 2, 3], step=[10, 20, 30], loss=[3.0, 2.0, 1.0], held_out=[3.0, 1.5, 2.0], held_out_per_level=[[1, 2]] * 3)
    ax = plots.loss_curve(history)
    assert list(line(ax, "loss").get_ydata()) == [3, 2, 1] and list(line(ax, "held out").get_xdata()) == [10, 20, 30]
    assert list(line(ax, "lowest held out: 1.5").get_xydata()[0]) == [20, 1.5]
    assert ax.get_xlabel() == "training step"
    plt.close(ax.figure)
    ax = plots.loss_curve(history | {"held_out": []})
    assert legend(ax) == ["loss"]
    with pytest.raises(ValueError, match="one of"):
        plots.loss_curve(dict(step=[1], loss=[]), ax=ax)
    with pytest.raises(ValueError, match=r"recorded step \(3\)"):
        plots.loss_curve(history | {"loss": [1.0]}, ax=ax)


def test_sigma_grids_leave_out_the_final_zero():
    ax = plots.sigma_grids({"EDM": torch.tensor([80.0, 1.0, 0.002, 0.0], dtype=torch.float64), "coarse": [80.0, 0.0]})
    assert list(line(ax, "EDM").get_ydata()) == [80, 1, 0.002] and list(line(ax, "EDM").get_xdata()) == [0, 1, 2]
    assert list(line(ax, "coarse").get_ydata()) == [80] and ax.get_yscale() == "log"


def test_lambda_schedules_repeat_a_constant():
    ax = plots.lambda_schedules({"plain": 1.0, "ES": torch.tensor([1.01, 1.02, 1.03])})
    assert list(line(ax, "plain").get_ydata()) == [1, 1, 1] and list(line(ax, "plain").get_xdata()) == [0, 1, 2]
    assert line(ax, "ES").get_ydata() == pytest.approx([1.01, 1.02, 1.03])
    assert legend(ax) == ["plain", "ES", "neutral"] and ax.get_ylabel() == "λ, divisor of ε"
