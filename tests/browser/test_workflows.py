"""Every workflow of the pack in ComfyUI's page: found, opened, exported; two of them run.

`tests/server` runs every prompt in API form, and each graph exports exactly that prompt.
"""

import json
import os
from urllib.parse import quote

import pytest
from glm_image.scripts import blueprints
from glm_image.scripts.blueprints import BLUEPRINTS, inside, with_one_loader, without_ends
from glm_image.scripts.client import Client
from glm_image.scripts.host import PACK, make_base
from glm_image.scripts.tiny_graphs import suit_tiny, write_graphs, write_templates
from glm_image.scripts.workflow_texts import FOLDER, file_title, graph_file
from glm_image.scripts.workflow_texts import WORKFLOWS as TEXTS
from glm_image.scripts.workflows import graph_id
from PIL import Image

NAMES = sorted(file.stem for file in (FOLDER / "api").glob("*.json"))
# (height, width) of the saved pictures of those that run; an edit has its picture's size
RUN = {"text_to_image": (192, 256), "edit_image": (768, 768)}
CROWDED = ("text_to_image", "edit_image", "layout_contact_sheet", "upscale_in_tiles")
TIMEOUT_S = 60
SHOWS_A_GRID = """() => {
    const canvases = [...document.querySelectorAll('.glm-image-grids canvas')]
        .filter(canvas => canvas.clientHeight > 50)
    return canvases.length === 1 && canvases[0].getContext('2d')
        .getImageData(canvases[0].width / 2, canvases[0].height / 4, 1, 1).data[3] === 255
}"""

MESSAGES_ARE_WHOLE = """() => {
    const messages = [...document.querySelectorAll('.glm-image-message')]
    return messages.length > 0 && messages.every(it => it.scrollHeight <= it.clientHeight)
}"""


def graph(name):
    return json.loads(graph_file(name).read_text())


def stored_prompt(name):
    return json.loads((FOLDER / "api" / f"{name}.json").read_text())


def titled(prompt):
    """With the titles of the pack's nodes only: hosts give their own nodes other ones."""
    return {
        key: {**node, "_meta": node["class_type"].startswith("GLMImage") and node["_meta"]}
        for key, node in prompt.items()
    }


def test_each_graph_has_an_api_form_a_title_and_a_picture():
    assert NAMES
    assert sorted(TEXTS) == NAMES
    graphs = sorted(graph_file(name) for name in NAMES)
    assert sorted(FOLDER.glob("*.json")) == graphs
    assert sorted(FOLDER.glob("*.jpg")) == [file.with_suffix(".jpg") for file in graphs]
    for name in NAMES:
        assert graph(name)["id"] == graph_id(name)
        assert Image.open(graph_file(name).with_suffix(".jpg")).format == "JPEG"


def test_the_template_browser_lists_them_by_their_titles(address):
    client = Client(address)
    titles = [file_title(name) for name in TEXTS]
    assert sorted(json.loads(client.get("/workflow_templates"))[PACK]) == titles
    for name in NAMES:
        for file in (graph_file(name), graph_file(name).with_suffix(".jpg")):
            served = client.get(f"/api/workflow_templates/{PACK}/{quote(file.name)}")
            assert served == file.read_bytes()


@pytest.mark.parametrize("name", NAMES)
def test_each_node_names_its_pack_and_has_a_title(name):
    for node in graph(name)["nodes"]:
        if node["type"] == "MarkdownNote":
            assert node["title"]
        else:
            ours = node["type"].startswith("GLMImage")
            assert node["properties"]["cnr_id"] == ("glm-image-native" if ours else "comfy-core")
    assert all(group["title"] for group in graph(name)["groups"])
    assert graph(name)["extra"]["ds"]["scale"] > 0  # otherwise the page moves the view itself


def test_they_open_export_and_leave_links_and_nodes_in_sight(shared_page):
    page = shared_page
    for name in NAMES:
        stored = stored_prompt(name)
        page.open_file(graph_file(name).read_text(), f"{name}.json")
        assert page.unknown_node_types() == []
        assert {node["class_type"] for node in stored.values()} <= set(page.node_types())
        assert page.messages() == []
        assert titled(page.export_prompt()) == titled(stored)
        assert page.overlaps() == [], name
    assert page.errors == []


def test_as_elements_they_leave_links_and_nodes_in_sight(page):
    page.draw_nodes_as_elements(True)
    try:
        for name in CROWDED:
            page.open_file(graph_file(name).read_text(), f"{name}.json")
            assert page.browser_page.locator("[data-node-id]").count() == len(page.node_types())
            assert page.overlaps() == [], name
    finally:
        page.draw_nodes_as_elements(False)


def test_hidden_links_and_nodes_are_found(shared_page):
    page = shared_page
    bad = graph("text_to_image")
    bad["extra"] = {}
    bad["nodes"][6]["pos"] = bad["nodes"][5]["pos"]
    page.open_file(json.dumps(bad), "bad.json")
    found = "; ".join(page.overlaps())
    assert "GLM-Image Sample Tokens (6) overlaps GLM-Image Glyph Encode (7)" in found
    assert "a link passes behind GLM-Image Decode (9)" in found


def test_the_blueprints_export_what_their_workflows_do(shared_page):
    page = shared_page
    files = {file.stem: file for file in blueprints.FOLDER.glob("*.json")}
    assert sorted(files) == sorted(BLUEPRINTS)
    for name, blueprint in BLUEPRINTS.items():
        stored = stored_prompt(blueprint.workflow)
        page.open_file(files[name].read_text(), f"{name}.json")
        assert page.messages() == []
        assert inside(page.export_prompt()) == without_ends(with_one_loader(stored))
    assert page.errors == []


@pytest.mark.parametrize("name", RUN)
def test_it_runs_and_shows_its_picture(shared_page, name):
    page = shared_page
    page.open_file(graph_file(name).read_text(), f"{name}.json")
    page.set_inputs(width=256, height=192, steps=4)
    page.run()
    assert page.wait_for_image("SaveImage", TIMEOUT_S) == RUN[name]
    page.browser_page.wait_for_function(SHOWS_A_GRID)
    assert page.browser_page.evaluate(MESSAGES_ARE_WHOLE)
    # Opened again its nodes are new, and the grid comes from the server's history.
    page.open_file(graph_file(name).read_text(), f"{name}.json")
    page.browser_page.wait_for_function(SHOWS_A_GRID)
    assert page.errors == []


def test_a_blueprint_is_found_placed_and_run(page):
    page.place_node("Text to Image (GLM-Image)")
    page.browser_page.evaluate(
        """() => {
            const node = app.graph.nodes.find(node => node.subgraph)
            const save = LiteGraph.createNode('SaveImage')
            app.graph.add(save)
            node.connect(0, save, 0)
        }"""
    )
    page.set_inputs(width=256, height=192, steps=4)
    page.run()
    assert page.wait_for_image("SaveImage", TIMEOUT_S) == RUN["text_to_image"]
    assert page.errors == []


def test_an_unknown_node_is_noticed(page):
    unknown = graph("text_to_image")
    unknown["nodes"][0]["type"] = "GLMImageNoSuchNode"
    page.open_file(json.dumps(unknown), "unknown.json")
    assert page.unknown_node_types() == ["GLMImageNoSuchNode"]
    assert any("GLMImageNoSuchNode" in message for message in page.messages())


def test_a_missing_model_is_told_once(page):
    missing = graph("text_to_image")
    page.browser_page.evaluate(
        """type => {
            const data = LiteGraph.registered_node_types[type].nodeData
            const [values, options] = data.input.required.model_name
            const names = Array.isArray(values) ? values : options.options
            names.push('sub/Not-There.safetensors')
        }""",
        missing["nodes"][0]["type"],
    )
    missing["nodes"][0]["widgets_values"][0] = "sub\\Not-There.safetensors"  # as Windows saves it
    page.open_file(json.dumps(missing), "windows.json")
    # Current pages say themselves that such a file "is missing", as they compare names exactly.
    assert not [message for message in page.messages() if "not installed" in message]
    missing["nodes"][0]["widgets_values"][0] = "Not-There"
    for _ in range(2):
        page.open_file(json.dumps(missing), "missing.json")
        told = [message for message in page.messages() if "Not-There" in message]
        assert len(told) == 1
        assert "not installed" in told[0]
        assert "models/glm_image" in told[0]


def test_the_tiny_models_graphs_are_written_and_a_changed_one_stays(tmp_path):
    folder = write_graphs(tmp_path, tiny=True)
    left_out = {name for name in TEXTS if not TEXTS[name].suits_tiny}
    assert len(list(folder.glob("*.json"))) == len(TEXTS) - len(left_out)
    first, second = (folder / f"{file_title(name)}.json" for name in list(TEXTS)[:2])
    assert sorted(folder.glob("*.json"))[:2] == [first, second]
    first.write_text("mine")
    write_graphs(tmp_path, tiny=False)
    assert first.read_text() == "mine"
    assert json.loads(second.read_text()) == graph(list(TEXTS)[1])


def test_a_server_of_the_tiny_model_has_its_graphs_as_templates(tmp_path):
    templates = write_templates(tmp_path / "templates")
    for _ in range(2):
        make_base(tmp_path / "base", templates)
    pack = tmp_path / "base" / "custom_nodes" / PACK
    assert (pack / "__init__.py").samefile(FOLDER.parent / "__init__.py")
    listed = {file.name for file in (pack / "workflows").iterdir()}
    graphs = write_graphs(tmp_path, tiny=True)
    assert {name for name in listed if name.endswith(".json")} == set(os.listdir(graphs))
    assert len(listed) == 2 * len(os.listdir(graphs))
    make_base(tmp_path / "base")
    assert pack.samefile(FOLDER.parent)


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
