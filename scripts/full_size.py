"""`python -m scripts.full_size`: the tables of README and docs about the real model's sizes.

They are computed from the hub's configs, without weights: shapes by the networks, memory by the
device plan, sizes of converted files by the conversion.
"""

import json
from collections.abc import Iterator
from functools import lru_cache

import torch

from glm_core.ar.model import ARConfig, ARModel
from glm_core.decoder.model import Decoder, DecoderConfig
from glm_core.files.component import COMPONENTS, Component
from glm_core.files.conversion import CHOICES, output
from glm_core.files.headers import TensorInfo
from glm_core.glyph.encoder import GlyphConfig, GlyphEncoder
from glm_core.placement.plan import GIB, Device, Plan, gib, plan_stages
from glm_core.placement.stages import Request, stages
from glm_core.vae import AutoencoderKL, VAEConfig
from glm_core.vision.encoder import VisionConfig, VisionEncoder

from . import environment

HUB = environment.ROOT / "tests" / "configs" / "hub"
NETWORKS = {
    "ar": [(ARModel, ARConfig), (VisionEncoder, VisionConfig)],
    "decoder": [(Decoder, DecoderConfig)],
    "glyph": [(GlyphEncoder, GlyphConfig)],
    "vae": [(AutoencoderKL, VAEConfig)],
}
DTYPES = {"glyph": torch.float32}  # the others are bf16
SHARDS = {"ar": 4, "decoder": 3}
"""Weight files of the hub's snapshot, where there are several."""
CARDS = [
    (80, ["default"], "nothing"),
    (48, ["default"], "nothing"),
    (24, ["default"], "nothing"),
    (24, ["fp8_e4m3fn", "int8"], "fp8 or int8"),
    (16, ["fp8_e4m3fn", "int8"], "fp8 or int8"),
    (12, ["fp8_e4m3fn", "int8"], "fp8 or int8"),
    (8, ["int4"], "int4"),
]
"""GPU memory in GiB, weight dtypes that need the same memory, and what to convert to."""
RESERVE = 1.0  # GiB of the card, left to other programs, as the Device Plan node leaves them
SIDE = 1024


@lru_cache
def component(name: str) -> Component:
    """A component as it would be opened from the hub's snapshot, without its tokenizer."""
    config = json.loads((HUB / f"{COMPONENTS[name].folder}_config.json").read_text())
    dtype = DTYPES.get(name, torch.bfloat16)
    with torch.device("meta"):
        states = [network(read.from_dict(config)).state_dict() for network, read in NETWORKS[name]]
    tensors = {
        key: TensorInfo(HUB, key, value.shape, dtype, 0, value.numel() * dtype.itemsize)
        for state in states
        for key, value in state.items()
    }
    return Component(name, HUB, config, tensors)


def components() -> dict[str, Component]:
    return {name: component(name) for name in COMPONENTS}


def card_rows() -> Iterator[str]:
    for card, weight_dtypes, converted in CARDS:
        rows = {_memory(_plan(card, weight_dtype)) for weight_dtype in weight_dtypes}
        (memory,) = rows  # the same for each of them
        yield _row(f"{card} GB", " or ".join(weight_dtypes), converted, *memory)


def _plan(card: float, weight_dtype: str) -> Plan:
    needs = stages(components(), weight_dtype, Request(SIDE, SIDE))
    devices = [Device("gpu:0", int((card - RESERVE) * GIB)), Device("cpu", 64 * GIB)]
    return plan_stages(needs, devices)


def _memory(plan: Plan) -> tuple[str, str, str]:
    """Host memory, what is streamed, and the peak on the card."""
    together = "gpu:0" in plan.together
    # While a stage runs, the weights of all others may wait in host memory.
    weights = sum(part.weights for part in plan.parts)
    waiting = weights - min(part.resident for part in plan.parts)
    streamed = ", ".join(
        f"{part.stage} {gib(part.offloaded)}" for part in plan.parts if part.offloaded
    )
    how = "all stages stay loaded" if together else "stages take turns"
    return (
        "-" if together else f"up to {gib(waiting)}",
        streamed or f"nothing; {how}",
        gib(plan.peak("gpu:0")),
    )


def download_rows() -> Iterator[str]:
    """The weights of the hub's snapshot."""
    total = 0
    for name, part in components().items():
        count, total = SHARDS.get(name, 1), total + part.nbytes
        files = f"{count} files of weights" if count > 1 else "1 file of weights"
        yield _row(f"`{COMPONENTS[name].folder}/`", part.title, files, _gb(part.nbytes))
    yield _row("", "", "together", _gb(total))


def converted_rows() -> Iterator[str]:
    """Sizes of converted files by component, a column for each dtype."""
    sizes = {
        name: [output(part, dtype).nbytes for dtype in CHOICES]
        for name, part in components().items()
    }
    for name, row in sizes.items():
        yield _row(COMPONENTS[name].title, *map(_gb, row))
    yield _row("together", *map(_gb, map(sum, zip(*sizes.values(), strict=True))))


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    for rows in (card_rows, download_rows, converted_rows):
        print("\n".join(rows()), end="\n\n")
