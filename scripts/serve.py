"""`make serve`: the demo's ComfyUI, left running for a browser."""

import contextlib
import os
import time

from . import environment, host
from .demo import BASE, demo_server, prepare_model

NAMED = "GLM-Image"
"""The model that the workflows' loaders name."""


def main() -> None:
    model = prepare_model(os.environ.get("MODEL"))
    models = BASE / "models" / "glm_image"
    free = (models / NAMED).is_symlink() or not (models / NAMED).exists()
    if model != NAMED and free:
        host.add_model(BASE, models / model, NAMED)
    port = int(os.environ.get("PORT", "8188"))
    server = demo_server(environment.host(), model, "--preview-method", "auto", port=port)
    with server as address:
        print(f"ComfyUI with the pack is at http://{address} (Ctrl-C stops it).")
        print(f"The model {model} is there, as {NAMED} too, which the workflows name.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()
