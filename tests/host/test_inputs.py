"""Values of another type at the nodes' inputs: one sentence each, at every node."""

import asyncio
import importlib

import pytest
import torch
from comfy_execution.graph import DynamicPrompt
from execution import IsChangedCache
from glm_image.glm_core.data.tokens import Layout, SemanticTokens
from glm_image.glm_core.errors import GLMImageError

import nodes as host

WRONG = {
    "INT": ["x", None, {"a": 1}, 1.5, float("nan")],
    "FLOAT": ["x", None, [1.0, 2.0, 3.0], torch.ones(1), float("nan")],
    "STRING": [5, None, {"a": 1}, True],
    "COMBO": [3, None, ["a"], {"a": 1}, 0.5],
}
LITERALS = ["x", 5, 1.5, True, {"a": 1}, [1, 2, 3], torch.zeros(2), object()]
TOKENS = SemanticTokens(torch.zeros(1, 2, 3, dtype=torch.int32), 64, 64, 96)


@pytest.fixture(scope="module")
def inputs(nodes) -> list:
    return [given for node in nodes.values() for given in node.define_schema().inputs]


@pytest.fixture(scope="module")
def require(nodes):
    return importlib.import_module("glm_image.nodes.node").require_input


def refusal(require, given, value) -> str:
    with pytest.raises(GLMImageError) as refused:
        require(given, value)
    return str(refused.value)


def test_every_node_checks_its_inputs(nodes) -> None:
    """The first input of each is given a type that no input takes."""
    for node in nodes.values():
        schema = node.define_schema()
        first, *others = schema.inputs
        wrong = [object()] if schema.is_input_list else object()
        values = {other.id: None for other in others} | {first.id: wrong}
        with pytest.raises(GLMImageError, match=rf"^{first.id} is of the type object and not "):
            node.EXECUTE_NORMALIZED(**values)


def test_what_is_linked_neither_fails_nor_changes_before_the_node_runs(
    nodes, monkeypatch, caplog
) -> None:
    """By the host's own code: an error there would run the node with every prompt."""
    asked = {id for id, node in nodes.items() if "fingerprint_inputs" in vars(node)}
    assert {"GLMImageLoadAR", "GLMImageLoadTokens", "GLMImageRemoteAR"} < asked
    for id in asked:
        monkeypatch.setitem(host.NODE_CLASS_MAPPINGS, id, nodes[id])
        links = {given.id: ["2", 0] for given in nodes[id].define_schema().inputs}
        prompt = DynamicPrompt({"1": {"class_type": id, "inputs": links}})
        (found,) = asyncio.run(IsChangedCache("one", prompt, None).get("1"))
        assert not found.strip(), id
    assert not caplog.messages


def test_every_input_refuses_values_of_other_types(require, inputs) -> None:
    for given in inputs:
        for value in WRONG.get(given.io_type, LITERALS):
            if value is None and given.optional:
                continue
            if (
                isinstance(value, float) and value != value and given.min is None
            ):  # a score may be missing
                continue
            sentence = refusal(require, given, value)
            assert sentence.startswith(f"{given.id} is ")
            assert sentence.endswith(". [GLM-INPUT]")


def test_an_optional_input_may_be_empty(require, inputs) -> None:
    optional = [given for given in inputs if given.optional]
    assert len(optional) > 10
    for given in optional:
        require(given, None)


@pytest.mark.parametrize(
    ("node", "name", "value", "sentence"),
    [
        ("SaveTokens", "tokens", 5, "tokens is 5 and not semantic tokens; connect GLM-Image "),
        ("SampleTokens", "ar", "x", 'ar is "x" and not an AR model; connect GLM-Image Load AR'),
        ("LockLayout", "layout", None, "layout is null and not a layout; connect GLM-Image "),
        ("LockLayout", "layout", TOKENS, "layout is of the type SemanticTokens and not a lay"),
        ("LoadVAE", "model_name", 3, "model_name is 3 and not one of its names; choose one."),
        ("Decode", "latent", {"a": 1}, 'latent is {"a": 1} and not a LATENT; connect'),
        ("ApplyTokens", "positive", [[1, 2]], "positive is [[1, 2]] and not a CONDITIONING;"),
        ("EncodeTokens", "image", torch.zeros(1, 0, 5, 3), "image is of the type Tensor and not"),
        ("Scheduler", "steps", 10**9, "steps is 1000000000; use a value from 1 to "),
        ("Decode", "cfg", float("nan"), "cfg is nan; use a value from 1.0 to 100.0."),
        ("SampleTokens", "width", 2.5, "width is 2.5 and not a whole number; type one."),
    ],
)
def test_the_sentence_says_what_is_wrong(nodes, require, node, name, value, sentence) -> None:
    (given,) = [x for x in nodes[f"GLMImage{node}"].define_schema().inputs if x.id == name]
    assert refusal(require, given, value).startswith(sentence)


def test_a_long_value_is_cut(nodes, require) -> None:
    (given,) = nodes["GLMImageLayoutToTokens"].define_schema().inputs
    for value in ("x" * 10**5, {"deep": ["y" * 10**5]}, "\ud83d" * 10**5):
        sentence = refusal(require, given, value)
        assert len(sentence) < 400
        sentence.encode("utf-8")


def test_a_right_value_passes(nodes) -> None:
    layout = Layout(torch.zeros(1, 13, 19, dtype=torch.int32), torch.zeros(13, 19) > 0, 64, 64, 96)
    (tokens,) = nodes["GLMImageLayoutToTokens"].EXECUTE_NORMALIZED(layout=layout).result
    assert torch.equal(tokens.tokens, layout.preview)
