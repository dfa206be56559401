"""An interrupt stops a stage at once, and the next prompt runs as usual."""

import time

import pytest
from graphs import fresh, the


@pytest.mark.parametrize("stage", ["GLMImageSampleTokens", "GLMImageDecode"])
def test_interrupt_in_the_middle(client, picture, stage):
    prompt = fresh(width=512, height=512, steps=200)
    node_id = the(prompt, stage)
    asked_at = []

    def interrupt(event):
        data = event["data"]
        if event["type"] == "progress" and data["node"] == node_id and not asked_at:
            assert data["value"] < data["max"] / 2
            asked_at.append(time.monotonic())
            client.interrupt()

    run = client.run(prompt, interrupt)
    assert run.interrupted_at == node_id
    assert run.executed[-1] == node_id
    assert time.monotonic() - asked_at[0] < 2
    assert picture(fresh()).std() > 1
