"""Saves and loads semantic tokens and their layout as files."""

import hashlib
import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..glm_core.data.token_file import MAX_FILE_BYTES, load_tokens, save_tokens
from ..glm_core.data.tokens import Layout as LayoutData
from ..glm_core.data.tokens import SemanticTokens
from ..glm_core.errors import GLMImageError
from .inputs import validate
from .node import Node
from .types import CATEGORY, Layout, Tokens

SUFFIX = ".safetensors"


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
        try:
            folder, name, counter, subfolder, _ = folder_paths.get_save_image_path(
                filename_prefix, folder_paths.get_output_directory(), tokens.width, tokens.height
            )
            file = f"{name}_{counter:05}_{SUFFIX}"
            save_tokens(Path(folder) / file, tokens, layout)
        except OSError as error:
            raise GLMImageError(
                f"The tokens cannot be saved as '{filename_prefix}' ({error.strerror}); choose "
                "another filename_prefix, or check the output folder."
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
            outputs=[Tokens.Output(display_name="tokens"), Layout.Output(display_name="layout")],
        )

    @classmethod
    def validate_inputs(cls, file: str | None = None) -> bool | str:
        return validate(_find, file or "")

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        path = _find(file)
        if path.stat().st_size > MAX_FILE_BYTES:  # `execute` refuses it
            return str(path.stat().st_size)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        tokens, layout = load_tokens(_find(file))
        no_layout = f"{file} holds no layout; connect a layout to Save Tokens to save it as well."
        return io.NodeOutput(tokens, layout or ExecutionBlocker(no_layout))


def _token_files() -> list[str]:
    folders = (
        (folder_paths.get_input_directory(), ""),
        (folder_paths.get_output_directory(), " [output]"),
    )
    return [
        f"{path.relative_to(folder).as_posix()}{mark}"
        for folder, mark in folders
        for path in sorted(Path(folder).rglob(f"*{SUFFIX}"))
        if path.is_file() and path.stat().st_size <= MAX_FILE_BYTES
    ]


def _find(name: str) -> Path:
    """The path of a file in the input folder, or in the output folder for `name [output]`.

    Raises:
        GLMImageError: the file lies outside these folders or does not exist.
    """
    plain, folder = folder_paths.annotated_filepath(name)
    root = os.path.abspath(folder or folder_paths.get_input_directory())
    path = os.path.abspath(
        os.path.join(root, plain)
    )  # not resolved: links may lead out of the folder
    if not Path(path).is_relative_to(root):
        raise GLMImageError(
            f"'{name}' lies outside the {Path(root).name} folder; copy the file into it."
        )
    if not os.path.isfile(path):
        raise GLMImageError(
            f"There is no token file '{name}'; put it into the input folder, "
            "or write 'name [output]' for one in the output folder."
        )
    return Path(path)
