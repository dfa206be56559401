"""Where the colours of latents are kept: in ComfyUI's user folder, fitted from a VAE in use.

ComfyUI's previews read them from the decoder's latent format. A file belongs to all checkpoints
with one latent space, which the numbers that normalise it tell apart. Those of the model in `tiny/`
are in `latent_colours/`.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import comfy.model_management
import folder_paths
from comfy.cli_args import LatentPreviewMethod, args

from ...glm_core.errors import GLMImageError
from ...glm_core.files.json_files import is_file, read_json
from ...glm_core.latent_rgb import LatentColours, fit_colours
from ...glm_core.schema import many, number, read

log = logging.getLogger(__name__)

SHIPPED = Path(__file__).parent / "latent_colours"
COLOUR = many(number(-1000, 1000), 3, 3)


def find_colours(mean: Sequence[float], std: Sequence[float]) -> LatentColours | None:
    """The colours of the latents that these numbers normalise; None if there are none yet."""
    name = _name(mean, std)
    for file in (_user_folder() / name, SHIPPED / name):
        if is_file(file):
            try:
                return _read(file, len(mean))
            except GLMImageError as error:
                log.warning("The colours of previews are not read: %s", error)
    return None


def fit_once(vae: Any) -> None:
    """Fits and keeps the colours of a VAE's latents, unless they are known or previews are off.

    Args:
        vae: a HostVAE that has just been used, so that its network is loaded. Nothing is loaded or
            moved here.
    """
    network, off = vae.first_stage_model, LatentPreviewMethod.NoPreviews
    numbers = network.config.latents_mean, network.config.latents_std
    if args.preview_method == off or find_colours(*numbers) is not None:
        return
    try:
        colours = fit_colours(network, vae.device, vae.vae_dtype)
    except comfy.model_management.OOM_EXCEPTION:
        return  # the next picture may leave more room
    if colours is not None:
        _write(_user_folder() / _name(*numbers), colours)


def _name(mean: Sequence[float], std: Sequence[float]) -> str:
    numbers = json.dumps([list(map(float, values)) for values in (mean, std)])
    return f"{hashlib.sha256(numbers.encode()).hexdigest()[:16]}.json"


def _user_folder() -> Path:
    """A folder that ComfyUI's web interface does not serve."""
    return Path(folder_paths.get_system_user_directory("glm_image")) / "latent_rgb"


def _read(file: Path, channels: int) -> LatentColours:
    table = {"factors": many(COLOUR, channels, channels), "bias": COLOUR}
    return LatentColours(**read(read_json(file), table, str(file), "delete it"))


def _write(file: Path, colours: LatentColours) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(asdict(colours)))
        part.replace(file)
    except OSError as error:
        log.warning("The colours of previews cannot be kept: %s.", error)
