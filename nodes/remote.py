"""The AR model of a service in place of one on this machine."""

from collections.abc import Callable
from functools import partial

from comfy_api.latest import io

from ..glm_core.ar.requests import SampleRequest
from .host.ahead import Ahead
from .host.ar_interface import AnyAR
from .host.constants import Values
from .host.lists import entries_of
from .host.remote_ar import connect, identity_of
from .host.services import find_service, service_names
from .inputs import fingerprint, validate
from .join import PromptLines
from .node import Node, require_input
from .semantic import SampleLayout, SampleTokens, layout_requests, token_requests
from .types import AR, CATEGORY


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
        return fingerprint(identity_of, service)

    @classmethod
    def execute(cls, service: str) -> io.NodeOutput:
        return io.NodeOutput(connect(service))


def watch_queue() -> None:
    """Has the samples of queued prompts asked for ahead. Without a server there is no queue."""
    from server import PromptServer

    server = getattr(PromptServer, "instance", None)
    if server is not None:
        samplers = {
            "GLMImageSampleTokens": partial(_requests, SampleTokens, token_requests),
            "GLMImageSampleLayout": partial(_requests, SampleLayout, layout_requests),
        }
        ahead = Ahead(server.prompt_queue, samplers, {"GLMImagePromptLines": _prompt_lines})
        server.add_on_prompt_handler(ahead.on_prompt)


def _requests(
    node: type[Node], entry_requests: Callable[..., list[SampleRequest]], values: Values, ar: AnyAR
) -> list[SampleRequest]:
    """What a sampler will ask for.

    Raises:
        GLMImageError: an input is none that it can use.
    """
    inputs = {"ar": [ar]}
    for given in node.define_schema().inputs:
        if given.id in values and given.id != "rows":
            inputs[given.id] = values[given.id]
            for value in values[given.id]:
                require_input(given, value)
    return [one for entry in entries_of(inputs) for one in entry_requests(**entry)]


def _prompt_lines(values: Values) -> list[str]:
    return PromptLines.execute(values["text"][0], values["split"][0]).result[0]
