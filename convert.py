"""Converts GLM-Image's weights, or checks a download; runs in any folder. See `--help`."""

import sys
from pathlib import Path

# The embedded Python of ComfyUI's portable version adds neither the script's folder nor the current
# one. ComfyUI itself does not import this file.
sys.path.insert(0, str(Path(__file__).resolve().parent))

from glm_core.convert import main

if __name__ == "__main__":
    main()
