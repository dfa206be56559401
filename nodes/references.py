"""Reference images: encoded once, cached once, attended to at every step."""

from typing import Any

import torch
from comfy_api.latest import io

from ..glm_core.data.references import References as ReferenceData
from .choices import check_choices, require_choices
from .host.ar import HostAR
from .host.decoder import require_decoder
from .host.encode import encode_references, encode_tokens
from .host.progress import show_text
from .host.reference_cache import PRECISIONS, STORES, compute_cache
from .semantic import size_inputs
from .types import AR, CATEGORY, Layout, ReferenceCache, References, Tokens

BATCHES = ("references", "one per sample")


class EncodeReference(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageEncodeReference",
            display_name="GLM-Image Encode Reference",
            category=f"{CATEGORY}/references",
            description="Reads an image for editing, style or identity: as semantic tokens for the "
            "AR model and as a latent for the decoder. It is first brought to the nearest size on "
            "which both agree (multiples of 32, sides 512 to 2048); transparency becomes white.",
            inputs=[
                AR.Input("ar", tooltip="From GLM-Image Load AR Model; its vision tower is used."),
                io.Vae.Input("vae", tooltip="From GLM-Image Load VAE."),
                io.Image.Input("image", tooltip="A batch makes several references."),
                References.Input(
                    "references",
                    optional=True,
                    tooltip="Earlier references; these come after them in the prompt.",
                ),
                io.Combo.Input(
                    "batch",
                    options=list(BATCHES),
                    default=BATCHES[0],
                    tooltip="references: every image of the batch is shown to every sample. "
                    "one per sample: image i is for sample i alone.",
                ),
            ],
            outputs=[
                References.Output(display_name="references"),
                io.Int.Output(display_name="width", tooltip="What the image was brought to."),
                io.Int.Output(display_name="height", tooltip="What the image was brought to."),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def validate_inputs(cls, batch: str | None = None) -> bool | str:
        return check_choices(("batch", batch, BATCHES))

    @classmethod
    def execute(
        cls,
        ar: HostAR,
        vae: Any,
        image: torch.Tensor,
        batch: str,
        references: ReferenceData | None = None,
    ) -> io.NodeOutput:
        require_choices(("batch", batch, BATCHES))
        chain, (height, width) = encode_references(ar, vae, image, references, batch == BATCHES[1])
        was = f"{image.shape[2]} x {image.shape[1]}"
        now = f"{width} x {height}"
        count = len(chain.sets[0])
        text = f"{was} read as it is" if was == now else f"{was} brought to {now}"
        show_text(cls.hidden.unique_id, f"{text}; {count} reference{'s' * (count > 1)} a sample")
        return io.NodeOutput(chain, width, height)


class MakeReferenceCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageReferenceCache",
            display_name="GLM-Image Reference Cache",
            category=f"{CATEGORY}/references",
            description="Runs the decoder once over the references and keeps every block's keys "
            "and values. The result is exact for any prompt and seed, and is made again only when "
            "the references, the decoder or its LoRAs change.",
            inputs=[
                io.Model.Input("model", tooltip="The decoder that will sample, LoRAs included."),
                References.Input("references", tooltip="From GLM-Image Encode Reference."),
                io.Combo.Input(
                    "store",
                    options=list(STORES),
                    default="auto",
                    tooltip="gpu: fastest, 1.9 GiB for a 1024 x 1024 reference. cpu: streamed from "
                    "host memory block by block. auto: gpu where there is room.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="model",
                    tooltip="fp8 takes half the memory and changes the picture slightly.",
                ),
            ],
            outputs=[ReferenceCache.Output(display_name="reference_cache")],
        )

    @classmethod
    def validate_inputs(cls, store: str | None = None, precision: str | None = None) -> bool | str:
        return check_choices(("store", store, STORES), ("precision", precision, PRECISIONS))

    @classmethod
    def execute(
        cls, model: Any, references: ReferenceData, store: str, precision: str
    ) -> io.NodeOutput:
        require_choices(("store", store, STORES), ("precision", precision, PRECISIONS))
        require_decoder(model)
        return io.NodeOutput(compute_cache(model, references, store, precision))


class EncodeTokens(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageEncodeTokens",
            display_name="GLM-Image Encode Tokens",
            category=CATEGORY,
            description="Turns a photo or a sketch into semantic tokens and a layout of an asked "
            "size. Lock the layout to keep the drawing's composition under another prompt, or "
            "decode the tokens as they are. The image is cropped to the aspect.",
            inputs=[
                AR.Input("ar", tooltip="From GLM-Image Load AR Model; its vision tower is used."),
                io.Image.Input("image", tooltip="A batch makes a batch of tokens."),
                *size_inputs(),
            ],
            outputs=[Tokens.Output(display_name="tokens"), Layout.Output(display_name="layout")],
        )

    @classmethod
    def execute(cls, ar: HostAR, image: torch.Tensor, width: int, height: int) -> io.NodeOutput:
        return io.NodeOutput(*encode_tokens(ar, image, height, width))
