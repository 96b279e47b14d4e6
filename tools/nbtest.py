"""Execute every notebook without writing it: python tools/nbtest.py [notebook or folder ...]

The same as `nbdev_test`, but each notebook has a process of its own, so that nothing one notebook sets can help or hurt
another, and each one's time is printed. Cells with a flag of tst_flags (settings.ini) or `eval: false` are left out."""
import multiprocessing
import os
import sys
import time
from multiprocessing.connection import wait
from pathlib import Path

import cells

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["TQDM_DISABLE"] = "1"

# Imported before the processes are forked, so that this time is spent once and not per notebook.
import matplotlib.pyplot  # noqa: E402, F401
import torch  # noqa: E402, F401
from nbdev.config import get_config  # noqa: E402
from nbdev.test import test_nb  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else None)


def execute(path: Path, flags: list, root: Path):
    "Run one notebook and end the process with status 1 if it fails; the traceback goes to stderr."
    sys.exit(not test_nb(path, skip_flags=flags, basepath=root)[0])


def run_all(paths: list, flags: list, root: Path, workers: int):
    "Run the notebooks, a few at a time, and yield path, exit code and seconds as they end."
    waiting, running = list(paths), {}
    while waiting or running:
        while waiting and len(running) < workers:
            path = waiting.pop(0)
            process = CONTEXT.Process(target=execute, args=(path, flags, root))
            process.start()
            running[process.sentinel] = path, process, time.time()
        for sentinel in wait(list(running)):
            path, process, start = running.pop(sentinel)
            process.join()
            yield path, process.exitcode, time.time() - start


def main(names: list, root: Path = ROOT, workers: int = 2) -> int:
    "Run the named notebooks, folders of them, or all, print one line each, and return the exit status."
    wanted = [Path(name).resolve() for name in names] or [root / "nbs"]
    paths = [p for p in cells.find(root) if any(p == w or w in p.parents for w in wanted)]
    if not paths:
        print("no notebook found", file=sys.stderr)
        return 1
    failed = 0
    for path, code, seconds in run_all(paths, get_config(path=root).tst_flags.split(), root, workers):
        failed += bool(code)
        print(f"{f'FAILED (exit {code})' if code else 'ok    '} {seconds:6.1f} s  {path.relative_to(root)}", flush=True)
    print(f"{len(paths) - failed} of {len(paths)} notebooks passed", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
