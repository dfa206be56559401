"""What the registry's archive holds: the files that .comfyignore leaves, and the pictures."""

import ast
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
IGNORED = {
    line.rstrip("/")
    for line in (ROOT / ".comfyignore").read_text().splitlines()
    if line and not line.startswith("#")
}
NOT_IN_GIT = {".git", ".cache", ".pytest_cache", ".ruff_cache", "output"}
PROGRAMS = {"subprocess", "pty", "pickle", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__"}
SYSTEM_CALLS = {"system", "popen"}


def shipped() -> list[Path]:
    kept = (path for path in ROOT.iterdir() if path.name not in IGNORED | NOT_IN_GIT)
    return sorted(file for path in kept for file in (path, *path.rglob("*")) if file.is_file())


def test_every_ignored_name_exists() -> None:
    assert [name for name in IGNORED if not (ROOT / name).exists()] == []


def test_what_the_nodes_need_is_shipped() -> None:
    top = {file.relative_to(ROOT).parts[0] for file in shipped()}
    needed = {"__init__.py", "nodes", "glm_core", "web", "locales", "workflows", "subgraphs"}
    assert needed <= top
    assert {"requirements.txt", "pyproject.toml", "LICENSE", "README.md", "docs"} <= top


def test_nothing_shipped_starts_programs_or_runs_text_as_code() -> None:
    found = []
    for file in (file for file in shipped() if file.suffix == ".py"):
        found += [f"{file.name}:{line}" for line in _suspicious(ast.parse(file.read_text()))]
    assert found == []


def test_such_code_is_noticed() -> None:
    for code in ("import subprocess", "from pickle import load", "exec('1')", "os.system('ls')"):
        assert _suspicious(ast.parse(code)) == [1], code
    assert _suspicious(ast.parse("network.eval()\nre.compile('a')")) == []


def _suspicious(tree: ast.AST) -> list[int]:
    """Lines that import a module of PROGRAMS or call one of CALLS or SYSTEM_CALLS."""
    lines = []
    for node in ast.walk(tree):
        names: set[str] = set()
        if isinstance(node, ast.Import):
            names = {alias.name.partition(".")[0] for alias in node.names} & PROGRAMS
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = {node.module.partition(".")[0]} & PROGRAMS
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = {node.func.id} & CALLS
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            names = {node.func.attr} & SYSTEM_CALLS
        lines += [node.lineno] if names else []
    return lines


def test_icon_and_banner_have_the_registrys_shapes() -> None:
    icon = Image.open(ROOT / "docs" / "images" / "icon.png")
    banner = Image.open(ROOT / "docs" / "images" / "banner.png")
    assert icon.width == icon.height <= 400
    assert banner.width * 9 == banner.height * 21
