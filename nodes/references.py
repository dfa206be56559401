"""Images read by the model: references for editing and style, tokens and layouts of photos."""

from typing import Any

import torch
from comfy_api.latest import io

from ..glm_core.data.grids import size_advice
from ..glm_core.data.references import References as ReferenceData
from .grid_ui import grids
from .host.ar_interface import AnyAR
from .host.decoder import require_decoder
from .host.encode import encode_references, encode_tokens
from .host.reference_cache import PRECISIONS, STORES, compute_cache
from .inputs import check_choices, require_choices, size_inputs, size_outputs, vision_input
from .messages import message, warning
from .node import Node
from .types import CATEGORY, Layout, ReferenceCache, References, Tokens

BATCHES = ("references", "one per sample")


class EncodeReference(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageEncodeReference",
            display_name="GLM-Image Encode Reference",
            category=f"{CATEGORY}/references",
            description="Reads an image for editing, style or identity, as semantic tokens for "
            "the AR model and as a latent for the decoder. The image is first resized to the "
            "nearest size that both read (multiples of 32, sides 512 to 2048); transparency "
            "becomes white.",
            inputs=[
                vision_input(),
                io.Vae.Input("vae", tooltip="From GLM-Image Load VAE."),
                io.Image.Input(
                    "image", tooltip="The image to refer to. A batch makes several references."
                ),
                References.Input(
                    "references",
                    optional=True,
                    tooltip="Earlier references. This image comes after them in the prompt.",
                ),
                io.Combo.Input(
                    "batch",
                    options=list(BATCHES),
                    default=BATCHES[0],
                    tooltip="references: every sample sees every image of the batch. "
                    "one per sample: sample i sees image i alone.",
                ),
            ],
            outputs=[
                References.Output(display_name="references"),
                *size_outputs("the resized image"),
            ],
        )

    @classmethod
    def validate_inputs(cls, batch: str | None = None) -> bool | str:
        return check_choices(("batch", batch, BATCHES))

    @classmethod
    def execute(
        cls,
        ar: AnyAR,
        vae: Any,
        image: torch.Tensor,
        batch: str,
        references: ReferenceData | None = None,
    ) -> io.NodeOutput:
        require_choices(("batch", batch, BATCHES))
        chain, (height, width) = encode_references(ar, vae, image, references, batch == BATCHES[1])
        said = message([_summary(image, width, height, len(chain.sets[0]))])
        return io.NodeOutput(chain, width, height, ui=said)


def _summary(image: torch.Tensor, width: int, height: int, count: int) -> str:
    """One line for the node: how the image was resized, and how many references a sample has."""
    was, now = f"{image.shape[2]} x {image.shape[1]}", f"{width} x {height}"
    size = f"{was} read as it is" if was == now else f"{was} resized to {now}"
    return f"{size}; {count} reference{'s' * (count > 1)} a sample"


class MakeReferenceCache(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageReferenceCache",
            display_name="GLM-Image Reference Cache",
            category=f"{CATEGORY}/references",
            description="Runs the decoder once over the references and stores every block's keys "
            "and values. The cache is exact for any prompt and seed. It is computed again only "
            "when the references, the decoder or its LoRAs change.",
            inputs=[
                io.Model.Input("model", tooltip="The decoder that will sample, with its LoRAs."),
                References.Input("references", tooltip="From GLM-Image Encode Reference."),
                io.Combo.Input(
                    "store",
                    options=list(STORES),
                    default="auto",
                    tooltip="gpu: fastest; takes 1.9 GiB for a 1024 x 1024 reference. cpu: "
                    "streamed from host memory block by block. auto: gpu if it fits, else cpu.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(PRECISIONS),
                    default="model",
                    tooltip="model: as the decoder computes. fp8: half the memory, and a slightly "
                    "different image.",
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


class EncodeTokens(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageEncodeTokens",
            display_name="GLM-Image Encode Tokens",
            category=CATEGORY,
            description="Turns a photo or a sketch into semantic tokens and a layout of the chosen "
            "size; the image is cropped to its aspect. Lock the layout to keep the composition "
            "under another prompt, or decode the tokens as they are.",
            inputs=[
                vision_input(),
                io.Image.Input(
                    "image", tooltip="The image to read. A batch makes a batch of tokens."
                ),
                *size_inputs(),
            ],
            outputs=[
                Tokens.Output(display_name="tokens"),
                Layout.Output(display_name="layout"),
                *size_outputs("the tokens' images"),
            ],
        )

    @classmethod
    def execute(cls, ar: AnyAR, image: torch.Tensor, width: int, height: int) -> io.NodeOutput:
        tokens, layout = encode_tokens(ar, image, height, width)
        said = warning(size_advice(height, width)) | grids(tokens)
        return io.NodeOutput(tokens, layout, width, height, ui=said)
