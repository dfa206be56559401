"""Which device runs which stage: bytes in, a plan out. Pure arithmetic, without a device.

Stages run one after the other and never need each other's weights, so each may have a device to
itself; where there is room for several, none has to leave. A stage that no device holds is split by
layers over several, or part of its weights stays in host memory and is streamed.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import GLMImageError

AUTO = "auto"
CPU = "cpu"
GIB = 2**30
IN_FLIGHT = 2  # layers whose streamed keys and values are on the device: one is read, one comes
STRATEGIES = (AUTO, "fastest", "least memory")
NAME = re.compile(r"cpu|gpu:\d+")
PIECE = re.compile(r"(?P<device>[^=]*)=(?P<first>\d{1,9})-(?P<last>\d{1,9})")

Split = tuple[tuple[str, range], ...]
"""Devices by name and the layers that each runs, first to last."""


@dataclass(frozen=True)
class Stage:
    """What a stage takes, in bytes.

    name: ar, vision, decoder, glyph or vae.
    layers: weights of each layer; empty where the stage is never split.
    rest: its other weights, which lie beside the first layer.
    work: beside the weights wherever a layer runs (activations).
    kept: beside each layer (its KV cache, its references' keys and values).
    streams_kept: whether that may lie in host memory, two layers' worth on its way at a time.
    least_work: with how much it can do, in tiles; None where it has no tiles.
    follows: the stage whose first device it shares, wherever that goes.
    """

    name: str
    layers: tuple[int, ...]
    rest: int
    work: int
    kept: int = 0
    streams_kept: bool = False
    least_work: int | None = None
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
    """Some or all layers of a stage on one device, in bytes.

    layers: None for a whole stage.
    offloaded: of the weights, what stays in host memory.
    kept_offloaded: of what is kept beside the layers, the same.
    buffer: for the layer that is streamed while another one computes.
    """

    stage: str
    device: str
    layers: range | None
    weights: int
    work: int
    offloaded: int = 0
    kept_offloaded: int = 0
    buffer: int = 0

    @property
    def resident(self) -> int:
        return self.weights - self.offloaded

    @property
    def beside(self) -> int:
        return self.work + self.buffer

    @property
    def peak(self) -> int:
        return self.resident + self.beside


@dataclass(frozen=True)
class Plan:
    """Where everything goes.

    parts: in the order in which stages run, a split stage's by layers.
    together: devices that hold all their stages at once; on the others stages take turns.
    least: whether layers are offloaded although there is room for them.
    notes: sentences about what is not as it was asked for, or does not fit.
    """

    devices: tuple[Device, ...]
    parts: tuple[Part, ...]
    together: frozenset[str]
    least: bool
    notes: tuple[str, ...]

    def of_stage(self, stage: str) -> tuple[Part, ...]:
        return tuple(part for part in self.parts if part.stage == stage)

    def peak(self, device: str) -> int:
        """Bytes at the busiest moment of the device."""
        parts = [part for part in self.parts if part.device == device]
        if device in self.together:
            return _together(parts)
        return max((part.peak for part in parts), default=0)


def parse_split(text: str, stage: str, layers: int | None = None) -> Split:
    """`gpu:0=0-19,gpu:1=20-39` -> devices and their layers; empty text is no split.

    Args:
        layers: the stage's number of layers, all of which must be given; None checks the form only.

    Raises:
        GLMImageError: a piece has another form, or the layers are not each given once in order.
    """
    pieces = [piece.strip() for piece in text.split(",")] if text.strip() else []
    split = tuple(_parse_piece(piece, stage) for piece in pieces)
    expected = 0
    for device, numbers in split:
        if numbers.start != expected:
            raise GLMImageError(
                f"{stage}_split gives {device} the layers from {numbers.start} on where "
                f"{expected} is next; give every layer once, from 0 on, in order."
            )
        expected = numbers.stop
    if split and layers is not None and expected != layers:
        raise GLMImageError(
            f"{stage}_split ends at layer {expected - 1} and the model's last one is "
            f"{layers - 1}; give every layer to a device."
        )
    return split


def _parse_piece(piece: str, stage: str) -> tuple[str, range]:
    found = PIECE.fullmatch(piece)
    if found is None:
        raise GLMImageError(
            f"{stage}_split holds '{piece}', which is not of the form device=first-last; "
            "write it as in gpu:0=0-19,gpu:1=20-39."
        )
    device, first, last = found["device"], int(found["first"]), int(found["last"])
    if not NAME.fullmatch(device):
        raise GLMImageError(
            f"{stage}_split names the device '{device}'; devices are called cpu, gpu:0, gpu:1 ..."
        )
    if last < first:
        raise GLMImageError(
            f"{stage}_split holds '{piece}', whose last layer comes before its first; swap them."
        )
    return device, range(first, last + 1)


def plan_stages(
    stages: Sequence[Stage],
    devices: Sequence[Device],
    *,
    strategy: str = AUTO,
    pins: Mapping[str, str] | None = None,
    splits: Mapping[str, Split] | None = None,
) -> Plan:
    """Choose a device, or several, for every stage.

    auto: each stage whole on one device where one holds it, split over several where only they
    do, else partly in host memory; stages stay loaded where there is room. fastest: splits also
    where that lets all stages stay loaded together. least memory: every stage on the roomiest
    device, its layers streamed from host memory whether or not they would fit.

    Args:
        stages: in the order in which they run.
        devices: the machine's, in its own order; "cpu" takes stages only if it is alone or asked.
        pins: stage -> device, `auto` for none.
        splits: stage -> its layers by device, see `parse_split`.

    Raises:
        GLMImageError: a stage is both pinned and split.
    """
    asked = _Requested(stages, devices, pins or {}, splits or {})
    spread, least = strategy == STRATEGIES[1], strategy == STRATEGIES[2]
    placed = _Draft(devices)
    for stage in sorted(stages, key=lambda stage: stage.weights, reverse=True):
        leader = [part for part in placed.parts if part.stage == stage.follows]
        if leader:
            placed.parts.append(_part(stage, placed.devices[leader[0].device], least=least))
        else:
            placed.parts += asked.parts(stage) or _choose(stage, placed, spread, least)
    order = [stage.name for stage in stages]
    parts = tuple(sorted(placed.parts, key=lambda part: order.index(part.stage)))
    notes = list(asked.notes)
    if spread and not placed.all_together:
        notes.append("There is no room to keep all stages loaded: some take turns.")
    notes += [note for stage in stages for note in _shortages(stage, parts, placed.devices)]
    return Plan(tuple(devices), parts, placed.together, least, tuple(notes))


class _Requested:
    """What the user fixed, without what this machine does not have."""

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
                raise GLMImageError(
                    f"{name} is set to {pin} and {name}_split is given too; use one of the two."
                )
            if pin != AUTO and self._has(name, [pin]):
                self.pins[name] = pin
            if split and self._has(name, [device for device, _ in split]):
                self.splits[name] = split

    def _has(self, stage: str, wanted: list[str]) -> bool:
        missing = [name for name in dict.fromkeys(wanted) if name not in self.devices]
        if missing:
            self.notes.append(
                f"{stage} asks for {' and '.join(missing)}, which this machine does not have: "
                "it is placed as with auto."
            )
        return not missing

    def parts(self, stage: Stage) -> list[Part]:
        """None where the user leaves the stage to the plan."""
        if stage.name in self.splits:
            ranges = self.splits[stage.name]
            return [_part(stage, self.devices[device], layers) for device, layers in ranges]
        if stage.name in self.pins:
            return [_part(stage, self.devices[self.pins[stage.name]])]
        return []


class _Draft:
    """The parts placed so far and the room that they leave."""

    def __init__(self, devices: Sequence[Device]) -> None:
        self.devices = {device.name: device for device in devices}
        self.candidates = [device for device in devices if device.name != CPU] or list(devices)
        self.parts: list[Part] = []

    def on(self, device: str) -> list[Part]:
        return [part for part in self.parts if part.device == device]

    def hold_too(self, parts: list[Part]) -> bool:
        """Whether these can stay loaded beside all that is there."""
        return not any(part.offloaded for part in parts) and all(
            _together([*self.on(part.device), part]) <= self.devices[part.device].room
            for part in parts
        )

    def left(self, device: Device, stage: Stage) -> Device:
        """The device with the room that others, staying loaded, leave to the stage."""
        parts = self.on(device.name)
        beside = max((part.beside for part in parts), default=0)
        taken = sum(part.resident for part in parts) + max(0, beside - stage.work)
        return replace(device, room=device.room - taken)

    @property
    def together(self) -> frozenset[str]:
        return frozenset(
            name
            for name, device in self.devices.items()
            if not any(part.offloaded for part in self.on(name))
            and _together(self.on(name)) <= device.room
        )

    @property
    def all_together(self) -> bool:
        return self.together >= {part.device for part in self.parts}


def _choose(stage: Stage, placed: _Draft, spread: bool, least: bool) -> list[Part]:
    """Beside the others if that can be, else in turns with them; whole rather than split."""
    devices = placed.candidates
    alone = _part(stage, max(devices, key=lambda device: device.room), least=least)
    if least:
        return [alone]
    for device in devices:
        whole = [_part(stage, device)]
        if placed.hold_too(whole):
            return whole
    if spread or alone.offloaded:
        parts = _split(stage, [placed.left(device, stage) for device in devices])
        if parts and placed.hold_too(parts):
            return parts
    return [alone] if not alone.offloaded else _split(stage, devices) or [alone]


def _split(stage: Stage, devices: Sequence[Device]) -> list[Part]:
    """Layers over as few devices as hold them, the roomiest first, in proportion to their room.

    Where all together do not hold them, each takes its share of what is streamed. Empty where
    there is nothing to split or fewer than two devices have room for a layer.
    """
    if not stage.layers:
        return []
    layer, total = max(stage.layers) + stage.kept, len(stage.layers)
    used: list[Device] = []
    able: list[int] = []
    for device in sorted(devices, key=lambda device: -device.room):
        room = device.room - stage.work - (0 if used else stage.rest)
        if room >= layer and sum(able) < total:
            used.append(device)
            able.append(room // layer)
    if len(used) < 2:
        return []
    parts, first = [], 0
    for device, count in zip(used, _shares(total, able), strict=True):
        parts.append(_part(stage, device, range(first, first + count)))
        first += count
    return parts


def _shares(total: int, able: list[int]) -> list[int]:
    """Whole numbers that add up to `total`, in proportion to `able`; none larger if they hold it.

    Every device in use is given one at least: it is in use because those before it fall short.
    """
    above, spare = total - len(able), max(1, sum(able) - len(able))
    shares = [1 + above * (count - 1) // spare for count in able]
    for _ in range(total - sum(shares)):
        spare = [count - share for count, share in zip(able, shares, strict=True)]
        shares[spare.index(max(spare))] += 1
    return shares


def _part(
    stage: Stage, device: Device, layers: range | None = None, *, least: bool = False
) -> Part:
    """All of a stage, or some of its layers, on a device: what does not fit is offloaded."""
    numbers = range(len(stage.layers)) if layers is None else layers
    in_layers = sum(stage.layers[i] for i in numbers)
    weights = in_layers + (stage.rest if numbers.start == 0 else 0)
    work = stage.work + stage.kept * len(numbers)
    if stage.least_work is not None:
        work = min(work, max(stage.least_work, device.room - weights))
    part = Part(stage.name, device.name, layers, weights, work)
    if device.name == CPU or (part.peak <= device.room and not least):
        return part
    if stage.streams_kept and len(numbers) > IN_FLIGHT:
        away = stage.kept * (len(numbers) - IN_FLIGHT)
        part = replace(part, work=work - away, kept_offloaded=stage.kept * len(numbers))
        if part.peak <= device.room and not least:
            return part
    buffer = max((stage.layers[i] for i in numbers), default=0)
    excess = part.peak + buffer - device.room
    return replace(part, offloaded=in_layers if least else min(weights, excess), buffer=buffer)


def _together(parts: Sequence[Part]) -> int:
    """Bytes while one of them works and the others stay loaded."""
    return sum(part.resident for part in parts) + max((part.beside for part in parts), default=0)


def _shortages(stage: Stage, parts: Sequence[Part], devices: Mapping[str, Device]) -> Iterable[str]:
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
        if part.kept_offloaded:
            yield (
                f"{stage.name} on {part.device}: {gib(part.kept_offloaded)} of references' keys "
                "and values stay in host memory and are streamed."
            )
        elif stage.least_work is not None and part.work < stage.work:
            yield (
                f"{stage.name} works in tiles on {part.device}: at once it would need "
                f"{gib(stage.work)} beside its weights."
            )


def gib(nbytes: float) -> str:
    return f"{nbytes / GIB:.1f} GiB"
