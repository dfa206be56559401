"""Every workflow of the pack in ComfyUI's page: found, opened, exported, run."""

import json
from pathlib import Path

import pytest
from glm_image.scripts.client import Client
from glm_image.scripts.host import PACK
from PIL import Image

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
NAMES = sorted(file.stem for file in WORKFLOWS.glob("*.json"))
# (height, width) that differ from the inputs: of a sheet, of the picture to edit, scaled up
SIZES = {
    "layout_contact_sheet": (416, 576),
    "edit_image": (768, 768),
    "upscale_in_tiles": (336, 448),
}
TIMEOUT_S = 60


def test_each_graph_has_an_api_form_and_a_picture():
    assert NAMES
    assert sorted(file.stem for file in (WORKFLOWS / "api").glob("*.json")) == NAMES
    assert sorted(file.stem for file in WORKFLOWS.glob("*.jpg")) == NAMES
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
def test_it_opens_exports_and_runs(page, name):
    stored = json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())
    page.open_file((WORKFLOWS / f"{name}.json").read_text(), f"{name}.json")
    assert page.unknown_node_types() == []
    assert {node["class_type"] for node in stored.values()} <= set(page.node_types())
    assert page.messages() == []
    assert page.export_prompt() == stored

    page.set_inputs(width=256, height=192, steps=4)
    page.run()
    assert page.wait_for_image("SaveImage", TIMEOUT_S) == SIZES.get(name, (192, 256))
    assert page.errors == []


def test_an_unknown_node_is_noticed(page):
    graph = json.loads((WORKFLOWS / f"{NAMES[0]}.json").read_text())
    graph["nodes"][0]["type"] = "GLMImageNoSuchNode"
    page.open_file(json.dumps(graph), "unknown.json")
    assert page.unknown_node_types() == ["GLMImageNoSuchNode"]
    assert any("GLMImageNoSuchNode" in message for message in page.messages())
