"""What the documents point to exists: files, and headings in them."""

import re
from pathlib import Path

import pytest

from scripts.plot_results import PLOT, draw

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document) -> None:
    links = re.findall(r"\]\(([^)]+)\)", document.read_text())
    for link in (link for link in links if ":" not in link):
        file, _, heading = link.partition("#")
        target = document.parent / file if file else document
        assert target.exists(), link
        assert not heading or heading in headings(target.read_text()), link


def headings(text: str) -> set[str]:
    """The names by which GitHub links to a document's headings."""
    lines = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", line).strip().lower().replace(" ", "-") for line in lines}


def test_there_are_documents() -> None:
    found = {path.relative_to(ROOT).as_posix() for path in DOCUMENTS}
    assert {"README.md", "ARCHITECTURE.md", "docs/devices.md"} <= found


def test_the_plot_shows_the_results() -> None:
    assert PLOT.read_text() == draw(), "run python -m scripts.plot_results"


def test_the_code_in_architecture_is_the_examples() -> None:
    architecture = (ROOT / "ARCHITECTURE.md").read_text()
    section = architecture.split("## glm_core alone\n")[1].split("\n## ")[0]
    script = _lines((ROOT / "scripts" / "without_comfyui.py").read_text())
    blocks = re.findall(r"```python\n(.+?)```", section, re.DOTALL)
    assert blocks
    assert all(_lines(block) in script for block in blocks)


def _lines(code: str) -> str:
    """Without indentation, which a part of a class loses in a document."""
    return "".join(f"{line.strip()}\n" for line in code.splitlines())
