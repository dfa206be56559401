"""The diffusion decoder as a native MODEL: conditioning, memory, latent format and loading."""

from collections.abc import Sequence
from typing import Any, ClassVar

import comfy.conds
import comfy.hooks
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.patcher_extension
import comfy.sampler_helpers
import comfy.supported_models_base
import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from ...glm_core.decoder.model import Decoder, DecoderConfig, block_segment
from ...glm_core.decoder.schedule import ScheduleConfig
from ...glm_core.errors import CheckpointError, LoraError, ModelError, SizeError, UnsupportedError
from ...glm_core.files.component import Component
from ...glm_core.files.saved import CONFIG, config_tensor
from ...glm_core.latent_rgb import LatentColours
from ...glm_core.placement import memory
from ...glm_core.split import LayerSegment, on_device
from .cache_reader import CacheReader, ReferencesCondition
from .conditioning import REFERENCES, conditions, unless_zeroed
from .decoder_network import HostDecoder
from .devices import Placement, default_placement
from .latent_rgb import find_colours
from .notices import Notices, about_conditions, about_patches, refuse_recorded_attention
from .out_of_memory import explain_out_of_memory, require_room
from .patchers import ListsSegments, make_patcher, require_layers
from .tiles import take_places
from .weights import Precision, check_keys, choose_precision, load_weights, open_model

SMALLER_RUN = (
    "use a smaller size or batch, weight_dtype fp8_e4m3fn, int8 or int4, or a reference cache with "
    "store cpu or precision fp8"
)
ROOT = "diffusion_model."
"""What ComfyUI puts before the network's keys."""


class GLMImageModel(ListsSegments, comfy.model_base.QwenImage):
    """The model in this pack's MODEL.

    ComfyUI's LoRA loaders choose the names that they know by the model's class. Those of QwenImage
    are diffusers': `transformer.`, none, and `lycoris_`. All else that QwenImage adds to
    `BaseModel` is overridden here; a test says so.
    """

    def __init__(self, model_config: "ModelConfig", device: Any = None) -> None:
        comfy.model_base.BaseModel.__init__(  # past QwenImage's, which builds its own network
            self,
            model_config,
            comfy.model_base.ModelType.FLOW,
            device=device,
            unet_model=HostDecoder,
        )
        # Other nodes look here for the numbers that ComfyUI's own models are built from.
        config = self.diffusion_model.config
        model_config.unet_config.update(vars(config), model_channels=config.hidden_size)
        self.segments = self.diffusion_model.segments
        self.schedule = model_config.schedule
        self.checkpoint = model_config.checkpoint
        self.quantisation = model_config.quantisation
        self.config_tensor = model_config.config_tensor
        self.readers: list[CacheReader] = []
        self.notices = Notices()

    def state_dict_for_saving(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """What save nodes write, our config beside the weights.

        Raises:
            GLMImageError: the network is only a part of the decoder, or its weights are quantised.
        """
        if self.segments:
            raise UnsupportedError(
                "A decoder that a device plan has split cannot be saved; load it without the plan."
            )
        if self.quantisation is not None:
            raise UnsupportedError(
                f"A decoder in {self.quantisation} cannot be saved; load the snapshot with "
                "weight_dtype default, and quantise what you have saved when it is loaded."
            )
        config = self.model_config.process_unet_state_dict_for_saving({CONFIG: self.config_tensor})
        return super().state_dict_for_saving(*args, **kwargs) | config

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.manual_cast_dtype or self.get_dtype()

    def shift(self, size: tuple[int, int]) -> float:
        """mu for an image of (height, width) pixels."""
        return self.schedule.shift(*size, self.diffusion_model.config.patch_size)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        """The network's arguments; the sampler asks once a run for each conditioning."""
        kwargs = unless_zeroed(kwargs)
        found = conditions(kwargs, kwargs["noise"].shape, self.diffusion_model.config)
        conds = {
            # CONDCrossAttn would repeat the shorter of two texts to batch them.
            "c_crossattn": comfy.conds.CONDRegular(found.glyphs),
            "tokens": comfy.conds.CONDNoiseShape(found.token_map),
            "size": comfy.conds.CONDConstant(found.size),
        }
        cache = kwargs.get(REFERENCES)
        if cache is not None:
            cache.check_decoder(self.current_patcher)
            hooks = kwargs.get("hooks")
            if hooks is not None and hooks.get_type(comfy.hooks.EnumHookType.Weight):
                raise LoraError(
                    "A reference cache cannot be used with LoRA hooks, which change the decoder "
                    "from step to step; load the LoRA into the MODEL instead."
                )
            # A copy, if the MODEL has moved to another device since the cache was made.
            reader = cache.reader_of(found.images)
            conds["references"] = ReferencesCondition(reader.to(kwargs["device"]))
            self.readers.append(reader)
        return conds

    def extra_conds_shapes(self, **kwargs: Any) -> dict[str, list[int]]:
        """Shapes for `memory_required` before a run, when there are no conditions yet."""
        cache = kwargs.get(REFERENCES)
        return {} if cache is None else {"references": ReferencesCondition(cache.reader).size()}

    def end_run(self) -> None:
        """Free what a run has cached."""
        self.diffusion_model.step_invariants.clear()
        for reader in self.readers:
            reader.end_run()
        self.readers.clear()

    def _apply_model(
        self,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`t` is sigma. It reaches `process_timestep` in a tuple, which the host does not cast.
        The model sampling's own `timestep()` is shifted, in units that patches change."""
        patcher = self.current_patcher
        without_hooks = patcher is not None and patcher.current_hooks is None
        self.diffusion_model.step_invariants.enabled = without_hooks
        options = transformer_options or {}
        self.notices.say(about_patches(options))
        with on_device(x.device):
            return super()._apply_model(
                x, t, c_concat, c_crossattn, control, options, sigma=(t,), **kwargs
            )

    def process_timestep(
        self, timestep: Tensor, sigma: tuple[Tensor], size: tuple[int, int], **_: Any
    ) -> Tensor:
        return self.schedule.timestep(sigma[0], self.shift(size))

    def memory_required(self, input_shape: list[int], cond_shapes: dict | None = None) -> float:
        """Bytes that one step needs beside the weights."""
        batch, _, *latent = input_shape
        references = (cond_shapes or {}).get("references", [])
        longest = max((length for _, length in references), default=0)
        config = self.diffusion_model.config
        return memory.decoder(config, batch, tuple(latent), longest, self.compute_dtype)


class LatentFormat(comfy.latent_formats.LatentFormat):
    """(z - mean) / std by channel, with the numbers of the checkpoint's VAE config.

    ComfyUI's previews read the colours before each run, so those fitted meanwhile are used.
    """

    latent_channels = 16

    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.latent_channels = len(mean)
        self.numbers = mean, std
        self.mean = torch.tensor(mean).view(1, -1, 1, 1)
        self.std = torch.tensor(std).view(1, -1, 1, 1)

    @property
    def latent_rgb_factors(self) -> list[list[float]] | None:
        colours = self._colours()
        return colours and colours.factors

    @property
    def latent_rgb_factors_bias(self) -> list[float] | None:
        colours = self._colours()
        return colours and colours.bias

    def _colours(self) -> LatentColours | None:
        return find_colours(*self.numbers)

    def process_in(self, latent: Tensor) -> Tensor:
        return (latent - self.mean.to(latent)) / self.std.to(latent)

    def process_out(self, latent: Tensor) -> Tensor:
        return latent * self.std.to(latent) + self.mean.to(latent)


class ModelConfig(comfy.supported_models_base.BASE):
    """The settings that `BaseModel` builds itself from."""

    unet_extra_config: ClassVar[dict[str, Any]] = {}

    def __init__(
        self,
        config: DecoderConfig,
        schedule: ScheduleConfig,
        latents: LatentFormat,
        precision: Precision,
        checkpoint: tuple[str, str],
        segments: Sequence[LayerSegment],
        config_tensor: Tensor,
    ) -> None:
        self.latent_format = lambda: latents  # the host expects a class and calls it
        self.sampling_settings = {"shift": schedule.shift(1024, 1024, config.patch_size)}
        storage, compute = precision.storage, precision.compute
        super().__init__({"config": config, "dtype": storage, "segments": segments})
        self.schedule = schedule
        self.checkpoint = checkpoint
        self.set_inference_dtype(storage, None if compute == storage else compute)
        self.custom_operations = precision.operations
        self.quantisation = precision.quantisation
        self.config_tensor = config_tensor


def load_decoder(
    model_name: str,
    weight_dtype: str = "default",
    placement: Placement | None = None,
    disable_dynamic: bool = False,
):
    """A MODEL. Current hosts call this again to rebuild it on another device.

    Args:
        placement: where a device plan puts it; None leaves it to ComfyUI.

    Raises:
        GLMImageError: the component is missing or broken, or the plan is another model's.
    """
    component = open_model("decoder", model_name, weight_dtype, tell=True)
    config = DecoderConfig.from_dict(component.config)
    check_keys(component, Decoder, config)

    chosen = placement or default_placement()
    require_layers(chosen, config.num_layers, component.title)
    precision = choose_precision(component, weight_dtype, chosen.load)
    segments = _block_segments(config, chosen, precision)
    settings = ModelConfig(
        config,
        ScheduleConfig.from_dict(component.scheduler),
        _latent_format(component, config),
        precision,
        checkpoint=(model_name, weight_dtype),
        segments=segments,
        config_tensor=config_tensor(component),
    )
    model = GLMImageModel(settings, device="meta")
    load_weights(model.diffusion_model, component, weight_dtype, segments=segments, root=ROOT)

    model.device = chosen.offload
    patcher = make_patcher(model, chosen, disable_dynamic, segments)
    patcher.add_callback(comfy.patcher_extension.CallbacksMP.ON_CLEANUP, _end_run)
    patcher.add_wrapper(comfy.patcher_extension.WrappersMP.OUTER_SAMPLE, _sample)
    patcher.cached_patcher_init = (load_decoder, (model_name, weight_dtype, placement))
    return patcher


def _sample(executor: Any, noise: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Wraps a whole run of the host's sampler, the loading of the weights included.

    Raises:
        GLMImageError: the latent is not an image's, a node needs another network, or memory is
            short or ran out.
    """
    guider = executor.class_obj
    patcher = guider.model_patcher
    require_size(patcher, noise.shape)
    refuse_recorded_attention(guider.model_options)
    guided = getattr(guider, "cfg", 1.0) != 1.0
    patcher.model.notices.begin()
    patcher.model.notices.say(about_conditions(guider.conds, guided))
    guider.conds = take_places(guider.conds)
    _, need = comfy.sampler_helpers.estimate_memory(patcher, noise.shape, guider.conds)
    needs = dict.fromkeys(_devices(patcher), need)
    with explain_out_of_memory("The decoder", needs, SMALLER_RUN, split="decoder_split"):
        return executor(noise, *args, **kwargs)


def require_size(patcher: Any, latent: torch.Size) -> None:
    """
    Raises:
        GLMImageError: a latent [B, C, H, W] is not an image's, or no step over it fits into memory.
    """
    if len(latent) != 4:
        raise SizeError(
            f"The latent has {len(latent)} dimensions, as a video's, and an image's has 4; "
            "use the LATENT of GLM-Image Apply Tokens."
        )
    need = patcher.model.memory_required(list(latent))
    require_room("The decoder", dict.fromkeys(_devices(patcher), need), SMALLER_RUN)


def _devices(patcher: Any) -> list[torch.device]:
    return [patcher.load_device, *(part.compute_device for part in patcher.model.segments)]


def _block_segments(
    config: DecoderConfig, placement: Placement, precision: Precision
) -> list[LayerSegment]:
    precision = precision.under(ROOT)
    return [
        block_segment(
            config,
            numbers,
            segment.load,
            device="meta",
            dtype=precision.storage,
            operations=precision.at(segment.load).operations,
            attention=optimized_attention,
            prefix=ROOT,
        )
        for numbers, segment in placement.segments
    ]


def _end_run(patcher: Any) -> None:
    patcher.model.end_run()


def _latent_format(component: Component, config: DecoderConfig) -> LatentFormat:
    latents = LatentFormat(component.vae["latents_mean"], component.vae["latents_std"])
    if latents.latent_channels != config.in_channels:
        raise CheckpointError(
            f"The decoder in {component.path} takes {config.in_channels} latent channels and the "
            f"VAE beside it makes {latents.latent_channels}; take both from one checkpoint."
        )
    return latents


def require_decoder(patcher: Any) -> GLMImageModel:
    """The GLM-Image model in a MODEL.

    Raises:
        GLMImageError: it holds another model.
    """
    model = patcher.model
    if not isinstance(model, GLMImageModel):
        raise ModelError(
            f"This MODEL is {type(model).__name__} and not GLM-Image's decoder; "
            "connect GLM-Image Load Decoder."
        )
    return model
