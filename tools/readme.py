"""Write README.md from nbs/index.ipynb (standard library only): python tools/readme.py [--check]

Markdown cells are taken as they are, with links made relative to the top folder; code cells become fenced Python with their
text outputs below; PNG outputs become nbs/images/index_1.png and so on. `#| hide` drops a cell, `#| echo: false` its code,
`#| output: false` its outputs; `fig-alt` (or `fig-cap`) describes a picture. With --check nothing is written and the exit
status tells whether README.md and its pictures are current."""
import base64
import re
import sys
from pathlib import Path
from posixpath import join, normpath

import cells

ROOT = Path(__file__).resolve().parent.parent
NOTICE = "<!-- Written by `make readme` from nbs/index.ipynb: edit the notebook, not this file. -->"
CODE = re.compile(r"(```.*?```|`[^`\n]*`)", re.DOTALL)
LINK = re.compile(r"""(\]\(|(?:src|href)=["']|^\[[^\]\n]+\]:\s+)([^)\s"'>]+)""", re.MULTILINE)


def is_local(target: str) -> bool:
    "True for a link to a file of the repository."
    return not re.match(r"[a-zA-Z][\w+.-]*:|[#/]", target)


def relink(markdown: str) -> str:
    "Links relative to nbs/ made relative to the top folder; code is left alone."
    def moved(match):
        path, mark, anchor = match[2].partition("#")
        return match[1] + (normpath(join("nbs", path)) + mark + anchor if is_local(match[2]) else match[2])
    parts = CODE.split(markdown)
    return "".join(part if i % 2 else LINK.sub(moved, part) for i, part in enumerate(parts))


def output_blocks(cell: dict, alt: str, images: dict) -> list:
    "The cell's outputs as Markdown; pictures are added to `images`, name -> bytes."
    blocks = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        if "image/png" in data:
            name = f"nbs/images/index_{len(images) + 1}.png"
            images[name] = base64.b64decode("".join(data["image/png"]))
            blocks.append(f"![{alt}]({name})")
        elif "text/markdown" in data:
            blocks.append(relink("".join(data["text/markdown"])))
        elif output.get("name") != "stderr":
            text = "".join(output.get("text") or data.get("text/plain") or "").rstrip()
            blocks += [f"```text\n{text}\n```"] if text else []
    return blocks


def render(notebook: dict) -> tuple:
    "README's text, and its pictures as a dict of name -> bytes."
    blocks, images = [], {}
    for cell in notebook["cells"]:
        directives, code = cells.split(cell["source"])
        if "hide" in directives or directives.get("include") == "false":
            continue
        if cell["cell_type"] == "markdown":
            blocks.append(relink(cell["source"].strip()))
        elif cell["cell_type"] == "code":
            if code and directives.get("echo") != "false":
                blocks.append(f"```python\n{code}\n```")
            if directives.get("output") != "false":
                alt = directives.get("fig-alt") or directives.get("fig-cap") or "output of the code above"
                blocks += output_blocks(cell, alt.strip("\"'"), images)
    heading, _, rest = blocks[0].partition("\n")
    text = "\n\n".join([heading, NOTICE, rest.strip(), *blocks[1:]])
    return re.sub(r"\n{3,}", "\n\n", text) + "\n", images


def problems(root: Path) -> list:
    "What is out of date or broken in README.md; empty if it is what `make readme` writes."
    text, images = render(cells.load(root / "nbs/index.ipynb"))
    readme = root / "README.md"
    found = []
    if not readme.is_file() or readme.read_text(encoding="utf-8") != text:
        found.append("README.md is not what nbs/index.ipynb gives: run `make readme`")
    for name, content in images.items():
        if not (root / name).is_file() or (root / name).read_bytes() != content:
            found.append(f"{name} is not the picture in nbs/index.ipynb: run `make readme`")
    for old in sorted((root / "nbs/images").glob("index_*.png")):
        if old.relative_to(root).as_posix() not in images:
            found.append(f"{old.relative_to(root).as_posix()} is no longer used: run `make readme`")
    for _, target in LINK.findall("".join(CODE.split(text)[::2])):
        if is_local(target) and target not in images and not (root / target.partition("#")[0]).exists():
            found.append(f"README.md links to {target}, which does not exist")
    return found


def write(root: Path):
    "Write README.md and its pictures, and remove pictures of an earlier version."
    text, images = render(cells.load(root / "nbs/index.ipynb"))
    for old in (root / "nbs/images").glob("index_*.png"):
        old.unlink()
    for name, content in images.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(content)
    (root / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    if "--check" not in sys.argv[1:]:
        write(ROOT)
    found = problems(ROOT)
    print("\n".join(found) or "README.md is current")
    sys.exit(bool(found))
