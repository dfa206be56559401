"""`python -m service` with arguments that cannot be: a sentence before Ray starts."""

import socket
import sys

import pytest
from short_samples import TINY

from glm_core.files.conversion import convert
from glm_core.files.opening import open_component
from service import __main__ as command
from service.fleet import KEY, Settings
from service.model import open_ar


def run(monkeypatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["service", *arguments])
    command.main()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["/nowhere"], "/nowhere does not exist"),
        ([str(TINY), "--device", "gpu:99"], "Each of 1 replicas needs a GPU and 0 can be used"),
        ([str(TINY), "--device", "gpu:1", "--address", "auto"], "leave out the number"),
    ],
)
def test_what_cannot_start_is_a_sentence(monkeypatch, arguments, words) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(SystemExit, match=words):
        run(monkeypatch, *arguments)


def test_a_quantised_file_is_left_out_if_there_is_a_snapshot(monkeypatch, tmp_path) -> None:
    file = convert(open_component(TINY, "ar"), "int8", tmp_path, lambda *_: None)
    with pytest.raises(SystemExit, match="holds the AR model in int8"):
        run(monkeypatch, str(tmp_path), "--device", "cpu")
    for part in ("vision_language_encoder", "processor"):
        (tmp_path / part).symlink_to(TINY / part)
    assert open_component(file, "ar").quantisation == "int8"
    assert open_ar(tmp_path).quantisation is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--replicas", "3-1"], "counts down: write 1-3"),
        (["--replicas", "0"], "no number from 1 to 1024"),
        (["--rows", "many"], "no number from 1 to 1024"),
        (["--port", "65535"], "no port from 1 to 65534"),
        (["--device", "tpu"], "none of cpu, gpu, gpu:1, gpu:0,2"),
    ],
)
def test_wrong_options_are_named(monkeypatch, capsys, arguments, words) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, str(TINY), *arguments)
    assert words in capsys.readouterr().err


def test_a_port_that_is_taken_is_named(monkeypatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for chosen in (port, port - 1):
            with pytest.raises(SystemExit, match=f"Port {port} is not free"):
                run(monkeypatch, str(TINY), "--device", "cpu", "--port", str(chosen))


def test_the_queue_holds_at_least_a_run(monkeypatch) -> None:
    """And what is asked for reaches the fleet."""
    asked = []

    def start(settings: Settings, port: int, address: str | None):
        asked.append((settings, port, address))
        raise SystemExit(KEY)

    monkeypatch.setattr(command, "started", start)
    options = ["--device", "cpu", "--replicas", "2-3", "--rows", "40", "--address", "auto"]
    with pytest.raises(SystemExit):
        run(monkeypatch, str(TINY), *options)
    ((settings, port, address),) = asked
    assert (settings.least, settings.most, settings.gpu) == (2, 3, False)
    assert (settings.rows, settings.queued) == (40, 40)
    assert (port, address) == (8790, "auto")
