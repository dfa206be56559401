"""A component's weights in a network of plain layers."""

from pathlib import Path

import pytest
import reference
import torch
from glm_image.glm_core.ar.model import ARConfig, ARModel
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.files.conversion import convert
from glm_image.glm_core.files.loading import load_network
from glm_image.glm_core.files.opening import open_component
from glm_image.glm_core.vision.encoder import VISION_PREFIXES

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("snapshot")
    reference.reference_snapshot(folder, "small")
    return folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_the_components_in_the_dtype_asked_for(snapshot, dtype) -> None:
    component = open_component(snapshot, "ar")
    network = load_network(ARModel, ARConfig, component, CPU, dtype, VISION_PREFIXES)
    for key, weight in network.state_dict().items():
        assert weight.dtype == dtype
        assert torch.equal(weight, component.tensor(key).to(dtype)), key
    assert not network.training
    assert not any(weight.requires_grad for weight in network.parameters())


def test_weights_of_another_network_are_refused(snapshot) -> None:
    component = open_component(snapshot, "ar")
    with pytest.raises(GLMImageError, match=r"weights unexpected: .*model\.visual"):
        load_network(ARModel, ARConfig, component, CPU, torch.float32)


def test_quantised_weights_are_refused(snapshot, tmp_path) -> None:
    file = convert(open_component(snapshot, "ar"), "int8", tmp_path, lambda done, total: None)
    component = open_component(file, "ar")
    with pytest.raises(GLMImageError, match="in int8, which plain layers cannot hold"):
        load_network(ARModel, ARConfig, component, CPU, torch.float32, VISION_PREFIXES)
