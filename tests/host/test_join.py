"""Join Tokens, Cells To Mask and Prompt Lines, called as ComfyUI calls them."""

from dataclasses import replace

import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from glm_image.glm_core.data.layout import mask_to_grid
from glm_image.glm_core.data.tokens import Layout, SemanticTokens
from glm_image.glm_core.errors import GLMImageError


@pytest.fixture(scope="module")
def run(nodes):
    return lambda name, **inputs: nodes[f"GLMImage{name}"].execute(**inputs).result


def tokens(*ids: int, width: int = 96) -> SemanticTokens:
    grids = torch.tensor(ids, dtype=torch.int32)[:, None, None].expand(-1, 2, width // 32)
    return SemanticTokens(grids.contiguous(), 64, 64, width, {"prompt": "a", "seed": 10})


def layout(*ids: int) -> Layout:
    preview = torch.tensor(ids, dtype=torch.int32)[:, None, None].expand(-1, 16, 16)
    return Layout(preview.contiguous(), torch.zeros(16, 16, dtype=torch.bool), 64, 1024, 1024)


def test_batches_are_joined_in_order(run) -> None:
    joined, above = run(
        "JoinTokens", indices="", tokens_2=tokens(3), tokens_1=tokens(1, 2), layout_5=layout(4)
    )
    assert joined.tokens[:, 0, 0].tolist() == [1, 2, 3]
    assert joined.info == {"prompt": "a", "seeds": [10, 11, 10]}
    assert above.preview[:, 0, 0].tolist() == [4]


def test_joined_images_keep_what_is_known_of_each(run) -> None:
    first, second = (replace(tokens(1), info={"seed": 5, "forced": text}) for text in ("0:0", ""))
    (joined, _), equal = run("JoinTokens", indices="", tokens_1=first, tokens_2=second), [5, 5]
    assert joined.info == {"seeds": equal, "forced": ["0:0", ""]}
    for i, text in enumerate(("0:0", "")):
        one, _ = run("JoinTokens", indices=str(i), tokens_1=joined)
        assert one.info == {"seed": 5, "forced": text}
    turned, _ = run("JoinTokens", indices="2,0", tokens_1=tokens(0, 1, 2))
    assert turned.numbers == (2, 0)
    assert turned.info["seeds"] == [12, 10]
    again, _ = run("JoinTokens", indices="1", tokens_1=turned)
    assert (again.numbers, again.info["seed"]) == ((0,), 10)
    assert joined.numbers is None  # of two batches
    mixed, _ = run("JoinTokens", indices="1,2", tokens_1=tokens(0, 1), tokens_2=tokens(2, 3))
    assert mixed.numbers is None
    assert again.root == turned.root == tokens(0, 1, 2).root != mixed.root


def test_indices_pick_in_their_order(run) -> None:
    five = tokens(0, 1, 2, 3, 4)
    assert run("JoinTokens", indices="3, 0-1", tokens_1=five)[0].tokens[:, 0, 0].tolist() == [
        3, 0, 1
    ]  # fmt: skip
    one, nothing = run("JoinTokens", indices="2", tokens_1=five)
    assert one.info["seed"] == 12
    assert isinstance(nothing, ExecutionBlocker)


@pytest.mark.parametrize(
    ("inputs", "sentence"),
    [
        ({}, "nothing to join"),
        (
            {"tokens_1": tokens(1), "tokens_2": tokens(1, width=128)},
            "96x64 with .* codes, 128x64 with",
        ),
        ({"tokens_1": tokens(1), "indices": "1"}, "indices names 1, and there are 1"),
        ({"tokens_1": tokens(1), "indices": "2-0"}, "write 0-2"),
        ({"tokens_1": tokens(1), "indices": "a"}, "the entry 'a'"),
        ({"tokens_1": "x"}, 'tokens_1 is "x" and not semantic tokens'),
    ],
)
def test_what_cannot_be_joined(run, inputs, sentence) -> None:
    with pytest.raises(GLMImageError, match=sentence):
        run("JoinTokens", **{"indices": "", **inputs})


def test_cells_of_a_grid_are_pixels(run) -> None:
    (mask,) = run("CellsToMask", cells="1:0-1", width=96, height=64)
    wanted = torch.zeros(1, 64, 96)
    wanted[:, 32:, :64] = 1
    assert torch.equal(mask, wanted)
    assert torch.equal(
        run("CellsToMask", cells="1:0-1", width=0, height=0, tokens=tokens(1))[0], mask
    )


def test_cells_of_a_layout_come_back_from_their_mask(run) -> None:
    (mask,) = run("CellsToMask", cells="0-7:0-3; 9:2", width=0, height=0, layout=layout(1))
    assert mask.shape == (1, 1024, 1024)
    cells = mask_to_grid(mask, (16, 16))
    assert cells.sum() == 33
    assert cells[9, 2]


def test_a_mask_needs_a_size_and_one_grid(run) -> None:
    with pytest.raises(GLMImageError, match="The mask's size is 96x0"):
        run("CellsToMask", cells="*", width=96, height=0)
    with pytest.raises(GLMImageError, match="connect a layout or tokens"):
        run("CellsToMask", cells="*", width=0, height=0, layout=layout(1), tokens=tokens(1))


def test_a_text_becomes_a_list(run) -> None:
    assert run("PromptLines", text=" a cat \n\n a dog\n", split="lines")[0] == ["a cat", "a dog"]
    blocks = run("PromptLines", text="a cat\non a mat\n \n\na dog", split="blocks")[0]
    assert blocks == ["a cat\non a mat", "a dog"]
    with pytest.raises(GLMImageError, match="holds no prompt"):
        run("PromptLines", text=" \n", split="lines")
