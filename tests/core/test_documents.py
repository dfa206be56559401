"""What the documents point to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(document) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", document.read_text())
    for link in (link for link in links if ":" not in link):
        assert (document.parent / link).exists(), link


def test_there_are_documents() -> None:
    assert {"README.md", "ARCHITECTURE.md"} <= {path.name for path in DOCUMENTS}


def test_the_code_in_architecture_is_the_examples() -> None:
    architecture = (ROOT / "ARCHITECTURE.md").read_text()
    section = architecture.split("## glm_core alone\n")[1].split("\n## ")[0]
    script = _lines((ROOT / "examples" / "without_comfyui.py").read_text())
    blocks = re.findall(r"```python\n(.+?)```", section, re.DOTALL)
    assert blocks
    assert all(_lines(block) in script for block in blocks)


def _lines(code: str) -> str:
    """Without indentation, which a part of a class loses in a document."""
    return "".join(f"{line.strip()}\n" for line in code.splitlines())
