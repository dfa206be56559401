"""The folders of glm_core import one way: each knows those before it and none after it."""

import subprocess
import sys
from pathlib import Path

GLM_CORE = Path(__file__).resolve().parents[2] / "glm_core"
ORDER = (
    "errors",
    "foreign",
    "schema",
    "attention",
    "fallbacks",
    "layers",
    "split",
    "choice",
    "data",
    "vision",
    "ar",
    "glyph",
    "decoder",
    "vae",
    "latent_rgb",
    "quant",
    "files",
    "placement",
    "convert",
)
"""Data, networks, files, placement; what belongs to no folder stands where it is needed first."""

PROGRAM = """
import importlib, pkgutil, sys
import glm_core

def loaded():
    return {name.split(".")[1] for name in sys.modules if name.startswith("glm_core.")}

for number, folder in enumerate(ORDER):
    module = importlib.import_module(f"glm_core.{folder}")
    for part in pkgutil.iter_modules(getattr(module, "__path__", ())):
        importlib.import_module(f"glm_core.{folder}.{part.name}")
    above = loaded() - set(ORDER[: number + 1])
    assert not above, f"{folder} imports {', '.join(sorted(above))}"
"""


def test_the_order_names_everything() -> None:
    folders = {path.stem for path in GLM_CORE.iterdir() if not path.name.startswith("_")}
    assert folders == set(ORDER)


def test_importing_a_folder_pulls_in_no_folder_above_it() -> None:
    program = f"ORDER = {ORDER!r}\n{PROGRAM}"
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=GLM_CORE.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
