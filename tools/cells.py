"""Reading notebooks: what the scripts of this folder share (standard library only)."""
import json
import re
from pathlib import Path

DIRECTIVE = re.compile(r"\s*#\s*\|\s*([\w-]+)\s*:?[ \t]*(.*)")


def find(root: Path) -> list:
    "Every notebook below nbs/ that nbdev reads, sorted."
    nbs = Path(root) / "nbs"
    return sorted(p for p in nbs.rglob("*.ipynb") if not any(part[0] in "._" for part in p.relative_to(nbs).parts))


def load(path: Path) -> dict:
    "A notebook as a dict; every cell's source is one string."
    notebook = json.loads(Path(path).read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        cell["source"] = "".join(cell["source"])
    return notebook


def split(source: str) -> tuple:
    "A code cell's leading directives as a dict, and the code below them."
    lines, directives = source.splitlines(), {}
    while lines and (match := DIRECTIVE.match(lines[0])):
        directives[match[1]] = match[2].strip()
        lines.pop(0)
    return directives, "\n".join(lines).strip("\n")


def is_off(directives: dict, flags=()) -> bool:
    "True if nbdev_test leaves a cell with these directives alone."
    return directives.get("eval", "").lower() == "false" or any(flag in directives for flag in flags)
