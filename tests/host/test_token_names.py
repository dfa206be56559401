"""Names of token files in a graph: where they may lead, and what none can have."""

from pathlib import Path

import folder_paths
import pytest
import torch
from glm_image.glm_core.data.tokens import SemanticTokens
from glm_image.glm_core.errors import GLMImageError
from PIL import Image

TOKENS = SemanticTokens(torch.zeros(1, 2, 3, dtype=torch.int32), 64, 64, 96, {"prompt": "\ud83d"})


def save(nodes, prefix: str) -> dict:
    (saved,) = (
        nodes["GLMImageSaveTokens"]
        .EXECUTE_NORMALIZED(tokens=TOKENS, filename_prefix=prefix)
        .ui["tokens"]
    )
    return saved


@pytest.mark.parametrize("prefix", ["/etc/tokens", "../tokens", "a/../../tokens", "/"])
def test_a_prefix_that_leads_out_of_the_output_folder(nodes, prefix) -> None:
    with pytest.raises(GLMImageError, match=rf"^filename_prefix '{prefix}' leads out of the"):
        save(nodes, prefix)


@pytest.mark.parametrize("prefix", ["\ud83d", "a\0b", "x/\udfff/y"])
def test_a_prefix_that_no_file_can_have(nodes, prefix) -> None:
    with pytest.raises(GLMImageError, match=r"^filename_prefix .* leave it out\. \[") as refused:
        save(nodes, prefix)
    str(refused.value).encode("utf-8")


def test_a_long_prefix_is_cut_in_the_sentence(nodes) -> None:
    with pytest.raises(GLMImageError, match="choose another filename_prefix") as refused:
        save(nodes, "n" * 10**5)
    assert len(str(refused.value)) < 400


def test_an_absolute_prefix_inside_the_output_folder_is_allowed(nodes) -> None:
    saved = save(nodes, f"{folder_paths.get_output_directory()}/inside/tokens")
    assert Path(folder_paths.get_output_directory(), "inside", saved["filename"]).is_file()


def test_a_backslash_is_a_slash(nodes) -> None:
    saved = save(nodes, "sub/deeper/tokens")
    name = f"{saved['subfolder']}/{saved['filename']} [output]"
    load = nodes["GLMImageLoadTokens"]
    for spelling in (name, name.replace("/", "\\")):
        assert load.validate_inputs(file=spelling) is True
        tokens = load.EXECUTE_NORMALIZED(file=spelling).result[0]
        assert torch.equal(tokens.tokens, TOKENS.tokens)


@pytest.mark.parametrize("name", ["clipspace/p.png [input]", "clipspace\\p.png [input]"])
def test_a_painted_mask_is_found_by_either_slash(nodes, name) -> None:
    file = Path(folder_paths.get_input_directory(), "clipspace", "p.png")
    file.parent.mkdir(exist_ok=True)
    Image.new("RGBA", (12, 8)).save(file)  # painted everywhere, as its alpha is 0
    show = nodes["GLMImageShowTokens"]
    assert show.validate_inputs(image=name) is True
    _, mask = show.EXECUTE_NORMALIZED(tokens=TOKENS, cell_size=4, image=name).result
    assert torch.equal(mask, torch.ones(1, 8, 12))


@pytest.mark.parametrize("name", [5, 0.5, True, [1], {"a": 1}, "\ud83d", "a\0b", "", "x" * 10**5])
def test_a_name_that_is_none_gets_a_sentence(nodes, name) -> None:
    sentence = nodes["GLMImageLoadTokens"].validate_inputs(file=name)
    assert sentence.endswith((". [GLM-FILE]", ". [GLM-INPUT]"))
    assert len(sentence) < 400
    sentence.encode("utf-8")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x", "..\\x.safetensors"])
def test_a_name_that_leads_out_of_the_input_folder(nodes, name) -> None:
    with pytest.raises(GLMImageError, match="lies outside the input folder"):
        nodes["GLMImageLoadTokens"].EXECUTE_NORMALIZED(file=name)
