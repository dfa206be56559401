"""A native VAE object around GLM-Image's autoencoder."""

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import comfy.model_management
import comfy.sd
import torch
from torch import Tensor

from ...glm_core.data.grids import PIXELS_PER_LATENT
from ...glm_core.errors import CheckpointError
from ...glm_core.files.saved import CONFIG, config_tensor
from ...glm_core.placement import memory
from ...glm_core.placement.stages import TILE
from ...glm_core.split import on_device
from ...glm_core.vae import AutoencoderKL, VAEConfig
from .devices import Placement
from .latent_rgb import fit_once
from .out_of_memory import explain_out_of_memory
from .patchers import make_patcher
from .weights import Precision, check_keys, load_weights, open_model, remember_dtypes

log = logging.getLogger(__name__)

WORKING_DTYPES = [torch.bfloat16, torch.float32]
EMPTY_VAE_WARNING = "No VAE weights detected"  # part of ComfyUI's sentence


def load_vae(model_name: str, placement: Placement | None = None) -> comfy.sd.VAE:
    """The autoencoder as a VAE.

    Args:
        placement: devices of a device plan; None leaves them to ComfyUI.

    Raises:
        GLMImageError: the component is missing or broken, or not of GLM-Image's latent size.
    """
    patcher = load_vae_patcher(model_name, placement)
    network = patcher.model
    with _without_empty_vae_warning():  # an empty VAE still sets all that its methods use
        vae = HostVAE(sd={})
    vae.config_tensor = config_tensor(open_model("vae", model_name, tell=True))
    vae.first_stage_model = network
    vae.latent_channels = network.config.latent_channels
    config = network.config
    vae.memory_used_decode = lambda shape, dtype: memory.vae_decode(config, shape[2:], dtype)
    vae.working_dtypes = WORKING_DTYPES
    vae.device = patcher.load_device
    vae.vae_dtype = next(network.parameters()).dtype
    vae.output_device = comfy.model_management.intermediate_device()
    vae.patcher = patcher
    vae.model_size()
    return vae


class HostVAE(comfy.sd.VAE):
    """ComfyUI's VAE, with a clear error where even a tile does not fit into memory.

    ComfyUI falls back to tiles by itself when memory is short. After a picture the network is
    loaded, so the colours of its latents are fitted then.
    """

    config_tensor: Tensor

    def get_sd(self) -> dict[str, Tensor]:
        """What save nodes write."""
        return {**super().get_sd(), CONFIG: self.config_tensor}

    def decode(self, *args: Any, **kwargs: Any) -> Tensor:
        pixels = super().decode(*args, **kwargs)
        with on_device(self.device):
            fit_once(self)
        return pixels

    def decode_tiled_(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._tiles():
            return super().decode_tiled_(*args, **kwargs)

    def encode_tiled_(self, *args: Any, **kwargs: Any) -> Tensor:
        with self._tiles():
            return super().encode_tiled_(*args, **kwargs)

    def _tiles(self) -> AbstractContextManager[None]:
        config = self.first_stage_model.config
        side = TILE // PIXELS_PER_LATENT
        need = memory.vae_decode(config, (side, side), self.vae_dtype)
        helps = "use VAE Decode (Tiled) with a smaller tile_size, or plan it onto another device"
        return explain_out_of_memory("The VAE", {self.device: need}, helps)


def load_vae_patcher(
    model_name: str, placement: Placement | None = None, disable_dynamic: bool = False
):
    """The VAE's patcher. Current hosts call this to rebuild it on another device."""
    component = open_model("vae", model_name)
    config = VAEConfig.from_dict(component.config)
    if config.downscale != PIXELS_PER_LATENT:
        raise CheckpointError(
            f"The VAE in {component.path} makes one latent of {config.downscale} x "
            f"{config.downscale} pixels, and GLM-Image's VAE one of {PIXELS_PER_LATENT} x "
            f"{PIXELS_PER_LATENT}; choose GLM-Image's VAE."
        )
    check_keys(component, AutoencoderKL, config)

    management = comfy.model_management
    chosen = placement or Placement(management.vae_device(), management.vae_offload_device())
    dtype = working_dtype(chosen.load)
    operations = Precision(dtype, dtype, device=chosen.load).operations
    network = AutoencoderKL(config, device="meta", dtype=dtype, operations=operations)
    load_weights(network, component).to(dtype)
    remember_dtypes(network)

    patcher = make_patcher(network, chosen, disable_dynamic)
    patcher.cached_patcher_init = (load_vae_patcher, (model_name, placement))
    return patcher


def working_dtype(device: torch.device) -> torch.dtype:
    """ComfyUI's choice for a device; the user sets it with --fp32-vae or --bf16-vae.

    --fp16-vae is not obeyed, since the VAE overflows in fp16.
    """
    management = comfy.model_management
    dtype = management.vae_dtype(device, WORKING_DTYPES)
    if dtype in WORKING_DTYPES:
        return dtype
    dtype = torch.bfloat16 if management.should_use_bf16(device) else torch.float32
    log.warning("GLM-Image's VAE overflows in fp16 and runs in %s instead.", dtype)
    return dtype


@contextmanager
def _without_empty_vae_warning() -> Iterator[None]:
    """Drops the root logger's record of a VAE with an empty state dict, and no other record."""

    def passes(record: logging.LogRecord) -> bool:
        return EMPTY_VAE_WARNING not in str(record.msg)

    logging.root.addFilter(passes)
    try:
        yield
    finally:
        logging.root.removeFilter(passes)
