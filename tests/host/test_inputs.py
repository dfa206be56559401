"""Values of another type at the nodes' inputs: one sentence each, at every node."""

import asyncio
import importlib
import inspect
from concurrent.futures import ThreadPoolExecutor

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
LAYOUT = Layout(torch.zeros(1, 13, 19, dtype=torch.int32), torch.zeros(13, 19) > 0, 64, 64, 96)
SHAPELESS = "image is a tensor of the shape [1, 0, 5, 3] and not an RGB or RGBA IMAGE; connect"
ONE_CHANNEL = "images is a tensor of the shape [1, 4, 5, 1] and not an RGB or RGBA IMAGE; connect"


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
    marked = {id for id, node in nodes.items() if "fingerprint_inputs" in vars(node)}
    assert {"GLMImageLoadAR", "GLMImageLoadTokens", "GLMImageRemoteAR"} < marked
    for id in marked:
        monkeypatch.setitem(host.NODE_CLASS_MAPPINGS, id, nodes[id])
        links = {given.id: ["2", 0] for given in nodes[id].define_schema().inputs}
        prompt = DynamicPrompt({"1": {"class_type": id, "inputs": links}})
        with ThreadPoolExecutor(1) as pool:  # a browser's test leaves a loop running in this thread
            asked = pool.submit(asyncio.run, IsChangedCache("one", prompt, None).get("1"))
        (found,) = asked.result()
        assert not found.strip(), id
    assert not caplog.messages


def test_every_input_refuses_values_of_other_types(require, inputs) -> None:
    for given in inputs:
        for value in WRONG.get(given.io_type, LITERALS):
            if value is None and given.optional and given.io_type not in WRONG:
                continue
            if (
                isinstance(value, float) and value != value and given.min is None
            ):  # a score may be missing
                continue
            sentence = refusal(require, given, value)
            assert sentence.startswith(f"{given.id} is ")
            assert sentence.endswith(". [GLM-INPUT]")


def test_a_list_may_leave_out_optional_links(require, inputs) -> None:
    optional = [given for given in inputs if given.optional and given.io_type not in WRONG]
    assert len(optional) > 10
    for given in optional:
        require(given, None)


@pytest.fixture
def echo(nodes):
    """What `execute` of a node with another's schema gets for its inputs."""
    base = importlib.import_module("glm_image.nodes.node").Node

    def echo(node: str, **values):
        class Echo(base):
            @classmethod
            def define_schema(cls):
                return nodes[f"GLMImage{node}"].define_schema()

            @classmethod
            def execute(cls, **inputs):
                return inputs

        return Echo.execute(**values)

    return echo


def test_none_at_an_optional_input_is_as_if_nothing_were_connected(nodes, echo) -> None:
    """As switch nodes give it. Every optional input of `execute` has a default, then."""
    for name, node in nodes.items():
        schema = node.define_schema()
        optional = [given.id for given in schema.inputs if given.optional]
        for nothing in (None, [None, None]) if schema.is_input_list else (None,):
            assert echo(name[8:], **dict.fromkeys(optional, nothing)) == {}
        parameters = inspect.signature(node.execute).parameters
        if inspect.Parameter.VAR_KEYWORD not in {one.kind for one in parameters.values()}:
            assert all(parameters[one].default is not inspect.Parameter.empty for one in optional)
    lock = nodes["GLMImageLockLayout"].EXECUTE_NORMALIZED
    (locked,) = lock(layout=LAYOUT, lock="whole", batch_index=0, cells=None, images=None).result
    assert locked.locked.all()


def test_none_in_a_list_stands_for_the_default_of_its_entry(echo) -> None:
    lists = {"cells": ["0:0", None], "rows": [None, 2], "layout": [None, LAYOUT]}
    filled = {"cells": ["0:0", ""], "rows": [1, 2], "layout": [None, LAYOUT]}
    assert echo("SampleTokens", **lists) == filled
    with pytest.raises(GLMImageError, match=r"^scores_2 is null and not a number"):
        echo("KeepBest", scores_2=[1.0, None])
    with pytest.raises(GLMImageError, match=r"^prompt is null and not text"):
        echo("SampleTokens", prompt=["a", None])


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
        ("EncodeTokens", "image", torch.zeros(1, 0, 5, 3), SHAPELESS),
        ("ReadText", "images", torch.zeros(1, 4, 5, 1), ONE_CHANNEL),
        ("LockLayout", "images", torch.zeros(1, 4, 5, 1), ONE_CHANNEL),
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
    (tokens,) = nodes["GLMImageLayoutToTokens"].EXECUTE_NORMALIZED(layout=LAYOUT).result
    assert torch.equal(tokens.tokens, LAYOUT.preview)
