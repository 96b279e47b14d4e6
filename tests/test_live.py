"What the widgets stand on: the newest request wins, threads end, pictures are exact."
import io
import subprocess
import sys
import threading
import time

import matplotlib.image
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sedm_kit.live import LADDER, Latest, LivePlot, Recent, Stale, Watched, encode_png, one_thread, picture_of_differences, picture_of_images, rung


def wait_for(test, seconds=5):
    "Wait until something holds."
    deadline = time.time() + seconds
    while not test():
        assert time.time() < deadline
        time.sleep(0.002)


def test_the_newest_request_is_the_last_one_shown():
    seen = []
    latest = Latest([lambda request, check: seen.append(("first", request)), lambda request, check: seen.append(("second", request))], failed=None, settle=0.01)
    for k in range(200):
        latest.submit(k)
    assert latest.wait(5) and seen[-1] == ("second", 199) and seen.index(("first", 199)) < len(seen) - 1


def test_stale_work_stops_where_it_stands():
    going, seen = threading.Event(), []
    def slow(request, check):
        going.set()
        for _ in range(2000):
            check()
            time.sleep(0.001)
        seen.append(request)
    latest = Latest([lambda request, check: slow(request, check) if request == "old" else seen.append(request)], failed=None)
    latest.submit("old")
    going.wait(5)
    started = time.perf_counter()
    latest.submit("new")
    assert latest.wait(5) and seen == ["new"] and time.perf_counter() - started < 1


def test_later_stages_wait_for_quiet():
    seen = []
    latest = Latest([lambda request, check: None, lambda request, check: seen.append(request)], failed=None, settle=0.2)
    for k in range(8):
        latest.submit(k)
        time.sleep(0.05)
    assert latest.wait(5) and seen == [7]


def test_none_drops_what_is_going_on():
    going, seen = threading.Event(), []
    def slow(request, check):
        going.set()
        while True:
            check()
            time.sleep(0.001)
    latest = Latest([slow], failed=lambda *told: seen.append(told))
    latest.submit(1)
    going.wait(5)
    latest.submit(None)
    assert latest.wait(5) and seen == []
    latest.submit(None)
    assert not latest.busy


def test_no_old_result_covers_a_newer_message():
    "Between the last check and the last word of a result, a newer request has to wait."
    said, inside = [], threading.Event()
    def stage(request, check):
        with latest.showing(check):
            inside.set()
            time.sleep(0.05)
            said.append(f"result of {request}")
    latest = Latest([stage], failed=None)
    latest.submit("old")
    inside.wait(5)
    latest.submit(None)
    said.append("refused")
    latest.wait(5)
    assert said == ["result of old", "refused"]
    inside.clear()
    latest.submit("old")
    latest.submit(None)
    said.append("refused again")
    latest.wait(5)
    assert said[-1] == "refused again"


def test_errors_of_older_requests_are_not_told():
    told, going = [], threading.Event()
    def stage(request, check):
        going.set()
        time.sleep(0.1)
        raise ValueError(request)
    latest = Latest([stage], failed=lambda request, error: told.append(request))
    latest.submit("old")
    going.wait(5)
    latest.submit(None)
    latest.wait(5)
    assert told == []


def test_errors_are_told_and_work_goes_on():
    told, seen = [], []
    def stage(request, check):
        if request == "bad":
            raise ZeroDivisionError("no")
        seen.append(request)
    latest = Latest([stage], failed=lambda request, error: told.append((request, type(error))))
    latest.submit("bad")
    assert latest.wait(5) and told == [("bad", ZeroDivisionError)]
    latest.submit("good")
    assert latest.wait(5) and seen == ["good"]


def test_no_thread_stays_behind():
    before = threading.active_count()
    for k in range(20):
        latest = Latest([lambda request, check: None], failed=None)
        latest.submit(k)
        latest.wait(5)
    wait_for(lambda: threading.active_count() <= before)


def test_the_interpreter_ends_cleanly_in_the_middle_of_work():
    code = ("import torch\nfrom sedm_kit.live import Latest\nimport time\n"
            "def stage(request, check):\n    while True:\n        check(); torch.randn(300, 300) @ torch.randn(300, 300)\n"
            "Latest.kept = Latest([stage], failed=print)\nLatest.kept.submit(1)\ntime.sleep(0.3)\n")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stderr == ""


def test_threads_of_torch_come_back():
    before = torch.get_num_threads()
    with one_thread():
        with one_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_watched_counts_and_stops():
    class Denoiser:
        img_resolution = 4
        def __call__(self, x, sigma, class_labels=None):
            return x if class_labels is None else x + 1
    def tell(images):
        if images > 2:
            raise Stale
    watched, x = Watched(Denoiser(), tell), torch.zeros(2, 1, 4, 4)
    assert watched.img_resolution == 4 and watched(x, 1.0).sum() == 0 and watched(x, 1.0, torch.zeros(2)).sum() == 32
    with pytest.raises(Stale):
        watched(torch.zeros(3, 1, 4, 4), 1.0)
    with pytest.raises(AttributeError):
        watched.nothing


def test_recent_forgets_the_oldest():
    recent, made = Recent(2), []
    for key in (1, 2, 1, 3, 1, 2):
        assert recent.get(key, lambda key=key: made.append(key) or 10 * key) == 10 * key
    assert made == [1, 2, 3, 2] and len(recent.kept) == 2


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 3, 4]), st.integers(0, 2**31))
def test_png_is_lossless(height, width, channels, seed):
    picture = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    back = (matplotlib.image.imread(io.BytesIO(encode_png(picture))) * 255).round().astype(np.uint8)
    expected = picture.repeat(3, 2) if channels == 1 else picture
    np.testing.assert_array_equal(back[..., :expected.shape[2]], expected)


def test_differences_are_signed():
    plain = torch.zeros(2, 3, 8, 8)
    images = torch.stack([plain[0] + 0.5, plain[0] - 0.5])
    picture = picture_of_differences(images, plain, 2, 68)
    assert (picture[5, 5] == [255, 0, 0]).all() and (picture[5, 40] == [0, 0, 255]).all()
    assert (picture_of_differences(plain, plain, 2, 68) == 255).all()
    assert picture_of_images(plain, 2, 272).shape[1] == 272


@given(st.lists(st.floats(-20, 20) | st.just(float("nan")), max_size=6), st.sampled_from([0.0, 1.0]))
def test_rung_holds_all_values(values, middle):
    finite = [abs(value - middle) for value in values if value == value]
    found = rung(values, middle)
    assert found in LADDER and (found >= max(finite, default=0) or found == LADDER[-1])
    assert found == LADDER[0] or LADDER[LADDER.index(found) - 1] < max(finite)


def test_a_plot_does_not_depend_on_what_it_showed_before():
    sigma = np.geomspace(0.01, 80, 12)
    curves = lambda size: [{"plain": (sigma, 1 + size * sigma / 80, None)}]
    one, other = LivePlot(["a"], ["plain"]), LivePlot(["a"], ["plain"])
    one.draw(curves(0.3))
    picture = one.draw(curves(0.01))
    assert one.draw(curves(0.3)) != picture == one.draw(curves(0.01))
    assert len(one.panels[0].lines) == 1 and not one.panels[0].collections
    assert np.abs(matplotlib.image.imread(io.BytesIO(other.draw(curves(0.01)))) - matplotlib.image.imread(io.BytesIO(picture))).mean() < 0.05
