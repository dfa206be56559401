"""Images as a client gets them."""

import io

import numpy as np
from glm_image.scripts.client import Client, Prompt, Run
from graphs import the
from PIL import Image


def first_image(client: Client, run: Run, prompt: Prompt) -> np.ndarray:
    """The first image of a run's SaveImage: [height, width, 3], 0 to 255."""
    return pixels(client.images(run, the(prompt, "SaveImage"))[0])


def pixels(png: bytes) -> np.ndarray:
    """[height, width, 3], 0 to 255."""
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image).astype(int)
