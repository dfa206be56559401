"""Seconds of a whole picture with guidance, from the prompt's ids to pixels."""

import time
from dataclasses import replace

import torch

from bench.ar import ARBench
from bench.measure import Bench
from bench.networks import ar_pair, decoder_pair, vae_pair
from bench.painting import DecoderBench
from bench.presets import Preset
from bench.whole import CFG, Pipelines
from glm_core.ar.choice import StepChoice, candidates
from glm_core.decoder.choice import BlockChoice
from glm_core.decoder.kernels import triton_operations

from .report import Report


def measure(preset: Preset, bench: Bench, report: Report) -> None:
    """Ours alone, with operations chosen as in the pack; the reference would take all the time."""
    size, dtype = preset.sizes[0], preset.dtype
    ar = ARBench(bench, *ar_pair(preset.ar, bench.device, preset.ar_dtype), preset.ar_dtype)
    decoder = DecoderBench(
        bench, *decoder_pair(preset.decoder, bench.device, dtype), size, 1, dtype
    )
    if not bench.on_cpu:
        ar.choose = StepChoice(None, candidates()).choose
        decoder.ours.choose = BlockChoice(None, triton_operations()).choose
    whole = Pipelines(ar, decoder, *vae_pair(preset.vae, bench.device, dtype), preset)
    replace(whole, preset=replace(preset, steps=1)).ours()  # records graphs, chooses kernels
    bench.wait()
    since = time.perf_counter()
    picture = whole.ours()
    bench.wait()
    name = f"{size[1]}x{size[0]}, {preset.steps} steps, CFG {CFG}"
    report.row(name, time.perf_counter() - since, "s")
    report.require("its numbers are finite", bool(picture.isfinite().all()))
    if not bench.on_cpu:
        report.row("the most memory", torch.cuda.max_memory_allocated() / 2**30, "GiB")
