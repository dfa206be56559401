"""Every node in words that a page shows: search words, Chinese, and help in both languages."""

import json
import re
from pathlib import Path

import pytest
from glm_image.nodes.search_aliases import ALIASES

ROOT = Path(__file__).resolve().parents[2]
CHINESE = re.compile("[\u4e00-\u9fff]")
FORMATTED = re.compile("[{}@|]")
"""Characters that the page's translator reads as its own syntax."""
FROM_DISK = ("model_name", "lora_name", "file", "service")
"""Inputs whose options are the names of files."""
HELP = {"en": "{}.md", "zh": "{}/zh.md"}


@pytest.fixture(scope="module")
def schemas(nodes) -> dict:
    return {node_id: node.define_schema() for node_id, node in nodes.items()}


@pytest.fixture(scope="module")
def chinese() -> dict:
    return json.loads((ROOT / "locales" / "zh" / "nodeDefs.json").read_text())


def test_every_node_has_search_words(schemas):
    assert [node_id for node_id in schemas if not ALIASES.get(node_id)] == []
    for node_id, schema in schemas.items():
        if hasattr(schema, "search_aliases"):
            assert schema.search_aliases == ALIASES[node_id]


def test_every_node_input_and_output_is_in_chinese(schemas, chinese):
    missing = []
    for node_id, schema in schemas.items():
        entry = chinese.get(node_id, {})
        told = {key: entry.get(key, "") for key in ("display_name", "description")}
        slots = [("inputs", given.id) for given in schema.inputs]
        slots += [("outputs", str(i)) for i in range(len(schema.outputs))]
        for kind, name in slots:
            slot = entry.get(kind, {}).get(name, {})
            told[f"{name} tooltip"] = slot.get("tooltip", "")
            if not slot.get("name"):
                missing.append(f"{node_id}: name of {name}")
        missing += [f"{node_id}: {what}" for what, text in told.items() if not CHINESE.search(text)]
        if any(getattr(given, "control_after_generate", None) for given in schema.inputs):
            assert entry["inputs"]["control_after_generate"]["name"]
    assert missing == []


def test_every_choice_is_explained_in_chinese(schemas, chinese):
    missing = []
    for node_id, schema in schemas.items():
        for given in schema.inputs:
            if given.io_type != "COMBO" or given.id in FROM_DISK:
                continue
            tooltip = chinese[node_id]["inputs"][given.id]["tooltip"]
            missing += [
                f"{node_id}: {given.id}={option}"
                for option in given.options
                if option not in tooltip and not option.startswith("gpu:")
            ]
    assert missing == []


def test_no_translation_holds_what_the_page_takes_for_a_format():
    for file in ROOT.glob("locales/*/*.json"):
        for text in _texts(json.loads(file.read_text())):
            assert not FORMATTED.search(text), (file, text)


def _texts(value: dict | str) -> list[str]:
    if isinstance(value, str):
        return [value]
    return [text for inner in value.values() for text in _texts(inner)]


@pytest.mark.parametrize("language", HELP)
def test_every_node_has_a_help_page_that_explains_every_slot(schemas, language):
    missing = []
    for node_id, schema in schemas.items():
        file = ROOT / "web" / "docs" / HELP[language].format(node_id)
        page = file.read_text() if file.is_file() else ""
        names = [given.id for given in schema.inputs]
        names += [output.display_name or output.io_type for output in schema.outputs]
        rows = set(re.findall(r"^\| .*?`([^`]+)`", page, re.MULTILINE))
        missing += [f"{node_id}: {name}" for name in names if name not in rows]
        if "```" not in page and "![" not in page:
            missing.append(f"{node_id}: a graph or a picture")
    assert missing == []
