"""Peaks of a full-size run on a card that is capped, beside what the device plan expects."""

import json

import torch

from bench.measure import Bench
from bench.presets import Preset
from glm_core.placement.plan import GIB

from ..demo import TINY
from ..simulated_cards import SIDE, Card, write_checkpoint, write_tokens
from .report import Report
from .server import folder, serving

CAPS = (24, 16, 12)
STAGES = ("AR model", "decoder", "VAE")


def measure(preset: Preset, bench: Bench, report: Report) -> None:
    """A CPU has no peaks; the tiny model goes the same way there, once."""
    if bench.on_cpu:
        _capped(bench, report, 0, 64 * GIB, SIDE // 4)
        return
    total = torch.cuda.mem_get_info()[1]
    for cap in CAPS:
        with report.attempt(f"{cap} GB"):
            _capped(bench, report, max(total / GIB - cap, 0), cap * GIB, SIDE)


def _capped(bench: Bench, report: Report, reserved: float, cap: float, side: int) -> None:
    """reserved: GiB that ComfyUI is told to leave to others."""
    name = f"{cap / GIB:.0f} GiB"
    base = folder(f"memory-{cap / GIB:.0f}")
    if bench.on_cpu:
        model = TINY.name
        (base / "models" / "glm_image" / model).symlink_to(TINY)
    else:
        model = write_checkpoint(base / "models" / "glm_image" / "Full-Size")
    write_tokens(base / "input" / "tokens.safetensors", side, TINY if bench.on_cpu else None)
    with serving(base.name, "--reserve-vram", f"{reserved:.2f}") as client:
        card = Card(client, int(cap), "/memory")
        peaks = card.peaks(model, side)
        for stage, peak in zip(STAGES, peaks, strict=True):
            report.row(f"{name}: peak of the {stage}", peak, "GiB")
        report.row(f"{name}: the plan", _plan(client, model, side, reserved))


def _plan(client, model: str, side: int, reserved: float) -> str:
    inputs = {
        "model_name": model, "weight_dtype": "default", "width": side, "height": side,
        "batch_size": 1, "references": 0, "strategy": "auto", "ar_split": "", "decoder_split": "",
        "reserve_gb": reserved, **dict.fromkeys(("ar", "decoder", "glyph", "vae"), "auto"),
    }  # fmt: skip
    prompt = {
        "1": {"class_type": "GLMImageDevicePlan", "inputs": inputs},
        "2": {"class_type": "PreviewAny", "inputs": {"source": ["1", 1]}},
    }
    return json.dumps(client.run(prompt).outputs["2"]["text"])
