"""The AR model of a service in place of one on this machine."""

from functools import partial

from comfy_api.latest import io

from ..glm_core.ar.requests import SampleRequest
from ..glm_core.ar.step import SamplingOptions
from .host.ahead import Ahead
from .host.constants import Values
from .host.remote_ar import CLIENT, SAMPLES, connect, identity_of
from .host.requests import requests_of
from .host.services import find_service, service_names
from .inputs import validate
from .join import PromptLines
from .node import Node, require_input
from .semantic import SampleLayout, SampleTokens
from .types import AR, CATEGORY

USED = {
    "prompt",
    "width",
    "height",
    "seed",
    "temperature",
    "top_p",
    "top_k",
    "batch_size",
    "lookahead",
    "layout",
    "references",
    "tokens",
    "mask",
}
"""What of a sampler's inputs a request depends on."""


class RemoteAR(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageRemoteAR",
            display_name="GLM-Image Remote AR Model",
            category=f"{CATEGORY}/loaders",
            description="The autoregressive model of a service, for every node that takes one "
            "but Load LoRA. This machine keeps none of its weights. The tokens are those of a "
            "model here. While this machine paints, the service writes the tokens of the prompts "
            "that wait in the queue.",
            inputs=[
                io.Combo.Input(
                    "service",
                    options=service_names(),
                    tooltip="A name in the file glm_image_services.yaml of ComfyUI's user folder, "
                    "which has the service's address and key. A workflow has only the name.",
                )
            ],
            outputs=[AR.Output(display_name="ar")],
        )

    @classmethod
    def validate_inputs(cls, service: str | None = None) -> bool | str:
        return service is None or validate(find_service, service)

    @classmethod
    def fingerprint_inputs(cls, service: str | None = None) -> str:
        """What the service has: its tokens are written again when it has another model."""
        return identity_of(service)

    @classmethod
    def execute(cls, service: str) -> io.NodeOutput:
        return io.NodeOutput(connect(service))


def watch_queue() -> None:
    """Has the samples of queued prompts asked for ahead. Without a server there is no queue."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        samplers = {
            "GLMImageSampleTokens": partial(_requests, SampleTokens, "tokens"),
            "GLMImageSampleLayout": partial(_requests, SampleLayout, "layout"),
        }
        givers = {"GLMImagePromptLines": _prompt_lines}
        ahead = Ahead(server.prompt_queue, CLIENT, SAMPLES, samplers, givers)
        server.add_on_prompt_handler(ahead.on_prompt)


def _requests(node: type[Node], kind: str, values: Values, codebook: int) -> list[SampleRequest]:
    """What the node will ask for, if its inputs are what it can use.

    Raises:
        GLMImageError: they are not.
    """
    values = {name: given for name, given in values.items() if name in USED}
    for given in node.define_schema().inputs:
        for value in values.get(given.id, ()):
            require_input(given, value)
    requests = []
    for i in range(max(map(len, values.values()))):
        one = {name: given[min(i, len(given) - 1)] for name, given in values.items()}
        one = {name: value for name, value in one.items() if value is not None}
        options = SamplingOptions(*(one.pop(name) for name in ("temperature", "top_p", "top_k")))
        requests += requests_of(codebook, options=options, kind=kind, **one)
    return requests


def _prompt_lines(values: Values) -> list[str]:
    return PromptLines.execute(values["text"][0], values["split"][0]).result[0]
