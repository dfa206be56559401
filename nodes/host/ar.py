"""The AR model on a graph: its network in a patcher, and the tokenizer of its checkpoint."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import comfy.model_management
import torch
from torch import Tensor

from ...glm_core.ar.cache import span_of
from ...glm_core.ar.graphs import CudaGraphs
from ...glm_core.ar.model import ARConfig, ARModel, layer_segment
from ...glm_core.ar.philox import batch_seeds
from ...glm_core.ar.prompt import Prompt, PromptTokenizer
from ...glm_core.ar.sampler import SamplingRun, sample_from_references, sample_layout, sample_tokens
from ...glm_core.ar.step import SamplingOptions
from ...glm_core.data.cells import format_cells
from ...glm_core.data.grids import preview_grid, token_grid
from ...glm_core.data.layout import (
    cells_outside,
    common_batch,
    locked_cells,
    require_codebook,
    require_layout_fits,
    require_tokens_fit,
)
from ...glm_core.data.references import References
from ...glm_core.data.tokens import Forced, Layout, SemanticTokens
from ...glm_core.errors import InputError
from ...glm_core.placement import memory
from ...glm_core.split import on_device
from ...glm_core.vision.encoder import VISION_PREFIXES
from .devices import Placement, default_placement
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
from .step_choice import chooser
from .step_graphs import StepGraphs, runs_graphs
from .vision import HostVision
from .weights import check_keys, choose_precision, load_weights, open_model

SMALLER_RUN = "use a smaller size or batch_size, or weight_dtype fp8_e4m3fn, int8 or int4"

SHARE_OF_WEIGHTS = 0.8
"""Of a device's memory; the rest is for the KV cache, the buffers and other programs."""


class HostARModel(ListsSegments, ARModel):
    """The network in a patcher."""


class HostAR:
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

    @property
    def config(self) -> ARConfig:
        return self.patcher.model.config

    def get_ram_usage(self) -> int:
        """Bytes of the weights, for hosts that drop outputs when memory is short (0.3.75)."""
        parts = [*with_segments(self.patcher), *self.vision.patchers]
        return sum(part.model_size() for part in parts)

    def sample(
        self,
        prompt: str,
        height: int,
        width: int,
        seed: int,
        batch_size: int,
        options: SamplingOptions,
        *,
        layout: Layout | None = None,
        tokens: SemanticTokens | None = None,
        mask: Tensor | None = None,
        lookahead: int = 1,
    ) -> tuple[SemanticTokens, Layout]:
        """The preview, then the large grid, `batch_size` times for each layout.

        Args:
            layout: its locked cells are forced.
            tokens, mask: large grids; only their cells under the mask are drawn anew.
            lookahead: see `sampler.SamplingRun`.

        Raises:
            GLMImageError: the prompt is empty, the size has no grid, or the layout or the tokens
                are of another model, another size or another batch.
        """
        self._require_region(tokens, mask, height, width)
        layouts = 1 if layout is None else len(layout.preview)
        images = 1 if tokens is None else len(tokens.tokens)
        samples = batch_size * common_batch("layouts", layouts, "images in tokens", images)
        large = None if tokens is None else cells_outside(mask, tokens, samples)
        written, preview = self._run(
            sample_tokens,
            self._text_to_image(prompt, height, width),
            (height, width),
            seed,
            samples,
            options,
            lookahead,
            preview=self._locked(layout, samples, height, width),
            large=large,
        )
        return (
            self._tokens(written, prompt, seed, options, height, width, large),
            self._layout(preview, layout, height, width),
        )

    def sample_from_references(
        self,
        prompt: str,
        height: int,
        width: int,
        seed: int,
        batch_size: int,
        options: SamplingOptions,
        references: References,
        *,
        tokens: SemanticTokens | None = None,
        mask: Tensor | None = None,
        lookahead: int = 1,
    ) -> SemanticTokens:
        """The large grid alone: with references there is no preview stage.

        Sample i is shown set i modulo their number. Prompts of different sets differ in length:
        where there are several sets, each sample is a run of its own.

        Raises:
            GLMImageError: as `sample`, or the references are of another codebook.
        """
        self._require_region(tokens, mask, height, width)
        require_codebook("references", references.codebook, self.config.codebook)
        grid, sets = token_grid(height, width), len(references.sets)
        images = 1 if tokens is None else len(tokens.tokens)
        samples = batch_size * common_batch("reference sets", sets, "images in tokens", images)
        large = None if tokens is None else cells_outside(mask, tokens, samples)
        runs = [slice(0, samples)] if sets == 1 else [slice(i, i + 1) for i in range(samples)]
        written = [
            self._run(
                sample_from_references,
                self.tokenizer.image_to_image(
                    prompt, grid, [image.tokens for image in references.sets[run.start % sets]]
                ),
                (height, width),
                (seed + run.start) % 2**64,
                run.stop - run.start,
                options,
                lookahead,
                large=large and Forced(large.values[run], large.mask),
            )
            for run in runs
        ]
        return self._tokens(torch.cat(written), prompt, seed, options, height, width, large)

    def sample_layout(
        self,
        prompt: str,
        height: int,
        width: int,
        seed: int,
        batch_size: int,
        options: SamplingOptions,
        *,
        layout: Layout | None = None,
        lookahead: int = 1,
    ) -> Layout:
        """The preview stage of `sample` alone."""
        samples = batch_size * (1 if layout is None else len(layout.preview))
        preview = self._run(
            sample_layout,
            self._text_to_image(prompt, height, width),
            (height, width),
            seed,
            samples,
            options,
            lookahead,
            preview=self._locked(layout, samples, height, width),
        )
        return self._layout(preview, layout, height, width)

    def _run(
        self,
        sampler: Callable[..., Any],
        prompt: Prompt,
        size: tuple[int, int],
        seed: int,
        samples: int,
        options: SamplingOptions,
        lookahead: int,
        **forced: Forced | None,
    ) -> Any:
        """Load the model, and run one of the functions of `sampler`."""
        grid = token_grid(*size)
        length = len(prompt) + math.prod(grid) + math.prod(preview_grid(grid))
        given = sum(int(cells.mask.sum()) for cells in forced.values() if cells is not None)
        block = max(len(prompt), samples * max(given, lookahead))
        needs = self.memory_required(samples, length, block)
        shape = (sampler, samples, grid, span_of(length), options, lookahead)
        allocated = self.graphs.allocated_for(shape)
        require_room(
            "The AR model",
            {device: need - allocated for device, need in needs.items()},
            SMALLER_RUN,
        )
        progress = TokenProgress(self.palette)
        with (
            on_device(self.patcher.load_device),
            explain_out_of_memory("The AR model", needs, SMALLER_RUN, split="ar_split"),
        ):
            comfy.model_management.load_models_gpu(
                with_segments(self.patcher), memory_required=max(max(needs.values()) - allocated, 0)
            )
            run = self._sampling_run(seed, samples, options, lookahead, progress)
            return sampler(self.patcher.model, prompt, grid, run, **forced)

    def _sampling_run(
        self,
        seed: int,
        samples: int,
        options: SamplingOptions,
        lookahead: int,
        progress: TokenProgress,
    ) -> SamplingRun:
        return SamplingRun(
            batch_seeds(seed, samples),
            options,
            device=self.patcher.load_device,
            dtype=self.dtype,
            lookahead=lookahead,
            runner=self.graphs.runner(self.patcher),
            choose=chooser(self.patcher),
            progress=progress.update,
            show=progress.show,
            check_interrupt=check_interrupt,
        )

    def _text_to_image(self, prompt: str, height: int, width: int) -> Prompt:
        return self.tokenizer.text_to_image(prompt, token_grid(height, width))

    def _locked(
        self, layout: Layout | None, samples: int, height: int, width: int
    ) -> Forced | None:
        if layout is None:
            return None
        require_layout_fits(layout, self.config.codebook, height, width)
        return locked_cells(layout, samples)

    def _require_region(
        self, tokens: SemanticTokens | None, mask: Tensor | None, height: int, width: int
    ) -> None:
        if (tokens is None) != (mask is None):
            raise InputError(
                "tokens and mask belong together: connect both to draw part of an image anew, or "
                "write cells in place of the mask; else connect neither."
            )
        if tokens is not None:
            require_tokens_fit(tokens, self.config.codebook, height, width)

    def _tokens(
        self,
        tokens: Tensor,
        prompt: str,
        seed: int,
        options: SamplingOptions,
        height: int,
        width: int,
        forced: Forced | None,
    ) -> SemanticTokens:
        info = {"prompt": prompt, "seed": seed, **vars(options)}
        if forced is not None:
            info["forced"] = format_cells(forced.mask)
        codebook, colours = self.config.codebook, self.palette.colours
        return SemanticTokens(_stored(tokens), codebook, height, width, info, colours)

    def _layout(self, preview: Tensor, given: Layout | None, height: int, width: int) -> Layout:
        """A preview with the locks of the layout that was given, if any."""
        locked = torch.zeros(preview.shape[1:], dtype=torch.bool) if given is None else given.locked
        codebook, colours = self.config.codebook, self.palette.colours
        return Layout(_stored(preview), locked, codebook, height, width, colours)

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


def _stored(tokens: Tensor) -> Tensor:
    return tokens.to("cpu", torch.int32)


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
