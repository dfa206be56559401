"""One replica: the model, its engine and the web application over them."""

import torch
from ray.util.metrics import Gauge

from .bounds import Bounds
from .engine import Engine
from .fleet import Settings
from .model import ServedModel
from .web import web_app


class Replica:
    """What Ray Serve runs in a process of its own, on a GPU of its own."""

    def __init__(self, settings: Settings, key_digest: bytes | None) -> None:
        device = torch.device("cuda:0" if settings.gpu else "cpu")
        bounds = Bounds(queued=max(settings.queued, settings.rows))
        self._model = ServedModel(settings.model, device, settings.rows, bounds)
        self._engine = Engine(self._model, bounds.queued)
        self._key_digest = key_digest
        self._waiting = Gauge("glm_image_waiting_samples", "Samples in the queue of a replica.")
        self._running = Gauge("glm_image_running_samples", "Samples in the run of a replica.")

    def __serve_build_asgi_app__(self):
        return web_app(self._model, self._engine, self._key_digest)

    def check_health(self) -> None:
        """Serve calls it every few seconds; a replica that raises is replaced."""
        waiting, running = self._engine.counts
        self._waiting.set(waiting)
        self._running.set(running)
        if not self._engine.is_healthy:
            raise RuntimeError("The model's thread has died, or its runs fail again and again.")
