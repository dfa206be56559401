"""Every kind of error: a code of its own, which the pages of both languages explain."""

import re
from pathlib import Path

import pytest
from glm_image.glm_core.errors import GLMImageError, SizeError

ROOT = Path(__file__).resolve().parents[2]
KINDS = [GLMImageError, *GLMImageError.__subclasses__()]
CODES = {kind.code for kind in KINDS}
PAGES = {
    "errors.md": [ROOT / "docs" / "errors.md"],
    "errors.zh.md": [ROOT / "docs" / "errors.zh.md"],
    "help": sorted((ROOT / "web" / "docs").glob("*.md")),
    "help in Chinese": sorted((ROOT / "web" / "docs").glob("*/zh.md")),
}


def test_codes_differ() -> None:
    assert len(CODES) == len(KINDS)


@pytest.mark.parametrize("name", PAGES)
def test_pages_explain_the_codes(name) -> None:
    """The help pages list the codes of their node, so not the one for anything else."""
    explained = {
        code
        for page in PAGES[name]
        for code in re.findall(r"^\| `(GLM-[A-Z]+)` \|", page.read_text(), re.MULTILINE)
    }
    assert explained == (CODES - {GLMImageError.code} if name.startswith("help") else CODES)


def test_a_code_stands_at_the_end_once() -> None:
    error = SizeError("The size is 3; use 32.")
    assert str(error) == "The size is 3; use 32. [GLM-SIZE]"
    assert error.sentence == "The size is 3; use 32."
    assert str(GLMImageError(f"a.png: {error.sentence}")).count("[") == 1
