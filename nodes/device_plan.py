"""The Device Plan node: which device runs which stage of a checkpoint on this machine."""

from typing import Any

from comfy_api.latest import io

from ..glm_core.files.component import COMPONENTS
from ..glm_core.files.weight_dtypes import WEIGHT_DTYPES
from ..glm_core.placement.plan import AUTO, STRATEGIES
from .host.devices import check_device, device_names
from .host.plan import make_plan, plannable_names, require_plannable
from .inputs import check_choices, require_choices, size_inputs, validate
from .loaders import files_of
from .node import Node
from .types import CATEGORY, DevicePlan

STAGES = {
    "ar": "the AR model",
    "decoder": "the diffusion decoder",
    "glyph": "the glyph encoder",
    "vae": "the VAE",
}
SPLIT_STAGES = ("ar", "decoder")


def _device(stage: str) -> io.Combo.Input:
    return io.Combo.Input(
        stage,
        options=device_names(),
        default=AUTO,
        tooltip=f"The device of {STAGES[stage]}; auto leaves it to the plan. A device that this "
        "machine does not have counts as auto.",
    )


def _split(stage: str) -> io.String.Input:
    return io.String.Input(
        f"{stage}_split",
        default="",
        tooltip=f"Layers of {STAGES[stage]} by device, as in gpu:0=0-19,gpu:1=20-39; empty leaves "
        "it to the plan.",
    )


class MakeDevicePlan(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageDevicePlan",
            display_name="GLM-Image Device Plan",
            category=f"{CATEGORY}/loaders",
            description="Chooses a device for every stage from the sizes of checkpoint and image "
            "and the free memory, and splits a stage that fits on no device over several. Connect "
            "it to the loaders; its second output is the plan as a table.",
            inputs=[
                io.Combo.Input(
                    "model_name",
                    options=plannable_names(),
                    tooltip="The checkpoint to plan for, as in the loaders.",
                ),
                io.Combo.Input(
                    "weight_dtype",
                    options=list(WEIGHT_DTYPES),
                    default="default",
                    tooltip="As in Load AR Model and Load Decoder.",
                ),
                *size_inputs(),
                io.Int.Input(
                    "batch_size", default=1, min=1, max=4096, tooltip="Images made together."
                ),
                io.Int.Input(
                    "references",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Reference images for each image, counted as being of its size.",
                ),
                io.Combo.Input(
                    "strategy",
                    options=list(STRATEGIES),
                    default=AUTO,
                    tooltip="auto: a stage is split only if it fits on no device. fastest: also if "
                    "all stages can then stay loaded. least memory: layers are streamed from host "
                    "memory even if they would fit.",
                ),
                *map(_device, STAGES),
                *map(_split, SPLIT_STAGES),
                io.Float.Input(
                    "reserve_gb",
                    default=1.0,
                    min=0.0,
                    max=1024.0,
                    step=0.1,
                    tooltip="GiB of each GPU that the plan leaves to other programs.",
                ),
            ],
            outputs=[
                DevicePlan.Output(display_name="device_plan"),
                io.String.Output(
                    display_name="table", tooltip="The device and memory of every stage, and notes."
                ),
            ],
        )

    @classmethod
    def validate_inputs(
        cls,
        model_name: str | None = None,
        weight_dtype: str | None = None,
        strategy: str | None = None,
        ar: str | None = None,
        decoder: str | None = None,
        glyph: str | None = None,
        vae: str | None = None,
    ) -> bool | str:
        """All but the splits: the host would blame every input here, and `execute` names one."""
        known = model_name is None or validate(require_plannable, model_name)
        if known is not True:
            return known
        for stage, name in {"ar": ar, "decoder": decoder, "glyph": glyph, "vae": vae}.items():
            answer = check_device(stage, name)
            if answer is not True:
                return answer
        return check_choices(
            ("weight_dtype", weight_dtype, WEIGHT_DTYPES), ("strategy", strategy, STRATEGIES)
        )

    @classmethod
    def fingerprint_inputs(cls, **inputs: Any) -> str:
        return files_of(inputs, *COMPONENTS)

    @classmethod
    def execute(
        cls,
        model_name: str,
        weight_dtype: str,
        width: int,
        height: int,
        batch_size: int,
        references: int,
        strategy: str,
        ar: str,
        decoder: str,
        glyph: str,
        vae: str,
        ar_split: str,
        decoder_split: str,
        reserve_gb: float,
    ) -> io.NodeOutput:
        require_choices(
            ("weight_dtype", weight_dtype, WEIGHT_DTYPES), ("strategy", strategy, STRATEGIES)
        )
        plan, table = make_plan(
            model_name,
            weight_dtype,
            (height, width),
            batch_size,
            references,
            strategy,
            pins={"ar": ar, "decoder": decoder, "glyph": glyph, "vae": vae},
            splits={"ar": ar_split, "decoder": decoder_split},
            reserve_gb=reserve_gb,
        )
        return io.NodeOutput(plan, table)
