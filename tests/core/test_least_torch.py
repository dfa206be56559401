"""The pack runs on torch 2.4: what later releases added is not used."""

import ast
from pathlib import Path

from glm_image.scripts.environment import ROOT

SINCE_2_5 = {"set_submodule", "OutOfMemoryError", "accelerator", "enable_gqa", "get_device_module",
             "flex_attention", "float8_e8m0fnu", "float4_e2m1fn_x2"}  # fmt: skip
"""Names of functions, arguments and types; `torch.cuda.OutOfMemoryError` is older."""
ON_REQUEST = {"compiled.py"}  # its candidates are dropped where torch lacks what they use
FILES = [
    file
    for folder in ("glm_core", "nodes")
    for file in (ROOT / folder).rglob("*.py")
    if file.name not in ON_REQUEST
]


def names(file: Path) -> set[str]:
    """Attributes and arguments that a file uses, with what is before them if that is one word."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Attribute):
            of_cuda = isinstance(node.value, ast.Attribute) and node.value.attr == "cuda"
            found.add(f"cuda.{node.attr}" if of_cuda else node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            found.add(node.arg)
    return found


def test_nothing_newer_is_used() -> None:
    assert len(FILES) > 80
    newer = {file.name: names(file) & SINCE_2_5 for file in FILES}
    assert not {name: found for name, found in newer.items() if found}
