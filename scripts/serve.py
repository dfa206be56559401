"""`make serve`: the demo's ComfyUI, left running for a browser."""

import contextlib
import os
import time

from . import environment
from .demo import demo_server, prepare_model


def main() -> None:
    model = prepare_model(os.environ.get("MODEL"))
    port = int(os.environ.get("PORT", "8188"))
    with demo_server(environment.host(), port) as address:
        print(f"ComfyUI with the pack is at http://{address} (Ctrl-C stops it).")
        print(f"Choose the model {model} in the loaders of a workflow.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main()
