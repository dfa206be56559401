"""The reference cache on a graph: computed once, then loaded and evicted like a model."""

from collections.abc import Sequence
from typing import Any

import comfy.model_management
import torch

from ...glm_core.data.references import References
from ...glm_core.data.tokens import SemanticTokens
from ...glm_core.decoder.config import DecoderConfig
from ...glm_core.decoder.reference_cache import FP8, ReferenceCache, make_cache
from ...glm_core.errors import BatchError, LowMemoryError, ModelError, ReferenceImageError
from ...glm_core.placement.memory import whole_reference_cache
from ...glm_core.placement.plan import gib
from ...glm_core.split import on_device
from .cache_patcher import make_cache_patcher
from .cache_reader import CacheReader, SplitReader
from .out_of_memory import explain_out_of_memory
from .patchers import all_patches, layer_devices, same_patches, with_segments
from .progress import check_interrupt, progress_bar

STORES = ("auto", "gpu", "cpu")
PRECISIONS = ("model", "fp8")


class HostReferenceCache:
    """GLM_REFERENCE_CACHE: a cache in patchers, its reader, and the decoder that it was made with.

    A split decoder has a cache patcher for each device, any other decoder has one.
    """

    def __init__(self, cache: ReferenceCache, decoder: Any, streamed: bool) -> None:
        self.sets = len(cache.blocks[0].sets)
        self.patchers, readers = [], []
        for numbers, device in layer_devices(decoder, len(cache.blocks)):
            part = ReferenceCache(cache.blocks[numbers.start : numbers.stop])
            self.patchers.append(make_cache_patcher(part, device, streamed))
            readers.append((numbers, CacheReader(part, device, streamed)))
        self.reader = SplitReader(readers) if len(readers) > 1 else readers[0][1]
        self._split = _split(decoder)
        self._patches = all_patches(decoder)
        self._injections = _injections(decoder)
        self._checkpoint = decoder.model.checkpoint

    @property
    def patcher(self) -> Any:
        """By it, current hosts see that this output holds much memory, and drop it early."""
        return self.patchers[0]

    def get_ram_usage(self) -> int:
        """Bytes, for hosts that drop outputs when memory is short (0.3.75)."""
        return sum(patcher.model_size() for patcher in self.patchers)

    def require_fits(self, tokens: SemanticTokens) -> None:
        """
        Raises:
            GLMImageError: the images are a whole batch, and no multiple of the sets.
        """
        images = len(tokens.tokens)
        if tokens.numbers is None and images % self.sets:
            raise BatchError(
                f"The reference cache holds references for {self.sets} samples, one set each, and "
                f"the tokens hold {images} images, which is no multiple; sample the tokens with "
                "the same references."
            )

    def reader_of(self, images: Sequence[int]) -> CacheReader | SplitReader:
        """The reader for latents that are painted with the images of these numbers, in order.

        Image i of a batch attends to set i modulo the number of sets.
        """
        sets = [image % self.sets for image in images]
        whole = list(range(self.sets)) * (len(images) // self.sets)
        if sets == whole:
            return self.reader
        return self.reader.of_sets(sets)

    def check_decoder(self, decoder: Any) -> None:
        """
        Raises:
            GLMImageError: the cache was made with other weights or LoRAs, or with another split.
        """
        if _split(decoder) != self._split:
            raise ModelError(
                "The reference cache was made with a MODEL whose layers are split over devices "
                "otherwise; connect the MODEL that is sampling to GLM-Image Reference Cache."
            )
        if (
            decoder.model.checkpoint != self._checkpoint
            or _injections(decoder) != self._injections
            or not same_patches(all_patches(decoder), self._patches)
        ):
            raise ModelError(
                "The reference cache was made with another decoder or with other LoRAs than the "
                "MODEL that is sampling; connect that MODEL to GLM-Image Reference Cache."
            )


def _split(decoder: Any) -> list[tuple[range, torch.device]] | None:
    """The blocks of a split decoder by device; None for a whole one, which hosts may move."""
    devices = layer_devices(decoder, decoder.model.diffusion_model.config.num_layers)
    return devices if len(devices) > 1 else None


def _injections(decoder: Any) -> list[Any]:
    """What hosts inject into layers besides patches: the same objects in every clone."""
    return [entry for entries in decoder.injections.values() for entry in entries]


# ---- computing it --------------------------------------------------------------------------------


def compute_cache(
    decoder: Any, references: References, store: str, precision: str
) -> HostReferenceCache:
    """Run the decoder, with its LoRAs, over the references.

    Args:
        decoder: a MODEL of this pack.
        store: gpu, cpu (streamed block by block), or auto: gpu where there is room.
        precision: model, or fp8 for half the memory.

    Raises:
        GLMImageError: the cache does not fit, or the references are none or of another model.
    """
    model = decoder.model
    config = model.diffusion_model.config
    _check_references(references, config)
    fp8 = precision == "fp8"
    nbytes = whole_reference_cache(references, config, FP8 if fp8 else model.compute_dtype)
    _require_host_memory(nbytes, fp8)
    shares = [
        (nbytes * len(numbers) // config.num_layers, device)
        for numbers, device in layer_devices(decoder, config.num_layers)
    ]
    images = {image for images in references.sets for image in images}
    # Every block computes the keys and values of all images before the next block does.
    working = sum(model.memory_required(list(image.latent.shape)) for image in images)
    needs = dict.fromkeys((device for _, device in shares), working)
    helps = "use smaller or fewer references"
    with (
        on_device(decoder.load_device),
        explain_out_of_memory("The reference cache", needs, helps, split="decoder_split"),
    ):
        comfy.model_management.load_models_gpu(with_segments(decoder), memory_required=working)
        cache = make_cache(
            model.diffusion_model,
            references,
            model.process_latent_in,
            device=decoder.load_device,
            dtype=model.compute_dtype,
            store=torch.device("cpu"),  # even if the user has all weights stay on the device
            fp8=fp8,
            progress=progress_bar(config.num_layers),
            check_interrupt=check_interrupt,
        )
        # Within, as pinning takes memory too.
        return HostReferenceCache(cache, decoder, _is_streamed(decoder, store, shares, working))


def _check_references(references: References, config: DecoderConfig) -> None:
    images = [image for images in references.sets for image in images]
    if not images:
        raise ReferenceImageError("The chain of references is empty; encode at least one image.")
    channels = {image.latent.shape[1] for image in images} - {config.in_channels}
    if channels:
        raise ModelError(
            f"A reference's latent has {channels.pop()} channels and the decoder takes "
            f"{config.in_channels}; encode it with GLM-Image Load VAE."
        )
    codebook = config.prior_vq_quantizer_codebook_size
    if references.codebook != codebook:
        raise ModelError(
            f"The references are of a codebook of {references.codebook} ids and the decoder knows "
            f"{codebook}; encode them with the AR model of the decoder's checkpoint."
        )


def _require_host_memory(nbytes: int, fp8: bool) -> None:
    host = torch.device("cpu")
    free = comfy.model_management.get_free_memory(host)
    if nbytes > free:
        raise LowMemoryError(
            f"The references' keys and values need {gib(nbytes)} and {gib(free)} "
            f"of {host} memory are free; use fewer or smaller references"
            f"{'' if fp8 else ', or precision fp8'}."
        )


def _is_streamed(
    decoder: Any, store: str, shares: Sequence[tuple[int, torch.device]], working: int
) -> bool:
    """Whether the cache stays in host memory.

    Args:
        shares: the bytes of the cache for each device.
        working: bytes beside them; auto keeps as many free.

    Raises:
        GLMImageError: store is gpu, and a device is smaller than its share.
    """
    if store == "auto":
        # Patchers of current hosts count weights that they can evict as free.
        management = comfy.model_management
        free = getattr(decoder, "get_free_memory", management.get_free_memory)
        return any(nbytes + working >= free(device) for nbytes, device in shares)
    if store == "gpu":
        for nbytes, device in shares:
            total = comfy.model_management.get_total_memory(device)
            if nbytes > total:
                raise LowMemoryError(
                    f"The references' keys and values need {gib(nbytes)} and {device} has "
                    f"{gib(total)}; set store to cpu or auto."
                )
    return store == "cpu"
