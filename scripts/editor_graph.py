"""What graphs in the page's format share: the packs of their nodes, frames, notes."""

from .graph_layout import Frame

PACK_ID, CORE_ID = "glm-image-native", "comfy-core"  # in ComfyUI's registry
CONTROLS = ("fixed", "increment", "decrement", "randomize")  # of a seed, after each run
NOTE_WIDTH, NOTE_HEIGHT, GAP = 700, 290, 40
WINDOW = 1500, 700  # pixels that most windows have for a graph
CORNER = 90, 130  # of the window, right of and below the page's bars
TITLE = 30  # of a note, above its place


def name_packs(nodes: list[dict]) -> None:
    """Says in each node which pack it is of, and leaves its seed as it is after a run."""
    for node in nodes:
        ours = node["type"].startswith("GLMImage")
        node["properties"]["cnr_id"] = PACK_ID if ours else CORE_ID
        values = node.get("widgets_values", [])
        node["widgets_values"] = ["fixed" if value in CONTROLS else value for value in values]


def groups(frames: list[Frame]) -> list[dict]:
    return [
        {"id": i, "title": title, "bounding": box, "color": "#3f789e", "font_size": 24, "flags": {}}
        for i, (title, box) in enumerate(frames, 1)
    ]


def view(frames: list[Frame]) -> dict:
    """What of a graph with such frames is in sight when it is opened: all, on most screens.

    A graph that says nothing is fitted into view by the page. ComfyUI 0.3.75's does so while nodes
    that are elements report their places, and takes wrong ones for them.
    """
    (left, right), (top, bottom) = (
        (
            min(box[side] for _, box in frames),
            max(box[side] + box[side + 2] for _, box in frames),
        )
        for side in (0, 1)
    )
    top = min(top, -TITLE)
    scale = min(WINDOW[0] / (right - left), WINDOW[1] / (bottom - top))
    return {"scale": scale, "offset": [CORNER[0] / scale - left, CORNER[1] / scale - top]}


def note(node_id: int, left: float, title: str, text: str) -> dict:
    return {
        "id": node_id,
        "type": "MarkdownNote",
        "pos": [left, 0],
        "size": [NOTE_WIDTH, NOTE_HEIGHT],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": title,
        "properties": {},
        "widgets_values": [text],
    }
