"""The AR model of a service in ComfyUI's graphs: the same pictures, its sentences, and ahead."""

import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
from glm_image.scripts import environment, host
from glm_image.scripts.client import Client, PromptError
from graphs import MODEL, add, changed, fresh, relink, the
from pictures import first_image, pixels
from remote_service import KEY, RemoteService, name_services, remote

SAMPLER, DECODER = "GLMImageSampleTokens", "GLMImageDecode"


@pytest.fixture(scope="module")
def service(base: Path, tmp_path_factory) -> Iterator[RemoteService]:
    model = base / "models" / "glm_image" / MODEL
    service = RemoteService(model, tmp_path_factory.mktemp("service"))
    name_services(base, service.address)
    service.start()
    service.wait()
    yield service
    service.kill()


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


# ---- the same as a model here --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["text_to_image", "redo_region", "style_transfer"])
def test_pictures_are_those_of_a_model_here(service, picture, name):
    """Seeds, locks, regions, references and pictures read by the vision tower."""
    prompt = fresh(name)
    here = picture(deepcopy(prompt))
    assert here.std() > 1
    assert np.array_equal(picture(remote(prompt)), here)


@pytest.mark.parametrize("measure", ["prompt match", "likelihood"])
def test_scores_are_those_of_a_model_here(service, picture, measure):
    """As a heat map of the cells."""
    prompt = fresh()
    sampler = the(prompt, SAMPLER)
    scorer = add(prompt, "GLMImageScoreTokens", tokens=[sampler, 0], layout=[sampler, 1])
    ar = prompt[sampler]["inputs"]["ar"]
    prompt[scorer]["inputs"] |= {"ar": ar, "prompt": "a cat", "against": ""}
    prompt[scorer]["inputs"]["measure"] = measure
    relink(prompt, (the(prompt, "VAEDecode"), 0), (scorer, 2))
    here = picture(deepcopy(prompt))
    assert np.array_equal(picture(remote(prompt)), here)


@pytest.fixture
def second(service, base, tmp_path) -> Iterator[Client]:
    """Another ComfyUI, with the same decoder and with live previews."""
    folder = host.make_base(tmp_path)
    host.add_model(folder, base / "models" / "glm_image" / MODEL)
    name_services(folder, service.address)
    flags = ("--preview-method", "auto")
    with host.serve(environment.host(), folder, *flags, threads=1) as address:
        yield Client(address, timeout_s=120)


def test_two_servers_paint_sixteen_prompts_as_one_with_a_model_here(service, client, second):
    """Eight in each queue at once; here they are a list."""
    texts, prompt, before = [f"{count} red apples" for count in range(16)], fresh(), service.asked
    asked = [remote(changed(deepcopy(prompt), prompt=text)) for text in texts]
    list_of_texts = {"text": "\n".join(texts), "split": "lines"}
    source, _ = prompt[the(prompt, SAMPLER)]["inputs"]["prompt"]
    prompt[source] = {"class_type": "GLMImagePromptLines", "inputs": list_of_texts}
    prompt[the(prompt, SAMPLER)]["inputs"]["rows"] = 16
    here = client.images(client.run(prompt), the(prompt, "SaveImage"))

    shown = set()

    def paint(number: int) -> np.ndarray:
        own, running = Client((client, second)[number % 2].address, timeout_s=120), [None]

        def note(event):
            if event["type"] == "executing":
                running[0] = event["data"]["node"]

        run = own.run(asked[number], note, lambda preview: shown.add((number % 2, running[0])))
        return first_image(own, run, asked[number])

    with ThreadPoolExecutor(16) as pool:
        pictures = list(pool.map(paint, range(16)))
    assert service.asked == before + 16
    sampler = the(prompt, SAMPLER)
    assert ((0, sampler) in shown, (1, sampler) in shown) == (False, True)
    for picture, png in zip(pictures, here, strict=True):
        assert np.array_equal(picture, pixels(png))
    # One seed draws the same tokens for some prompts, as the weights are random.
    assert len({picture.tobytes() for picture in pictures}) > 8


# ---- what can go wrong ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("wrong key", "The AR service 'wrong key' refuses the key; correct its key"),
        ("away", "The AR service 'away' cannot be reached, and for 1 s no answer came; start"),
        ("nobody", "There is no AR service 'nobody' in user/__glm_image/glm_image_services.yaml"),
    ],
)
def test_a_service_that_cannot_be_asked_is_a_sentence(service, client, picture, name, said):
    prompt = remote(fresh(), name)
    with pytest.raises(PromptError, match=said) as told:
        client.run(prompt)
    assert told.value.node_id == the(prompt, "GLMImageRemoteAR")
    assert str(told.value).endswith("[GLM-SERVICE]")
    assert picture(remote(fresh())).std() > 1


def test_a_lora_on_it_is_a_sentence(service, client):
    prompt = remote(fresh())
    ar = the(prompt, "GLMImageRemoteAR")
    lora = add(prompt, "GLMImageLoadLora", lora_name="ar.safetensors", ar=[ar, 0])
    prompt[lora]["inputs"] |= {"strength_model": 1.0, "strength_ar": 1.0}
    prompt[the(prompt, SAMPLER)]["inputs"]["ar"] = [lora, 1]
    with pytest.raises(PromptError, match="'studio' takes no LoRA from here") as told:
        client.run(prompt)
    assert told.value.node_id == lora


def test_a_wrong_input_is_the_sentence_of_a_model_here(service, client):
    prompt = remote(fresh(prompt=" "))
    with pytest.raises(PromptError, match=r"The prompt is empty.*\[GLM-PROMPT\]") as told:
        client.run(prompt)
    assert told.value.node_id == the(prompt, SAMPLER)


def test_an_interrupt_ends_the_work_there(service, client, picture):
    prompt = remote(fresh(width=2048, height=2048))
    sampler = the(prompt, SAMPLER)
    asked_at = []

    def interrupt(event):
        data = event["data"]
        if event["type"] == "progress" and data["node"] == sampler and not asked_at:
            assert 0 < data["value"] < data["max"] / 2
            assert not service.is_idle
            asked_at.append(time.monotonic())
            client.interrupt()

    run = client.run(prompt, interrupt)
    assert run.interrupted_at == sampler
    until(lambda: service.is_idle, 5)
    assert time.monotonic() - asked_at[0] < 5
    assert picture(remote(fresh())).std() > 1


def test_a_service_that_is_killed_and_comes_back_loses_nothing(service, client, picture):
    prompt = fresh(width=512, height=512)
    here = picture(deepcopy(prompt))
    sampler = the(remote(prompt), SAMPLER)
    killed = []

    def kill(event):
        data = event["data"]
        if event["type"] == "progress" and data["node"] == sampler and not killed:
            assert data["value"] < data["max"]
            service.kill()
            killed.append(True)
            service.start()

    run = client.run(prompt, kill)
    assert killed
    assert np.array_equal(first_image(client, run, prompt), here)


# ---- ahead ---------------------------------------------------------------------------------------


@pytest.fixture
def painting(client) -> Iterator[Callable[[], None]]:
    """The server's decoder works at another prompt until the test ends, or calls what it gets."""
    prompt = fresh(width=512, height=512, steps=2000)
    decoder, other = the(prompt, DECODER), Client(client.address, timeout_s=120)
    with ThreadPoolExecutor(1) as pool:
        begun = []
        run = pool.submit(other.run, prompt, lambda event: begun.append(event["data"].get("node")))
        until(lambda: decoder in begun, 60)

        def end() -> None:
            if begun:
                assert not run.done()
                other.interrupt()
                assert run.result(60).interrupted_at == decoder
                begun.clear()

        yield end
        end()


def test_tokens_are_asked_for_while_another_prompt_is_painted(service, client, painting):
    before, prompt = service.asked, remote(fresh())
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(client.run, prompt)
        until(lambda: service.asked == before + 1)
        until(lambda: service.is_idle)  # the tokens are there
        painting()
        assert the(prompt, SAMPLER) in run.result(60).executed
    assert service.asked == before + 1  # and not asked for again


def test_what_leaves_the_queue_is_given_up(service, client, painting):
    before = service.asked
    prompt = remote(fresh(width=2048, height=2048))
    prompt_id = client.post("/prompt", {"prompt": prompt, "client_id": client.id})["prompt_id"]
    until(lambda: service.asked == before + 1)
    assert not service.is_idle
    client.post("/queue", {"delete": [prompt_id]})
    until(lambda: service.is_idle, 5)


def test_it_can_be_switched_off(service, client, painting):
    before = service.asked
    queued = [
        client.post("/prompt", {"prompt": remote(fresh(), name)})["prompt_id"]
        for name in ("no ahead", "studio")
    ]
    until(lambda: service.asked == before + 1)
    time.sleep(1)
    assert service.asked == before + 1
    client.post("/queue", {"delete": queued})


def test_no_address_and_no_key_is_told_to_anybody(service, client, base):
    told = [
        json.dumps(client.object_info()["GLMImageRemoteAR"]),
        client.get("/history").decode(),
        (base / "server.log").read_text(),
    ]
    assert "studio" in told[0]
    assert "studio" in told[1]
    for text in told:
        assert KEY not in text
        assert service.address not in text
