"""Where a graph's nodes stand: columns in the order of its links, in the frames of its stages.

Every link leads to the right. One to the next column crosses the free strip between the two; a
longer one runs through a lane above all nodes, from one reroute to the next. So no link passes
behind a node.
"""

from dataclasses import dataclass

STAGES = {
    "Models": (
        "GLMImageLoadCheckpoint",
        "GLMImageLoadAR",
        "GLMImageRemoteAR",
        "GLMImageLoadGlyphEncoder",
        "GLMImageLoadDecoder",
        "GLMImageLoadVAE",
    ),
    "Prompt": ("PrimitiveStringMultiline", "PrimitiveInt", "GLMImagePromptLines"),
    "Picture": ("LoadImage",),
    "Size": ("ImageScale", "ImageScaleBy", "ImagePadForOutpaint", "GetImageSize"),
    "Tiles": ("ImageCrop", "ImageBatch", "RebatchImages"),
    "Region": ("SolidMask", "MaskComposite", "FeatherMask", "GrowMask"),
    "References": ("GLMImageEncodeReference", "GLMImageReferenceCache"),
    "Layout": (
        "GLMImageEncodeTokens",
        "GLMImageSampleLayout",
        "GLMImageComposeLayouts",
        "GLMImageLockLayout",
        "GLMImageLayoutToTokens",
        "GLMImageShowTokens",
    ),
    "Semantic tokens": ("GLMImageSampleTokens",),
    "Text in the picture": ("GLMImageGlyphEncode",),
    "Diffusion decoder": (
        "GLMImageApplyTokens",
        "GLMImageModelSampling",
        "VAEEncode",
        "SetLatentNoiseMask",
        "GLMImageDecode",
        "KSampler",
    ),
    "Best of": ("GLMImageScoreTokens", "GLMImageReadText", "GLMImageKeepBest"),
    "Put together": ("ImageFromBatch", "ImageCompositeMasked"),
    "Result": ("VAEDecode", "PreviewImage", "SaveImage"),
}
SIZES = {
    "PrimitiveStringMultiline": (360, 140),
    "LoadImage": (320, 470),
    "GLMImageLockLayout": (400, 700),  # with the layouts on it
    "PreviewImage": (420, 480),
    "SaveImage": (420, 480),
}
EDITORS = ("GLMImageComposeLayouts", "GLMImageSampleTokens")
GRIDS = ("GLMImageSampleLayout", "GLMImageShowTokens", "GLMImageEncodeTokens", "GLMImageLoadTokens")
PREVIEWS = ("GLMImageDecode", "KSampler")
TABLES = ("GLMImageScoreTokens", "GLMImageReadText", "GLMImageKeepBest")
ROOM = {  # pixels under what a node shows below its widgets, while it runs or after it
    **dict.fromkeys(EDITORS, 560),
    **dict.fromkeys(GRIDS, 440),
    **dict.fromkeys(PREVIEWS + TABLES, 260),
}
REDRAWING_ROOM = 760  # of Sample Tokens with tokens: what it wrote, and the editor of its region
WIDTH, GRID_WIDTH = 270, 400
STRIP = 260  # between columns; a curve of 2500 pixels up or down stays within it
GAP, PADDING, TITLE = 90, 20, 70  # nodes are taller where the page draws them as elements
REROUTE = 45  # pixels between a column and the reroutes of its links
LANE = 24
LANES_GAP = 70  # between the lowest lane and the frames: the curves at a reroute dip a little
Place = tuple[int, int]
Frame = tuple[str, list[float]]


@dataclass(frozen=True)
class Columns:
    """The edges of the columns in pixels, and in which one a node stands."""

    of: dict[int, int]
    left: dict[int, float]
    right: dict[int, float]


def arrange(graph: dict, top: float) -> tuple[Columns, list[Frame], list[dict]]:
    """Places the nodes of a graph in the page's format, from the height `top` downwards.

    Returns its columns, its frames as titles with (left, top, width, height), and its reroutes.

    Raises:
        SystemExit: a node has no stage.
    """
    types = {node["type"] for node in graph["nodes"]}
    if missing := types - {type_ for stage in STAGES.values() for type_ in stage}:
        raise SystemExit(f"{', '.join(sorted(missing))} has no stage; add it to STAGES.")
    depths = _depths(graph)
    lanes = _lanes(graph, depths)
    first = top + LANE * len(set(lanes.values())) + LANES_GAP
    columns, frames = _place(graph["nodes"], depths, first + TITLE)
    return columns, frames, _reroutes(graph, columns, lanes, first - LANES_GAP)


def _stage(node: dict) -> int:
    return next(i for i, types in enumerate(STAGES.values()) if node["type"] in types)


def _depths(graph: dict) -> dict[int, int]:
    """Each node's column: loaders, inputs, and then one more than its deepest source.

    A node that needs loaders and inputs only stands just before the first that needs it.
    """
    sources: dict[int, set[int]] = {node["id"]: set() for node in graph["nodes"]}
    for _, origin, _, target, _, _ in graph["links"]:
        sources[target].add(origin)
    loaders = {node["id"] for node in graph["nodes"] if node["type"] in STAGES["Models"]}
    depths: dict[int, int] = {}

    def depth(node: int) -> int:
        if node not in depths:
            deepest = max(map(depth, sources[node]), default=0)
            depths[node] = 0 if node in loaders else max(1, deepest + 1)
            if sources[node]:
                depths[node] = max(2, depths[node])
        return depths[node]

    for node in sources:
        depth(node)
    for node, of in sources.items():
        if of and all(depths[source] <= 1 for source in of):
            users = [depths[user] for user, used in sources.items() if node in used]
            depths[node] = max([depths[node], *([min(users) - 1] if users else [])])
    return depths


def _place(nodes: list[dict], depths: dict[int, int], top: float) -> tuple[Columns, list[Frame]]:
    left, edges, runs = 0.0, {}, []
    for column in sorted(set(depths.values())):
        members = [node for node in nodes if depths[node["id"]] == column]
        members.sort(key=lambda node: (_stage(node), _rank(node), node["id"]))
        width = max(_size(node)[0] for node in members)
        y, before = top, None
        for node in members:
            stage = _stage(node)
            if before is not None and stage != before:
                y += TITLE - GAP + 2 * PADDING
            node["pos"], node["size"] = [left, y], [width, _size(node)[1]]
            bottom = y + node["size"][1] + _room(node)
            if stage == before:
                runs[-1]["bottom"] = bottom
            else:
                runs.append({"stage": stage, "columns": [column], "top": y, "bottom": bottom})
            y, before = bottom + GAP, stage
        edges[column] = (left, left + width)
        left += width + STRIP
    columns = Columns(
        depths,
        {column: ends[0] for column, ends in edges.items()},
        {column: ends[1] for column, ends in edges.items()},
    )
    return columns, _frames(runs, columns)


def _room(node: dict) -> float:
    redraws = node["type"] == "GLMImageSampleTokens" and any(
        slot["name"] == "tokens" and slot.get("link") is not None for slot in node["inputs"]
    )
    return REDRAWING_ROOM if redraws else ROOM.get(node["type"], 0)


def _rank(node: dict) -> int:
    return list(STAGES.values())[_stage(node)].index(node["type"])


def _size(node: dict) -> list[float]:
    if node["type"] in SIZES:
        return list(SIZES[node["type"]])
    width = GRID_WIDTH if node["type"] in EDITORS + GRIDS else WIDTH
    return [max(width, node["size"][0]), node["size"][1]]


def _frames(runs: list[dict], columns: Columns) -> list[Frame]:
    """A frame for each run of a stage in a column; the lowest ones end at one height."""
    bottom = max(run["bottom"] for run in runs)
    for run in runs:
        below = [other["top"] for other in runs if other["columns"] == run["columns"]]
        if run["top"] == max(below):
            run["bottom"] = bottom
    alone = [[run for run in runs if run["columns"] == [column]] for column in columns.left]
    merged: list[dict] = []
    for column in alone:
        before = merged[-1] if merged else None
        whole = len(column) == 1 and before and before["whole"]
        if whole and column[0]["stage"] == before["stage"]:
            before["columns"] += column[0]["columns"]
        else:
            merged += [run | {"whole": len(column) == 1} for run in column]
    return [
        (
            list(STAGES)[run["stage"]],
            [
                columns.left[run["columns"][0]] - PADDING,
                run["top"] - TITLE,
                columns.right[run["columns"][-1]] - columns.left[run["columns"][0]] + 2 * PADDING,
                run["bottom"] - run["top"] + TITLE + PADDING,
            ],
        )
        for run in merged
    ]


def _long(graph: dict, depths: dict[int, int]) -> dict[Place, list[list]]:
    """The links that skip a column, by the (node, output) where they begin."""
    outputs: dict[Place, list[list]] = {}
    for link in graph["links"]:
        _, origin, slot, target, _, _ = link
        if depths[target] - depths[origin] > 1:
            outputs.setdefault((origin, slot), []).append(link)
    return outputs


def _lanes(graph: dict, depths: dict[int, int]) -> dict[Place, int]:
    """The lane of each output's long links, counted upwards; short ones are below long ones."""
    spans = {
        output: (depths[output[0]], max(depths[link[3]] for link in links))
        for output, links in _long(graph, depths).items()
    }
    lanes: dict[Place, int] = {}
    for output, (start, end) in sorted(spans.items(), key=lambda item: item[1][1] - item[1][0]):
        taken = {
            lanes[other] for other in lanes if spans[other][0] < end and start < spans[other][1]
        }
        lanes[output] = next(lane for lane in range(len(spans)) if lane not in taken)
    return lanes


def _reroutes(graph: dict, columns: Columns, lanes: dict[Place, int], lowest: float) -> list[dict]:
    """One reroute where an output's links enter their lane, and one before each of its targets.

    Each names the one before it as its parent, and the links that pass through it.
    """
    reroutes: list[dict] = []
    for (origin, slot), links in _long(graph, columns.of).items():
        y = lowest - LANE * lanes[origin, slot]
        ends = sorted({columns.of[link[3]] for link in links})
        stops = [(columns.right[columns.of[origin]] + REROUTE, ends[0])]
        stops += [(columns.left[column] - REROUTE, column) for column in ends]
        for i, (x, column) in enumerate(stops):
            through = [link[0] for link in links if columns.of[link[3]] >= column]
            reroute = {"id": len(reroutes) + 1, "pos": [x, y], "linkIds": through}
            reroutes.append(reroute | ({"parentId": reroute["id"] - 1} if i else {}))
    return reroutes


def extensions(reroutes: list[dict]) -> list[dict]:
    """The last reroute of each link, as the page's format lists them."""
    last = {link: reroute["id"] for reroute in reroutes for link in reroute["linkIds"]}
    return [{"id": link, "parentId": reroute} for link, reroute in sorted(last.items())]
