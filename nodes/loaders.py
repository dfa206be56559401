"""Loaders: one node for each component of a checkpoint, and one for all of them."""

from typing import Any

from comfy_api.latest import io

from ..glm_core.files.component import COMPONENTS
from ..glm_core.files.weight_dtypes import WEIGHT_DTYPES
from .host.ar import load_ar
from .host.decoder import load_decoder
from .host.devices import DevicePlan as Plan
from .host.devices import Placement
from .host.glyph import load_glyph_encoder
from .host.paths import checkpoint_names, find_place, model_names, model_stamp
from .host.vae import load_vae
from .inputs import fingerprint, require_choices, validate
from .node import Node
from .types import AR, CATEGORY, DevicePlan


def _model_name(component: str, what: str) -> io.Combo.Input:
    return io.Combo.Input(
        "model_name",
        options=model_names(component),
        tooltip=f"The {what} to load: a snapshot folder in models/glm_image, or a single file.",
    )


def _weight_dtype() -> io.Combo.Input:
    return io.Combo.Input(
        "weight_dtype",
        options=list(WEIGHT_DTYPES),
        default="default",
        tooltip="Format of the weights in memory; default: that of the file. Against bf16, fp8 and "
        "int8 halve the layers' matrices, and int4 quarters them. This pack's convert.py writes "
        "files that load without quantising.",
    )


def _device_plan() -> DevicePlan.Input:
    return DevicePlan.Input(
        "device_plan",
        optional=True,
        tooltip="From GLM-Image Device Plan. Unconnected: ComfyUI chooses the device.",
    )


def _placement(plan: Plan | None, stage: str) -> Placement | None:
    return None if plan is None else plan.placement(stage)


def _check_model_name(component: str, model_name: str | None) -> bool | str:
    return model_name is None or validate(find_place, component, model_name)


def files_of(inputs: dict[str, Any], *components: str) -> str:
    """For `fingerprint_inputs`: the nodes run again when a file of these components has changed."""
    name, weight_dtype = inputs.get("model_name"), inputs.get("weight_dtype") or "default"
    return "\n".join(fingerprint(model_stamp, name, one, weight_dtype) for one in components)


class LoadAR(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageLoadAR",
            display_name="GLM-Image Load AR Model",
            category=f"{CATEGORY}/loaders",
            description="Loads the autoregressive model, which writes an image's semantic tokens "
            "from a prompt. Its weights move to the GPU only when a sampler needs them.",
            inputs=[_model_name("ar", "AR model"), _weight_dtype(), _device_plan()],
            outputs=[AR.Output(display_name="ar")],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        return _check_model_name("ar", model_name)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return files_of(inputs, "ar")

    @classmethod
    def execute(
        cls, model_name: str, weight_dtype: str, device_plan: Plan | None = None
    ) -> io.NodeOutput:
        require_choices(("weight_dtype", weight_dtype, WEIGHT_DTYPES))
        return io.NodeOutput(load_ar(model_name, weight_dtype, _placement(device_plan, "ar")))


class LoadDecoder(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageLoadDecoder",
            display_name="GLM-Image Load Decoder",
            category=f"{CATEGORY}/loaders",
            description="Loads the diffusion decoder as a native MODEL. It works with KSampler, "
            "the custom samplers, LoRA loaders, torch.compile and caching nodes.",
            inputs=[_model_name("decoder", "diffusion decoder"), _weight_dtype(), _device_plan()],
            outputs=[io.Model.Output()],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        return _check_model_name("decoder", model_name)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return files_of(inputs, "decoder")

    @classmethod
    def execute(
        cls, model_name: str, weight_dtype: str, device_plan: Plan | None = None
    ) -> io.NodeOutput:
        require_choices(("weight_dtype", weight_dtype, WEIGHT_DTYPES))
        return io.NodeOutput(
            load_decoder(model_name, weight_dtype, _placement(device_plan, "decoder"))
        )


class LoadGlyphEncoder(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageLoadGlyphEncoder",
            display_name="GLM-Image Load Glyph Encoder",
            category=f"{CATEGORY}/loaders",
            description="Loads the Glyph-ByT5 encoder, which reads the texts to render byte by "
            "byte, as a native CLIP. It works with GLM-Image Glyph Encode and CLIP Text Encode.",
            inputs=[_model_name("glyph", "glyph encoder"), _device_plan()],
            outputs=[io.Clip.Output()],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        return _check_model_name("glyph", model_name)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return files_of(inputs, "glyph")

    @classmethod
    def execute(cls, model_name: str, device_plan: Plan | None = None) -> io.NodeOutput:
        return io.NodeOutput(load_glyph_encoder(model_name, _placement(device_plan, "glyph")))


class LoadVAE(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageLoadVAE",
            display_name="GLM-Image Load VAE",
            category=f"{CATEGORY}/loaders",
            description="Loads GLM-Image's autoencoder as a native VAE. It works with VAE Decode, "
            "VAE Encode and their tiled forms.",
            inputs=[_model_name("vae", "VAE"), _device_plan()],
            outputs=[io.Vae.Output()],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        return _check_model_name("vae", model_name)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return files_of(inputs, "vae")

    @classmethod
    def execute(cls, model_name: str, device_plan: Plan | None = None) -> io.NodeOutput:
        return io.NodeOutput(load_vae(model_name, _placement(device_plan, "vae")))


class LoadCheckpoint(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageLoadCheckpoint",
            display_name="GLM-Image Load Checkpoint",
            category=f"{CATEGORY}/loaders",
            description="Loads the whole model under one name: AR model, decoder, glyph encoder "
            "and VAE, as the four loaders do. Weights stay in their files until a stage runs, "
            "except those that weight_dtype quantises.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=checkpoint_names(),
                    tooltip="The model to load: a folder in models/glm_image with all of it.",
                ),
                _weight_dtype(),
                _device_plan(),
            ],
            outputs=[
                AR.Output(display_name="ar"),
                io.Model.Output(),
                io.Clip.Output(),
                io.Vae.Output(),
            ],
        )

    @classmethod
    def validate_inputs(cls, model_name: str | None = None) -> bool | str:
        answers = (_check_model_name(component, model_name) for component in COMPONENTS)
        return next((answer for answer in answers if answer is not True), True)

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return files_of(inputs, *COMPONENTS)

    @classmethod
    def execute(
        cls, model_name: str, weight_dtype: str, device_plan: Plan | None = None
    ) -> io.NodeOutput:
        require_choices(("weight_dtype", weight_dtype, WEIGHT_DTYPES))
        places = {component: _placement(device_plan, component) for component in COMPONENTS}
        return io.NodeOutput(
            load_ar(model_name, weight_dtype, places["ar"]),
            load_decoder(model_name, weight_dtype, places["decoder"]),
            load_glyph_encoder(model_name, places["glyph"]),
            load_vae(model_name, places["vae"]),
        )
