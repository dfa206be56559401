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
