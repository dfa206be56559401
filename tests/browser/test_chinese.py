"""The page set to Chinese: nodes, the node search, help."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from glm_image.scripts.client import Client, Prompt
from glm_image.scripts.page import Page
from glm_image.scripts.workflow_texts import graph_file

ROOT = Path(__file__).resolve().parents[2]
NAME = "text_to_image_chinese"
WORKFLOW = graph_file(NAME)
LAYOUT_NODES = ("采样布局", "锁定布局", "组合布局", "布局转 token")
CHINESE = re.compile("[\u4e00-\u9fff]")
EMPTY_SPOT = (960, 950)  # of the canvas


@pytest.fixture
def chinese_page(address: str, shared_page: Page) -> Iterator[Page]:
    client = Client(address)
    client.post("/settings/Comfy.Locale", "zh")
    try:
        with shared_page.another() as page:
            yield page
    finally:
        client.post("/settings/Comfy.Locale", "en")


def test_nodes_search_and_help_are_in_chinese(chinese_page):
    page = chinese_page.browser_page
    titles = page.evaluate(
        """() => Object.entries(LiteGraph.registered_node_types)
            .filter(([type]) => type.startsWith('GLMImage')).map(([, node]) => node.title)"""
    )
    assert titles
    assert [title for title in titles if not CHINESE.search(title)] == []

    chinese_page.open_file(WORKFLOW.read_text(), WORKFLOW.name)
    stored = json.loads((ROOT / "workflows" / "api" / f"{NAME}.json").read_text())
    assert _inputs(chinese_page.export_prompt()) == _inputs(stored)
    sampler = page.evaluate(
        """() => {
            const node = app.graph.nodes.find(node => node.type === 'GLMImageSampleTokens')
            app.canvas.selectNode(node)
            return [node.title, ...node.inputs.map(input => input.label ?? input.localized_name)]
        }"""
    )
    assert {"GLM-Image 采样语义 token", "提示词", "参考图", "批量大小"} <= set(sampler)

    page.locator("[data-testid=info-button]").click()
    page.get_by_text("常见错误").wait_for()

    page.mouse.dblclick(*EMPTY_SPOT)
    page.wait_for_function("document.activeElement.tagName === 'INPUT'")
    page.keyboard.type("布局")
    for title in LAYOUT_NODES:
        page.wait_for_function("text => document.body.innerText.includes(text)", arg=title)
    assert chinese_page.errors == []


def _inputs(prompt: Prompt) -> dict[str, dict]:
    """Without the titles, which are in the page's language."""
    return {key: node["inputs"] for key, node in prompt.items()}
