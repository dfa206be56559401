"""The reference cache on a graph: computed once, then loaded and evicted like a model."""

from collections.abc import Sequence
from copy import copy, deepcopy
from typing import Any

import comfy.conds
import comfy.model_management
import torch
from torch import Tensor, nn

from ...glm_core.data.references import References
from ...glm_core.decoder.model import KeysValues
from ...glm_core.decoder.reference_cache import FP8, ReferenceCache, make_cache
from ...glm_core.errors import GLMImageError
from ...glm_core.placement.memory import cache_bytes
from ...glm_core.placement.plan import gib
from ...glm_core.split import on_device
from .devices import Placement, placement_on
from .memory import memory_for
from .patchers import all_patches, layer_devices, make_patcher, same_patches, with_segments
from .progress import check_interrupt, progress_bar

STORES = ("auto", "gpu", "cpu")
PRECISIONS = ("model", "fp8")


class CacheReader:
    """What rides in the conditioning: for block i, the keys and values on the decoder's device.

    It has no dtype, so no host casts it, and it compares by identity. A host that splits work over
    devices calls `to` at every step, so each device's reader is made once.
    """

    def __init__(
        self,
        cache: ReferenceCache,
        device: torch.device,
        streamed: bool,
        sets: slice = slice(None),
    ) -> None:
        self.cache = cache
        self.device = device
        self.streamed = streamed
        self.sets = sets
        self._ahead: tuple[int, Any, list[tuple[Tensor, ...]]] | None = None
        self._elsewhere: dict[torch.device, CacheReader] = {}

    def to(self, device: torch.device, *_: Any, **__: Any) -> "CacheReader":
        if device == self.device:
            return self
        if device not in self._elsewhere:
            cache = self.cache if self.streamed else _copied_to(device, self.cache)
            self._elsewhere[device] = CacheReader(cache, device, self.streamed, self.sets)
        return self._elsewhere[device]

    def __getitem__(self, block: int) -> Sequence[KeysValues]:
        sets = self.cache.blocks[block].sets[self.sets]
        parts = [pair.parts() for pair in sets]
        # A host short of memory leaves or puts back pairs on its side: then they are streamed too.
        if self.streamed or any(part.device != self.device for pair in parts for part in pair):
            parts = self._take(block)
        return [pair.restore(part) for pair, part in zip(sets, parts, strict=True)]

    def _take(self, block: int) -> list[tuple[Tensor, ...]]:
        """A block's part, fetched while the block before it computed; the next one is begun."""
        if self._ahead is None or self._ahead[0] != block:
            self._ahead = self._fetch(block)
        _, stream, parts = self._ahead
        comfy.model_management.sync_stream(self.device, stream)
        if stream is not None:  # their memory is not to be used again before they have been read
            reading = comfy.model_management.current_stream(self.device)
            for part in (part for pair in parts for part in pair):
                part.record_stream(reading)
        self._ahead = self._fetch((block + 1) % len(self.cache.blocks))
        return parts

    def _fetch(self, block: int) -> tuple[int, Any, list[tuple[Tensor, ...]]]:
        stream = comfy.model_management.get_offload_stream(self.device)
        parts = [
            tuple(
                comfy.model_management.cast_to(
                    part, None, self.device, non_blocking=True, stream=stream
                )
                for part in pair.parts()
            )
            for pair in self.cache.blocks[block].sets[self.sets]
        ]
        return block, stream, parts

    @property
    def tokens(self) -> int:
        return self.cache.tokens

    def of_sets(self, sets: slice) -> "CacheReader":
        """Some of the sets of references."""
        return CacheReader(self.cache, self.device, self.streamed, sets)

    def end_run(self) -> None:
        """Let go of what was fetched ahead, and of the copies on other devices."""
        self._ahead = None
        self._elsewhere.clear()


def _copied_to(device: torch.device, cache: ReferenceCache) -> ReferenceCache:
    """Part by part, with no second copy where it lies."""
    parts = {id(p): nn.Parameter(p.to(device), requires_grad=False) for p in cache.parameters()}
    return deepcopy(cache, parts)


class SplitReader:
    """The readers of a split decoder, each on the device of its blocks, which are never copied."""

    def __init__(self, readers: Sequence[tuple[range, CacheReader]]) -> None:
        self.readers = readers

    def to(self, *_: Any, **__: Any) -> "SplitReader":
        return self

    def __getitem__(self, block: int) -> Sequence[KeysValues]:
        numbers, reader = next(pair for pair in self.readers if block in pair[0])
        return reader[block - numbers.start]

    @property
    def tokens(self) -> int:
        return self.readers[0][1].tokens

    def of_sets(self, sets: slice) -> "SplitReader":
        return SplitReader([(numbers, reader.of_sets(sets)) for numbers, reader in self.readers])

    def end_run(self) -> None:
        for _, reader in self.readers:
            reader.end_run()


class HostReferenceCache:
    """GLM_REFERENCE_CACHE: a cache in patchers, its reader, and what it was made with.

    There is one patcher, or one beside each range of blocks of a split decoder.
    """

    def __init__(self, cache: ReferenceCache, decoder: Any, streamed: bool) -> None:
        self.sets = len(cache.blocks[0].sets)
        self.patchers, readers = [], []
        for numbers, device in layer_devices(decoder, len(cache.blocks)):
            part = ReferenceCache(cache.blocks[numbers.start : numbers.stop])
            self.patchers.append(_cache_patcher(part, device, streamed))
            readers.append((numbers, CacheReader(part, device, streamed)))
        self.reader = SplitReader(readers) if len(readers) > 1 else readers[0][1]
        self._placed = _placed(decoder)
        self._patches = all_patches(decoder)
        self._injections = _injections(decoder)
        self._checkpoint = decoder.model.checkpoint

    def for_samples(self, batch: int, chosen: list[int]) -> "HostReferenceCache":
        """This cache as the chosen samples of a batch see it: sample i attends to set i modulo
        the number of sets.

        Raises:
            GLMImageError: the batch is no multiple of the sets.
        """
        sets = self.sets
        if batch % sets:
            raise GLMImageError(
                f"The reference cache holds references for {sets} samples, one set each, and the "
                f"tokens hold {batch} images, which is no multiple; sample the tokens with the "
                "same references."
            )
        if sets == 1 or len(chosen) == batch:
            return self
        view, index = copy(self), chosen[0] % sets
        view.reader = self.reader.of_sets(slice(index, index + 1))
        return view

    def check_decoder(self, decoder: Any) -> None:
        """
        Raises:
            GLMImageError: its weights or LoRAs are not those that the cache was made with, or its
                layers are split over devices otherwise.
        """
        if _placed(decoder) != self._placed:
            raise GLMImageError(
                "The reference cache was made with a MODEL whose layers are split over devices "
                "otherwise; connect the MODEL that is sampling to GLM-Image Reference Cache."
            )
        if (
            decoder.model.checkpoint != self._checkpoint
            or _injections(decoder) != self._injections
            or not same_patches(all_patches(decoder), self._patches)
        ):
            raise GLMImageError(
                "The reference cache was made with another decoder or with other LoRAs than the "
                "MODEL that is sampling; connect that MODEL to GLM-Image Reference Cache."
            )


class ReferencesCondition(comfy.conds.CONDConstant):
    """A reader as a condition; by its size the memory estimate counts the reference tokens."""

    def size(self) -> list[int]:
        return [1, self.cond.tokens]


def compute_cache(
    decoder: Any, references: References, store: str, precision: str
) -> HostReferenceCache:
    """Run the decoder, with its LoRAs, over the references.

    Args:
        decoder: a MODEL of this pack.
        store: gpu, cpu (streamed block by block), or auto: gpu where there is room.
        precision: model, or fp8 for half the memory.

    Raises:
        GLMImageError: neither place has room, or the references are of another codebook.
    """
    model = decoder.model
    network = model.diffusion_model
    images = [image for images in references.sets for image in images]
    if not images:
        raise GLMImageError("The chain of references is empty; encode at least one image.")
    channels = {image.latent.shape[1] for image in images} - {network.config.in_channels}
    if channels:
        raise GLMImageError(
            f"A reference's latent has {channels.pop()} channels and the decoder takes "
            f"{network.config.in_channels}; encode it with GLM-Image Load VAE."
        )
    codebook = network.config.prior_vq_quantizer_codebook_size
    if references.codebook != codebook:
        raise GLMImageError(
            f"The references are of a codebook of {references.codebook} ids and the decoder knows "
            f"{codebook}; encode them with the AR model of the decoder's checkpoint."
        )
    dtype = model.compute_dtype
    fp8 = precision == "fp8"
    nbytes = cache_bytes(references, network.config, FP8 if fp8 else dtype)
    host = torch.device("cpu")  # also where the user has all weights stay on the device
    _require_room(nbytes, host, fp8)
    blocks = network.config.num_layers
    shares = [
        (nbytes * len(numbers) // blocks, device)
        for numbers, device in layer_devices(decoder, blocks)
    ]

    # All references go through a block together.
    working = sum(model.memory_required(list(image.latent.shape)) for image in set(images))
    needs = dict.fromkeys((device for _, device in shares), working)
    helps = "use smaller or fewer references"
    with (
        on_device(decoder.load_device),
        memory_for("The reference cache", needs, helps, split="decoder_split"),
    ):
        comfy.model_management.load_models_gpu(with_segments(decoder), memory_required=working)
        cache = make_cache(
            network,
            references,
            model.process_latent_in,
            device=decoder.load_device,
            dtype=dtype,
            store=host,
            fp8=fp8,
            progress=progress_bar(blocks),
            check_interrupt=check_interrupt,
        )
    if store == "auto":
        fits = all(
            part + working < comfy.model_management.get_free_memory(device)
            for part, device in shares
        )
        store = "gpu" if fits else "cpu"
    elif store == "gpu":
        for part, device in shares:
            _require_total(part, device)
    return HostReferenceCache(cache, decoder, streamed=store == "cpu")


def _placed(decoder: Any) -> list[tuple[range, torch.device]] | None:
    """Where a split decoder's blocks are; one that is not split may be brought elsewhere."""
    parts = layer_devices(decoder, decoder.model.diffusion_model.config.num_layers)
    return parts if len(parts) > 1 else None


def _injections(decoder: Any) -> list[Any]:
    """What hosts inject into layers beside patches, as the same objects in every clone."""
    return [entry for entries in decoder.injections.values() for entry in entries]


def _cache_patcher(cache: ReferenceCache, device: torch.device, streamed: bool) -> Any:
    if not streamed:
        return load_cache_patcher(cache, device, placement_on(device).offload)
    pinned = comfy.model_management.device_supports_non_blocking(device)
    if pinned and not comfy.model_management.is_device_cpu(device):
        for parameter in cache.parameters():
            parameter.data = parameter.data.pin_memory()
    host = torch.device("cpu")
    return load_cache_patcher(cache, host, host)


def load_cache_patcher(
    cache: ReferenceCache,
    device: torch.device,
    offload: torch.device,
    disable_dynamic: bool = False,
) -> Any:
    """The cache's patcher; the factory with which current hosts rebuild it makes a copy.

    Never a dynamic one, which streams a layer's weights into that layer's own forward.
    """
    patcher = make_patcher(cache, Placement(device, offload), disable_dynamic=True)
    patcher.cached_patcher_init = (_copy_patcher, (cache, device, offload))
    return patcher


def _copy_patcher(
    cache: ReferenceCache, *where: torch.device, disable_dynamic: bool = False
) -> Any:
    return load_cache_patcher(deepcopy(cache), *where, disable_dynamic)


def _require_room(nbytes: int, device: torch.device, fp8: bool) -> None:
    free = comfy.model_management.get_free_memory(device)
    if nbytes > free:
        raise GLMImageError(
            f"The references' keys and values need {gib(nbytes)} and {gib(free)} "
            f"of {device} memory are free; use fewer or smaller references"
            f"{'' if fp8 else ', or precision fp8'}."
        )


def _require_total(nbytes: int, device: torch.device) -> None:
    total = comfy.model_management.get_total_memory(device)
    if nbytes > total:
        raise GLMImageError(
            f"The references' keys and values need {gib(nbytes)} and {device} has "
            f"{gib(total)}; set store to cpu or auto."
        )
