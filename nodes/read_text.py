"""Whether the texts in pictures can be read."""

import torch
from comfy_api.latest import io
from torch import Tensor

from ..glm_core.errors import PromptError, shown
from ..glm_core.glyph.reading import Match, match_texts, plain, score
from ..glm_core.glyph.texts import texts_that_fit, texts_to_render
from ..glm_core.vision.pixels import require_images
from .host.ocr import TextInPicture, outlined, read_texts
from .host.progress import check_interrupt, progress_bar
from .messages import message
from .node import Node
from .types import CATEGORY


class ReadText(Node):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="GLMImageReadText",
            display_name="GLM-Image Read Text",
            category=f"{CATEGORY}/best of",
            description="Reads the texts in images (OCR) and compares them with those that the "
            "images should show. The score is 1 - character error rate, from 0 to 1: 1 when every "
            "text is there, letter by letter, in any order. Spaces do not count, nor do other "
            "texts in the image. Needs the packages of requirements-ocr.txt.",
            inputs=[
                io.Image.Input("images", tooltip="The images to read."),
                io.String.Input(
                    "prompt",
                    optional=True,
                    multiline=True,
                    tooltip="The prompt of the images: the texts in quotes are expected, as "
                    "GLM-Image Glyph Encode finds them.",
                ),
                io.String.Input(
                    "texts",
                    optional=True,
                    multiline=True,
                    tooltip="The texts to expect, one a line, in place of the prompt's.",
                ),
            ],
            outputs=[
                io.Float.Output(
                    display_name="scores",
                    is_output_list=True,
                    tooltip="A number for each image. Connect it to GLM-Image Keep Best.",
                ),
                io.String.Output(display_name="table"),
                io.Image.Output(display_name="images", tooltip="With the texts that were read."),
            ],
        )

    @classmethod
    def execute(cls, images: Tensor, prompt: str = "", texts: str = "") -> io.NodeOutput:
        require_images(images)
        wanted = _wanted(prompt, texts)
        progress = progress_bar(len(images))
        scores, rows, pictures = [], [], []
        for i, image in enumerate(images):
            check_interrupt()
            read = read_texts(image)
            matches = match_texts(wanted, [text.text for text in read])
            scores.append(score(matches))
            rows += _rows(i, scores[-1], matches, read)
            pictures.append(outlined(image, read))
            progress(i + 1, len(images))
        return io.NodeOutput(scores, "\n".join(rows), torch.stack(pictures), ui=message(rows))


def _wanted(prompt: str, texts: str) -> list[str]:
    """
    Raises:
        GLMImageError: there is no text to expect.
    """
    lines = [line for line in texts.splitlines() if plain(line)]
    wanted = lines or texts_that_fit([text for text in texts_to_render(prompt) if plain(text)])
    if not wanted:
        raise PromptError(
            f"The prompt '{shown(prompt)}' has no text in quotes; put the text that the images "
            "should show in quotes, or write it into texts."
        )
    return wanted


def _rows(number: int, result: float, matches: list[Match], read: list[TextInPicture]) -> list[str]:
    """The lines of a table about one image."""
    head = f"image {number}: {result:.3f}"
    expected = [f"  '{match.wanted}' read as '{match.read}'" for match in matches]
    places = [
        f"  found '{text.text}' at column {text.corners[0][0]:.0f}, row {text.corners[0][1]:.0f}"
        for text in read
    ]
    return [head, *expected, *places]
