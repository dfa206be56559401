"""What each workflow is called, its note, and what the tiny model is asked in it.

The order teaches: each workflow needs only what those before it showed.
"""

from dataclasses import dataclass, field
from pathlib import Path

from . import environment
from .demo import TINY_PROMPT

FOLDER = environment.ROOT / "workflows"


@dataclass(frozen=True)
class Workflow:
    """The texts of the graph of `workflows/api/NAME.json`.

    Args:
        note: Markdown that stands in the graph.
        tiny: by the title of their nodes, the prompts for the model `tiny/`.
        suits_tiny: whether `tiny/` does what they ask. If not, `make serve` leaves the graph out.
    """

    title: str
    note: str
    tiny: dict[str, str] = field(default_factory=dict)
    suits_tiny: bool = True


MODEL_NOTE = """\
# The model
[zai-org/GLM-Image](https://huggingface.co/zai-org/GLM-Image), 36 GB; in the folder that holds \
ComfyUI:

`hf download zai-org/GLM-Image --local-dir ComfyUI/models/glm_image/GLM-Image`
```
ComfyUI/models/glm_image/GLM-Image/
    vision_language_encoder/  20.2 GB  AR model
    processor/                         its tokenizer
    transformer/              13.9 GB  decoder
    scheduler/                         its schedule
    text_encoder/              0.9 GB  glyph encoder
    vae/                       0.8 GB  VAE
```
"""

WORKFLOWS = {
    "text_to_image": Workflow(
        "Text to image",
        """\
# GLM-Image: text to image
Write the **Prompt**, set size and seed on **Sample Tokens**, run.

1. **Sample Tokens** writes the picture's layout and content as tokens; its seed changes both.
2. **Glyph Encode** reads the words in quotes, so that they are spelled right.
3. **Decode** paints the tokens. Its own seed changes only the details, and only it runs again.
""",
        {"Prompt": TINY_PROMPT},
    ),
    "text_to_image_ksampler": Workflow(
        "Text to image with KSampler",
        """\
# GLM-Image: text to image with KSampler
The decoder is an ordinary MODEL, so any sampler, scheduler, LoRA or model node fits.

**Model Sampling** gives it the noise levels of the picture's size; without it they are those \
of 1024 x 1024. The picture's seed is that of **Sample Tokens**.
""",
        {"Prompt": "中间一个红色心形，白色背景，底部写着“福喜”"},
    ),
    "text_to_image_chinese": Workflow(
        "Text to image, Chinese",
        """\
# GLM-Image：中文提示词
提示词可以是中文。引号（“……”或「……」）里的文字由 **字形编码** 逐字节读取，画到图里；\
其余部分只由 **采样语义 token** 读取。

1. **采样语义 token** 写出布局和内容，它的种子改变两者。
2. **字形编码** 的第二个输出列出找到的文字。
3. **解码** 的种子只改变细节。
""",
        {"提示词": "左边一个蓝色星形，黄色背景，顶部写着“猫茶”"},
    ),
    "prompts_from_list": Workflow(
        "Many prompts at once",
        """\
# GLM-Image: many prompts at once
Write one prompt a line. **Prompt Lines** makes a list of them, and **Sample Tokens** writes up to \
`rows` of the list together, in little more time than one. The decoder then paints one picture \
after the other.

All pictures have the seed and the size of **Sample Tokens**. A list of seeds, of sizes or of \
layouts may be connected as well; what differs in size is written apart.
""",
        {
            "Prompts": "a red circle on the left, white background\na blue star on the right, "
            "yellow background\na green square in the middle, white background, the text 'TEA' at "
            "the bottom"
        },
    ),
    "edit_image": Workflow(
        "Edit a picture",
        """\
# GLM-Image: edit a picture
Choose a picture and say what shall change; the seed is that of **Sample Tokens**.

**Encode Reference** brings the picture to a size that both stages read and gives that size to \
**Sample Tokens**. **Reference Cache** runs the decoder over it once; it is exact for every prompt \
and seed, so only the first run pays for it.
""",
        {"Prompt": "change the background to yellow"},
    ),
    "style_transfer": Workflow(
        "Take the style of a picture",
        """\
# GLM-Image: another picture's style
The reference gives the style, the prompt the content, and **Sample Tokens** has size and seed. \
Change any of these: the reference is neither encoded nor cached again.
""",
        {"Prompt": "change the background to yellow"},
    ),
    "two_references": Workflow(
        "Two references",
        """\
# GLM-Image: several references
Each **Encode Reference** adds its picture to the chain, and the prompt speaks of them in that \
order. Size and seed are those of **Sample Tokens**.

One **Reference Cache** holds all references; `fp8` halves its memory, `cpu` streams it.
""",
        {"Prompt": "change the background to yellow"},
        suits_tiny=False,  # it has learned edits of one picture, and copies two unchanged
    ),
    "layout_contact_sheet": Workflow(
        "Choose one of eight layouts",
        """\
# GLM-Image: choose one of eight layouts
**Sample Layout** writes only the previews, all eight in little more than one's time. They are \
shown as squares and, painted quickly, as small pictures. Set `batch_index` in **Choose one** and \
run again: only the large picture is made anew.

The sheets count row by row from 0, as `batch_index` does. Layout *i* is also the one that \
seed + *i* gives alone.
""",
        {"Prompt": "a red square and a blue star, yellow background"},
    ),
    "layouts_by_hand": Workflow(
        "Layouts by hand",
        """\
# GLM-Image: layouts by hand
1. Press ▶ on **Click one, drag over it**: eight layouts are drawn and painted quickly, no more.
2. Click the one you like. 3. Drag over what shall stay; without that all of it stays.
4. Write the **Prompt** and run.

The layouts have a prompt and a seed of their own, so they stay when **Prompt** or the seed of \
Sample Tokens changes. If you change **Layouts' prompt**, the node says that your cells were \
chosen for other layouts.
""",
        {
            "Layouts' prompt": "a red circle on the left, a blue star on the right, white "
            "background",
            "Prompt": "a red circle on the left, a green square on the right, white background",
        },
    ),
    "lock_layout_change_prompt": Workflow(
        "Lock a layout, change the prompt",
        """\
# GLM-Image: another picture with the same layout
**Lock Layout** holds the layout of the first prompt; **Sample Tokens** writes the new prompt \
around it and spends no time on what is locked. Change the new prompt, the seed of Sample Tokens, \
the decoder or a LoRA: the composition stays.
""",
        {
            "First prompt": "a red circle on the left, a green square on the right, white "
            "background, the text 'BOOK' at the bottom",
            "New prompt": "a red circle on the left, a green square on the right, white "
            "background, the text 'OPEN' at the bottom",
        },
    ),
    "lock_region_resample_rest": Workflow(
        "Lock a region, redraw the rest",
        """\
# GLM-Image: keep a part of a layout, choose the rest
The **First prompt** makes the layout whose region is locked; it stays whatever **Prompt** and \
**Seed** say. Four layouts are drawn around it. Look at them, set `batch_index` (from 0, row by \
row) in **Choose one**, and the picture is written with it.

Any mask will do, of any size: paint one in the mask editor of Load Image.
""",
        {
            "First prompt": "a blue square on the right, white background",
            "Prompt": "a red circle on the left, a blue square on the right, white background",
        },
    ),
    "redo_region": Workflow(
        "Redo a region",
        """\
# GLM-Image: redo a region of a finished picture
Change **New prompt** or **Seed**: the first picture stays. One mask in three places: **Lock \
Layout** holds the layout outside of it, **Sample Tokens** keeps the tokens outside of it, **Set \
Latent Noise Mask** keeps the pixels. For a mask of your own use the mask editor of Load Image.
""",
        {
            "First prompt": "a red circle on the left, white background",
            "New prompt": "a red circle on the left, a blue star on the right, white background",
        },
    ),
    "compose_two_layouts": Workflow(
        "Compose two layouts",
        """\
# GLM-Image: one layout out of two
**Compose Layouts** pastes the source into the base, 8 cells to the right of its place; a mask \
pastes a part. **Lock Layout** holds the result, and the prompt **Whole** describes all of it. \
The picture's seed is that of Sample Tokens.
""",
        {
            "Left": "a red circle on the left, white background",
            "Right": "a blue star on the left, white background",  # that half goes to the right
            "Whole": "a red circle on the left, a blue star on the right, white background",
        },
    ),
    "layout_from_sketch": Workflow(
        "Layout from a sketch",
        """\
# GLM-Image: keep a drawing's composition
**Encode Tokens** reads a photo or a sketch as semantic tokens and as a layout, cropped to the \
asked aspect. **Lock Layout** holds it, and **Sample Tokens** writes the prompt's picture on it. \
A mask on Lock Layout holds a part of it only.
""",
        {"Prompt": "a blue circle on the left, an orange diamond on the right, white background"},
    ),
    "extend_picture": Workflow(
        "Extend a picture",
        """\
# GLM-Image: a picture beyond its edges
**Width** and **Height** are the picture's, **Grow the canvas** says how many pixels are added on \
each side (multiples of 32). The **Prompt** describes the whole of it.

**Encode Tokens** reads the grown picture. Its tokens and its layout stay, and new ones are \
written around them. The layout's cells at the seam see the grey that fills the canvas, so \
**Unlock the seam of the layout** lets them be drawn anew. The picture's own pixels come back at \
the end, with a soft seam.
""",
        {
            "Prompt": "a blue circle on the left, an orange diamond in the centre, a red star on "
            "the right, white background"
        },
    ),
    "upscale_by_tokens": Workflow(
        "Twice the size",
        """\
# GLM-Image: the same picture at twice the size
**Encode Tokens** reads the enlarged picture as tokens of its new size, and **Decode the large \
picture** paints it anew where the enlarged one is soft. Its `denoise` says how much: the noise of \
0.1 is strong already, as it grows with the size. Change it: the first picture is not made again.

The large picture may have 2048 pixels a side. For more, or for less memory, see *Upscale in tiles*.
""",
        {"Prompt": TINY_PROMPT},
    ),
    "upscale_in_tiles": Workflow(
        "Upscale in tiles",
        """\
# GLM-Image: a larger picture, painted in tiles
The first picture is scaled up and cut into four tiles of its own size, which overlap by a \
quarter. **Encode Tokens** gives each tile tokens of its own: those of the first picture would \
paint the whole scene into every tile. The tiles are painted one by one, in the memory of one.

**Scale up** by less than 2, or the tiles leave a gap. For a picture of your own put Load Image in \
the place of the first VAE Decode; its sides must be multiples of 32. `denoise` says how much is \
painted anew.
""",
        {"Prompt": TINY_PROMPT},
    ),
    "best_of_eight_layouts": Workflow(
        "Best of eight layouts",
        """\
# GLM-Image: the best of eight layouts
**Sample Layout** writes eight previews. **Score Tokens** says how likely each is under the \
prompt, and **Keep Best** hands on the likeliest, which the large picture keeps. In the heat maps \
the deepest blue is the least likely cell.
""",
        {"Prompt": "a red square and a blue star, yellow background"},
    ),
    "best_text_of_four": Workflow(
        "Best text of four",
        """\
# GLM-Image: the best text of four
Four pictures are painted in a few steps. **Read Text** compares the texts in them with those in \
the quotes of the prompt, and **Keep Best** hands on the tokens and the noise of the best one, \
which is painted in all steps. Read Text needs the packages of `requirements-ocr.txt`.
""",
        {"Prompt": TINY_PROMPT},
    ),
}


def file_title(name: str) -> str:
    """A workflow's number and title, as the names of files that a page sorts."""
    return f"{list(WORKFLOWS).index(name) + 1:02} {WORKFLOWS[name].title}"


def graph_file(name: str) -> Path:
    """The editor's graph. The template browser's title is the name of its file."""
    return FOLDER / f"{file_title(name)}.json"
