"""Milliseconds of the decoder's step beside diffusers, with a reference in each store; the VAE."""

import importlib.util
import sys
import time
from functools import partial
from types import ModuleType

import torch
from torch import Tensor

from bench.measure import Bench
from bench.networks import decoder_pair
from bench.painting import DecoderBench, vae_rows
from bench.presets import Preset
from glm_core.choice import SECONDS, described, operations_of
from glm_core.decoder.choice import BlockChoice
from glm_core.decoder.kernels import triton_operations
from glm_core.decoder.model import plainly
from glm_core.decoder.operations import PLAIN, Operations
from glm_core.decoder.reference_cache import BlockCache, KeyValuePair, ReferenceCache

from ..environment import ROOT
from . import COMFYUI
from .report import Report

TIMES = 10
STORES = (("gpu", False), ("cpu", False), ("cpu", True))
"""Where the cache lies, and whether in fp8."""


def measure(preset: Preset, bench: Bench, report: Report) -> None:
    ours, reference = decoder_pair(preset.decoder, bench.device, preset.dtype)
    for size in preset.sizes:
        ours.choose = plainly
        step = DecoderBench(bench, ours, reference, size, 1, preset.dtype)
        name = f"{size[1]}x{size[0]}"
        plain = None
        with report.attempt(f"step, {name}"):
            plain = _beside_diffusers(step, name, report)
        with report.attempt(f"kernels, {name}"):
            _with_kernels(step, name, plain, report)
        for store, fp8 in STORES:
            title = f"step, {name}, one reference, store {store}{', fp8' * fp8}"
            with report.attempt(title):
                _with_reference(step, title, store, fp8, report)
    del ours, reference, step
    with report.attempt("VAE"):
        for row in vae_rows(preset, bench):
            report.row(f"{row.stage}, beside diffusers", row.ours, row.unit, row.reference)


def _beside_diffusers(step: DecoderBench, name: str, report: Report) -> float:
    ours = step.our_prediction()

    def theirs() -> Tensor:
        return step.their_prediction(step.x, step.glyphs, step.tokens)

    report.row(f"relative error, {name}", _error(ours(), theirs()))
    reference = report.milliseconds(f"diffusers' step, {name}", theirs, TIMES)
    return report.milliseconds(f"step, {name}, beside diffusers", ours, TIMES, reference)


def _with_kernels(step: DecoderBench, name: str, plain: float | None, report: Report) -> None:
    """Each kernel alone, and what the pack's own trial chooses, which the following rows have."""
    found, predict = triton_operations(), step.our_prediction()
    expected = predict()
    for field in found:
        step.ours.choose = partial(_always, operations_of(PLAIN, {field: "triton"}, found))
        with report.attempt(f"step, {name}, {field}=triton"):
            report.row(f"{field}=triton, {name}: relative difference", _error(predict(), expected))
            report.milliseconds(f"step, {name}, {field}=triton", predict, TIMES, plain)
    choice = BlockChoice(None, found, 0.0 if step.bench.on_cpu else SECONDS)
    step.ours.choose = choice.choose
    since = time.perf_counter()
    predict()
    step.bench.wait()
    report.row(f"the trial with a step, {name}", time.perf_counter() - since, "s")
    for names in choice.choice.known.values():
        text = described(names)
        report.row(f"the trial's choice, {name}", text)
        report.milliseconds(f"step, {name}, chosen: {text}", predict, TIMES, plain)


def _always(operations: Operations, *_: Tensor) -> Operations:
    return operations


def _with_reference(step: DecoderBench, title: str, store: str, fp8: bool, report: Report) -> None:
    """Through the pack's own reader; a cache in host memory is pinned as the pack pins it."""
    patcher = pack_module("nodes.host.cache_patcher")
    readers = pack_module("nodes.host.cache_reader")
    device = step.bench.device
    pairs = step.ours.reference_keys_values(*step.picture(1), step.size)
    blocks = [BlockCache([KeyValuePair(*pair, fp8)]).to("cpu") for pair in pairs]
    cache = ReferenceCache(blocks)
    held = patcher.make_cache_patcher(cache, device, streamed=store == "cpu")
    reader = readers.CacheReader(cache.to(device) if store == "gpu" else cache, device, True)
    invariants = step.ours.prepare(step.glyphs, step.tokens, step.size, step.dtype)

    def predict() -> Tensor:
        return step.ours.predict(step.x, step.timestep, invariants, references=reader)

    report.milliseconds(title, predict, TIMES)
    reader.end_run()
    if not step.bench.on_cpu:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        predict()
        peak = torch.cuda.max_memory_allocated() - before
        report.row(
            f"{title}: peak beside what was there", peak / 2**20, "MiB", cache.nbytes / 2**20
        )
        reader.end_run()
    del held


def _error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()


def pack_module(name: str) -> ModuleType:
    """A module of the pack, imported as ComfyUI does it, under the name `glm_image`."""
    if "glm_image" not in sys.modules:
        sys.path.insert(0, str(COMFYUI))
        from comfy.cli_args import args

        args.cpu = not torch.cuda.is_available()  # before anything asks for a device
        spec = importlib.util.spec_from_file_location(
            "glm_image", ROOT / "__init__.py", submodule_search_locations=[str(ROOT)]
        )
        sys.modules["glm_image"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["glm_image"])
    return importlib.import_module(f"glm_image.{name}")
