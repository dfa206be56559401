"""Blocks in host memory go through two buffers, in order with the work that reads them."""

import comfy.model_management
import pytest
import torch
from glm_image.nodes.host.block_stream import BlockStream
from helpers import same
from streams import Device

ELSEWHERE = torch.device("cpu", 0)
"""Not the device of host memory, by name, and the same in fact: what is copied has numbers."""
BLOCKS = 5


@pytest.fixture
def blocks():
    return [[torch.randn(3, 4), torch.randn(2)] for _ in range(BLOCKS)]


@pytest.fixture
def device(monkeypatch):
    """The host with a stream that copies and one that computes."""
    device = Device()
    management = comfy.model_management
    monkeypatch.setattr(management, "get_offload_stream", lambda _: device.copying)
    monkeypatch.setattr(management, "current_stream", lambda _: device.current)
    return device


def stream_of(blocks) -> BlockStream:
    return BlockStream(blocks.__getitem__, len(blocks), ELSEWHERE)


def run(stream: BlockStream, order, found: list) -> None:
    for number in order:
        tensors = stream.read(number)
        found.append([tensor * 1 for tensor in tensors])


ORDERS = {
    "two steps": [*range(BLOCKS)] * 2,
    "a step that was cut off": [0, 1, 2, 0, 1, 2, 3, 4],
    "blocks twice": [0, 0, 1, 1, 2, 2],
    "blocks left out": [0, 3, 1, 4, 0],
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_every_block_is_read_after_its_copy_and_before_the_next(device, blocks, order) -> None:
    found: list = []
    with device:
        run(stream_of(blocks), order, found)
    assert device.races == []
    assert len(found) == len(order)
    for number, tensors in zip(order, found, strict=True):
        assert all(map(same, tensors, blocks[number]))


def test_the_next_block_is_copied_beside_the_work_on_this_one(device, blocks) -> None:
    """The copy of block 1 waits for nothing that is queued after block 0 was asked for."""
    stream = stream_of(blocks)
    with device:
        stream.read(0)
        before = device.copying.seen[device.computing]
        torch.zeros(1) + 1
        copied = device.copying.seen[device.copying]
        stream.read(1)
    assert copied == 4  # two tensors of each of two blocks
    assert before < device.copying.seen[device.computing]


@pytest.mark.parametrize("left_out", ["computing", "copying"])
def test_a_stream_that_does_not_wait_is_seen(device, blocks, left_out: str, monkeypatch) -> None:
    """What the test above compares has the fault in it."""
    monkeypatch.setattr(getattr(device, left_out), "wait_event", lambda event: None)
    with device:
        run(stream_of(blocks), ORDERS["two steps"], [])
    assert device.races


def test_two_blocks_are_on_the_device_however_many_are_read(device, blocks) -> None:
    stream, addresses = stream_of(blocks), set()
    for number in ORDERS["two steps"]:
        addresses |= {tensor.data_ptr() for tensor in stream.read(number)}
    assert len(addresses) == 2 * len(blocks[0])


def test_buffers_are_freed_after_the_last_copy(device, blocks) -> None:
    """Until then the copy reads host memory, which may be freed as well."""
    stream = stream_of(blocks)
    with device:
        stream.read(0)
    copied = [event for event in device.events if event.seen[device.copying]]
    stream.release()
    assert not stream._buffers
    assert copied[-1].synchronized


def test_without_streams_a_block_is_copied_when_it_is_asked_for(blocks) -> None:
    found: list = []
    run(stream_of(blocks), ORDERS["two steps"], found)
    for number, tensors in zip(ORDERS["two steps"], found, strict=True):
        assert all(map(same, tensors, blocks[number]))
