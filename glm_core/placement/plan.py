"""Which device runs which stage: bytes in, a plan out. Pure arithmetic, without a device.

Stages run one after the other and never need each other's weights, so each may have a device to
itself; devices with room for several stages keep them all loaded. A stage that fits on no single
device is split by layers over several, or part of its weights stays in host memory and is streamed.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import DeviceError
from .splits import Split

AUTO = "auto"
FASTEST = "fastest"
LEAST_MEMORY = "least memory"
STRATEGIES = (AUTO, FASTEST, LEAST_MEMORY)
CPU = "cpu"
GIB = 2**30
STREAMED_LAYERS = 2  # whose streamed cache is on the device at once: one is read, one is fetched


# ---- data ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stage:
    """What a stage needs, in bytes.

    name: ar, vision, decoder, glyph or vae.
    layers: weights of each layer; empty if the stage is never split.
    rest: all other weights, which lie beside the first layer.
    work: activations, on every device that runs layers of the stage.
    cache: beside each layer (its KV cache, or the keys and values of references).
    streams_cache: whether the cache may stay in host memory, fetched a layer ahead.
    tiled_work: the least work that it can run with, in tiles; None if it has no tiles.
    follows: the stage whose first device it shares.
    """

    name: str
    layers: tuple[int, ...]
    rest: int
    work: int
    cache: int = 0
    streams_cache: bool = False
    tiled_work: int | None = None
    follows: str | None = None

    @property
    def weights(self) -> int:
        return sum(self.layers) + self.rest


@dataclass(frozen=True)
class Device:
    """A device and the bytes of it that may be used."""

    name: str
    room: int


@dataclass(frozen=True)
class Part:
    """A stage or some of its layers on one device, in bytes.

    layers: None for a whole stage.
    work: activations, and the cache that is on the device.
    offloaded: weights that stay in host memory.
    cache_offloaded: cache that stays in host memory.
    buffer: for the layer that is fetched while another one computes.
    """

    stage: str
    device: str
    layers: range | None
    weights: int
    work: int
    offloaded: int = 0
    cache_offloaded: int = 0
    buffer: int = 0

    @property
    def resident(self) -> int:
        """Bytes of its weights on the device."""
        return self.weights - self.offloaded

    @property
    def beside(self) -> int:
        """Bytes beside its weights while it runs."""
        return self.work + self.buffer

    @property
    def peak(self) -> int:
        return self.resident + self.beside


@dataclass(frozen=True)
class Plan:
    """The device of every stage.

    parts: in the order in which stages run, a split stage's by layers.
    together: devices that keep all their stages loaded; on the others stages take turns.
    least_memory: whether layers are offloaded although there is room for them.
    notes: sentences about requests that were not met, and about stages that do not fit.
    """

    devices: tuple[Device, ...]
    parts: tuple[Part, ...]
    together: frozenset[str]
    least_memory: bool
    notes: tuple[str, ...]

    def of_stage(self, stage: str) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.stage == stage)

    def peak(self, device: str) -> int:
        """Most bytes in use on the device at one time."""
        parts = [part for part in self.parts if part.device == device]
        if device in self.together:
            return _peak_together(parts)
        return max((part.peak for part in parts), default=0)


# ---- the choice ----------------------------------------------------------------------------------


def plan_stages(
    stages: Sequence[Stage],
    devices: Sequence[Device],
    *,
    strategy: str = AUTO,
    pins: Mapping[str, str] | None = None,
    splits: Mapping[str, Split] | None = None,
) -> Plan:
    """Choose one device or several for every stage.

    auto: a stage is whole if it fits on one device, split if it fits on several, and else partly in
    host memory; stages stay loaded where there is room. fastest: a stage is also split if all
    stages can then stay loaded. least memory: every stage is on the device with the most room, and
    its layers are streamed from host memory even if they would fit.

    Args:
        stages: in the order in which they run.
        devices: the machine's, in its own order; "cpu" is used only if alone or asked for.
        pins: stage -> device; `auto` is no pin.
        splits: stage -> its layers by device, see `parse_split`.

    Raises:
        GLMImageError: a stage is both pinned and split.
    """
    requested = _Requested(stages, devices, pins or {}, splits or {})
    draft = _Draft(devices)
    for stage in sorted(stages, key=lambda stage: stage.weights, reverse=True):
        leader = [part for part in draft.parts if part.stage == stage.follows]
        if leader:
            device = draft.devices[leader[0].device]
            draft.parts.append(_fit(stage, device, stream=strategy == LEAST_MEMORY))
        else:
            draft.parts += requested.parts(stage) or _choose(stage, draft, strategy)
    order = [stage.name for stage in stages]
    parts = tuple(sorted(draft.parts, key=lambda part: order.index(part.stage)))
    notes = list(requested.notes)
    if strategy == FASTEST and not draft.all_together:
        notes.append("There is no room to keep all stages loaded: some take turns.")
    notes += [note for stage in stages for note in _shortages(stage, parts, draft.devices)]
    return Plan(tuple(devices), parts, draft.together, strategy == LEAST_MEMORY, tuple(notes))


class _Requested:
    """The user's pins and splits, except those that name a device which the machine lacks."""

    def __init__(
        self,
        stages: Iterable[Stage],
        devices: Sequence[Device],
        pins: Mapping[str, str],
        splits: Mapping[str, Split],
    ) -> None:
        self.devices = {device.name: device for device in devices}
        self.notes: list[str] = []
        self.pins: dict[str, str] = {}
        self.splits: dict[str, Split] = {}
        for name in (stage.name for stage in stages):
            pin, split = pins.get(name, AUTO), splits.get(name, ())
            if split and pin != AUTO:
                raise DeviceError(
                    f"{name} is set to {pin} and {name}_split is given too; use one of the two."
                )
            if pin != AUTO and self._are_present(name, [pin]):
                self.pins[name] = pin
            if split and self._are_present(name, [device for device, _ in split]):
                self.splits[name] = split

    def _are_present(self, stage: str, wanted: list[str]) -> bool:
        missing = [name for name in dict.fromkeys(wanted) if name not in self.devices]
        if missing:
            self.notes.append(
                f"{stage} asks for {' and '.join(missing)}, which this machine does not have: "
                "it counts as auto."
            )
        return not missing

    def parts(self, stage: Stage) -> list[Part]:
        """Empty for a stage that the user leaves to the plan."""
        if stage.name in self.splits:
            split = self.splits[stage.name]
            return [_fit(stage, self.devices[device], layers) for device, layers in split]
        if stage.name in self.pins:
            return [_fit(stage, self.devices[self.pins[stage.name]])]
        return []


class _Draft:
    """The parts chosen so far and the room that they leave."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self.devices = {device.name: device for device in devices}
        self.candidates = [device for device in devices if device.name != CPU] or list(devices)
        self.parts: list[Part] = []

    def parts_on(self, device: str) -> list[Part]:
        return [part for part in self.parts if part.device == device]

    def has_room_for(self, parts: list[Part]) -> bool:
        """Whether these parts can stay loaded beside all others."""
        return not any(part.offloaded for part in parts) and all(
            _peak_together([*self.parts_on(part.device), part]) <= self.devices[part.device].room
            for part in parts
        )

    def remaining(self, device: Device, stage: Stage) -> Device:
        """The device with the room that remains for the stage if all others stay loaded."""
        parts = self.parts_on(device.name)
        beside = max((part.beside for part in parts), default=0)
        taken = sum(part.resident for part in parts) + max(0, beside - stage.work)
        return replace(device, room=device.room - taken)

    @property
    def together(self) -> frozenset[str]:
        return frozenset(
            name
            for name, device in self.devices.items()
            if not any(part.offloaded for part in self.parts_on(name))
            and _peak_together(self.parts_on(name)) <= device.room
        )

    @property
    def all_together(self) -> bool:
        return self.together >= {part.device for part in self.parts}


def _choose(stage: Stage, draft: _Draft, strategy: str) -> list[Part]:
    """Beside the other stages if there is room, else in turns; whole rather than split."""
    devices = draft.candidates
    roomiest = max(devices, key=lambda device: device.room)
    alone = _fit(stage, roomiest, stream=strategy == LEAST_MEMORY)
    if strategy == LEAST_MEMORY:
        return [alone]
    for device in devices:
        whole = [_fit(stage, device)]
        if draft.has_room_for(whole):
            return whole
    if strategy == FASTEST or alone.offloaded:
        parts = _split_layers(stage, [draft.remaining(device, stage) for device in devices])
        if parts and draft.has_room_for(parts):
            return parts
    return [alone] if not alone.offloaded else _split_layers(stage, devices) or [alone]


def _split_layers(stage: Stage, devices: Sequence[Device]) -> list[Part]:
    """Layers over as few devices as can hold them, in proportion to their room, the roomiest first.

    If all devices together cannot hold the layers, each streams a share of the excess. The list is
    empty if the stage has no layers or fewer than two devices have room for one.
    """
    if not stage.layers:
        return []
    layer, total = max(stage.layers) + stage.cache, len(stage.layers)
    used: list[Device] = []
    capacities: list[int] = []
    for device in sorted(devices, key=lambda device: -device.room):
        room = device.room - stage.work - (0 if used else stage.rest)
        if room >= layer and sum(capacities) < total:
            used.append(device)
            capacities.append(room // layer)
    if len(used) < 2:
        return []
    parts, first = [], 0
    for device, count in zip(used, _shares(total, capacities), strict=True):
        parts.append(_fit(stage, device, range(first, first + count)))
        first += count
    return parts


def _shares(total: int, capacities: list[int]) -> list[int]:
    """Whole numbers that add up to `total`, in proportion to the capacities.

    None exceeds its capacity unless `total` exceeds their sum. Each is at least 1: a device is used
    only because those before it cannot hold all layers.
    """
    above, spare = total - len(capacities), max(1, sum(capacities) - len(capacities))
    shares = [1 + above * (capacity - 1) // spare for capacity in capacities]
    for _ in range(total - sum(shares)):
        spare = [capacity - share for capacity, share in zip(capacities, shares, strict=True)]
        shares[spare.index(max(spare))] += 1
    return shares


# ---- the arithmetic ------------------------------------------------------------------------------


def _fit(
    stage: Stage, device: Device, layers: range | None = None, *, stream: bool = False
) -> Part:
    """A stage or some of its layers on a device; what does not fit is offloaded.

    Args:
        stream: offload all layers even if they fit.
    """
    numbers = range(len(stage.layers)) if layers is None else layers
    in_layers = sum(stage.layers[i] for i in numbers)
    weights = in_layers + (stage.rest if numbers.start == 0 else 0)
    work = stage.work + stage.cache * len(numbers)
    if stage.tiled_work is not None:
        work = min(work, max(stage.tiled_work, device.room - weights))
    part = Part(stage.name, device.name, layers, weights, work)
    if device.name == CPU or (part.peak <= device.room and not stream):
        return part
    if stage.streams_cache and len(numbers) > STREAMED_LAYERS:
        saved = stage.cache * (len(numbers) - STREAMED_LAYERS)
        part = replace(part, work=work - saved, cache_offloaded=stage.cache * len(numbers))
        if part.peak <= device.room and not stream:
            return part
    buffer = max((stage.layers[i] for i in numbers), default=0)
    excess = part.peak + buffer - device.room
    return replace(part, offloaded=in_layers if stream else min(weights, excess), buffer=buffer)


def _peak_together(parts: Sequence[Part]) -> int:
    """Most bytes in use while one part runs and the others stay loaded."""
    return sum(part.resident for part in parts) + max((part.beside for part in parts), default=0)


def _shortages(stage: Stage, parts: Sequence[Part], devices: Mapping[str, Device]) -> Iterable[str]:
    """Sentences about the stage's parts that do not fit as they are."""
    for part in parts:
        if part.stage != stage.name:
            continue
        room = devices[part.device].room
        if part.device != CPU and part.peak > room:
            yield (
                f"{stage.name} needs {gib(part.peak)} of {part.device} with all its layers "
                f"streamed and {gib(max(room, 0))} may be used: ask for a smaller size or batch, "
                "or lower reserve_gb."
            )
        if part.cache_offloaded:
            yield (
                f"{stage.name} on {part.device}: {gib(part.cache_offloaded)} of references' keys "
                "and values stay in host memory and are streamed."
            )
        elif stage.tiled_work is not None and part.work < stage.work:
            yield (
                f"{stage.name} works in tiles on {part.device}: at once it would need "
                f"{gib(stage.work)} beside its weights."
            )


def gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f} GiB"
