"""`make serve`: the demo's ComfyUI, left running for a browser, with graphs for its model.

`ARGS="--listen ..."` are flags for ComfyUI.
"""

import contextlib
import os
import sys
import time

from . import environment, host
from .demo import BASE, TINY, demo_server, prepare_model
from .tiny_graphs import write_graphs, write_templates
from .workflow_texts import file_title

WORKFLOW_MODEL = "GLM-Image"
"""The model name in the workflows' loaders."""


def main(flags: list[str]) -> None:
    model = prepare_model(os.environ.get("MODEL"))
    models = BASE / "models" / "glm_image"
    alias = models / WORKFLOW_MODEL
    if model != WORKFLOW_MODEL and (alias.is_symlink() or not alias.exists()):
        host.add_model(BASE, models / model, WORKFLOW_MODEL)
    is_tiny = model == TINY.name
    graphs = write_graphs(BASE, is_tiny)
    templates = write_templates(BASE / "templates") if is_tiny else None
    port = int(os.environ.get("PORT", "8188"))
    flags = ["--preview-method", "auto", *flags]
    server = demo_server(environment.host(), model, *flags, port=port, templates=templates)
    with server as address:
        print(f"ComfyUI with the pack is at http://{address} (Ctrl-C stops it).")
        print(f"Its model is {model}; the workflows find it as {WORKFLOW_MODEL}.")
        print(
            f"Graphs for it are in the page's Templates and in its sidebar, Workflows (key W); "
            f"begin with '{file_title('text_to_image')}'. They lie in {graphs}.",
            flush=True,
        )
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                time.sleep(3600)


if __name__ == "__main__":
    main(sys.argv[1:])
