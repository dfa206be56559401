"""`make workflows`: draws the editor's graphs from the API prompts.

`workflows/api/NAME.json` is the source. ComfyUI's page opens it, and this module gives every stage
a column and a frame. The page then opens the result and exports it; if the export is the same
prompt, the graph is written to `workflows/NAME.json`. A workflow that `make pictures` does not run
gets a picture of its graph, `workflows/NAME.jpg`. `ARGS="NAME ..."` draws only those.
"""

import json
import sys
import tempfile
import uuid
from pathlib import Path

from . import environment, host
from .client import Prompt
from .page import Page, open_page
from .pictures import PROMPTS

FOLDER = environment.ROOT / "workflows"

STAGES = {
    "Models": (
        "GLMImageLoadAR",
        "GLMImageLoadGlyphEncoder",
        "GLMImageLoadDecoder",
        "GLMImageLoadVAE",
    ),
    "Prompt": ("PrimitiveStringMultiline", "GLMImageGlyphEncode"),
    "References": ("LoadImage", "GLMImageEncodeReference", "GLMImageReferenceCache"),
    "Tiles": ("ImageScaleBy", "GetImageSize", "ImageCrop", "ImageBatch", "RebatchImages"),
    "Region": ("SolidMask", "MaskComposite", "FeatherMask"),
    "Layout": (
        "GLMImageEncodeTokens",
        "GLMImageSampleLayout",
        "GLMImageComposeLayouts",
        "GLMImageLockLayout",
        "GLMImageShowTokens",
    ),
    "Semantic tokens": ("GLMImageSampleTokens", "GLMImageLayoutToTokens", "GLMImageApplyTokens"),
    "Diffusion decoder": (
        "GLMImageModelSampling",
        "VAEEncode",
        "SetLatentNoiseMask",
        "GLMImageDecode",
        "KSampler",
    ),
    "Joined tiles": ("ImageFromBatch", "ImageCompositeMasked"),
    "Picture": ("VAEDecode", "PreviewImage", "SaveImage"),
}
SIZES = {
    "PrimitiveStringMultiline": (380, 180),
    "LoadImage": (320, 400),
    "PreviewImage": (420, 470),
    "SaveImage": (420, 470),
}
WIDTH = 320
GAP, PADDING, TITLE = 60, 20, 70
NOTE_HEIGHT = 190

NOTES = {
    "text_to_image": """\
# GLM-Image: text to image
Put a snapshot of the model into `models/glm_image/GLM-Image` and choose it in the four loaders.

1. **Sample Tokens** writes the picture's layout and content as tokens; its seed changes both.
2. **Glyph Encode** reads the words in quotes, so that they are spelled right.
3. **Decode** paints the tokens. Its seed changes only the details, and only it runs again.
""",
    "text_to_image_ksampler": """\
# GLM-Image: text to image with KSampler
The decoder is an ordinary MODEL, so any sampler, scheduler, LoRA or model node fits.

**Model Sampling** gives it the noise levels of the picture's size; without it they are those \
of 1024 x 1024.
""",
    "text_to_image_chinese": """\
# GLM-Image：中文提示词
提示词可以是中文。引号（“……”或「……」）里的文字由 **字形编码** 逐字节读取，画到图里；\
其余部分只由 **采样语义 token** 读取。

1. **采样语义 token** 写出布局和内容，它的种子改变两者。
2. **字形编码** 的第二个输出列出找到的文字。
3. **解码** 的种子只改变细节。
""",
    "layout_contact_sheet": """\
# GLM-Image: eight layouts to choose from
**Sample Layout** writes only the previews, all eight in little more than one's time. **Show \
Tokens** draws them as squares, **Layout To Tokens** lets the decoder paint each as a small picture.

Layout *i* of the sheet, counted row by row from 0, is the one that seed + *i* gives: take that \
seed, or **Lock Layout** with `batch_index` *i*, to the large picture.
""",
    "lock_layout_change_prompt": """\
# GLM-Image: another picture with the same layout
**Lock Layout** holds the layout of the first prompt; **Sample Tokens** writes the new prompt \
around it and spends no time on what is locked. Change the new prompt, its seed, the decoder or a \
LoRA: the composition stays.
""",
    "lock_region_resample_rest": """\
# GLM-Image: keep a part of a layout, choose the rest
What the region covers is locked and stays; four layouts are drawn around it. Look at them, set \
`batch_index` in **Choose one**, and the picture is written with it.

Any mask will do, of any size: paint one in the mask editor of Load Image.
""",
    "compose_two_layouts": """\
# GLM-Image: one layout out of two
**Compose Layouts** pastes the source into the base, 8 cells to the right of its place; a mask \
pastes a part. **Lock Layout** holds the result, and a third prompt describes the whole.
""",
    "redo_region": """\
# GLM-Image: redo a region of a finished picture
One mask in three places: **Lock Layout** holds the layout outside of it, **Sample Tokens** keeps \
the tokens outside of it, **Set Latent Noise Mask** keeps the pixels. Inside, the new prompt is \
written and painted anew. For a mask of your own use the mask editor of Load Image.
""",
    "layout_from_sketch": """\
# GLM-Image: keep a drawing's composition
**Encode Tokens** reads a photo or a sketch as semantic tokens and as a layout, cropped to the \
asked aspect. **Lock Layout** holds it, and **Sample Tokens** writes the prompt's picture on it. \
A mask on Lock Layout holds a part of it only.
""",
    "upscale_in_tiles": """\
# GLM-Image: a larger picture, painted in tiles
The first picture is scaled up and cut into four tiles of its own size, which overlap by a \
quarter. **Encode Tokens** gives each tile tokens of its own: those of the first picture would \
paint the whole scene into every tile. The tiles are painted one by one, in the memory of one.

**Scale up** by less than 2, or the tiles leave a gap. For a picture of your own put Load Image in \
the place of the first VAE Decode; its sides must be multiples of 32. `denoise` says how much is \
painted anew.
""",
    "edit_image": """\
# GLM-Image: edit a picture
**Encode Reference** brings the picture to a size that both stages read and gives that size to \
**Sample Tokens**. **Reference Cache** runs the decoder over it once; it is exact for every prompt \
and seed, so only the first run pays for it.
""",
    "style_transfer": """\
# GLM-Image: another picture's style
The reference gives the style, the prompt the content, and Sample Tokens the size. Change the \
prompt or a seed: the reference is neither encoded nor cached again.
""",
    "two_references": """\
# GLM-Image: several references
Each **Encode Reference** adds its picture to the chain, and the prompt speaks of them in that \
order. One **Reference Cache** holds them all; `fp8` halves its memory, `cpu` streams it.
""",
}


def main(names: list[str]) -> None:
    files = [FOLDER / "api" / f"{name}.json" for name in names]
    with tempfile.TemporaryDirectory() as folder:
        base = host.make_base(Path(folder))
        with host.serve(environment.host(), base) as address, open_page(address) as page:
            for file in files or sorted((FOLDER / "api").glob("*.json")):
                write_workflow(page, file)


def write_workflow(page: Page, file: Path) -> None:
    prompt = json.loads(file.read_text())
    page.open_api(prompt, file.stem)
    graph = arrange(page.serialize(), prompt, file.stem)
    page.open_file(json.dumps(graph), file.name)
    if page.export_prompt() != prompt:
        raise SystemExit(f"{file}: its graph exports another prompt; compare the nodes' inputs.")
    (FOLDER / file.name).write_text(json.dumps(graph, indent=2) + "\n")
    if file.stem not in PROMPTS:
        page.picture(FOLDER / f"{file.stem}.jpg")


def arrange(graph: dict, prompt: Prompt, name: str) -> dict:
    """The graph with each stage in a framed column and the note above them."""
    top = NOTE_HEIGHT + GAP + TITLE
    nodes, groups, left = [], [], 0
    for title, types in STAGES.items():
        y, width = top, 0
        column = [node for type_ in types for node in graph["nodes"] if node["type"] == type_]
        if not column:
            continue
        for node in column:
            node["size"] = _size(node)
            node["pos"] = [left + PADDING, y]
            width = max(width, node["size"][0])
            y += node["size"][1] + GAP
        for node in column:
            node["size"][0] = width
            if "randomize" in node.get("widgets_values", ()):
                values = node["widgets_values"]
                values[values.index("randomize")] = "fixed"
        nodes += column
        frame = [left, top - TITLE, width + 2 * PADDING, y - GAP + PADDING - top + TITLE]
        group = {"id": len(groups) + 1, "title": title, "bounding": frame}
        groups.append(group | {"color": "#3f789e", "font_size": 24, "flags": {}})
        left += width + 2 * PADDING + GAP // 2
    if left_out := {node["type"] for node in graph["nodes"]} - {node["type"] for node in nodes}:
        raise SystemExit(f"{name}: {', '.join(sorted(left_out))} has no stage; add it to STAGES.")
    note = _note(graph["last_node_id"] + 1, NOTES[name])
    return graph | {
        "id": str(uuid.uuid5(uuid.NAMESPACE_URL, f"glm-image/{name}")),
        "last_node_id": note["id"],
        "nodes": [*sorted(nodes, key=lambda node: node["id"]), note],
        "groups": groups,
        "extra": {},
    }


def _size(node: dict) -> list[float]:
    if node["type"] in SIZES:
        return list(SIZES[node["type"]])
    return [max(WIDTH, node["size"][0]), node["size"][1]]


def _note(node_id: int, text: str) -> dict:
    return {
        "id": node_id,
        "type": "MarkdownNote",
        "pos": [0, 0],
        "size": [760, NOTE_HEIGHT],
        "flags": {},
        "order": 0,
        "mode": 0,
        "inputs": [],
        "outputs": [],
        "title": "About this graph",
        "properties": {},
        "widgets_values": [text],
    }


if __name__ == "__main__":
    main(sys.argv[1:])
