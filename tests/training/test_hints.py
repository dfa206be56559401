"""The decoder's first blocks start with their neighbours and texts; cells get their characters."""

import numpy as np
import pytest
import torch
from diffusers import GlmImageTransformer2DModel
from diffusers.models.transformers.transformer_glm_image import GlmImageRotaryPosEmbed

from training.codes import SLOTS, cells
from training.decoder import HEAD_DIM, HEADS, characters_of
from training.glyphs import CHARACTERS
from training.hints import init_neighbour_heads, init_text_lookup
from training.scene import Scene, Text

SIDE = 32  # patches, as in a picture of 512 pixels


def small_decoder() -> GlmImageTransformer2DModel:
    torch.manual_seed(0)
    return GlmImageTransformer2DModel(
        num_layers=2, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS, text_embed_dim=8,
        time_embed_dim=8, condition_dim=8, prior_vq_quantizer_codebook_size=8,
    )  # fmt: skip


def positions() -> tuple[torch.Tensor, torch.Tensor]:
    return GlmImageRotaryPosEmbed(HEAD_DIM, 2)(torch.empty(1, 1, 2 * SIDE, 2 * SIDE))


@pytest.mark.parametrize(("block", "neighbours"), [(0, [(9, 8), (9, 10)]), (1, [(8, 9), (10, 9)])])
def test_a_patch_changes_its_neighbours_most(block, neighbours) -> None:
    network = small_decoder()
    init_neighbour_heads(network)
    attention = network.transformer_blocks[block].attn1
    states = torch.randn(1, SIDE * SIDE, HEADS * HEAD_DIM)
    marked = states.clone()
    marked[0, 9 * SIDE + 9] += 3
    rope = positions()
    with torch.no_grad():
        plain, changed = (
            attention(one, states[:, :0], image_rotary_emb=rope)[0] for one in (states, marked)
        )
    moved = (plain - changed).norm(dim=-1).view(SIDE, SIDE)
    most_moved = moved.flatten().topk(2).indices.tolist()
    assert sorted(divmod(index, SIDE) for index in most_moved) == neighbours


def test_a_patch_attends_to_the_byte_of_its_slot() -> None:
    """At every position, and with noisy states."""
    block = small_decoder().transformer_blocks[0]
    width = HEADS * HEAD_DIM
    of_cells, of_bytes = torch.randn(2, len(SLOTS) + 1, width) / 2
    cell_slots, byte_slots = torch.randint(-1, len(SLOTS), (2, 4000))
    image, text = of_cells[cell_slots], of_bytes[byte_slots]
    image, text = (states + torch.randn(4000, width) / 4 for states in (image, text))
    init_text_lookup(block, image, cell_slots, text, byte_slots)
    cell_slots = torch.randint(-1, len(SLOTS), (SIDE * SIDE,))
    byte_slots = torch.randperm(len(SLOTS))
    image = of_cells[cell_slots] + torch.randn(SIDE * SIDE, width) / 4
    text = of_bytes[byte_slots] + torch.randn(len(SLOTS), width) / 4
    moved = []
    with torch.no_grad():
        for i in range(len(SLOTS)):
            louder = text.clone()
            louder[i] += 1 / 4
            both = [
                block.attn1(image[None], one[None], image_rotary_emb=positions())[0]
                for one in (text, louder)
            ]
            moved.append((both[0] - both[1]).norm(dim=-1)[0])
    found = byte_slots[torch.stack(moved).argmax(0)]
    assert (found == cell_slots)[cell_slots >= 0].float().mean() > 0.95


def test_every_cell_of_a_text_has_its_character() -> None:
    texts = (Text("HELLO", "bottom"), Text("春天", "top"))
    scene = Scene(512, 512, "yellow", (), texts)
    found = characters_of(scene, torch.from_numpy(cells(scene))).numpy()
    expected = np.full((16, 16), -1)
    for text in texts:
        row, column = scene.text_origin(text)
        for i, character in enumerate(text.content):
            left = column + 2 * i
            expected[row : row + 2, left : left + 2] = CHARACTERS.index(character)
    np.testing.assert_array_equal(found, expected)
