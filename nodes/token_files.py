"""Saves and loads semantic tokens and their layout as files."""

import hashlib
import os
from itertools import islice
from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..glm_core.data.token_file import MAX_FILE_BYTES, load_tokens, save_tokens
from ..glm_core.data.tokens import Layout as LayoutData
from ..glm_core.data.tokens import SemanticTokens
from ..glm_core.errors import FileError, InputError, shown
from .grid_ui import grids
from .host.named_files import find_file, inside
from .inputs import fingerprint, size_outputs, validate
from .node import Node
from .types import CATEGORY, Layout, Tokens

SUFFIX = ".safetensors"
MAX_ENTRIES = 100_000
"""Files of the input or output folder that are looked at for the list; others load by name."""


class SaveTokens(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageSaveTokens",
            display_name="GLM-Image Save Tokens",
            category=CATEGORY,
            description="Saves semantic tokens and their layout into the output folder. The file "
            "has a few kilobytes and records how the tokens were made.",
            inputs=[
                Tokens.Input("tokens", tooltip="The tokens to save; a batch goes into one file."),
                io.String.Input(
                    "filename_prefix",
                    default="glm_image/tokens",
                    tooltip="Start of the file's name, with folders if wanted. %year%, %month%, "
                    "%day%, %hour%, %minute%, %second%, %width% and %height% (pixels) are "
                    "replaced.",
                ),
                Layout.Input(
                    "layout",
                    optional=True,
                    tooltip="A layout to save in the same file, with its locks.",
                ),
            ],
            outputs=[],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls, tokens: SemanticTokens, filename_prefix: str, layout: LayoutData | None = None
    ) -> io.NodeOutput:
        _require_prefix(filename_prefix)
        try:
            folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
                filename_prefix, folder_paths.get_output_directory(), tokens.width, tokens.height
            )
            file = f"{name}_{counter:05}_{SUFFIX}"
            save_tokens(Path(folder) / file, tokens, layout)
        except OSError as error:
            raise InputError(
                f"The tokens cannot be saved as '{shown(filename_prefix)}' ({error.strerror}); "
                "choose another filename_prefix, or check the output folder."
            ) from error
        saved = {"filename": file, "subfolder": subfolder, "type": "output"}
        return io.NodeOutput(ui={"tokens": [saved]})


class LoadTokens(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageLoadTokens",
            display_name="GLM-Image Load Tokens",
            category=CATEGORY,
            description="Loads semantic tokens and their layout from the input folder, or from the "
            "output folder as 'name [output]'.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=_token_files(),
                    tooltip="A file saved by GLM-Image Save Tokens.",
                )
            ],
            outputs=[
                Tokens.Output(display_name="tokens"),
                Layout.Output(display_name="layout"),
                *size_outputs("the tokens' images"),
                io.String.Output(
                    display_name="prompt",
                    tooltip="The prompt that the tokens were written for; empty where the file "
                    "names none.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return file is None or validate(_find, file)

    @classmethod
    def fingerprint_inputs(cls, file: str | None = None) -> str:
        return fingerprint(_content_of, file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        tokens, layout = load_tokens(_find(file))
        no_layout = f"{file} holds no layout; connect a layout to Save Tokens to save it as well."
        return io.NodeOutput(
            tokens,
            layout or ExecutionBlocker(no_layout),
            tokens.width,
            tokens.height,
            _prompt(tokens.info),
            ui=grids(tokens),
        )


def _content_of(name: str) -> str:
    """A hash of a file's content.

    Raises:
        GLMImageError: as `_find`.
    """
    path = _find(name)
    if path.stat().st_size > MAX_FILE_BYTES:  # `execute` refuses it
        return str(path.stat().st_size)
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _prompt(info: dict[str, Any]) -> str:
    """The prompt in a file's metadata; empty where there is none, or something else."""
    prompt = info.get("prompt")
    return prompt if isinstance(prompt, str) else ""


def _token_files() -> list[str]:
    folders = (
        (folder_paths.get_input_directory(), ""),
        (folder_paths.get_output_directory(), " [output]"),
    )
    return [
        f"{path.relative_to(folder).as_posix()}{mark}"
        for folder, mark in folders
        for path in _files_below(folder)
        if path.is_file() and path.stat().st_size <= MAX_FILE_BYTES
    ]


def _files_below(folder: str) -> list[Path]:
    """Paths with SUFFIX, sorted, among the first MAX_ENTRIES entries. No link is followed."""
    below = (Path(at) / name for at, _, names in os.walk(folder) for name in names)
    return sorted(path for path in islice(below, MAX_ENTRIES) if path.suffix == SUFFIX)


def _require_prefix(prefix: str) -> None:
    """
    Raises:
        GLMImageError: no file in the output folder can have such a name.
    """
    output = os.path.abspath(folder_paths.get_output_directory())
    if not inside(output, prefix):
        raise InputError(
            f"filename_prefix '{shown(prefix)}' leads out of the output folder; use a name or a "
            "path below it."
        )
    try:
        os.fsencode(prefix)
        allowed = "\0" not in prefix
    except UnicodeEncodeError:  # half a surrogate pair
        allowed = False
    if not allowed:
        raise InputError(
            f"filename_prefix '{shown(prefix)}' has a character that no file's name can have; "
            "leave it out."
        )


def _find(name: str) -> Path:
    """The path of a file in the input folder, or in the output folder for `name [output]`.

    Raises:
        GLMImageError: the file lies outside these folders or does not exist.
    """
    path = find_file("file", name, "copy the file into it")
    if path is None:
        raise FileError(
            f"There is no token file '{shown(name)}'; put it into the input folder, "
            "or write 'name [output]' for one in the output folder."
        )
    return path
