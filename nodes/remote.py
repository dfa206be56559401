"""The AR model of a service in place of one on this machine."""

from typing import Any

from comfy_api.latest import io

from .host.remote_ar import connect, identity_of
from .host.services import find_service, service_names
from .inputs import validate
from .node import Node
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
    def fingerprint_inputs(cls, service: str | None = None) -> Any:
        """What the service has: its tokens are written again when it has another model."""
        return identity_of(service)

    @classmethod
    def execute(cls, service: str) -> io.NodeOutput:
        return io.NodeOutput(connect(service))
