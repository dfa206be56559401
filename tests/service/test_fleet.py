"""The service on Ray, as its clients see it: two replicas of the tiny model."""

import os
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import requests
import torch
from fleet_client import CODEBOOK, HEADERS, body_of, events, result_of, running
from short_samples import TINY, locked_rows, plain, short

from glm_core.ar import protocol
from glm_core.ar.protocol import ScoreRequest
from glm_core.ar.requests import write_together
from glm_core.data.tokens import Forced, Layout
from glm_core.vision.pixels import ImageConfig
from scripts import environment
from service.bounds import Bounds
from service.engine import Entry, Order, Watch
from service.model import ServedModel, identity

ROWS, QUEUED, REPLICAS = 4, 16, 2
BOUND = QUEUED * REPLICAS
CLIENTS = 200
LONG = plain(side=1024)  # a thousand steps
WATCH = Watch([Entry(Order(1, lambda: None), 0, None, None)])  # somebody who does not leave


@pytest.fixture(scope="module")
def local():
    """The model in this process."""
    return ServedModel(TINY, torch.device("cpu"), ROWS, Bounds())


@pytest.fixture(scope="module")
def fleet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("service")
    sizes = ("--rows", str(ROWS), "--queue", str(QUEUED), "--replicas", str(REPLICAS))
    with running(folder, str(TINY), "--device", "cpu", *sizes) as fleet:
        yield fleet


def written_here(local, request):
    how = {"device": local.device, "dtype": local.dtype}
    return write_together(local._network, local.tokenizer, [request], ROWS, **how)[0]


def same(one, other) -> bool:
    pairs = ((one.tokens, other.tokens), (one.preview, other.preview))
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


# ---- what it answers -----------------------------------------------------------------------------


def test_it_says_what_it_serves(fleet, local) -> None:
    info = fleet.get("/info").json()
    assert info["checkpoint"] == identity(local.component)
    assert (info["model"], info["codebook"], info["rows"]) == ("tiny", CODEBOOK, ROWS)
    assert (info["dtype"], info["device"]) == ("bfloat16", "cpu")
    assert info["bounds"]["samples"] == ROWS
    assert info["bounds"]["queued"] == QUEUED
    assert ImageConfig.from_dict(info["image"]) == local.image_config
    palette = protocol.tensors_from_bytes(fleet.get("/v1/palette").content, "palette")
    assert torch.equal(palette["palette"], local.palette)


def test_samples_are_those_of_a_local_run(fleet, local) -> None:
    kept = torch.zeros(4, 4, dtype=torch.bool)
    kept[:2] = True
    large = Forced(torch.arange(16, dtype=torch.int32).view(1, 4, 4), kept)
    picture = torch.arange(256, dtype=torch.int32).view(16, 16)
    asked = [
        plain(),
        short("two green triangles", seed=2**64 - 1),
        plain(seed=5, large=large),
        plain("make it blue", references=(picture,)),
    ]
    for one, request in zip(fleet.write(asked), asked, strict=True):
        assert same(one, written_here(local, request))


def test_progress_comes_with_the_grids_so_far(fleet) -> None:
    with fleet.post("/v1/samples", body_of([plain()])) as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        told = list(events(response))
    assert [name for name, _ in told].count("result") == 1
    name, first = told[0]
    assert name == "progress"
    assert (first["sample"], first["total"]) == (0, 48)
    cells = [row for grid in first["grids"].values() for row in grid]
    assert {len(row) for row in cells} == {16, 4}
    assert sum(cell >= 0 for row in cells for cell in row) == 14 * 16 + first["done"]


def test_images_become_the_tokens_of_a_local_run(fleet, local) -> None:
    images = torch.rand(2, 512, 544, 3, generator=torch.Generator().manual_seed(1))
    body = protocol.tensors_to_bytes({protocol.IMAGES: images})
    tokens = protocol.encoded_from_text(result_of(fleet.post("/v1/images", body)), CODEBOOK)
    assert torch.equal(tokens, local.encode(images, WATCH))


def test_scores_are_those_of_a_local_run(fleet, local) -> None:
    preview = locked_rows(0).values
    layout = Layout(preview, torch.zeros(16, 16, dtype=torch.bool), CODEBOOK, 256, 256)
    request = ScoreRequest("a red circle", "a square", None, layout)
    body = protocol.score_to_json(request, CODEBOOK)
    file = protocol.tensors_from_text(result_of(fleet.post("/v1/scores", body)), "file")
    assert file.keys() == {"preview"}
    assert torch.equal(file["preview"], local.score(request, WATCH)["preview"])


def test_ray_tells_its_metrics(fleet) -> None:
    deadline, text = time.monotonic() + 30, ""
    while "ray_glm_image_waiting_samples" not in text:
        assert time.monotonic() < deadline, text
        time.sleep(1)
        text = requests.get(fleet.metrics, timeout=10).text
    assert "ray_serve_deployment_replica_healthy" in text


# ---- who may ask, and what -----------------------------------------------------------------------


@pytest.mark.parametrize("sent", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "x"}])
def test_without_the_key_nothing_is_answered(fleet, sent) -> None:
    for path in ("/info", "/v1/palette", "/nothing"):
        response = fleet.get(path, headers=sent)
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == "Bearer"
        assert response.json()["code"] == "GLM-SERVICE"
    assert fleet.post("/v1/samples", body_of([short()]), headers=sent).status_code == 401
    assert fleet.get("/health", headers=sent).json() == {"status": "ok"}


def test_ray_refuses_processes_without_its_token(fleet) -> None:
    program = f"from ray._raylet import GcsClient; GcsClient({fleet.ray_address()!r})"
    variables = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 32}
    command = [environment.service_python(), "-c", program]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode
    assert "AuthenticationError" in done.stderr


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("/v1/samples", b"", 400, "not JSON"),
        ("/v1/samples", b"[" * 100_000, 400, "not JSON"),
        ("/v1/samples", b"\xff\x00", 400, "not JSON"),
        ("/v1/samples", {"samples": []}, 400, "list of samples"),
        ("/v1/samples", body_of([short(" ")]), 400, "prompt is empty"),
        ("/v1/samples", {"samples": [{"prompt": "a", "width": 32}]}, 400, "has no height"),
        ("/v1/samples", body_of([short()] * (ROWS + 1)), 413, "5 samples and one may have 4"),
        ("/v1/samples", body_of([short("x" * 30_000)]), 413, "30000 characters"),
        ("/v1/samples", body_of([plain(side=16384)]), 413, "262144 cells"),
        ("/v1/samples", b" " * 2**24, 413, "may have 8 MiB"),
        ("/v1/images", b"no safetensors", 400, "no safetensors file"),
        ("/v1/scores", {"prompt": "a", "tokens": "AAAA"}, 400, "no safetensors file"),
        ("/v1/nothing", b"", 404, "no such path"),
        ("/info", b"", 405, "method"),
    ],
)
def test_a_malformed_request_is_a_sentence(fleet, path, body, status, words) -> None:
    response = fleet.post(path, body)
    assert response.status_code == status
    assert words in response.json()["message"]


# ---- clients that harm nobody --------------------------------------------------------------------


def half_a_request(fleet) -> socket.socket:
    """A client that announces a body, sends a part of it and waits."""
    client = socket.create_connection(("127.0.0.1", fleet.port), 60)
    headers = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
    client.sendall(
        f"POST /v1/samples HTTP/1.1\r\nHost: a\r\n{headers}Content-Length: 1000\r\n\r\n{{".encode()
    )
    return client


def test_slow_clients_and_garbage_harm_nobody(fleet, local) -> None:
    slow = [half_a_request(fleet) for _ in range(20)]
    unread = [fleet.post("/v1/samples", body_of([short(seed=i)])) for i in range(4)]
    for garbage in (b"\x16\x03\x01", b"GET /\r\n\r\n", b"POST /v1/samples HTTP/1.1\r\nHost: a\r\n"):
        with socket.create_connection(("127.0.0.1", fleet.port), 60) as client:
            client.sendall(garbage)
    (written,) = fleet.write([plain()])
    assert same(written, written_here(local, plain()))
    for client in slow:
        client.close()
    for response in unread:
        response.close()


def test_closed_connections_stop_costing(fleet) -> None:
    """Both replicas write for minutes, unless those who asked leave."""
    clients = [fleet.post("/v1/samples", body_of([LONG] * 2)) for _ in range(6)]
    for response in clients:
        assert response.status_code == 200
    next(events(clients[0]))
    for response in clients:
        response.close()
    since = time.monotonic()
    fleet.write([short()])
    fleet.write([short()])
    assert time.monotonic() - since < 30


def test_everyone_of_many_is_answered_by_tokens_or_told_to_wait(fleet, local) -> None:
    asked = [short(seed=i % 4) for i in range(CLIENTS)]
    expected = [written_here(local, short(seed=i)) for i in range(4)]

    def ask(request):
        with fleet.post("/v1/samples", body_of([request]), timeout=120) as response:
            if response.status_code == 503:
                assert int(response.headers["Retry-After"]) >= 1
                assert "are waiting here and 16 may" in response.json()["message"]
                return None
            return protocol.written_from_text(result_of(response), request, CODEBOOK)

    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = list(pool.map(ask, asked))
    written = [i for i, answer in enumerate(answers) if answer is not None]
    assert len(written) >= BOUND
    assert all(same(answers[i], expected[i % 4]) for i in written)
    assert len(fleet.write([short()])) == 1


def test_replicas_killed_in_mid_batch_lose_nothing(fleet, local) -> None:
    """Twice, while streams run; what is asked again gives the same tokens."""
    asked = [plain("a blue square", seed=i, side=256) for i in range(4)]
    pairs = [asked[:2], asked[2:], asked[:2], asked[2:]]
    progress, broken = threading.Event(), []

    def ask(pair):
        while True:
            try:
                return fleet.write(pair, progress.set)
            except (OSError, requests.RequestException) as error:
                broken.append(error)
                time.sleep(0.5)

    victims = fleet.replicas()
    assert len(victims) == REPLICAS
    with ThreadPoolExecutor(len(pairs)) as pool:
        pending = [pool.submit(ask, pair) for pair in pairs]
        for victim in victims:
            progress.clear()
            assert progress.wait(60)
            victim.kill()
        written = [future.result(120) for future in pending]
    assert broken
    expected = {id(request): written_here(local, request) for request in asked}
    for pair, answers in zip(pairs, written, strict=True):
        for one, request in zip(answers, pair, strict=True):
            assert same(one, expected[id(request)])
