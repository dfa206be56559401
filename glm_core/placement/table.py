"""A plan as a table that a person reads."""

from .plan import CPU, Device, Plan, gib

HEADINGS = ("stage", "device", "weights", "offloaded", "beside", "expected peak")


def plan_table(plan: Plan) -> str:
    """A row for each stage or segment, a line for each device, then the plan's notes."""
    rows = [
        (
            part.stage if part.layers is None else f"{part.stage} {_layers(part.layers)}",
            part.device,
            gib(part.weights),
            gib(part.offloaded) if part.offloaded else "-",
            gib(part.beside),
            gib(part.peak),
        )
        for part in plan.parts
    ]
    widths = [max(map(len, column)) for column in zip(HEADINGS, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (HEADINGS, *rows)
    ]
    used = {part.device for part in plan.parts}
    devices = [
        _device(plan, device)
        for device in plan.devices
        if device.name in used or device.name != CPU
    ]
    notes = ("", *plan.notes) if plan.notes else ()
    return "\n".join((*lines, "", *devices, *notes))


def _layers(layers: range) -> str:
    return f"layers {layers.start}-{layers.stop - 1}"


def _device(plan: Plan, device: Device) -> str:
    stages = {part.stage for part in plan.parts if part.device == device.name}
    if not stages:
        return f"{device.name}: unused, {gib(max(device.room, 0))} free"
    shared = "all stay loaded" if device.name in plan.together else "its stages take turns"
    peak = f"{gib(plan.peak(device.name))} of {gib(device.room)}"
    return f"{device.name}: expected peak {peak}" + (f", {shared}" if len(stages) > 1 else "")
