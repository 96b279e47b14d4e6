"The widgets in a real JupyterLab: Chromium opens the notebook, runs it, drags, types, presses, and what is shown is compared."
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
SCREENS = ROOT / "build" / "screens"   # kept: what the pages looked like
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
CI = os.environ.get("CI") == "true"


def missing():
    "What the browser tests need and do not find, in words."
    if CHROMIUM is None:
        return "no Chromium on the PATH (Debian: apt-get install chromium)"
    try:
        import jupyterlab, playwright  # noqa: F401
    except ImportError as error:
        return f"{error.name} is not installed (pip install -e '.[dev]')"


if missing() and not CI:
    pytest.skip(f"the browser tests are skipped: {missing()}", allow_module_level=True)


def test_everything_is_there():
    assert missing() is None


if not missing():
    from playwright.sync_api import expect, sync_playwright


class Lab:
    "A JupyterLab server in a folder of its own."
    def __init__(self, folder: Path):
        self.folder, self.home = folder / "work", folder / "home"
        self.folder.mkdir()
        for name, part, values in (("@jupyterlab/notebook-extension", "tracker", {"windowingMode": "none"}),
                                   ("@jupyterlab/apputils-extension", "notification", {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True})):
            path = self.home / "settings" / name / f"{part}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{free.getsockname()[1]}"
        env = {**os.environ, "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(self.home / "ipython"), "JUPYTERLAB_SETTINGS_DIR": str(self.home / "settings"), "JUPYTERLAB_WORKSPACES_DIR": str(self.home / "spaces"),
               "JUPYTER_CONFIG_DIR": str(self.home / "config"), "JUPYTER_DATA_DIR": str(self.home / "data"), "JUPYTER_RUNTIME_DIR": str(self.home / "run")}
        self.log = open(folder / "server.log", "w")
        self.server = subprocess.Popen([sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", f"--ServerApp.port={self.address.rsplit(':', 1)[1]}", "--ServerApp.port_retries=0",
                                        "--IdentityProvider.token=secret", f"--ServerApp.root_dir={self.folder}"], env=env, stdout=self.log, stderr=subprocess.STDOUT)
        deadline = time.time() + 60
        while True:
            try:
                urllib.request.urlopen(f"{self.address}/api/status?token=secret", timeout=1)
                return
            except OSError:
                assert time.time() < deadline and self.server.poll() is None, (folder / "server.log").read_text()[-2000:]
                time.sleep(0.2)

    def close(self):
        self.server.terminate()
        self.server.wait(20)
        self.log.close()


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    yield lab
    lab.close()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"])
        yield browser
        browser.close()


def notebook(*cells):
    "A notebook of code cells."
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells], metadata={"kernelspec": {"name": "python3", "display_name": "python3"}})


class Page:
    "A notebook in the browser, with all cells run."
    def __init__(self, lab, browser, name, content):
        nbformat.write(content, lab.folder / name)
        self.page, self.wrong, self.away = browser.new_page(viewport={"width": 1400, "height": 1300}), [], []
        self.page.set_default_timeout(30_000)
        self.page.on("console", lambda message: self.wrong.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.wrong.append(str(error)))
        self.page.on("request", lambda request: self.away.append(request.url) if request.url.startswith("http") and lab.address not in request.url else None)
        self.page.goto(f"{lab.address}/lab/tree/{name}?token=secret&reset")
        self.page.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for(timeout=60_000)
        self.run_all()

    def run_all(self):
        "Run every cell, and wait until the last one has its number."
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        self.page.wait_for_function("() => { const p = [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')]; return p.length && /\\[\\d+\\]/.test(p.at(-1).textContent) }", timeout=90_000)

    def __getattr__(self, name):
        return getattr(self.page, name)

    def typed(self, css, value):
        "Type a number beside a slider."
        field = self.page.locator(f"{css} input").last
        field.fill(str(value))
        field.press("Enter")

    def says(self, text, css=".sedm-status"):
        "Wait for words."
        expect(self.page.locator(css).first).to_contain_text(text, timeout=30_000)

    def source(self, css):
        "What an image shows."
        return self.page.locator(f"{css} img, img{css}").first.get_attribute("src")

    def changes(self, css, before):
        "Wait for another picture."
        self.page.wait_for_function("([css, before]) => { const i = document.querySelector(css + ' img, img' + css); return i && i.src && i.src !== before }", arg=[css, before])

    def bytes_of(self, css):
        "The picture's bytes: its address is another one at every update, even for equal pictures."
        return self.page.evaluate("async css => Array.from(new Uint8Array(await (await fetch(document.querySelector(css + ' img, img' + css).src)).arrayBuffer()))", css)

    def photograph(self, name):
        "Keep what the page looks like."
        SCREENS.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=str(SCREENS / f"{name}.png"))


@pytest.fixture(scope="module")
def tuner(lab, browser):
    page = Page(lab, browser, "tuner.ipynb", notebook("from sedm_kit.widgets import Tuner", "tuner = Tuner('digits')\ntuner"))
    page.locator(".sedm-images").scroll_into_view_if_needed()
    page.says("1000 images")
    yield page
    page.close()


def test_it_opens(tuner):
    tuner.says("λ = 1, no guidance; euler, 18 steps")
    controls, images = (tuner.locator(css).first.bounding_box() for css in (".sedm-w", ".sedm-curves"))
    assert images["x"] >= controls["x"] + controls["width"]  # beside each other on a usual screen
    tuner.photograph("tuner-start")
    for css in (".sedm-images", ".sedm-curves", ".sedm-map"):
        assert len(tuner.bytes_of(css)) > 1000


def test_drag(tuner):
    before = tuner.source(".sedm-images")
    slider = tuner.locator(".sedm-lambda .noUi-base").bounding_box()
    handle = tuner.locator(".sedm-lambda .noUi-handle").bounding_box()
    tuner.mouse.move(handle["x"] + handle["width"] / 2, handle["y"] + handle["height"] / 2)
    tuner.mouse.down()
    tuner.mouse.move(slider["x"] + slider["width"] * 0.8, slider["y"] + slider["height"] / 2, steps=12)
    tuner.mouse.up()
    tuner.changes(".sedm-images", before)
    tuner.wait_for_function("() => { const value = parseFloat([...document.querySelectorAll('.sedm-lambda input')].at(-1).value); return 1.04 < value && value < 1.07 }")
    tuner.wait_for_timeout(1000)  # previews come before the drag's last value does
    value = float(tuner.locator(".sedm-lambda input").last.input_value())
    tuner.says(f"λ = {value:g}, no guidance")
    tuner.says("1000 images")
    tuner.says("resolved" if "resolved" in tuner.locator(".sedm-table").inner_text() else "o", ".sedm-table")


def test_keys(tuner):
    tuner.typed(".sedm-lambda", 1.02)
    tuner.says("λ = 1.02,")
    tuner.locator(".sedm-lambda .noUi-handle").focus()
    for k in (1, 2, 3):
        tuner.keyboard.press("ArrowRight")
        tuner.says(f"λ = 1.02{k},")


def test_typed_values_and_errors(tuner):
    tuner.typed(".sedm-lambda", 1.03)
    tuner.says("λ = 1.03, no guidance")
    tuner.says("1000 images")
    good = tuner.bytes_of(".sedm-images")
    tuner.typed(".sedm-lambda", 0)
    tuner.says("lambda must be finite and positive (1 is neutral), got 0")
    tuner.photograph("tuner-error")
    assert tuner.bytes_of(".sedm-images") == good  # the last good picture stays
    tuner.typed(".sedm-lambda", 1.2)                # beyond the slider, but a lambda
    tuner.says("λ = 1.2,")
    tuner.typed(".sedm-steps", 0)
    tuner.says("steps must be an integer from 1 to 200, got 0")
    tuner.typed(".sedm-steps", 18)
    tuner.typed(".sedm-lambda", 1.0128)
    tuner.typed(".sedm-w", 1.5)
    tuner.says("λ = 1.0128, w = (1.5, 0)")
    tuner.says("better", ".sedm-table")
    tuner.photograph("tuner-guided")


def test_solver_and_disabled_guidance(tuner):
    tuner.locator(".sedm-solver select").select_option("rk3")
    tuner.says("rk3, 18 steps")
    tuner.says("no discriminator for rk3", ".sedm-window-note")
    assert tuner.locator(".sedm-w input").last.is_disabled()
    tuner.locator(".sedm-guide select").select_option("euler")
    tuner.says("w = (1.5, 0); rk3")
    tuner.locator(".sedm-solver select").select_option("heun")
    tuner.locator(".sedm-guide select").select_option("the solver's own")
    tuner.says("heun, 18 steps")


def test_churn_by_keyboard(tuner):
    tuner.locator(".sedm-reset").click()
    button = tuner.get_by_role("button", name="churn …")
    button.focus()
    tuner.keyboard.press("Enter")
    tuner.typed(".sedm-churn", 5)
    tuner.says("S churn 5")
    tuner.photograph("tuner-churn")
    button.click()


def test_fields_have_names(tuner):
    "What a screen reader calls them."
    for name in ("λ", "steps N", "w first", "first seed", "solver", "world"):
        assert tuner.get_by_label(name, exact=True).count() >= 1, name


@pytest.mark.parametrize("width", [1000, 700])
def test_narrow_windows_lose_nothing(tuner, width):
    "Pictures keep their size and can be reached."
    tuner.set_viewport_size({"width": width, "height": 1300})
    tuner.wait_for_timeout(600)
    for css, wide in ((".sedm-images", 560), (".sedm-curves", 600), (".sedm-map", 320)):
        place = tuner.locator(f"img{css}, {css} img").first
        place.scroll_into_view_if_needed()
        assert abs(place.bounding_box()["width"] - wide) < 2, (width, css, place.bounding_box())
    assert tuner.locator(".sedm-table table").first.bounding_box()["width"] > 100
    tuner.photograph(f"tuner-{width}")
    tuner.set_viewport_size({"width": 1400, "height": 1300})


def test_buttons(tuner, lab):
    tuner.locator(".sedm-reset").click()
    tuner.says("λ = 1, no guidance; euler, 18 steps")
    tuner.locator(".sedm-auto").click()
    tuner.says("Automatic λ = 1.02")
    tuner.says("exact denoiser")
    tuner.locator(".sedm-best").click()
    tuner.says("Best found: λ = 1.0128, w = 1.5")
    tuner.locator(".sedm-copy").click()
    expect(tuner.locator(".sedm-code textarea")).to_have_value(re.compile(r"scaling=1\.0128"))
    tuner.photograph("tuner-code")
    tuner.locator(".sedm-copy").click()
    tuner.says("1000 images")
    tuner.locator(".sedm-save").click()
    tuner.says("saved sedm_tuner_001.png")
    assert (lab.folder / "sedm_tuner_001.png").read_bytes()[:4] == b"\x89PNG"
    tuner.get_by_role("button", name="difference to plain").click()
    tuner.says("1000 images")
    tuner.photograph("tuner-difference")
    tuner.get_by_role("button", name="images", exact=True).click()


def test_measure_a_surface(tuner):
    tuner.typed(".sedm-steps", 6)
    tuner.says("euler, 6 steps")
    before = tuner.source(".sedm-map")
    tuner.locator(".sedm-measure").click()
    tuner.says("Map of digits, euler, 6 steps measured: 20 points of 200 images")
    tuner.changes(".sedm-map", before)
    tuner.photograph("tuner-measured")


def test_schedules_and_worlds(tuner):
    tuner.locator(".sedm-reset").click()
    tuner.says("λ = 1, no guidance; euler, 18 steps")
    tuner.locator(".sedm-shape select").select_option("per step")
    tuner.locator(".sedm-handles .widget-slider").nth(17).wait_for()
    tuner.locator(".sedm-handles .noUi-handle").nth(2).focus()
    tuner.keyboard.press("ArrowUp")
    tuner.says("λ per step, 1.000 to 1.001")
    tuner.photograph("tuner-handles")
    tuner.locator(".sedm-shape select").select_option("constant")
    tuner.locator(".sedm-world select").select_option("patches")
    tuner.says("1000 images")
    tuner.photograph("tuner-patches")
    tuner.locator(".sedm-world select").select_option("digits")


def test_latency(tuner, capsys):
    "From a message of the slider to the picture in the page; printed, not judged."
    tuner.typed(".sedm-lambda", 1.04)
    tuner.says("λ = 1.04, no guidance; euler, 18 steps: 1000 images")
    tuner.locator(".sedm-reset").click()
    tuner.says("λ = 1, no guidance; euler, 18 steps: 1000 images")  # so that no late answer undoes what is typed next
    measure = """async ([drag]) => {
        const image = document.querySelector('.sedm-images img, img.sedm-images'), status = document.querySelector('.sedm-status'), field = [...document.querySelectorAll('.sedm-lambda input')].at(-1), times = [];
        const until = test => new Promise((done, failed) => {   // told by the page, so that waiting costs the kernel nothing
            if (test()) return done();
            const late = setTimeout(() => failed(new Error(`waited for ${test}; the status says ${status.textContent}, the field ${field.value}`)), 20000);
            const observer = new MutationObserver(() => { if (test()) { clearTimeout(late); observer.disconnect(); done(); } });
            observer.observe(document.body, {subtree: true, childList: true, characterData: true, attributes: true, attributeFilter: ['src']});
        });
        for (let k = 0; k < 15; k++) {
            const before = image.src, start = performance.now();
            const value = (1.001 + 0.001 * k + (drag ? 0 : 0.0005)).toFixed(4);
            field.value = value; field.dispatchEvent(new Event('input', {bubbles: true})); field.dispatchEvent(new Event('change', {bubbles: true}));
            await until(() => image.src !== before);
            if (!drag) await until(() => status.textContent.includes('256 images') && status.textContent.includes('λ = ' + parseFloat(value)));
            times.push(performance.now() - start);
            await until(() => status.textContent.includes('1000 images') && status.textContent.includes('λ = ' + parseFloat(value)));
        }
        return times; }"""
    drag, release = (statistics.median(tuner.evaluate(measure, [kind])) for kind in (True, False))
    with capsys.disabled():
        print(f"\nlatency, digits, N = 18: {drag:.0f} ms from message to the preview's picture (16 images), {release:.0f} ms to the full result (256 images and distances)")
    assert drag > 0 and release > 0


def test_restart(tuner):
    "After a bare restart the widget says what to do; run again, it works."
    tuner.get_by_role("menuitem", name="Kernel", exact=True).click()
    tuner.get_by_role("menuitem", name=re.compile("^Restart Kernel…")).first.click()
    tuner.locator(".jp-Dialog .jp-mod-accept").click()
    tuner.wait_for_timeout(1500)
    tuner.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for(timeout=60_000)
    if tuner.locator(".sedm-hint").count():  # JupyterLab may take the widget away, or leave it without a kernel
        tuner.says("run this cell again", ".sedm-hint")
    tuner.get_by_role("menuitem", name="Kernel", exact=True).click()
    tuner.get_by_role("menuitem", name="Restart Kernel and Run All Cells…").click()
    tuner.locator(".jp-Dialog .jp-mod-accept").click()
    tuner.wait_for_timeout(1500)
    tuner.locator("#jp-main-statusbar").get_by_text("| Idle").wait_for(timeout=60_000)
    tuner.says("1000 images")
    tuner.typed(".sedm-lambda", 1.01)
    tuner.says("λ = 1.01, no guidance")


def test_console_is_clean_and_nothing_leaves_the_page(tuner):
    assert tuner.wrong == [] and tuner.away == []


# ---- the notebook that comes with the package, with all four widgets

class Below:
    "One widget of a page: its own controls, pictures and words."
    def __init__(self, page, number):
        self.page, self.place = page, page.locator(".jp-OutputArea-output:has(.sedm-status)").nth(number)
        self.place.scroll_into_view_if_needed()

    def says(self, text, css=".sedm-status"):
        expect(self.place.locator(css).first).to_contain_text(text, timeout=30_000)

    def typed(self, css, value):
        field = self.place.locator(f"{css} input").last
        field.fill(str(value))
        field.press("Enter")

    def choose(self, css, option):
        self.place.locator(f"{css} select").select_option(option)

    def picture(self, css):
        return self.place.locator(f"{css} img, img{css}").first.get_attribute("src")

    def changes(self, css, action):
        before = self.picture(css)
        action()
        expect(self.place.locator(f"{css} img, img{css}").first).not_to_have_attribute("src", before, timeout=30_000)


@pytest.fixture(scope="module")
def packaged(lab, browser):
    page = Page(lab, browser, "packaged.ipynb", nbformat.read(ROOT / "sedm_kit" / "data" / "notebooks" / "tuner.ipynb", 4))
    page.locator(".sedm-status").nth(3).wait_for()
    yield page
    page.close()


def test_epsilon_explorer(packaged):
    widget = Below(packaged, 1)
    widget.says("18 steps")
    widget.changes(".sedm-curves", lambda: widget.typed(".sedm-scale", 1.02))
    widget.says("scale 1.02")
    widget.changes(".sedm-curves", lambda: widget.choose(".sedm-solver", "heun"))
    widget.says("heun")
    widget.choose(".sedm-solver", "euler")
    expect(widget.place.locator(".sedm-repair-both").first).to_contain_text("λ = 1.01")
    widget.changes(".sedm-curves", lambda: widget.place.locator(".sedm-repair-both").first.click())
    expect(widget.place.locator(".sedm-lambda input").last).to_have_value(re.compile(r"1\.01"))  # the kernel's answer is there before the next is typed
    widget.typed(".sedm-lambda", 0)
    widget.says("lambda must be finite and positive")
    packaged.photograph("epsilon-explorer")


def test_weight_explorer(packaged):
    widget = Below(packaged, 2)
    widget.changes(".sedm-curves", lambda: widget.choose(".sedm-prediction", "x0"))
    widget.changes(".sedm-curves", lambda: widget.typed(".sedm-gamma", 0.5))
    widget.typed(".sedm-gamma", -1)
    widget.says("gamma must be finite and not negative")
    widget.typed(".sedm-gamma", 1)
    packaged.photograph("weight-explorer")


def test_schedule_explorer(packaged):
    widget = Below(packaged, 3)
    widget.changes(".sedm-levels", lambda: widget.typed(".sedm-rho", 3))
    widget.says("ρ 3")
    widget.changes(".sedm-errors", lambda: widget.typed(".sedm-steps", 12))
    widget.typed(".sedm-sigma-min", -1)
    widget.says("-1")
    widget.typed(".sedm-sigma-min", 0.002)
    widget.changes(".sedm-levels", lambda: widget.choose(".sedm-grid", "VE"))
    packaged.photograph("schedule-explorer")


def test_the_packaged_notebook_leaves_no_errors(packaged):
    assert packaged.wrong == [] and packaged.away == []
