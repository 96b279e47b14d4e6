"""The scripts of tools/: each gate must let good input pass and stop bad input."""
import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

import cells
import gates
import readme

ROOT = Path(__file__).resolve().parent.parent
PNG = base64.b64encode(b"not really a picture").decode()


def code(source, outputs=(), number=[0]):
    "A code cell with an id of its own."
    number[0] += 1
    return {"cell_type": "code", "id": f"{number[0]:08d}", "metadata": {}, "execution_count": None, "source": source, "outputs": list(outputs)}


def markdown(source):
    "A markdown cell."
    return {key: value for key, value in {**code(source), "cell_type": "markdown"}.items() if key not in ("outputs", "execution_count")}


def result(kind="text/plain", content="1"):
    "An output as a last expression leaves it."
    return {"output_type": "execute_result", "execution_count": None, "metadata": {}, "data": {kind: content}}


def stream(text, name="stdout"):
    "Printed output."
    return {"output_type": "stream", "name": name, "text": text}


def save(path, *cells, **metadata):
    "Write a notebook."
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    notebook = {"cells": list(cells), "metadata": {**kernel, **metadata}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(notebook, indent=1), encoding="utf-8")


def only(complaints, *words):
    "There is exactly one complaint and it contains the words."
    assert len(complaints) == 1, complaints
    for word in words:
        assert word in complaints[0]


# ---- cells

def test_directives_are_split_from_code():
    directives, body = cells.split("#| export\n#| fig-cap: A: b\n# a comment\nx = 1")
    assert directives == {"export": "", "fig-cap": "A: b"} and body == "# a comment\nx = 1"
    assert cells.split("x = 1\n#| export") == ({}, "x = 1\n#| export")


def test_cells_that_tests_leave_out():
    assert cells.is_off({"eval": "false"}) and cells.is_off({"slow": ""}, ["slow"])
    assert not cells.is_off({"export": "", "eval": "true"}, ["slow"])


def test_find_passes_over_hidden_folders(tmp_path):
    for name in ("a.ipynb", "worlds/b.ipynb", ".ipynb_checkpoints/a.ipynb", "_proc/c.ipynb", "_d.ipynb"):
        save(tmp_path / "nbs" / name)
    assert [p.name for p in cells.find(tmp_path)] == ["a.ipynb", "b.ipynb"]


# ---- readme

@pytest.mark.parametrize("given, wanted", [
    ("![a](images/x.png)", "![a](nbs/images/x.png)"),
    ("[a](00_noise.ipynb#grids)", "[a](nbs/00_noise.ipynb#grids)"),
    ("[a](../LICENSE)", "[a](LICENSE)"),
    ('<img src="images/x.png" width="9">', '<img src="nbs/images/x.png" width="9">'),
    ("[a]: images/x.png", "[a]: nbs/images/x.png"),
    ("[a](https://b.c/d) [e](#f) [g](mailto:h@i)", "[a](https://b.c/d) [e](#f) [g](mailto:h@i)"),
    ("`[a](b)` and\n```\n[a](b)\n```", "`[a](b)` and\n```\n[a](b)\n```"),
])
def test_links_become_relative_to_the_top(given, wanted):
    assert readme.relink(given) == wanted


def index(tmp_path):
    "A small index.ipynb with one cell of every kind."
    save(tmp_path / "nbs/index.ipynb", markdown("# kit\n\n> what it is"), code("#| hide\nsecret()"),
         code("1 + 1", [stream("hello\n"), stream("warning", "stderr"), result(content="2")]),
         code("#| fig-alt: a curve\n#| echo: false\nplot()", [result("image/png", PNG)]),
         code("#| output: false\nquiet()", [result(content="unseen")]), markdown("see [LICENSE](../LICENSE)"))
    (tmp_path / "LICENSE").touch()


def test_readme_holds_what_the_notebook_shows(tmp_path):
    index(tmp_path)
    text, images = readme.render(cells.load(tmp_path / "nbs/index.ipynb"))
    assert text.startswith(f"# kit\n\n{readme.NOTICE}\n\n> what it is\n\n```python\n1 + 1\n```\n\n```text\nhello\n```\n\n```text\n2\n```\n")
    assert "![a curve](nbs/images/index_1.png)" in text and "```python\nquiet()\n```" in text
    assert not any(word in text for word in ("secret", "plot()", "unseen", "warning", "#|"))
    assert images == {"nbs/images/index_1.png": b"not really a picture"}


def test_readme_gate_sees_every_way_to_be_out_of_date(tmp_path):
    index(tmp_path)
    assert any("README.md is not" in line for line in readme.problems(tmp_path))
    readme.write(tmp_path)
    assert readme.problems(tmp_path) == gates.readme_current(tmp_path) == []
    picture = tmp_path / "nbs/images/index_1.png"
    picture.write_bytes(b"old")
    only(gates.readme_current(tmp_path), "index_1.png is not the picture")
    readme.write(tmp_path)
    (tmp_path / "nbs/images/index_2.png").touch()
    only(gates.readme_current(tmp_path), "index_2.png is no longer used")
    readme.write(tmp_path)
    (tmp_path / "LICENSE").unlink()
    only(gates.readme_current(tmp_path), "links to LICENSE")
    (tmp_path / "LICENSE").touch()
    (tmp_path / "README.md").write_text("by hand")
    only(gates.readme_current(tmp_path), "README.md is not")


# ---- gates on notebooks

def test_size(tmp_path):
    save(tmp_path / "nbs/small.ipynb", code("x", [stream("y" * 390_000)]))
    assert gates.notebook_size(tmp_path) == []
    save(tmp_path / "nbs/worlds/large.ipynb", code("x", [stream("y" * 400_000)]))
    only(gates.notebook_size(tmp_path), "large.ipynb", "at most 400 kB")


@pytest.mark.parametrize("outputs, metadata, word", [
    ([{"output_type": "error", "ename": "NameError", "evalue": "", "traceback": []}], {}, "NameError"),
    ([stream("UserWarning", "stderr")], {}, "stderr"),
    ([result("application/vnd.jupyter.widget-view+json", {})], {}, "widget"),
    ([], {"widgets": {}}, "widget state"),
])
def test_outputs_that_must_not_be_saved(tmp_path, outputs, metadata, word):
    save(tmp_path / "nbs/good.ipynb", code("x", [stream("fine"), result()]))
    assert gates.notebook_outputs(tmp_path) == []
    save(tmp_path / "nbs/bad.ipynb", code("x", outputs), **metadata)
    only(gates.notebook_outputs(tmp_path), "bad.ipynb", word)


@pytest.mark.parametrize("cell, word", [
    (code("#| fig-cap: a curve\nplot()"), "no picture"),
    (code("#| fig-alt: a curve\nplot()", [result()]), "no picture"),
    (code("x = 1\nx.shape"), "`x.shape` has no output"),
    (code("f(1)"), "never executed"),
])
def test_cells_that_were_not_executed(tmp_path, cell, word):
    save(tmp_path / "nbs/good.ipynb", code("x", [result()]), code("x;"), code("f(x)"), code("%matplotlib inline\nx = 1"),
         code("#| eval: false\nx"), code("#| fig-cap: a\nplot()", [result("image/png", PNG)]), code('"words"'), markdown("x"))
    assert gates.notebook_executed(tmp_path) == []
    save(tmp_path / "nbs/bad.ipynb", cell)
    assert any(word in line for line in gates.notebook_executed(tmp_path))


def test_pictures_without_words(tmp_path):
    picture = [result("image/png", PNG)]
    save(tmp_path / "nbs/good.ipynb", code("#| fig-cap: a\n#| fig-alt: b\nplot()", picture), code("x", [result()]))
    assert gates.picture_words(tmp_path) == []
    save(tmp_path / "nbs/bad.ipynb", code("#| fig-cap: a\nplot()", picture))
    only(gates.picture_words(tmp_path), "bad.ipynb, cell 0", "without fig-alt")


# ---- gates on modules

@pytest.fixture
def house(tmp_path):
    "Two numbered notebooks and a writer of modules."
    for name in ("00_noise", "01_analytic"):
        save(tmp_path / f"nbs/{name}.ipynb")
    (tmp_path / "sedm_kit").mkdir()
    return lambda name, text: (tmp_path / f"sedm_kit/{name}.py").write_text(text)


@pytest.mark.parametrize("line", ["from sedm_kit.analytic import f", "import sedm_kit.analytic as a", "from sedm_kit import analytic",
                                  "from .analytic import f", "from . import analytic", "def f():\n    from sedm_kit.analytic import g"])
def test_imports_of_larger_numbers(tmp_path, house, line):
    house("noise", "import math\nfrom sedm_kit import __version__")
    house("analytic", "from sedm_kit.noise import f\nfrom . import noise")
    assert gates.house_order(tmp_path) == []
    house("noise", line)
    only(gates.house_order(tmp_path), "sedm_kit/noise.py:", "imports analytic (number 1)")


def test_modules_without_a_notebook(tmp_path, house):
    house("_modidx", "")
    house("__init__", "")
    house("stray", "")
    only(gates.house_order(tmp_path), "stray.py has no notebook")


def test_lengths(tmp_path, house):
    house("noise", "def f():\n" + "    x = 1\n" * 44 + "# end\n" * 405)
    assert gates.lengths(tmp_path) == []
    house("noise", "class A:\n    def f(self):\n" + "        x = 1\n" * 45)
    only(gates.lengths(tmp_path), "noise.py:2 f has 46 lines")
    house("noise", "# a line\n" * 451)
    only(gates.lengths(tmp_path), "noise.py has 451 lines")


def test_versions(tmp_path, house):
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nversion = 1.2.3\n")
    house("__init__", '__version__ = "1.2.3"\n')
    assert gates.one_version(tmp_path) == []
    house("__init__", '__version__ = "1.2.4"\n')
    only(gates.one_version(tmp_path), "1.2.4", "1.2.3")


@pytest.mark.parametrize("parts", [("/", "work/main"), ("see /", "root/.cache"), ("/", "home/ann/x"), ("'/", "Users/ann/x'"), ("/", "opt/wheels"),
                                   ("https://", "py" "pi.org/simple"), ("download.", "pytorch.org/whl")])
def test_private_names(tmp_path, parts):
    (tmp_path / "good.md").write_text("https://a.org/work/b, $HOME/work/x, ./work/y, ~/work/z, framework/main, numpy.org, /homework/")
    (tmp_path / "good.ipynb").write_text('"image/png": "' + "".join(parts) + '"')
    (tmp_path / "data.bin").write_bytes(b"\xff\xfe" + "".join(parts).encode())
    assert gates.private_names(tmp_path) == []
    (tmp_path / "bad.md").write_text("first line\n" + "".join(parts))
    only(gates.private_names(tmp_path), "bad.md:2")


# ---- export, clean, and the copy

SETTINGS = """[DEFAULT]
repo = kit
lib_name = sedm_kit
version = 0.0.1
min_python = 3.10
license = apache2
description = d
keywords = k
author = a
author_email = a@b.c
user = u
branch = main
copyright = c
nbs_path = nbs
lib_path = sedm_kit
doc_path = _docs
recursive = True
custom_sidebar = True
update_pyproject = False
title = t
git_url = https://example.com/kit
doc_host = https://example.com
doc_baseurl = /kit
"""


def test_export_and_clean_must_change_nothing(tmp_path):
    (tmp_path / "settings.ini").write_text(SETTINGS)
    (tmp_path / "sedm_kit").mkdir()
    (tmp_path / "sedm_kit/__init__.py").write_text('__version__ = "0.0.1"\n')
    save(tmp_path / "nbs/00_noise.ipynb", markdown("# noise\n\n> d"), code("#| default_exp noise"), code("#| export\ndef f(): return 1"))
    assert any("sedm_kit/noise.py changes" in line for line in gates.export_and_clean(tmp_path))
    assert gates.export_and_clean(tmp_path) == []
    save(tmp_path / "nbs/00_noise.ipynb", code("#| default_exp noise"), code("#| export\ndef f(): return 2"), junk={})
    complaints = gates.export_and_clean(tmp_path)
    assert any("nbs/00_noise.ipynb changes" in line for line in complaints) and any("return 2" in line for line in complaints)


@pytest.mark.parametrize("repository", [True, False])
def test_the_copy_holds_uncommitted_files_and_no_ignored_ones(tmp_path, repository):
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "sub").mkdir(parents=True)
    target.mkdir()
    (source / ".gitignore").write_text("ignored\n")
    for name in ("new", "ignored", "sub/gone"):
        (source / name).write_text(name)
    (source / "link").symlink_to("new")
    if repository:
        for command in (["init", "--quiet"], ["add", "sub"]):
            subprocess.run(["git", *command], cwd=source, check=True)
    (source / "sub/gone").unlink()
    gates.copy_tree(source, target)
    assert sorted(p.name for p in target.iterdir()) == [".gitignore", "link", "new"] and (target / "link").is_symlink()


# ---- the notebook runners

def nbtest(root):
    "tools/nbtest.py on another root, in a process of its own."
    script = "import sys, pathlib, nbtest; sys.exit(nbtest.main([], pathlib.Path(sys.argv[1])))"
    return subprocess.run([sys.executable, "-c", script, root], cwd=ROOT / "tools", capture_output=True, text=True)


def test_a_failing_or_dying_notebook_fails_the_run(tmp_path):
    (tmp_path / "settings.ini").write_text(SETTINGS + "tst_flags = slow\n")
    run = nbtest(tmp_path)
    assert run.returncode == 1 and "no notebook found" in run.stderr
    save(tmp_path / "nbs/good.ipynb", code("x = 1"), code("assert x == 1"), code("#| slow\n1 / 0"), code("#| eval: false\n1 / 0"))
    run = nbtest(tmp_path)
    assert run.returncode == 0 and "1 of 1 notebooks passed" in run.stdout, run.stderr
    save(tmp_path / "nbs/worlds/bad.ipynb", code("1 / 0"))
    save(tmp_path / "nbs/killed.ipynb", code("import os"), code("os.kill(os.getpid(), 9)"))
    run = nbtest(tmp_path)
    assert run.returncode == 1 and "1 of 3 notebooks passed" in run.stdout and "ZeroDivisionError" in run.stderr


def test_running_in_place_keeps_skipped_outputs_and_no_bars(tmp_path):
    import nbrun
    path = tmp_path / "a.ipynb"
    save(path, code("from tqdm.auto import tqdm"), code("for i in tqdm(range(2)): pass\ni"), code("#| eval: false\n1 / 0", [result(content="kept")]))
    nbrun.run(path)
    outputs = [cell["outputs"] for cell in cells.load(path)["cells"]]
    assert outputs[0] == [] and len(outputs[1]) == 1 and "".join(outputs[1][0]["data"]["text/plain"]) == "1"
    assert "".join(outputs[2][0]["data"]["text/plain"]) == "kept" and not path.with_suffix(".partial").exists()
    before = path.read_bytes()
    save(tmp_path / "b.ipynb", code("1 / 0"))
    with pytest.raises(Exception, match="ZeroDivisionError"):
        nbrun.run(tmp_path / "b.ipynb")
    assert path.read_bytes() == before and cells.load(tmp_path / "b.ipynb")["cells"][0]["outputs"] == []
