"""The AR model on a graph: its network in a patcher, and the tokenizer of its checkpoint."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...glm_core.ar.cache import span_of
from ...glm_core.ar.graphs import CudaGraphs
from ...glm_core.ar.model import ARConfig, ARModel, layer_segment
from ...glm_core.ar.prompt import PromptTokenizer
from ...glm_core.ar.requests import (
    SampleRequest,
    Written,
    batches,
    shared_runs,
    write_batch,
    write_together,
)
from ...glm_core.ar.writer import MOST_READ
from ...glm_core.data.grids import Grid, Size, preview_grid
from ...glm_core.placement import memory
from ...glm_core.split import on_device
from ...glm_core.vision.encoder import VISION_PREFIXES
from .ar_interface import AnyAR
from .devices import Placement, default_placement, usable
from .notices import Notices
from .out_of_memory import explain_out_of_memory, require_room
from .palette import CodePalette
from .patchers import (
    ListsSegments,
    layer_devices,
    make_patcher,
    nbytes,
    require_layers,
    with_segments,
)
from .progress import TokenProgress, check_interrupt
from .score_run import prompt_pairs, score_run
from .step_choice import chooser
from .step_graphs import StepGraphs, runs_graphs
from .vision import HostVision
from .weights import check_keys, choose_precision, load_weights, open_model

SMALLER_RUN = "use a smaller size or batch_size, or weight_dtype fp8_e4m3fn, int8 or int4"

SHARE_OF_WEIGHTS = 0.8
"""Of a device's memory; the rest is for the KV cache, the buffers and other programs."""


class HostARModel(ListsSegments, ARModel):
    """The network in a patcher."""


@dataclass(frozen=True)
class RunSize:
    """What a run takes of memory.

    length: positions of the cache.
    block: the most ids that one pass reads, over all samples.
    padded: whether prompts are padded to a span of the cache.
    """

    rows: int
    length: int
    block: int
    padded: bool


class HostAR(AnyAR):
    """GLM_AR. Like a CLIP, it owns a patcher, and LoRAs go onto a clone of it."""

    def __init__(
        self,
        patcher: Any,
        tokenizer: PromptTokenizer,
        dtype: torch.dtype,
        vision: HostVision,
        palette: CodePalette,
        graphs: StepGraphs,
    ) -> None:
        self.patcher = patcher
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.vision = vision
        self.palette = palette
        self.graphs = graphs

    def with_patcher(self, patcher: Any) -> "HostAR":
        """The same model under another patcher, such as a clone that carries a LoRA."""
        return HostAR(patcher, self.tokenizer, self.dtype, self.vision, self.palette, self.graphs)

    def require_patcher(self) -> Any:
        return self.patcher

    @property
    def config(self) -> ARConfig:
        return self.patcher.model.config

    def get_ram_usage(self) -> int:
        """Bytes of the weights, for hosts that drop outputs when memory is short (0.3.75)."""
        parts = [*with_segments(self.patcher), *self.vision.patchers]
        return sum(part.model_size() for part in parts)

    @property
    def codebook(self) -> int:
        return self.config.codebook

    def write(self, requests: Sequence[SampleRequest], rows: int) -> list[Written]:
        """Write samples, with progress, live previews and interrupts.

        Args:
            requests: with one row, those of one node; others may be any.
            rows: samples of one run. With one, requests of one prompt are a batch instead. With
                more, all that may share a run do, and fewer rows are used if memory is short.

        Raises:
            GLMImageError: a prompt is empty, or memory is short.
        """
        if rows == 1:
            runs, padded = batches(requests), False
        else:
            rows = self._rows_with_room(requests, rows)
            runs, padded = shared_runs(self.tokenizer, requests, rows), rows > 1
        progress = TokenProgress(self.palette, len(runs))
        written = {}
        for run in runs:
            some = [requests[i] for i in run]
            size = _size(some, self._longest(some), rows if padded else len(some), padded)
            written |= zip(run, self._run(some, size, progress), strict=True)
            progress.next_part()
        return [written[i] for i in range(len(requests))]

    def cell_scores(
        self,
        prompt: str,
        against: str | None,
        size: Size,
        sets: Sequence[Sequence[Tensor] | None],
        grids: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        return score_run(self, prompt_pairs(self.tokenizer, prompt, against, size, sets), grids)

    def _longest(self, requests: Sequence[SampleRequest]) -> int:
        """Ids of the longest prompt."""
        return max(len(request.read(self.tokenizer)) for request in requests)

    def _run(
        self, requests: Sequence[SampleRequest], size: RunSize, progress: TokenProgress
    ) -> list[Written]:
        """Load the model, and write requests that share a run."""
        needs = self.memory_required(size.rows, size.length, size.block)
        one = requests[0]
        kind = one.kind, bool(one.references), one.grid, one.options, one.lookahead
        allocated = self.graphs.allocated_for((kind, size.rows, span_of(size.length), size.padded))
        require_room(
            "The AR model",
            {device: need - allocated for device, need in needs.items()},
            SMALLER_RUN,
        )
        with (
            on_device(self.patcher.load_device),
            explain_out_of_memory("The AR model", needs, SMALLER_RUN, split="ar_split"),
        ):
            comfy.model_management.load_models_gpu(
                with_segments(self.patcher), memory_required=max(max(needs.values()) - allocated, 0)
            )
            what = self.patcher.model, self.tokenizer, requests
            how = self._how(progress)
            if size.padded:
                return write_together(*what, size.rows, **how)
            return write_batch(*what, **how)

    def _how(self, progress: TokenProgress) -> dict[str, Any]:
        """What `SamplingRun` is told by the host."""
        return {
            "device": self.patcher.load_device,
            "dtype": self.dtype,
            "runner": self.graphs.runner(self.patcher),
            "choose": chooser(self.patcher),
            "progress": progress.update,
            "show": progress.show,
            "check_interrupt": check_interrupt,
        }

    def _rows_with_room(self, requests: Sequence[SampleRequest], rows: int) -> int:
        """As many of the rows as memory has room for, at least one; fewer are told of."""
        grids: dict[Grid, list[SampleRequest]] = {}
        for request in requests:
            grids.setdefault(request.grid, []).append(request)
        longest = {grid: self._longest(some) for grid, some in grids.items()}

        def has_room(count: int) -> bool:
            sizes = (_size(some, longest[grid], count, True) for grid, some in grids.items())
            return all(
                need - self.graphs.nbytes <= usable(device)
                for size in sizes
                for device, need in self.memory_required(size.rows, size.length, size.block).items()
            )

        found = next((count for count in range(rows, 1, -1) if has_room(count)), 1)
        if found < rows:
            Notices().say(
                [
                    f"The AR model writes {found} samples in a run instead of {rows}, as there is "
                    "no memory for more. In bf16, tokens depend on that number: set rows to "
                    f"{found} to get the same ones again."
                ]
            )
        return found

    def memory_required(self, batch: int, length: int, block: int) -> dict[torch.device, int]:
        """Bytes beside the weights, by device: the widest activations of a pass, and the KV cache
        of the layers that compute there.

        Args:
            block: the most ids that one pass may read: the prompt's, or the forced or guessed cells
                of all samples.
        """
        layer = memory.kv_cache(self.config, batch, length, self.dtype)
        work = memory.ar(self.config, block, self.dtype)
        needs: dict[torch.device, int] = {}
        for numbers, device in layer_devices(self.patcher, self.config.layers):
            needs[device] = needs.get(device, work) + len(numbers) * layer
        return needs


def _size(requests: Sequence[SampleRequest], longest: int, rows: int, padded: bool) -> RunSize:
    """longest: ids of the longest prompt."""
    grid = requests[0].grid
    end = span_of(longest) if padded else longest
    length = end + math.prod(grid) + math.prod(preview_grid(grid))
    ahead = rows * max(max(request.forced, request.lookahead) for request in requests)
    return RunSize(rows, length, max(longest, min(ahead, MOST_READ) if padded else ahead), padded)


def load_ar(
    model_name: str, weight_dtype: str = "default", placement: Placement | None = None
) -> HostAR:
    """
    Args:
        placement: where a device plan puts it; None leaves it to ComfyUI.

    Raises:
        GLMImageError: the component is missing or broken.
    """
    component = open_model("ar", model_name, weight_dtype, tell=True)
    processor = component.processor
    tokenizer = PromptTokenizer(
        processor.tokenizer, processor.tokenizer_config, processor.chat_template
    )
    patcher = load_ar_patcher(model_name, weight_dtype, placement)
    dtype = choose_precision(component, weight_dtype, patcher.load_device, few_rows=True).compute
    # The vision tower is never split; it runs where the first layers do.
    whole = placement and replace(placement, limit=None, segments=())
    vision = HostVision(component, model_name, weight_dtype, whole)
    palette = CodePalette(component, patcher.model.config.codebook)
    graphs = StepGraphs(partial(CudaGraphs, patcher.load_device))
    graphs.watch(patcher)
    return HostAR(patcher, tokenizer, dtype, vision, palette, graphs)


def load_ar_patcher(
    model_name: str,
    weight_dtype: str = "default",
    placement: Placement | None = None,
    disable_dynamic: bool = False,
):
    """The AR's patcher. Current hosts call this again to build it on another device."""
    component = open_model("ar", model_name, weight_dtype)
    config = ARConfig.from_dict(component.config)
    check_keys(component, ARModel, config, VISION_PREFIXES)

    chosen = placement or default_placement()
    precision = choose_precision(component, weight_dtype, chosen.load, few_rows=True)
    require_layers(chosen, config.layers, component.title)
    on_meta = {"device": "meta", "dtype": precision.storage}
    segments = [
        layer_segment(
            config,
            numbers,
            segment.load,
            operations=precision.at(segment.load).operations,
            **on_meta,
        )
        for numbers, segment in chosen.segments
    ]
    network = HostARModel(config, segments=segments, operations=precision.operations, **on_meta)
    load_weights(network, component, weight_dtype, VISION_PREFIXES, segments)

    disable_dynamic = disable_dynamic or _may_run_graphs(network, chosen)
    patcher = make_patcher(network, chosen, disable_dynamic, segments)
    patcher.cached_patcher_init = (load_ar_patcher, (model_name, weight_dtype, placement))
    return patcher


def _may_run_graphs(network: HostARModel, placement: Placement) -> bool:
    """Whether the device has graphs, and room to keep all weights on it, which graphs need.

    A dynamic patcher would stream the weights, which costs more than reading them.
    """
    if not runs_graphs(placement.load):
        return False
    room = comfy.model_management.get_total_memory(placement.load)
    return nbytes(network) <= SHARE_OF_WEIGHTS * room
