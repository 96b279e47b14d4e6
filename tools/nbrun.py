"""Execute notebooks in place, as the tests would see them, and keep their outputs.

    python tools/nbrun.py [notebook or folder ...]      (default: all of nbs/)

Cells that the tests skip (`eval: false` or a flag of tst_flags) keep the outputs they have. Progress bars and widget
state are left out: saved notebooks stay small and do not change from run to run for no reason."""
import os
import sys
import time
from pathlib import Path

import cells

# Read by the kernels. One thread: the last digits do not depend on the number of cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TQDM_DISABLE"] = "1"

import nbformat  # noqa: E402
from nbclient import NotebookClient  # noqa: E402
from nbdev.clean import nbdev_clean  # noqa: E402
from nbdev.config import get_config  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
FLAGS = get_config(path=ROOT).tst_flags.split()


class Client(NotebookClient):
    "A notebook client that passes over cells the tests skip."

    async def async_execute_cell(self, cell, index, **kwargs):
        if cell.cell_type == "code" and cells.is_off(cells.split(cell.source)[0], FLAGS):
            return cell
        return await super().async_execute_cell(cell, index, **kwargs)


def is_widget(output) -> bool:
    "Whether an output is a widget, shown by a kernel."
    return any("widget-view" in kind for kind in output.get("data", {}))


def drop_widgets(notebook):
    "Take out widget state and widgets (progress bars are widgets), which show nothing without a kernel; a still picture beside one stays."
    notebook.metadata.pop("widgets", None)
    for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
        cell.outputs = [output for output in cell.outputs if not is_widget(output) or "image/png" in output.data]
        for output in filter(is_widget, cell.outputs):
            output.data = {kind: value for kind, value in output.data.items() if "widget" not in kind}


def run(path: Path):
    "Execute one notebook in its own folder and write it back, cleaned; on an error the file stays as it was."
    notebook = nbformat.read(path, 4)
    client = Client(notebook, timeout=None, kernel_name="python3", store_widget_state=False,
                    resources={"metadata": {"path": str(path.parent)}})
    client.execute()
    drop_widgets(notebook)
    partial = path.with_suffix(".partial")
    nbformat.write(notebook, partial)
    os.replace(partial, path)
    nbdev_clean.__wrapped__(str(path))


def main(names: list):
    "Run the named notebooks, folders of notebooks, or all of them."
    known = cells.find(ROOT)
    wanted = [Path(name).resolve() for name in names] or [ROOT / "nbs"]
    paths = [p for p in known if any(p == w or w in p.parents for w in wanted)]
    missing = [w for w in wanted if not any(p == w or w in p.parents for p in paths)]
    if missing:
        sys.exit(f"no notebook at {', '.join(map(str, missing))}")
    for path in paths:
        start = time.time()
        run(path)
        print(f"{time.time() - start:6.1f} s {path.stat().st_size / 1000:6.0f} kB  {path.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
