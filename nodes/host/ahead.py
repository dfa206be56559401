"""Asks services for the tokens of queued prompts while this machine still paints.

ComfyUI calls a handler with each prompt that comes in, on its event loop and before the prompt is
checked. The handler only wakes a watcher in the thread of the requests. The watcher reads the
queue, whose prompts are checked and have ids: it asks for the samples of the next ones as far as
they are known, and gives up those whose prompt has left the queue.
"""

import asyncio
import heapq
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from comfy_execution.graph_utils import is_link

from ...glm_core.ar.requests import SampleRequest
from ...glm_core.errors import GLMImageError
from .ar_interface import AnyAR
from .constants import Constants, Graph, NotConstantError, Values, needed
from .remote_ar import CLIENT, SAMPLES, RemoteAR
from .service_client import Clock, persist
from .services import MAX_AHEAD, Service, find_service

REMOTE_AR = "GLMImageRemoteAR"
POLL_SECONDS = 0.25
LINGER_SECONDS = 60.0
"""After a prompt came in: how long its checks may take before it stands in the queue."""

Requests = Callable[[Values, AnyAR], list[SampleRequest]]
"""The requests of a sampler, from the lists of its other inputs and the AR model."""


class Ahead:
    """
    Args:
        queue: ComfyUI's PromptQueue.
        samplers: by class of node.
        givers: see `Constants`.
    """

    def __init__(
        self,
        queue: Any,
        samplers: Mapping[str, Requests],
        givers: Mapping[str, Callable[[Values], list[Any]]],
    ) -> None:
        self._queue = queue
        self._samplers = samplers
        self._givers = givers
        self._tasks: dict[str, asyncio.Task[None] | None] = {}
        """By prompt, until it leaves the queue; None where there is nothing to ask for."""
        self._until = 0.0
        self._watcher: asyncio.Task[None] | None = None

    def on_prompt(self, data: dict[str, Any]) -> dict[str, Any]:
        """ComfyUI's handler: returns at once, and leaves the prompt as it is."""
        graph = data.get("prompt")
        if isinstance(graph, dict) and any(
            isinstance(node, dict) and node.get("class_type") == REMOTE_AR
            for node in graph.values()
        ):
            CLIENT.soon(self._wake)
        return data

    # ---- in the thread of the requests ----

    def _wake(self) -> None:
        self._until = time.monotonic() + LINGER_SECONDS
        if self._watcher is None or self._watcher.done():
            self._watcher = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while self._tasks or time.monotonic() < self._until:
            running, pending = self._queue.get_current_queue_volatile()
            self._drop({entry[1] for entry in (*running, *pending)})
            for place, entry in enumerate(heapq.nsmallest(MAX_AHEAD, pending, lambda e: e[:2])):
                self._consider(place, *entry[1:3], entry[4])
            await asyncio.sleep(POLL_SECONDS)

    def _drop(self, queued: Collection[str]) -> None:
        for prompt_id in self._tasks.keys() - queued:
            task = self._tasks.pop(prompt_id)
            if task is not None:
                task.cancel()
                SAMPLES.release(prompt_id)

    def _consider(self, place: int, prompt_id: str, graph: Graph, outputs: list[str]) -> None:
        """Begins to ask for a prompt's samples, unless so many prompts wait before it."""
        if prompt_id in self._tasks:
            return
        samplers = self._remote_samplers(graph, outputs)
        if not samplers:
            self._tasks[prompt_id] = None
        elif all(place < service.ahead for service in samplers.values()):
            self._tasks[prompt_id] = asyncio.create_task(self._ask(prompt_id, graph, samplers))

    def _remote_samplers(self, graph: Graph, outputs: list[str]) -> dict[str, Service]:
        """The samplers that a prompt may run with a service's AR model, by node."""
        found = {}
        for node_id in needed(graph, outputs):
            ar = graph[node_id]["inputs"].get("ar")
            if graph[node_id]["class_type"] not in self._samplers or not is_link(ar):
                continue
            if graph[ar[0]]["class_type"] == REMOTE_AR:
                with suppress(NotConstantError, GLMImageError):  # the node will say what is wrong
                    name, *_ = Constants(graph, self._givers).inputs(ar[0])["service"]
                    found[node_id] = find_service(name)
        return found

    async def _ask(self, prompt_id: str, graph: Graph, samplers: dict[str, Service]) -> None:
        constants = Constants(graph, self._givers)
        for node_id, service in samplers.items():
            with suppress(NotConstantError, GLMImageError):
                values = constants.inputs(node_id, frozenset({"ar"}))
                ask_info = partial(CLIENT.info, service)
                ar = RemoteAR(service, await persist(service, Clock(), ask_info))
                requests = self._samplers[graph[node_id]["class_type"]](values, ar)
                SAMPLES.hold(prompt_id, service, ar.info, requests)
