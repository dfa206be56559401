"""Every workflow of the pack in ComfyUI's page: found, opened, exported; two of them run.

`tests/server` runs every prompt in API form, and each graph exports exactly that prompt.
"""

import json
from pathlib import Path

import pytest
from glm_image.scripts.client import Client
from glm_image.scripts.host import PACK
from glm_image.scripts.tiny_graphs import suit_tiny, write_graphs
from glm_image.scripts.workflow_texts import WORKFLOWS as TEXTS
from glm_image.scripts.workflow_texts import file_title
from PIL import Image

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(file.stem for file in WORKFLOWS.glob("*.json"))
# (height, width) of the saved pictures of those that run; an edit has its picture's size
RUN = {"text_to_image": (192, 256), "edit_image": (768, 768)}
TIMEOUT_S = 60
SHOWS_A_GRID = """() => {
    const canvases = [...document.querySelectorAll('.glm-image-grids canvas')]
        .filter(canvas => canvas.clientHeight > 50)
    return canvases.length === 1 && canvases[0].getContext('2d')
        .getImageData(canvases[0].width / 2, canvases[0].height / 4, 1, 1).data[3] === 255
}"""


def graph(name):
    return json.loads((WORKFLOWS / f"{name}.json").read_text())


def test_each_graph_has_an_api_form_a_title_and_a_picture():
    assert NAMES
    assert sorted(file.stem for file in (WORKFLOWS / "api").glob("*.json")) == NAMES
    assert sorted(file.stem for file in WORKFLOWS.glob("*.jpg")) == NAMES
    assert sorted(TEXTS) == NAMES
    for name in NAMES:
        assert Image.open(WORKFLOWS / f"{name}.jpg").format == "JPEG"


def test_the_template_browser_lists_them(address):
    client = Client(address)
    assert sorted(json.loads(client.get("/workflow_templates"))[PACK]) == NAMES
    for name in NAMES:
        for suffix in ("json", "jpg"):
            served = client.get(f"/api/workflow_templates/{PACK}/{name}.{suffix}")
            assert served == (WORKFLOWS / f"{name}.{suffix}").read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_each_node_names_its_pack_and_has_a_title(name):
    for node in graph(name)["nodes"]:
        if node["type"] == "MarkdownNote":
            assert node["title"]
        else:
            ours = node["type"].startswith("GLMImage")
            assert node["properties"]["cnr_id"] == ("glm-image-native" if ours else "comfy-core")
    assert all(group["title"] for group in graph(name)["groups"])


def test_they_open_export_and_leave_links_and_nodes_in_sight(page):
    for name in NAMES:
        stored = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
        page.open_file((WORKFLOWS / f"{name}.json").read_text(), f"{name}.json")
        assert page.unknown_node_types() == []
        assert {node["class_type"] for node in stored.values()} <= set(page.node_types())
        assert page.messages() == []
        assert page.export_prompt() == stored
        assert page.overlaps() == [], name
    assert page.errors == []


def test_hidden_links_and_nodes_are_found(page):
    bad = graph("text_to_image")
    bad["extra"] = {}
    bad["nodes"][6]["pos"] = bad["nodes"][5]["pos"]
    page.open_file(json.dumps(bad), "bad.json")
    found = "; ".join(page.overlaps())
    assert "GLM-Image Sample Tokens (6) overlaps GLM-Image Glyph Encode (7)" in found
    assert "a link passes behind GLM-Image Decode (9)" in found


@pytest.mark.parametrize("name", RUN)
def test_it_runs_and_shows_its_picture(page, name):
    page.open_file((WORKFLOWS / f"{name}.json").read_text(), f"{name}.json")
    page.set_inputs(width=256, height=192, steps=4)
    page.run()
    assert page.wait_for_image("SaveImage", TIMEOUT_S) == RUN[name]
    page.browser_page.wait_for_function(SHOWS_A_GRID)
    # Opened again its nodes are new, and the grid comes from the server's history.
    page.open_file((WORKFLOWS / f"{name}.json").read_text(), f"{name}.json")
    page.browser_page.wait_for_function(SHOWS_A_GRID)
    assert page.errors == []


def test_an_unknown_node_is_noticed(page):
    unknown = graph("text_to_image")
    unknown["nodes"][0]["type"] = "GLMImageNoSuchNode"
    page.open_file(json.dumps(unknown), "unknown.json")
    assert page.unknown_node_types() == ["GLMImageNoSuchNode"]
    assert any("GLMImageNoSuchNode" in message for message in page.messages())


def test_a_missing_model_is_told_once(page):
    missing = graph("text_to_image")
    missing["nodes"][0]["widgets_values"][0] = "Not-There"
    for _ in range(2):
        page.open_file(json.dumps(missing), "missing.json")
        told = [message for message in page.messages() if "Not-There" in message]
        assert len(told) == 1
        assert "models/glm_image" in told[0]


def test_the_tiny_models_graphs_are_written_and_a_changed_one_stays(tmp_path):
    folder = write_graphs(tmp_path, tiny=True)
    first, second = (folder / f"{file_title(name)}.json" for name in list(TEXTS)[:2])
    assert sorted(folder.glob("*.json"))[:2] == [first, second]
    first.write_text("mine")
    write_graphs(tmp_path, tiny=False)
    assert first.read_text() == "mine"
    assert json.loads(second.read_text()) == graph(list(TEXTS)[1])


@pytest.mark.parametrize("name", NAMES)
def test_the_tiny_models_graph_asks_what_it_understands(name):
    changed = graph(name)
    suit_tiny(changed, name)
    before = {node["id"]: node for node in graph(name)["nodes"]}
    for node in changed["nodes"]:
        values, old = node.get("widgets_values", []), before[node["id"]].get("widgets_values", [])
        assert [type(value) for value in values] == [type(value) for value in old]
        if node["type"] in ("GLMImageDecode", "KSampler"):
            assert 20 in values
        if node["type"] == "PrimitiveStringMultiline":
            assert values == [TEXTS[name].tiny[node["title"]]]
        if node["type"] != "SolidMask":
            assert 1024 not in values
