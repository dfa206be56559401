"""Adds a LoRA to the decoder, the AR model, or both."""

from pathlib import Path
from typing import Any

import folder_paths
from comfy_api.latest import io
from comfy_execution.graph_utils import ExecutionBlocker

from ..glm_core.errors import InputError, LoraError, shown
from .host.ar_interface import AnyAR
from .host.decoder import require_decoder
from .host.lora import apply_lora
from .host.paths import spellings, stamp
from .inputs import fingerprint, validate
from .node import Node
from .types import AR, CATEGORY


def _strength(name: str, model: str) -> io.Float.Input:
    return io.Float.Input(
        name,
        default=1.0,
        min=-100.0,
        max=100.0,
        step=0.01,
        tooltip=f"Strength on {model}. 0 leaves it unchanged; a negative value inverts the LoRA.",
    )


def _find(lora_name: str) -> Path:
    """The file of that name.

    Raises:
        GLMImageError: there is none, or the name is no text.
    """
    for name in spellings("lora_name", lora_name):
        path = folder_paths.get_full_path("loras", name)
        if path is not None:
            return Path(path)
    raise LoraError(f"No LoRA is called '{shown(lora_name)}'; put the file into models/loras.")


class LoadLora(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageLoadLora",
            display_name="GLM-Image Load LoRA",
            category=f"{CATEGORY}/loaders",
            description="Adds a LoRA to the decoder, the AR model, or both, each with its own "
            "strength. Reads files of diffusers, PEFT, kohya and ComfyUI.",
            inputs=[
                io.Combo.Input(
                    "lora_name",
                    options=folder_paths.get_filename_list("loras"),
                    tooltip="The LoRA: a file in models/loras.",
                ),
                _strength("strength_model", "the decoder"),
                _strength("strength_ar", "the AR model"),
                io.Model.Input("model", optional=True, tooltip="The decoder to adapt."),
                AR.Input("ar", optional=True, tooltip="The AR model to adapt."),
            ],
            outputs=[io.Model.Output(), AR.Output(display_name="ar")],
        )

    @classmethod
    def validate_inputs(cls, lora_name: str | None = None) -> bool | str:
        return True if lora_name is None else validate(_find, lora_name)

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **_: Any) -> str:
        return fingerprint(lambda name: stamp(_find(name)), lora_name)

    @classmethod
    def execute(
        cls,
        lora_name: str,
        strength_model: float,
        strength_ar: float,
        model: Any = None,
        ar: AnyAR | None = None,
    ) -> io.NodeOutput:
        if model is None and ar is None:
            raise InputError("Nothing to adapt: connect model, ar or both to Load LoRA.")
        if model is not None:
            require_decoder(model)
        decoder, ar_patcher = apply_lora(
            _find(lora_name), model, ar and ar.require_patcher(), strength_model, strength_ar
        )
        return io.NodeOutput(
            _or_blocked(decoder, "model"), _or_blocked(ar and ar.with_patcher(ar_patcher), "ar")
        )


def _or_blocked(output: Any | None, name: str) -> Any:
    return output or ExecutionBlocker(f"Load LoRA has no {name} output: connect its {name} input.")
