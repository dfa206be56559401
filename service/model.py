"""The AR model of a checkpoint without ComfyUI, as a replica runs it."""

import hashlib
import json
import math
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from glm_core.ar.graphs import CudaGraphs, captures_failed
from glm_core.ar.model import ARConfig, ARModel
from glm_core.ar.prompt import Prompt, PromptTokenizer
from glm_core.ar.protocol import VERSION, ScoreRequest
from glm_core.ar.replay import EagerRunner, ReplayRunner, Runner
from glm_core.ar.requests import SampleRequest, run_key, write_together
from glm_core.ar.row_linear import cpu_is_fast_in_bf16
from glm_core.ar.score import ScoringRun, cell_scores
from glm_core.ar.writer import MOST_READ
from glm_core.data.grids import PIXELS_PER_TOKEN, preview_grid, token_grid
from glm_core.errors import LowMemoryError
from glm_core.files.component import Component
from glm_core.files.loading import load_network, require_plain
from glm_core.files.model_folder import find_component
from glm_core.files.opening import open_component
from glm_core.files.palette import token_colours
from glm_core.placement import memory
from glm_core.vision.encoder import OTHER_PREFIXES, VISION_PREFIXES, VisionConfig, VisionEncoder
from glm_core.vision.pixels import ImageConfig, vision_pixels

from .bounds import Bounds, too_large
from .engine import Watch

SMALL_BYTES = 2**16
LEAST_POSITIONS = 2048
"""An image of 1024 x 1024 pixels after a prompt of 700 ids."""


class ServedModel:
    """The networks of the AR component; the vision tower is loaded on first use."""

    def __init__(self, path: Path | str, device: torch.device, rows: int, bounds: Bounds) -> None:
        """
        Args:
            path: a snapshot's folder, or a single file of the AR model.
            rows: samples that one run writes together; a step always has so many.

        Raises:
            GLMImageError: the component is missing, broken or quantised, or memory is too little
                for so many rows.
        """
        path = Path(path)
        self.component = open_ar(path)
        self.name = path.resolve().name
        self.device, self.rows = device, rows
        self.dtype = _dtype(self.component, device, few_rows=True)
        self._network = load_network(
            ARModel, ARConfig, self.component, device, self.dtype, VISION_PREFIXES
        )
        files = self.component.processor
        self.image_config = ImageConfig.from_dict(files.image)
        self.tokenizer = PromptTokenizer(
            files.tokenizer, files.tokenizer_config, files.chat_template
        )
        has_graphs = device.type == "cuda"
        self._graphs = ReplayRunner(partial(CudaGraphs, device)) if has_graphs else None
        self.bounds = replace(
            bounds, samples=min(bounds.samples, rows), positions=self._positions(bounds.positions)
        )

    @property
    def codebook(self) -> int:
        return self._network.config.codebook

    @cached_property
    def palette(self) -> Tensor:
        """float32 [codebook, 3], 0 to 1."""
        return token_colours(self.component, self.codebook)

    @cached_property
    def info(self) -> dict[str, Any]:
        """What `/info` answers, without the engine's bounds."""
        return {
            "service": "glm_image_ar",
            "version": VERSION,
            "model": self.name,
            "checkpoint": identity(self.component),
            "dtype": str(self.dtype).removeprefix("torch."),
            "device": str(self.device),
            "codebook": self.codebook,
            "rows": self.rows,
            "pixels_per_token": PIXELS_PER_TOKEN,
            "bounds": {
                name: getattr(self.bounds, name)
                for name in ("queued", "samples", "body", "images_body", "prompt", "positions")
            },
            "image": self.component.processor.image,
        }

    # ---- samples ---------------------------------------------------------------------------------

    def key(self, request: SampleRequest) -> Hashable:
        """Requests of equal keys may share a run.

        Raises:
            GLMImageError: the prompt is empty.
            RefusalError: the sample is above a bound.
        """
        self._require_few_cells(request.height, request.width)
        self._require_short(request.prompt)
        cells = _cells(request.height, request.width, preview=not request.references)
        self._require_positions(len(request.read(self.tokenizer)) + cells)
        return run_key(self.tokenizer, request)

    def write(self, requests: Sequence[SampleRequest], watch: Watch) -> None:
        """Write 1 to `rows` requests of one key in one run."""
        write_together(
            self._network,
            self.tokenizer,
            requests,
            self.rows,
            watch.finished,
            gone=watch.gone,
            device=self.device,
            dtype=self.dtype,
            runner=self._runner,
            progress=watch.progress,
            show=watch.show,
            check_interrupt=watch.check_interrupt,
        )

    @property
    def _runner(self) -> Runner:
        """Of a run that begins now: graphs where the device has them, until one fails."""
        if self._graphs is None or captures_failed():
            return EagerRunner()
        return self._graphs

    # ---- images and scores -----------------------------------------------------------------------

    def encode(self, images: Tensor, watch: Watch) -> Tensor:
        """Tokens int32 [B, H / 32, W / 32] of images float32 [B, H, W, 3]."""
        pixels = vision_pixels(images, self.image_config)
        tokens = []
        for i, image in enumerate(pixels):
            watch.check_interrupt()
            tokens.append(self._vision(image[None].to(self.device), self._vision_dtype))
            watch.progress(i + 1, len(pixels))
        return torch.cat(tokens).to("cpu", torch.int32)

    def score(self, request: ScoreRequest, watch: Watch) -> dict[str, Tensor]:
        """The score of each cell, float32 [B, rows, columns], for each grid of the request."""
        prompt, against = self._scored_prompts(request)
        grids, read = request.grids, 0
        cells = sum(grid.numel() for grid in grids.values())
        total = sum(len(one) + cells for one in (prompt, against) if one is not None)

        def progress(count: int) -> None:
            nonlocal read
            read += count
            watch.progress(read, total)

        run = ScoringRun(self.device, self.dtype, progress, watch.check_interrupt)
        found = cell_scores(self._network, prompt, against, list(grids.values()), run)
        return dict(zip(grids, found, strict=True))

    def require_scorable(self, request: ScoreRequest) -> None:
        """
        Raises:
            GLMImageError: the prompt is empty.
            RefusalError: there are more images than rows, or the request is above a bound.
        """
        (grid, *_) = request.grids.values()
        if len(grid) > self.bounds.samples:
            raise too_large(
                f"There are {len(grid)} images to score and a request may have "
                f"{self.bounds.samples}: send several requests."
            )
        self._require_few_cells(*request.size)
        self._require_short(request.prompt)
        self._require_short(request.against or "")
        cells = sum(one[0].numel() for one in request.grids.values())
        read = [prompt for prompt in self._scored_prompts(request) if prompt is not None]
        self._require_positions(cells + max(map(len, read)))

    def require_image(self, height: int, width: int) -> None:
        """
        Raises:
            GLMImageError: the size has no grid.
            RefusalError: the image has too many cells.
        """
        token_grid(height, width)
        self._require_few_cells(height, width)

    def _scored_prompts(self, request: ScoreRequest) -> tuple[Prompt, Prompt | None]:
        what, read = (token_grid(*request.size), request.references), self.tokenizer.read
        prompt = read(request.prompt, *what)
        if request.against is None:
            return prompt, None
        return prompt, read(request.against, *what, may_be_empty=True)

    # ---- bounds ----------------------------------------------------------------------------------

    def _require_short(self, prompt: str) -> None:
        if len(prompt) > self.bounds.prompt:
            raise too_large(
                f"The prompt has {len(prompt)} characters and this service takes "
                f"{self.bounds.prompt}: shorten it."
            )

    def _require_few_cells(self, height: int, width: int) -> None:
        cells = math.prod(token_grid(height, width))
        if cells > self.bounds.positions:
            raise too_large(
                f"An image of {width}x{height} pixels has {cells} cells and this service takes "
                f"{self.bounds.positions}: use a smaller size."
            )

    def _require_positions(self, positions: int) -> None:
        if positions > self.bounds.positions:
            raise too_large(
                f"The prompt, its references and the cells have {positions} positions together "
                f"and this service takes {self.bounds.positions}: use a smaller size, fewer "
                "references or a shorter prompt."
            )

    def _positions(self, most: int) -> int:
        """For how many positions of `rows` samples there is memory beside all weights."""
        config, free = self._network.config, _free_bytes(self.device)
        tower = self._vision_bytes
        positions = most
        while positions >= LEAST_POSITIONS:
            cache = config.layers * memory.kv_cache(config, self.rows, positions, self.dtype)
            need = tower + cache + memory.ar(config, max(positions, MOST_READ), self.dtype)
            if need <= free:
                return positions
            positions //= 2
        raise LowMemoryError(
            f"{self.rows} rows of {2 * positions} positions and the vision tower need "
            f"{need / 2**30:.1f} GiB on {self.device} beside the other weights, and "
            f"{free / 2**30:.1f} GiB are free: start the service with fewer rows."
        )

    # ---- the vision tower ------------------------------------------------------------------------

    @property
    def _vision_dtype(self) -> torch.dtype:
        return _dtype(self.component, self.device, few_rows=False)

    @property
    def _vision_bytes(self) -> int:
        """What the tower will take once it is loaded."""
        weights = self.component.tensors.items()
        shapes = [info.shape for key, info in weights if not key.startswith(OTHER_PREFIXES)]
        return sum(shape.numel() for shape in shapes) * self._vision_dtype.itemsize

    @cached_property
    def _vision(self) -> VisionEncoder:
        return load_network(
            VisionEncoder,
            VisionConfig,
            self.component,
            self.device,
            self._vision_dtype,
            OTHER_PREFIXES,
        )


def identity(component: Component) -> str:
    """A SHA-256 of what tells checkpoints apart, without reading all weights.

    It covers config, tokenizer, the names, shapes and dtypes of weights, and the values of small
    ones: norms and biases, which training changes like all others.
    """
    digest = hashlib.sha256()
    files = component.processor
    texts = [component.config, files.tokenizer, files.tokenizer_config, files.chat_template]
    digest.update(json.dumps(texts, sort_keys=True).encode())
    for key, info in sorted(component.tensors.items()):
        digest.update(f"{key} {list(info.shape)} {info.dtype}".encode())
        if info.nbytes <= SMALL_BYTES:
            digest.update(component.tensor(key).contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _cells(height: int, width: int, preview: bool) -> int:
    grid = token_grid(height, width)
    return math.prod(grid) + (math.prod(preview_grid(grid)) if preview else 0)


def open_ar(path: Path) -> Component:
    """The AR component of a model's folder, quantised files aside, or of a single file.

    Raises:
        GLMImageError: it is missing, broken or quantised.
    """
    found = find_component(path, "ar", weight_dtype="bf16") if path.is_dir() else path
    component = open_component(found, "ar")
    require_plain(component)
    return component


def _dtype(component: Component, device: torch.device, few_rows: bool) -> torch.dtype:
    """What the pack's loaders compute in by default: the same tokens come of it.

    bf16 if the file has it or a smaller dtype and the device is fast in it.
    """
    if component.dtype == torch.float32:
        return torch.float32
    if device.type == "cpu":
        fast = cpu_is_fast_in_bf16(few_rows)
    else:
        fast = device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available
