"""Put the notebook of the widgets into the package, without outputs: python tools/package_notebook.py

`sedm lab` opens it from there. The gate in tools/gates.py compares the two."""
import json
from pathlib import Path

import cells

ROOT = Path(__file__).resolve().parent.parent
SOURCE, TARGET = "nbs/lessons/by_hand.ipynb", "sedm_kit/data/notebooks/tuner.ipynb"


def packaged(root: Path) -> str:
    "The text of the packaged notebook: sources without outputs or directives of the documentation."
    kept = []
    for cell in cells.load(root / SOURCE)["cells"]:
        source = cells.split(cell["source"])[1] if cell["cell_type"] == "code" else cell["source"]
        code = {"execution_count": None, "outputs": []} if cell["cell_type"] == "code" else {}
        kept.append({"cell_type": cell["cell_type"], "id": cell["id"], "metadata": {}, "source": source.lstrip("\n"), **code})
    metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return json.dumps({"cells": kept, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1, ensure_ascii=False) + "\n"


def problems(root: Path) -> list:
    "What is wrong with the packaged notebook."
    path = root / TARGET
    current = path.exists() and path.read_text(encoding="utf-8") == packaged(root)
    return [] if current else [f"{TARGET} is not what {SOURCE} says: run tools/package_notebook.py"]


if __name__ == "__main__":
    (ROOT / TARGET).parent.mkdir(parents=True, exist_ok=True)
    (ROOT / TARGET).write_text(packaged(ROOT), encoding="utf-8")
