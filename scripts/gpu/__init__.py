"""One command that measures everything on a bare GPU machine without network, and what it needs.

`make gpu` fills `.gpu/` with what is missing there; `python3 -m scripts.gpu.run` is the command.
"""

import os
from pathlib import Path

from ..environment import ROOT

FOLDER = Path(os.environ.get("GPU_FOLDER") or ROOT / ".gpu")
COMFYUI = FOLDER / "comfyui"
WHEELS = FOLDER / "wheels"
STAND_INS = FOLDER / "stand_ins"
PAGE = FOLDER / "page"
PRESET = os.environ.get("PRESET", "full")
