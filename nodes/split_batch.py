"""Splits a batch, for nodes that take images one by one."""

from comfy_api.latest import io

from .host.conditioning import Conditioning
from .host.split_batch import split_conditioning, split_latent
from .node import Node
from .types import CATEGORY


class SplitBatch(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageSplitBatch",
            display_name="GLM-Image Split Batch",
            category=f"{CATEGORY}/sampling",
            description="Makes lists of single images out of a batch, so that the nodes behind it "
            "run once an image: for samplers of other packs that take images one by one, and for "
            "less memory. Each image keeps its tokens, references, masks and noise, and is painted "
            "as in the batch. Rebatch Latents joins the results.",
            inputs=[
                io.Conditioning.Input("positive", tooltip="From GLM-Image Apply Tokens."),
                io.Conditioning.Input("negative", tooltip="From GLM-Image Apply Tokens."),
                io.Latent.Input(
                    "latent",
                    tooltip="From GLM-Image Apply Tokens, or of as many encoded images. Images are "
                    "paired with tokens by batch_index, or in order where there is none.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(display_name="positive", is_output_list=True),
                io.Conditioning.Output(display_name="negative", is_output_list=True),
                io.Latent.Output(display_name="latent", is_output_list=True),
            ],
        )

    @classmethod
    def execute(cls, positive: Conditioning, negative: Conditioning, latent: dict) -> io.NodeOutput:
        return io.NodeOutput(
            split_conditioning("positive", positive, latent),
            split_conditioning("negative", negative, latent),
            split_latent(latent),
        )
