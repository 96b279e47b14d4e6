"""The gates: what must hold for everything that is committed. python tools/gates.py

They run on a temporary copy of the files that git tracks or would add, so they see uncommitted work, depend on no history,
and change nothing. Each gate takes the copy's folder and returns its complaints, one line each."""
import ast
import difflib
import os
import re
import subprocess
import sys
import tempfile
import time
from configparser import ConfigParser
from pathlib import Path
from shutil import copy2

import cells
import package_notebook
import readme

ROOT = Path(__file__).resolve().parent.parent
MAX_NOTEBOOK = 400_000   # bytes
MAX_FUNCTION = 45        # lines, from `def` to the last one
MAX_MODULE = 450         # lines
GENERATED = {"__init__", "_modidx"}
# A folder of somebody's machine, or a host that packages are fetched from: neither belongs into a public file.
PRIVATE = re.compile(r"(?<![\w.~}-])/(?:work|root|opt|home/\w+|Users/\w+)/|"
                     r"\b(?:pypi|pythonhosted|download\.pytorch|npmjs|anaconda)\.(?:org|com)\b")
PICTURES = re.compile(r'"image/\w+": (?:"[^"]*"|\[[^\]]*\])')
EXPORT = "import nbdev.doclinks as d, nbdev.clean as c; d.nbdev_export.__wrapped__(); c.nbdev_clean.__wrapped__()"


# ---- the copy

def committed_files(root: Path) -> list:
    "Files that git tracks or would add, relative to `root`; works without a repository too."
    with tempfile.TemporaryDirectory() as empty:
        git = ["git", "-c", "safe.directory=*"]
        if not (root / ".git").exists():
            subprocess.run([*git, "init", "--quiet", "--bare", empty], check=True)
            git += [f"--git-dir={empty}", f"--work-tree={root}"]
        listing = subprocess.run([*git, "ls-files", "-z", "-co", "--exclude-standard"], cwd=root, check=True, capture_output=True)
    names = {Path(name) for name in listing.stdout.decode().split("\0") if name}
    return sorted(name for name in names if os.path.lexists(root / name))


def copy_tree(root: Path, target: Path):
    "Copy the committed files, links as links."
    for name in committed_files(root):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        copy2(root / name, target / name, follow_symlinks=False)


def texts(root: Path) -> dict:
    "Every text file's name and content."
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink()):
        try:
            found[path.relative_to(root).as_posix()] = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
    return found


# ---- gates on notebooks

def notebook_size(root: Path) -> list:
    "No notebook is above 400 kB."
    return [f"{p.relative_to(root)} has {p.stat().st_size / 1000:.0f} kB; at most {MAX_NOTEBOOK // 1000} kB: make its pictures smaller"
            for p in cells.find(root) if p.stat().st_size > MAX_NOTEBOOK]


def notebook_outputs(root: Path) -> list:
    "No saved notebook carries widgets, errors or warnings."
    found = []
    for path in cells.find(root):
        notebook, name = cells.load(path), path.relative_to(root)
        if "widgets" in notebook["metadata"]:
            found.append(f"{name} carries widget state: run tools/nbrun.py on it")
        for number, cell in enumerate(notebook["cells"]):
            for output in cell.get("outputs", []):
                if output["output_type"] == "error":
                    found.append(f"{name}, cell {number}: an error is saved ({output.get('ename')})")
                elif output.get("name") == "stderr":
                    found.append(f"{name}, cell {number}: output on stderr is saved (a warning or a progress bar)")
                elif any("widget-view" in kind for kind in output.get("data", {})):
                    found.append(f"{name}, cell {number}: a widget is saved, which shows nothing without a kernel: run tools/nbrun.py on it")
    return found


def last_expression(code: str):
    "The node of the expression that a cell ends in, or None; a final semicolon silences it."
    lines = [line for line in code.splitlines() if not re.match(r"\s*[%!]", line)]
    try:
        body = ast.parse("\n".join(lines)).body
    except SyntaxError:
        return None
    return body[-1].value if body and isinstance(body[-1], ast.Expr) and not code.rstrip().endswith(";") else None


def notebook_executed(root: Path) -> list:
    "Outputs are there: pictures where a caption is, values where a cell ends in one."
    found = []
    for path in cells.find(root):
        name, shown, has_output = path.relative_to(root), [], False
        for number, cell in enumerate(cells.load(path)["cells"]):
            directives, code = cells.split(cell["source"])
            if cell["cell_type"] != "code" or cells.is_off(directives):
                continue
            outputs, value = cell.get("outputs", []), last_expression(code)
            has_output |= bool(outputs)
            kinds = {kind for output in outputs for kind in output.get("data", {})}
            if {"fig-cap", "fig-alt"} & set(directives) and not any(kind.startswith("image/") for kind in kinds):
                found.append(f"{name}, cell {number}: has a caption but no picture: run tools/nbrun.py on it")
            elif not outputs and value and not isinstance(value, (ast.Call, ast.Await, ast.Constant)):
                found.append(f"{name}, cell {number}: `{ast.unparse(value)[:60]}` has no output: run tools/nbrun.py on it")
            shown += [number] if value else []
        if shown and not has_output:
            found.append(f"{name} was never executed: run tools/nbrun.py on it")
    return found


def export_and_clean(root: Path) -> list:
    "nbdev_export and nbdev_clean change nothing: notebooks are clean, modules are what the notebooks say."
    folders = [root / "nbs", root / "sedm_kit"]
    def snapshot():
        return {p.relative_to(root).as_posix(): p.read_bytes() for f in folders for p in sorted(f.rglob("*")) if p.is_file()}
    before = snapshot()
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    env.pop("IN_TEST", None)  # with it nbdev exports nothing
    run = subprocess.run([sys.executable, "-c", EXPORT], cwd=root, env=env, capture_output=True, text=True)
    if run.returncode:
        return ["nbdev_export or nbdev_clean failed:", *run.stderr.splitlines()[-15:]]
    after, found = snapshot(), []
    for name in sorted(before.keys() | after.keys()):
        old, new = (side.get(name, b"").decode("utf-8", "replace").splitlines() for side in (before, after))
        if before.get(name) != after.get(name):
            diff = [line[:160] for line in difflib.unified_diff(old, new, "committed", "exported", n=0, lineterm="")]
            found += [f"{name} changes by nbdev_export or nbdev_clean: run both (or tools/nbrun.py) and commit", *diff[2:10]]
    return found


def picture_words(root: Path) -> list:
    "Every picture has a caption and, for those who cannot see it, a description."
    found = []
    for path in cells.find(root):
        for number, cell in enumerate(cells.load(path)["cells"]):
            missing = {"fig-cap", "fig-alt"} - set(cells.split(cell["source"])[0])
            if missing and any(kind.startswith("image/") for output in cell.get("outputs", []) for kind in output.get("data", {})):
                found.append(f"{path.relative_to(root)}, cell {number}: a picture without {' and '.join(sorted(missing))}")
    return found


def readme_current(root: Path) -> list:
    "README.md is what `make readme` writes, and its links lead somewhere."
    return readme.problems(root)


def packaged_notebook(root: Path) -> list:
    "The notebook inside the package, which `sedm lab` opens, is the one in nbs/."
    return package_notebook.problems(root)


# ---- gates on modules

def house_numbers(root: Path) -> dict:
    "Module name -> (number, name), from the names of the notebooks: 02_edm_unets comes before 02_networks, as in a listing."
    found = [re.match(r"(\d+)_(\w+)$", path.stem) for path in cells.find(root) if path.parent == root / "nbs"]
    return {match[2]: (int(match[1]), match[2]) for match in found if match}


def imported_modules(tree: ast.AST, package: str = "sedm_kit"):
    "Modules of the package that this code imports anywhere, functions included, with the line."
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(filter(None, [package if node.level else "", node.module]))
            names = [f"{base}.{alias.name}" for alias in node.names] if base == package else [base]
        yield from ((name.split(".")[1], node.lineno) for name in names if name.startswith(package + "."))


def house_order(root: Path) -> list:
    "A module imports only modules whose notebooks come before its own, and every module comes from its notebook."
    numbers, found = house_numbers(root), []
    for path in sorted((root / "sedm_kit").glob("*.py")):
        if path.stem in GENERATED:
            continue
        if path.stem not in numbers:
            found.append(f"sedm_kit/{path.name} has no notebook nbs/NN_{path.stem}.ipynb")
            continue
        for module, line in imported_modules(ast.parse(path.read_text(encoding="utf-8"))):
            if module in numbers and numbers[module] >= numbers[path.stem]:
                found.append(f"sedm_kit/{path.name}:{line} imports {module} (number {numbers[module][0]}); "
                             f"{path.stem} is number {numbers[path.stem][0]} and may import only what comes before it")
    return found


def lengths(root: Path) -> list:
    "No function is longer than 45 lines, no module longer than 450."
    found = []
    for path in sorted(p for folder in ("sedm_kit", "tools", "bench") for p in (root / folder).rglob("*.py")):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(root)
        if path.stem in GENERATED:
            continue
        if len(text.splitlines()) > MAX_MODULE:
            found.append(f"{name} has {len(text.splitlines())} lines; at most {MAX_MODULE}: split it")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION:
                    found.append(f"{name}:{node.lineno} {node.name} has {length} lines; at most {MAX_FUNCTION}: split it")
    return found


def one_version(root: Path) -> list:
    "settings.ini and the package say the same version."
    config = ConfigParser(delimiters=["="], interpolation=None)
    config.read(root / "settings.ini", encoding="utf-8")
    wanted = config["DEFAULT"]["version"]
    match = re.search(r'__version__ = "([^"]*)"', (root / "sedm_kit/__init__.py").read_text(encoding="utf-8"))
    given = match[1] if match else "none"
    return [] if given == wanted else [f"sedm_kit.__version__ is {given}, settings.ini says {wanted}"]


def private_names(root: Path) -> list:
    "No text names a folder of somebody's machine or a package registry's host."
    found = []
    for name, text in texts(root).items():
        for number, line in enumerate(PICTURES.sub(lambda m: "\n" * m[0].count("\n"), text).splitlines(), 1):
            if match := PRIVATE.search(line):
                start = max(0, match.start() - 20)
                found.append(f"{name}:{number} names {match[0]!r}: ...{line[start:match.end() + 20].strip()}...")
    return found


GATES = (notebook_size, notebook_outputs, notebook_executed, picture_words, house_order, lengths, one_version, private_names,
         readme_current, packaged_notebook, export_and_clean)


def main() -> int:
    "Run every gate on a copy, print one line each, and return the exit status."
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        copy_tree(ROOT, Path(folder))
        for gate in GATES:
            start = time.time()
            found = gate(Path(folder))
            failed |= bool(found)
            print(f"{'FAILED' if found else 'ok    '} {time.time() - start:6.1f} s  {gate.__name__}: {gate.__doc__}")
            print("".join(f"         {line}\n" for line in found), end="", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
