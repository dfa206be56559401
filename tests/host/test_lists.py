"""Lists at the samplers: written one by one or together, with the same tokens."""

import comfy.utils
import pytest
import torch
from comfy_execution.graph_utils import ExecutionBlocker
from glm_image.glm_core.data.references import Reference, References
from glm_image.glm_core.errors import GLMImageError
from glm_image.nodes.host import ar as host_ar
from helpers import same, sampled

PROMPTS = ["a door", "a much longer text about a red door with 'PULL' on it", "the sea"]
MASK = torch.zeros(1, 19, 13)
MASK[:, 4] = 1


@pytest.fixture(scope="module")
def ar(nodes):
    return nodes["GLMImageLoadAR"].execute("small", "default").result[0]


@pytest.fixture(scope="module")
def layout(nodes, ar):
    """A layout of a 64x96 picture of which one row is not locked, so that lists are quick."""
    node = nodes["GLMImageSampleLayout"]
    (drawn,) = sampled(node, ar, "a wall", 64, 96, 1, 0.9, 0.75, 0, 1)
    return nodes["GLMImageLockLayout"].execute(drawn, "outside mask", 0, MASK).result[0]


@pytest.fixture
def write(nodes, ar, layout):
    """The lists that a sampler gives for lists of inputs."""

    def write(kind: str = "Tokens", **lists):
        one = {
            "ar": ar, "prompt": "a door", "width": 64, "height": 96, "seed": 5, "temperature": 0.9,
            "top_p": 0.75, "top_k": 0, "batch_size": 1, "layout": layout,
        }  # fmt: skip
        inputs = {name: [value] for name, value in one.items()} | lists
        return nodes[f"GLMImageSample{kind}"].execute(**inputs).result

    return write


def references(seed: int) -> References:
    tokens = torch.randint(64, (2, 2), generator=torch.Generator().manual_seed(seed)).int()
    image = Reference(tokens, torch.zeros(1, 16, 8, 8), torch.zeros(2, 2, 3), (64, 64))
    return References(((image,),), 64)


def alone(write, kind="Tokens", **lists):
    """The same entries, each in a list of its own."""
    count = max(map(len, lists.values()))
    entries = [
        {name: [values[min(i, len(values) - 1)]] for name, values in lists.items()}
        for i in range(count)
    ]
    return [[entry for (entry,) in write(kind, **one)] for one in entries]


def require_same(ours, expected) -> None:
    for (tokens, layout), (their_tokens, their_layout) in zip(
        zip(*ours, strict=True), expected, strict=True
    ):
        assert same(tokens.tokens, their_tokens.tokens)
        assert tokens.info == their_tokens.info
        assert same(layout.preview, their_layout.preview)
        assert same(layout.locked, their_layout.locked)


@pytest.mark.parametrize("rows", [1, 4])
def test_a_list_is_its_entries_one_by_one(write, rows):
    """A shorter list repeats its last entry, and no seed counts up. An entry may be a batch."""
    lists = {"prompt": PROMPTS, "seed": [5, 9], "batch_size": [1, 2]}
    require_same(write(rows=[rows], **lists), alone(write, **lists))


def test_entries_that_cannot_share_a_run_form_their_own(write, monkeypatch):
    runs, write_together = [], host_ar.write_together

    def spied(model, tokenizer, requests, rows, **how):
        runs.append(([request.prompt for request in requests], rows))
        return write_together(model, tokenizer, requests, rows, **how)

    monkeypatch.setattr(host_ar, "write_together", spied)
    lists = {"prompt": PROMPTS, "temperature": [0.9, 0.5, 0.9]}
    ours = write(rows=[2], **lists)
    assert runs == [([PROMPTS[0], PROMPTS[2]], 2), ([PROMPTS[1]], 2)]
    require_same(ours, alone(write, **lists))


def test_pictures_among_edits(write, layout):
    """The place of an edit in the list of layouts is blocked, and nothing else is."""
    lists = {
        "prompt": PROMPTS,
        "references": [None, references(1), references(2)],
        "layout": [layout, None, None],
    }
    tokens, layouts = write(rows=[3], **lists)
    for i, one in enumerate(alone(write, **lists)):
        assert same(tokens[i].tokens, one[0].tokens)
    assert [isinstance(one, ExecutionBlocker) for one in layouts] == [False, True, True]
    assert not same(tokens[1].tokens, tokens[2].tokens)


def test_layouts_of_a_list(write):
    ours = write("Layout", prompt=PROMPTS, rows=[2])[0]
    for mine, (theirs,) in zip(ours, alone(write, "Layout", prompt=PROMPTS), strict=True):
        assert same(mine.preview, theirs.preview)


def test_one_bar_shows_all_runs_and_an_interrupt_stops_them(write, monkeypatch):
    seen = []
    monkeypatch.setattr(
        comfy.utils, "PROGRESS_BAR_HOOK", lambda done, total, *_, **__: seen.append((done, total))
    )
    write(prompt=PROMPTS, rows=[2])
    assert {total for _, total in seen} == {2 * (13 + 6)}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1]

    class StoppedError(Exception):
        pass

    def stop():
        raise StoppedError

    monkeypatch.setattr(host_ar, "check_interrupt", stop)
    with pytest.raises(StoppedError):
        write(prompt=PROMPTS, rows=[2])


def test_fewer_rows_where_memory_is_short(write, ar, monkeypatch, caplog):
    rows, memory_required = [], ar.memory_required

    def spied(batch, length, block):
        rows.append(batch)
        return memory_required(batch, length, block)

    (two,) = memory_required(2, 512, 512).values()
    monkeypatch.setattr(ar, "memory_required", spied)
    monkeypatch.setattr(host_ar, "usable", lambda device: two)
    ours = write(prompt=PROMPTS, rows=[5])
    assert rows == [5, 4, 3, 2, 2, 2]
    assert "writes 2 samples in a run instead of 5" in caplog.text
    assert "set rows to 2" in caplog.text
    monkeypatch.undo()
    require_same(ours, alone(write, prompt=PROMPTS))


def test_an_empty_list_is_an_error(write):
    with pytest.raises(GLMImageError, match="prompt is an empty list; connect"):
        write(prompt=[])
