"""The time that the pack adds to ComfyUI's start, and the names that it uses of ComfyUI."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from glm_image.scripts import environment

TESTS = Path(__file__).resolve().parents[1]
NODES = TESTS.parent / "nodes"
HOST = environment.host().path
DOCUMENT = (TESTS.parent / "ARCHITECTURE.md").read_text()
PROGRAM = """
import functools, gc, importlib, json, sys, time
sys.path[:0] = [{host!r}, {tests!r}]
from comfy.cli_args import args
args.cpu = True
# What a server imports before any pack; `nodes` puts another `utils` on the path.
import utils.extra_config, nodes, comfy_api.latest, comfy_execution.graph_utils
import conftest  # registers the pack's folder, imports nothing of it
gc.disable()  # a collection over all of the host's objects would count as ours
sys.pycache_prefix, sys.dont_write_bytecode = {bytecode!r}, False
since = time.perf_counter()
importlib.import_module("glm_image.nodes")
seconds, gone = time.perf_counter() - since, {{}}
for module, name in {names!r}:
    try:
        functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError) as error:
        gone[f"{{module}}.{{name}}"] = str(error)
print("result", json.dumps([seconds, gone]))
"""


def start(names: list[tuple[str, str]], bytecode: Path) -> tuple[float, dict[str, str]]:
    """Seconds for the pack's import in a new process, and which of `names` ComfyUI lacks.

    The first start compiles the pack into the folder `bytecode`, as Python does at a user's first
    start, whatever the environment says of writing it; later ones read it.
    """
    program = PROGRAM.format(host=str(HOST), tests=str(TESTS), names=names, bytecode=str(bytecode))
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seconds, gone = json.loads(out.rsplit("result ", 1)[1])
    return seconds, gone


def test_importing_the_pack_takes_under_300_ms_and_finds_every_name(tmp_path: Path) -> None:
    _, gone = start(sorted(USED), tmp_path)
    assert gone == {}
    assert any(tmp_path.rglob("*.pyc"))
    assert min(start([], tmp_path)[0] for _ in range(2)) < 0.3


# ---- names ---------------------------------------------------------------------------------------


def imported(file: Path) -> Iterator[tuple[str, str]]:
    """Each module of ComfyUI in a file, with the names that are used of it, dots in them."""
    tree = ast.parse(file.read_text())
    used = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level and is_of_comfyui(node.module):
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            for module in filter(is_of_comfyui, (alias.name for alias in node.names)):
                for name in used:
                    if re.fullmatch(rf"{re.escape(module)}(\.\w+)+", name):
                        yield module, name.removeprefix(f"{module}.")


def is_of_comfyui(module: str) -> bool:
    top = HOST / module.split(".")[0]
    return top.is_dir() or top.with_suffix(".py").is_file()


USED = {used for file in NODES.rglob("*.py") for used in imported(file)}


def test_the_document_lists_what_is_imported() -> None:
    section = DOCUMENT.split("## What is used of ComfyUI\n")[1].split("\n## ")[0]
    modules = re.findall(r"`([\w.]+)`", section.split("From `comfy` ")[1].split("; besides")[0])
    rows = {
        module: set(re.findall(r"`(\w+)`", names))
        for module, names in re.findall(r"^\| `([\w.]+)` \| (`.+?) \|", section, re.M)
    }
    found: dict[str, set[str]] = {}
    for module, name in USED:
        found.setdefault(module, set()).add(name.split(".")[0])
    assert found.keys() == {*rows, *(f"comfy.{module}" for module in modules)}
    assert {module: found[module] for module in rows} == rows
