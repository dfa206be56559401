"""The AR model of a service, as GLM_AR."""

import concurrent.futures
import json
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...glm_core.ar import protocol
from ...glm_core.ar.protocol import ScoreRequest
from ...glm_core.ar.requests import SampleRequest, Written
from ...glm_core.data.grids import Size
from ...glm_core.data.tokens import UNKNOWN, Layout, SemanticTokens
from ...glm_core.errors import GLMImageError, LoraError
from .ar_interface import AnyAR
from .progress import TokenProgress, progress_bar
from .remote_samples import RemoteSample, RemoteSamples
from .service_client import JSON, TENSORS, Clock, RetryError, ServiceClient, persist, wait
from .service_info import Info
from .services import Service, find_service

IMAGES, SCORES, PALETTE = "/v1/images", "/v1/scores", "/v1/palette"
PARTS = 1000  # of a progress bar, for each request

CLIENT = ServiceClient()
SAMPLES = RemoteSamples(CLIENT)
"""Shared by all graphs, so that a node finds what was asked for ahead of it."""
KNOWN: dict[Service, Info] = {}
ASK_SECONDS = 2.0


def connect(name: str) -> "RemoteAR":
    """
    Raises:
        GLMImageError: there is no such service in the user's file, or it cannot be reached within
            its time limit, refuses the key, or is of another version.
    """
    service = find_service(name)
    info = KNOWN[service] = CLIENT.run(persist(service, Clock(), lambda: CLIENT.info(service)))
    return RemoteAR(service, info)


def identity_of(name: str) -> str:
    """What a node's outputs depend on: the service's model, or its last known one while it is away.

    Hosts keep this text with the prompt. The hash of address and key differs in every process.

    Raises:
        GLMImageError: there is no such service in the user's file.
    """
    service = find_service(name)
    with suppress(RetryError, GLMImageError, concurrent.futures.TimeoutError):
        KNOWN[service] = CLIENT.start(CLIENT.info(service)).result(ASK_SECONDS)
    identity = KNOWN[service].identity if service in KNOWN else ()
    return " ".join(map(str, (*identity, hash(service))))


class RemoteAR(AnyAR):
    """The same tokens as of a HostAR of that checkpoint and as many rows."""

    has_rows = True

    def __init__(self, service: Service, info: Info) -> None:
        self.service = service
        self.info = info
        self.vision = RemoteVision(service, info)
        self.palette = RemotePalette(service, info)

    @property
    def codebook(self) -> int:
        return self.info.codebook

    def require_patcher(self) -> Any:
        raise LoraError(
            f"The AR model of the service '{self.service.name}' takes no LoRA from here; connect "
            "GLM-Image Load AR Model, or leave ar unconnected for the decoder alone."
        )

    def write(self, requests: Sequence[SampleRequest], rows: int) -> list[Written]:
        """`rows` is the service's own here."""
        holder, progress = object(), _Progress(self.palette)
        samples = SAMPLES.hold(holder, self.service, self.info, requests)
        try:
            wait([sample.future for sample in samples], lambda: progress.update(samples))
            return [sample.future.result() for sample in samples]
        finally:
            SAMPLES.release(holder)

    def cell_scores(
        self,
        prompt: str,
        against: str | None,
        size: Size,
        sets: Sequence[Sequence[Tensor] | None],
        grids: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        samples = len(next(iter(grids.values())))
        bodies = []
        for i in range(samples):  # one request an image, as a service bounds them
            image = {kind: grid[i : i + 1] for kind, grid in grids.items()}
            request = self._score_request(prompt, against, size, sets[i % len(sets)], image)
            data = protocol.score_to_json(request, self.codebook)
            bodies.append(json.dumps(data).encode())
        texts = _ask(self.service, SCORES, bodies, JSON)
        answers = [protocol.tensors_from_text(text, "The service's scores") for text in texts]
        return {kind: torch.cat([answer[kind] for answer in answers]) for kind in grids}

    def _score_request(
        self,
        prompt: str,
        against: str | None,
        size: Size,
        references: Sequence[Tensor] | None,
        grids: dict[str, Tensor],
    ) -> ScoreRequest:
        own = {"codebook": self.codebook, "height": size[0], "width": size[1]}
        preview, tokens = grids.get(protocol.PREVIEW), grids.get(protocol.TOKENS)
        return ScoreRequest(
            prompt,
            against,
            None if tokens is None else SemanticTokens(tokens, **own),
            None if preview is None else Layout(preview, preview[0] < 0, **own),
            tuple(references or ()),
        )


class RemoteVision:
    def __init__(self, service: Service, info: Info) -> None:
        self.image_config = info.image
        self._service = service
        self._info = info

    def encode(self, images: Tensor) -> Tensor:
        """One request an image, as a body may not be of any length."""
        bodies = [protocol.tensors_to_bytes({"images": image[None].float()}) for image in images]
        answers = _ask(self._service, IMAGES, bodies, TENSORS)
        codebook = self._info.codebook
        return torch.cat([protocol.encoded_from_text(text, codebook) for text in answers])


class RemotePalette:
    def __init__(self, service: Service, info: Info) -> None:
        self._service = service
        self._info = info

    @cached_property
    def colours(self) -> Tensor:
        service = self._service
        content = CLIENT.run(persist(service, Clock(), lambda: CLIENT.content(service, PALETTE)))
        palette = protocol.tensors_from_bytes(content, "The service's palette")["palette"]
        return palette.reshape(self._info.codebook, 3).float()


class _Progress:
    """Progress over all samples of a node, with a live picture of those of one size."""

    def __init__(self, palette: RemotePalette) -> None:
        self._progress = TokenProgress(palette)
        self._done = 0

    def update(self, samples: Sequence[RemoteSample]) -> None:
        done = sum(sample.done for sample in samples)
        if done == self._done:
            return
        self._done = done
        if grids := _grids_of_one_size(samples):
            self._progress.show(grids)
        self._progress.update(done, sum(sample.total for sample in samples))


def _grids_of_one_size(samples: Sequence[RemoteSample]) -> list[Tensor]:
    """The grids so far, [B, rows, columns] each, of the samples that look like the first one."""
    begun = [sample.grids for sample in samples if sample.grids]
    if not begun:
        return []
    first = next((grids for grids in begun if (grids[-1] == UNKNOWN).any()), begun[0])
    shapes = [grid.shape for grid in first]
    alike = [grids for grids in begun if [grid.shape for grid in grids] == shapes]
    return [torch.cat(stage) for stage in zip(*alike, strict=True)]


def _ask(service: Service, path: str, bodies: Sequence[bytes], kind: str) -> list[str]:
    """The files of requests that have one each, with a progress bar over all of them."""
    bar = progress_bar(PARTS * len(bodies))
    shares = [0.0] * len(bodies)

    async def one(number: int) -> str:
        clock = Clock()

        async def attempt() -> str:
            result = None
            async for name, data in CLIENT.events(service, path, bodies[number], kind):
                if name == "progress" and data["done"] / data["total"] > shares[number]:
                    shares[number] = data["done"] / data["total"]
                    clock.restart()
                elif name == "result":
                    result = data["file"]
            if result is None:
                raise RetryError("broke off its answer")
            return result

        return await persist(service, clock, attempt)

    futures = [CLIENT.start(one(number)) for number in range(len(bodies))]
    try:
        wait(futures, lambda: bar(int(PARTS * sum(shares)), PARTS * len(bodies)))
        return [future.result() for future in futures]
    finally:
        for future in futures:
            future.cancel()
