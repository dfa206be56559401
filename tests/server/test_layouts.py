"""Layouts through a real server: sampled, locked, composed, saved, shown, used by samplers."""

import io
import itertools
import re

import pytest
import torch
from glm_image.glm_core.data.grids import preview_grid, token_grid
from glm_image.glm_core.data.token_file import load_tokens
from glm_image.scripts.client import PromptError
from PIL import Image

SIZES = {"512x768": (512, 768), "1024x1024": (1024, 1024), "strip": (1152, 384)}  # width, height
PROMPT = "two boats"
_seeds = itertools.count(10**6, 100)


def fresh_seed():
    """A seed that no node or image of a batch has used in this session."""
    return next(_seeds)


class Graph(dict):
    """A prompt of token nodes alone, on the small random model."""

    def __init__(self, size=(96, 64)):
        super().__init__()
        self.size = size
        self.ar = self.node("LoadAR", model_name="GLM-Image", weight_dtype="default")

    def node(self, name, **inputs):
        """Adds a node of the pack and returns its first output."""
        node_id = str(len(self) + 1)
        self[node_id] = {"class_type": f"GLMImage{name}", "inputs": inputs}
        return [node_id, 0]

    def core(self, class_type, **inputs):
        node_id = str(len(self) + 1)
        self[node_id] = {"class_type": class_type, "inputs": inputs}
        return [node_id, 0]

    def sample(self, what, seed, batch=1, prompt=PROMPT, temperature=0.9, **links):
        width, height = self.size
        return self.node(
            f"Sample{what}",
            ar=self.ar,
            prompt=prompt,
            width=width,
            height=height,
            seed=seed,
            temperature=temperature,
            top_p=0.75,
            top_k=0,
            batch_size=batch,
            **links,
        )

    def lock(self, layout, how="whole", index=-1, **links):
        return self.node("LockLayout", layout=layout, lock=how, batch_index=index, **links)

    def mask(self, *, left=None):
        """A mask of 96 columns: white, or white only to the left of a column (0: all black)."""
        white = self.core(
            "SolidMask", value=1.0, width=96 if left is None else left or 1, height=64
        )
        if left is None:
            return white
        black = self.core("SolidMask", value=0.0, width=96, height=64)
        if not left:
            return black
        placed = {"x": 0, "y": 0, "operation": "add"}
        return self.core("MaskComposite", destination=black, source=white, **placed)

    def save(self, tokens, **links):
        return self.node("SaveTokens", tokens=tokens, filename_prefix="layouts/test", **links)


def layout_of(tokens):
    """The layout output of Sample Tokens or Load Tokens."""
    return [tokens[0], 1]


@pytest.fixture
def saved(client, base):
    """Runs a graph and returns the tokens and layout that each given Save Tokens node wrote."""

    def run(graph, *savers, on_event=lambda event: None):
        outputs = client.run(graph, on_event).outputs
        found = []
        for node_id, _ in savers:
            (file,) = outputs[node_id]["tokens"]
            found.append(load_tokens(base / "output" / file["subfolder"] / file["filename"]))
        return found[0] if len(found) == 1 else found

    return run


@pytest.fixture
def refused_at(client):
    """Runs a graph that must fail at a node with a sentence, then one that must work."""

    def check(graph, node_id, sentence):
        with pytest.raises(PromptError, match=sentence) as refusal:
            client.run(graph)
        message = str(refusal.value)
        assert refusal.value.node_id == node_id, message
        assert "Traceback" not in message
        assert re.search(r"\.( \[GLM-[A-Z]+\])?\s*$", message)
        works = Graph()
        saver = works.save(works.sample("Tokens", fresh_seed()))
        assert saver[0] in client.run(works).outputs

    return check


# ---- meaning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 4])
def test_a_runs_own_layout_locked_gives_the_same_tokens(saved, size, batch):
    graph = Graph(SIZES[size])
    seed = fresh_seed()
    free = graph.sample("Tokens", seed, batch)
    locked = graph.sample("Tokens", seed, layout=graph.lock(layout_of(free)))
    (tokens, layout), (again, used) = saved(
        graph,
        graph.save(free, layout=layout_of(free)),
        graph.save(locked, layout=layout_of(locked)),
    )
    assert torch.equal(again.tokens, tokens.tokens)
    assert torch.equal(used.preview, layout.preview)
    assert used.locked.all()
    assert not layout.locked.any()
    assert len(tokens.tokens) == batch


def test_a_wholly_locked_run_draws_the_large_grid_alone(client):
    graph = Graph((1024, 1024))
    layout = graph.sample("Layout", fresh_seed())
    tokens = graph.sample("Tokens", fresh_seed(), layout=graph.lock(layout))
    graph.save(tokens)
    totals = {}

    def note(event):
        if event["type"] == "progress":
            totals[event["data"]["node"]] = (event["data"]["value"], event["data"]["max"])

    client.run(graph, note)
    assert totals == {layout[0]: (256, 256), tokens[0]: (1024, 1024)}


def test_locked_cells_survive_seed_temperature_and_prompt(saved):
    graph = Graph()
    first = graph.sample("Tokens", fresh_seed())
    locked = graph.lock(layout_of(first), "masked", mask=graph.mask(left=48))
    others = [
        graph.sample("Tokens", fresh_seed(), layout=locked, **changes)
        for changes in ({}, {}, {"temperature": 3.0}, {"prompt": "a green door"})
    ]
    savers = [graph.save(tokens, layout=layout_of(tokens)) for tokens in (first, *others)]
    (_, before), *after = saved(graph, *savers)
    columns = preview_grid(token_grid(64, 96))[1]
    cells = (torch.arange(columns) < (columns + 1) // 2).expand_as(before.locked)
    drawn = []
    for _, layout in after:
        assert torch.equal(layout.locked, cells)
        assert torch.equal(layout.preview[:, cells], before.preview[:, cells])
        drawn.append(layout.preview[:, ~cells])
    assert not torch.equal(drawn[0], drawn[1])


def test_a_batch_of_layouts_is_one_image_each(saved):
    graph = Graph()
    seed = fresh_seed()
    layouts = graph.sample("Layout", fresh_seed(), 3)
    together = graph.sample("Tokens", seed, layout=graph.lock(layouts))
    alone = graph.sample("Tokens", seed + 2, layout=graph.lock(layouts, index=2))
    twice = graph.sample("Tokens", seed, 2, layout=graph.lock(layouts))
    savers = [graph.save(tokens, layout=layout_of(tokens)) for tokens in (together, alone, twice)]
    (three, layout), (third, _), (six, layout_of_six) = saved(graph, *savers)
    assert len(three.tokens) == 3
    assert torch.equal(three.tokens[2:], third.tokens)
    assert torch.equal(six.tokens[:3], three.tokens)
    assert torch.equal(layout_of_six.preview, layout.preview.repeat(2, 1, 1))
    assert not torch.equal(six.tokens[3:], three.tokens)


def test_locking_after_composing_keeps_the_union_of_locks(saved):
    graph = Graph()
    left, right = (graph.sample("Tokens", fresh_seed()) for _ in range(2))
    base = graph.lock(layout_of(left), "masked", mask=graph.mask(left=32))
    source = graph.lock(layout_of(right), "masked", mask=graph.mask(left=16))
    composed = graph.node("ComposeLayouts", base=base, source=source, row=0, column=10)
    union = graph.lock(composed, "outside mask", mask=graph.mask(left=80))
    savers = [graph.save(left, layout=union), graph.save(right, layout=layout_of(right))]
    (_, made), (_, other) = saved(graph, *savers)
    columns = made.locked.shape[1]
    assert columns == 19
    locked = torch.zeros(columns, dtype=torch.bool)
    locked[:6] = locked[10:13] = locked[16:] = True
    assert torch.equal(made.locked, locked.expand_as(made.locked))
    assert torch.equal(made.preview[:, :, 10:], other.preview[:, :, : columns - 10])


def test_tokens_of_two_pictures_are_composed(saved, refused_at):
    """They go on as tokens from Layout To Tokens alone."""
    graph = Graph()
    base, source = (graph.sample("Tokens", fresh_seed()) for _ in range(2))
    composed = graph.node("ComposeLayouts", base=base, source=source, row=0, column=1, cells="0:0")
    tokens = graph.node("LayoutToTokens", layout=composed)
    (made, _), (old, _), (new, _) = saved(graph, *map(graph.save, (tokens, base, source)))
    wanted = old.tokens.clone()
    wanted[:, 0, 1] = new.tokens[:, 0, 0]
    assert torch.equal(made.tokens, wanted)
    refused_at(graph, graph.lock(composed)[0], "SemanticTokens and not a layout")


@pytest.mark.parametrize(("how", "left", "share"), [
    ("masked", 0, 0), ("masked", None, 1), ("outside mask", 0, 1), ("outside mask", None, 0),
    ("whole", 0, 1), ("none", None, 0),
])  # fmt: skip
def test_masks_all_black_and_all_white(saved, how, left, share):
    graph = Graph()
    tokens = graph.sample("Tokens", 1)
    _, layout = saved(
        graph,
        graph.save(tokens, layout=graph.lock(layout_of(tokens), how, mask=graph.mask(left=left))),
    )
    assert layout.locked.float().mean() == share


def test_a_region_of_tokens_is_drawn_anew_and_the_rest_is_kept(saved):
    graph = Graph((256, 256))
    seed = fresh_seed()
    first = graph.sample("Tokens", seed)
    links = {"tokens": first, "layout": graph.lock(layout_of(first))}
    redone, none, whole = (
        graph.sample("Tokens", seed + 1, mask=graph.mask(left=left), **links)
        for left in (48, 0, None)
    )
    by_cells = graph.sample("Tokens", seed + 1, cells="0-7:0-3", **links)
    savers = [graph.save(tokens) for tokens in (first, redone, none, whole, by_cells)]
    before, after, unchanged, all_new, named = (
        tokens.tokens for tokens, _ in saved(graph, *savers)
    )
    assert torch.equal(after[:, :, 4:], before[:, :, 4:])
    assert torch.equal(named, after)
    assert (after != before)[:, :, :4].float().mean() > 0.3
    assert torch.equal(unchanged, before)
    assert (all_new != before).float().mean() > 0.3


def test_layouts_and_locks_go_through_a_file(saved, base):
    graph = Graph()
    tokens = graph.sample("Tokens", fresh_seed(), 2)
    locked = graph.lock(layout_of(tokens), "masked", mask=graph.mask(left=48))
    before, layout = saved(graph, graph.save(tokens, layout=locked))
    newest = max(
        (base / "output" / "layouts").glob("*.safetensors"), key=lambda f: f.stat().st_mtime
    )
    again = Graph()
    loaded = again.node("LoadTokens", file=f"layouts/{newest.name} [output]")
    shared = again.sample("Tokens", fresh_seed(), layout=layout_of(loaded))
    (same, same_layout), (_, used) = saved(
        again,
        again.save(loaded, layout=layout_of(loaded)),
        again.save(shared, layout=layout_of(shared)),
    )
    assert torch.equal(same.tokens, before.tokens)
    assert torch.equal(same_layout.preview, layout.preview)
    assert torch.equal(same_layout.locked, layout.locked)
    cells = layout.locked
    assert torch.equal(used.preview[:, cells], layout.preview[:, cells])
    assert not torch.equal(used.preview, layout.preview)


def test_layouts_of_a_list_lock_the_tokens_of_a_list(client, base):
    """They go through Lock Layout, which takes them one by one."""
    graph = Graph()
    seed = fresh_seed()
    lines = graph.node("PromptLines", text="a red door\na longer text", split="lines")
    layouts = graph.sample("Layout", seed, prompt=lines, rows=2)
    tokens = graph.sample("Tokens", seed, prompt=lines, layout=graph.lock(layouts), rows=2)
    free = graph.sample("Tokens", seed, prompt=lines)
    savers = [graph.save(one, layout=layout_of(one)) for one in (tokens, free)]
    outputs = client.run(graph).outputs
    locked, drawn = (
        [load_tokens(base / "output" / "layouts" / file["filename"])[0].tokens for file in files]
        for files in (outputs[saver]["tokens"] for saver, _ in savers)
    )
    assert len(locked) == 2
    assert all(torch.equal(*pair) for pair in zip(locked, drawn, strict=True))
    assert not torch.equal(*locked)


# ---- painted masks ------------------------------------------------------------------------------


@pytest.fixture
def painting(client, base):
    """A shown layout, and a file as the page's mask editor makes it of the picture shown.

    The file is the picture with the alpha 1 - mask; the right half is painted.
    """
    graph = Graph()
    layout = graph.sample("Layout", fresh_seed())
    shown = graph.node("ShowTokens", layout=layout, cell_size=8)
    (picture,) = client.images(client.run(graph), shown[0])
    image = Image.open(io.BytesIO(picture)).convert("RGBA")
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (image.width // 2, 0, image.width, image.height))
    image.putalpha(alpha)
    folder = base / "input" / "clipspace"
    folder.mkdir(exist_ok=True)
    file = folder / f"clipspace-painted-masked-{fresh_seed()}.png"
    image.save(file)
    graph[shown[0]]["inputs"]["image"] = f"clipspace/{file.name} [input]"
    return graph, layout, shown, file


def test_a_painted_mask_reaches_the_graph(client, saved, painting):
    graph, layout, shown, file = painting
    tokens = graph.node("LayoutToTokens", layout=layout)
    locked = graph.lock(layout, "masked", mask=[shown[0], 1])
    saver = graph.save(tokens, layout=locked)
    _, found = saved(graph, saver)
    columns = found.locked.shape[1]
    half = torch.arange(columns) >= columns // 2
    assert torch.equal(found.locked, half.expand_as(found.locked))

    image = Image.open(file)
    image.putalpha(255)
    image.save(file)  # painted over: another content under the same name
    _, found = saved(graph, saver)
    assert not found.locked.any()
    del graph[shown[0]]["inputs"]["image"]
    _, found = saved(graph, saver)  # nothing is painted
    assert not found.locked.any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"cell_size": 16}, "painted on a picture of 152x104 pixels, and this one has 304x208"),
        ({"image": "clipspace/gone.png [input]"}, "no painted mask 'clipspace/gone.png .input.'"),
        ({"image": "../server.log"}, "lies outside the input folder"),
        ({"image": "dead.safetensors"}, "no painted mask"),
        ({"image": "no_picture.png [input]"}, "cannot be read as a picture"),
    ],
)
def test_what_is_no_mask_of_the_picture_is_refused(refused_at, painting, base, change, sentence):
    graph, _, shown, _ = painting
    (base / "input" / "no_picture.png").write_text("no picture")
    graph[shown[0]]["inputs"] |= change
    refused_at(graph, shown[0], sentence)


# ---- errors -----------------------------------------------------------------------------------


def _does_not_fit(graph):
    other = Graph((512, 512)).size
    layout = graph.sample("Layout", 1)
    graph[layout[0]]["inputs"] |= dict(zip(("width", "height"), other, strict=True))
    return graph.sample("Tokens", 1, layout=layout), r"16x16 cells .*96x64.* 13x19. Use 512x512, "


def _other_codebook(graph):
    ar = graph.node("LoadAR", model_name="Wide", weight_dtype="default")
    layout = graph.sample("Layout", 1)
    graph[layout[0]]["inputs"]["ar"] = ar
    return graph.sample("Tokens", 1, layout=layout), "layout is 96 and the AR model's 64"


def _mask_alone(graph):
    return graph.sample("Tokens", 1, mask=graph.mask()), "mask is connected and tokens are not"


def _cells_outside_the_grid(graph):
    first = graph.sample("Tokens", 1)
    redone = graph.sample("Tokens", 1, tokens=first, cells="0-1:3")
    return redone, "names column 3, but the grid has the columns 0 to 2"


def _tokens_of_another_size(graph):
    tokens = graph.sample("Tokens", 1)
    graph[tokens[0]]["inputs"]["width"] = 128
    redone = graph.sample("Tokens", 1, tokens=tokens, mask=graph.mask())
    return redone, "images of 128x64 pixels, but 96x64"


def _no_such_layout(graph):
    layouts = graph.sample("Layout", 1, 2)
    return graph.lock(layouts, index=2), "batch_index is 2 and there are 2 layouts; use 0 to 1"


def _no_mask(graph):
    return graph.lock(graph.sample("Layout", 1), "outside mask"), "connect a mask"


def _unknown_lock(graph):
    return graph.lock(graph.sample("Layout", 1), "half"), "lock is 'half'; choose one of whole"


def _composed_outside(graph):
    base, source = (graph.sample("Layout", seed) for seed in (1, 2))
    links = {"base": base, "source": source}
    return graph.node("ComposeLayouts", row=13, column=0, **links), "At row 13 .* use -12 to 12"


@pytest.mark.parametrize(
    "spoil",
    [
        _does_not_fit,
        _other_codebook,
        _mask_alone,
        _cells_outside_the_grid,
        _tokens_of_another_size,
        _no_such_layout,
        _no_mask,
        _unknown_lock,
        _composed_outside,
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(refused_at, spoil):
    graph = Graph()
    node, sentence = spoil(graph)
    if graph[node[0]]["class_type"] == "GLMImageSampleTokens":
        node_tokens = node
    else:
        node_tokens = graph.sample("Tokens", 1, layout=node)
    graph.save(node_tokens)
    refused_at(graph, node[0], sentence)


def test_nothing_to_show(refused_at):
    graph = Graph()
    shown = graph.node("ShowTokens", cell_size=16)
    graph.core("PreviewImage", images=shown)
    refused_at(graph, shown[0], "either tokens or a layout")
