"""The service on Ray Serve: replicas of the AR model, each with its own queue and batches.

Ray is imported inside the functions, because it reads its settings from the environment when it is
imported, and `start` sets them.
"""

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

NAME = "glm_image_ar"
KEY = "GLM_IMAGE_SERVICE_KEY"
"""The environment variable with the key that clients send."""
TOKEN, TOKEN_PATH = "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
SPARE_REQUESTS = 1024
"""That a replica answers beside those in its queue: refusals, bodies on their way, `/info`."""
OBJECT_STORE_BYTES = 128 * 2**20  # of Ray's shared memory; requests pass through it in pieces
AGENT_SECONDS = 300
"""In which Ray's agent has to start; Ray itself gives it 30, which a busy machine exceeds."""
STOP_SECONDS = 600
"""In which a replica that is scaled away ends what it has taken."""


@dataclass(frozen=True)
class Settings:
    """
    Args:
        model: a snapshot's folder or a single file, at the same path on every machine.
        least, most: replicas; they are scaled between the two by the number of requests.
        gpu: whether each replica gets a GPU, else one CPU.
        rows: samples that a replica writes together.
        queued: samples that may wait at a replica.
        cpus: of each replica; as many threads compute where it has no GPU.
    """

    model: str
    least: int = 1
    most: int = 1
    gpu: bool = True
    rows: int = 16
    queued: int = 32
    cpus: int = 1


def application(arguments: Mapping[str, Any]) -> Any:
    """The Serve application, for `serve.run` and for the manifests in `deploy/`.

    Args:
        arguments: the fields of `Settings`. The key comes from the environment.
    """
    from ray import serve

    from .keys import digest
    from .replica import Replica

    settings = Settings(**_known(arguments))
    key = os.environ.get(KEY)
    scaling: dict[str, Any] = {"num_replicas": settings.least}
    if settings.most > settings.least:
        target = {"target_ongoing_requests": settings.rows}
        span = {"min_replicas": settings.least, "max_replicas": settings.most}
        scaling = {"autoscaling_config": {**span, **target}}
    deployment = serve.deployment(
        serve.ingress()(Replica),
        name="ar",
        max_ongoing_requests=settings.queued + settings.rows + SPARE_REQUESTS,
        ray_actor_options={"num_cpus": settings.cpus, "num_gpus": int(settings.gpu)},
        graceful_shutdown_timeout_s=STOP_SECONDS,
        health_check_period_s=2,
        logging_config={"enable_access_log": False, "log_level": "WARNING"},
        **scaling,
    )
    return deployment.bind(settings, digest(key) if key else None)


def _known(arguments: Mapping[str, Any]) -> dict[str, Any]:
    names = [field.name for field in fields(Settings)]
    if unknown := set(arguments) - set(names):
        raise ValueError(f"There is no setting {', '.join(unknown)}; there are {', '.join(names)}.")
    return dict(arguments)


@contextmanager
def started(settings: Settings, port: int, address: str | None) -> Iterator[None]:
    """Run the service while the block runs.

    It listens on all addresses if there is a key, else on this machine alone.

    Args:
        port: of the service; the next one has the metrics of a Ray that is started here.
        address: of a Ray cluster to join; None starts Ray on this machine.
    """
    _set_environment(own=address is None)
    import ray
    from ray import serve

    host = "0.0.0.0" if os.environ.get(KEY) else "127.0.0.1"
    if address is None:
        cpus = max(os.cpu_count() or 1, settings.most * settings.cpus)
        ray.init(
            address="local",  # also where RAY_ADDRESS names a cluster
            num_cpus=cpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            _metrics_export_port=port + 1,
            _node_ip_address="127.0.0.1",
        )
    else:
        ray.init(address=address)
    try:
        serve.start(
            proxy_location="HeadOnly" if address is None else "EveryNode",
            http_options={"host": host, "port": port},
            logging_config={"enable_access_log": False, "log_level": "WARNING"},
        )
        serve.run(application(vars(settings)), name=NAME, route_prefix="/")
        yield
    finally:
        if address is not None:
            serve.delete(NAME)
        ray.shutdown()  # ends Ray's processes where they were started here


def _set_environment(own: bool) -> None:
    """What Ray reads when it is imported; its processes inherit it.

    Args:
        own: whether Ray is started here. Without a token of the user's it gets one that nobody
            else knows, so nothing else can join it.
    """
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_agent_register_timeout_ms", str(1000 * AGENT_SECONDS))
    if own and TOKEN not in os.environ and TOKEN_PATH not in os.environ:
        os.environ[TOKEN] = secrets.token_hex(32)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
