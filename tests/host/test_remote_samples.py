"""Samples of services: sent once, cancelled when nobody holds them, dropped after a while."""

from concurrent.futures import Future

import pytest
from glm_image.glm_core.ar.requests import SampleRequest
from glm_image.glm_core.ar.step import SamplingOptions
from glm_image.nodes.host import remote_samples
from glm_image.nodes.host.remote_samples import RemoteSamples
from glm_image.nodes.host.service_info import Info
from glm_image.nodes.host.services import Service

SERVICE = Service("studio", "http://127.0.0.1:9", None)
ONE = SampleRequest("a cat", 64, 96, 1, SamplingOptions())
OTHER = SampleRequest("a cat", 64, 96, 2, SamplingOptions())


class Requests:
    """What is sent to the service, which answers nothing yet."""

    def __init__(self) -> None:
        self.sent: list[Future] = []

    def start(self, work) -> Future:
        work.close()
        self.sent.append(Future())
        return self.sent[-1]


@pytest.fixture
def requests() -> Requests:
    return Requests()


@pytest.fixture
def hold(requests):
    """Holds samples, and gives how many requests were sent until then."""
    samples, info = RemoteSamples(requests), Info(("0", "float32", 2), 64, None)

    def hold(holder: str, *asked: SampleRequest) -> int:
        samples.hold(holder, SERVICE, info, asked)
        return len(requests.sent)

    hold.release = samples.release
    return hold


def test_an_equal_sample_is_sent_once(hold, requests):
    assert hold("ahead", ONE, OTHER) == 2
    assert hold("node", ONE) == 2
    hold.release("ahead")
    assert [sent.cancelled() for sent in requests.sent] == [False, True]
    hold.release("node")
    assert requests.sent[0].cancelled()
    assert hold("node", ONE) == 3


def test_what_nobody_fetches_is_dropped_after_a_while(hold, requests, monkeypatch):
    hold("ahead", ONE)
    requests.sent[0].set_result(None)
    hold.release("ahead")
    assert hold("node", ONE) == 1
    hold.release("node")
    monkeypatch.setattr(remote_samples, "KEPT_SECONDS", -1.0)
    assert hold("node", ONE) == 2


def test_no_more_than_so_many_are_kept(hold, requests, monkeypatch):
    monkeypatch.setattr(remote_samples, "KEPT", 1)
    for i, one in enumerate((ONE, OTHER)):
        hold(str(i), one)
        requests.sent[i].set_result(None)
        hold.release(str(i))
    assert hold("newest", OTHER) == 2
    assert hold("oldest", ONE) == 3
