"""Which inputs of a queued graph are known before it runs."""

import pytest
from glm_image.nodes.host.constants import Constants, NotConstantError, needed

GRAPH = {
    "1": {"class_type": "PrimitiveStringMultiline", "inputs": {"value": "a\nb"}},
    "2": {"class_type": "Lines", "inputs": {"text": ["1", 0]}},
    "3": {"class_type": "PrimitiveInt", "inputs": {"value": 64}},
    "4": {"class_type": "LoadImage", "inputs": {"image": "x.png"}},
    "5": {"class_type": "Sampler", "inputs": {"prompt": ["2", 0], "width": ["3", 0], "seed": 7}},
    "6": {"class_type": "Sampler", "inputs": {"mask": ["4", 1], "seed": 7, "ar": ["4", 0]}},
    "7": {"class_type": "PrimitiveInt", "inputs": {"value": ["4", 1]}},
    "8": {"class_type": "Sampler", "inputs": {"width": ["7", 0]}},
}
KNOWN = Constants(GRAPH, {"Lines": lambda values: values["text"][0].splitlines()})


def test_values_primitives_and_what_is_made_of_them():
    assert KNOWN.inputs("5") == {"prompt": ["a", "b"], "width": [64], "seed": [7]}


@pytest.mark.parametrize("node_id", ["6", "8"])
def test_what_another_node_has_to_make_is_not_known(node_id):
    with pytest.raises(NotConstantError):
        KNOWN.inputs(node_id, frozenset({"ar"}))


def test_what_outputs_need():
    assert needed(GRAPH, ["5"]) == ["1", "2", "3", "5"]
    assert needed(GRAPH, ["6", "3"]) == ["3", "4", "6"]
