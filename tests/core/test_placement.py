"""Plans for many machines, at the hub's sizes."""

import pytest
from full_size import components
from glm_image.glm_core.errors import GLMImageError
from glm_image.glm_core.placement.plan import GIB, Device, Plan, Stage, plan_stages
from glm_image.glm_core.placement.splits import parse_split
from glm_image.glm_core.placement.stages import Request, stages
from glm_image.glm_core.placement.table import plan_table

RESERVE = 1.0


def plan(gpus, weights="default", strategy="auto", size=1024, batch=1, references=0, **asked):
    """A plan for the hub's model on GPUs of these GiB, and a CPU."""
    request = Request(size, size, batch, references)
    machine = [Device(f"gpu:{i}", int((gib - RESERVE) * GIB)) for i, gib in enumerate(gpus)]
    return plan_stages(
        stages(components(), weights, request),
        [*machine, Device("cpu", 64 * GIB)],
        strategy=strategy,
        **asked,
    )


def where(plan: Plan) -> str:
    """`stage=device` for whole stages, `stage=device+device` for split ones; ~ if streamed."""
    found: dict[str, list[str]] = {}
    for part in plan.parts:
        found.setdefault(part.stage, []).append(part.device + "~" * bool(part.offloaded))
    return " ".join(f"{stage}={'+'.join(devices)}" for stage, devices in found.items())


ONE = "ar=gpu:0 glyph=gpu:0 decoder=gpu:0 vae=gpu:0"
# GPUs in GiB, weights, strategy; the stages' devices, and devices on which stages take turns.
MACHINES = [
    ([80], "default", "auto", ONE, ""),
    ([48], "default", "auto", ONE, ""),
    ([24], "default", "auto", ONE, "gpu:0"),
    ([24], "fp8_e4m3fn", "auto", ONE, ""),
    ([16], "default", "auto", "ar=gpu:0~ glyph=gpu:0 decoder=gpu:0 vae=gpu:0", "gpu:0"),
    ([16], "fp8_e4m3fn", "auto", ONE, "gpu:0"),
    ([16], "int4", "auto", ONE, "gpu:0"),
    ([12], "default", "auto", "ar=gpu:0~ glyph=gpu:0 decoder=gpu:0~ vae=gpu:0", "gpu:0"),
    ([12], "fp8_e4m3fn", "auto", ONE, "gpu:0"),
    ([8], "default", "auto", "ar=gpu:0~ glyph=gpu:0 decoder=gpu:0~ vae=gpu:0", "gpu:0"),
    ([8], "fp8_e4m3fn", "auto", "ar=gpu:0~ glyph=gpu:0 decoder=gpu:0~ vae=gpu:0", "gpu:0"),
    ([8], "int4", "auto", ONE, "gpu:0"),
    ([24, 24], "default", "auto", "ar=gpu:0 glyph=gpu:0 decoder=gpu:1 vae=gpu:0", ""),
    ([24, 24], "fp8_e4m3fn", "auto", ONE, ""),
    ([16, 16], "default", "auto", "ar=gpu:0+gpu:1 glyph=gpu:1 decoder=gpu:0 vae=gpu:1", "gpu:0"),
    ([16, 16], "fp8_e4m3fn", "auto", "ar=gpu:0 glyph=gpu:0 decoder=gpu:1 vae=gpu:0", ""),
    (
        [12] * 4,
        "default",
        "auto",
        "ar=gpu:0+gpu:1 glyph=gpu:0 decoder=gpu:2+gpu:3 vae=gpu:0",
        "gpu:0",
    ),
    ([12] * 4, "int4", "auto", "ar=gpu:0 glyph=gpu:1 decoder=gpu:0 vae=gpu:1", ""),
    ([24, 8], "default", "auto", "ar=gpu:0 glyph=gpu:1 decoder=gpu:0 vae=gpu:1", "gpu:0"),
    ([80, 24], "default", "auto", ONE, ""),
    ([24, 80], "default", "auto", "ar=gpu:0 glyph=gpu:0 decoder=gpu:1 vae=gpu:0", ""),
    # auto leaves the decoder whole, in turns; fastest splits it so that all stay loaded
    ([28, 14], "default", "auto", "ar=gpu:0 glyph=gpu:1 decoder=gpu:0 vae=gpu:1", "gpu:0"),
    ([28, 14], "default", "fastest", "ar=gpu:0 glyph=gpu:0 decoder=gpu:1+gpu:0 vae=gpu:1", ""),
    ([80], "default", "fastest", ONE, ""),
    ([24], "default", "least memory", "ar=gpu:0~ glyph=gpu:0 decoder=gpu:0~ vae=gpu:0", "gpu:0"),
    ([8, 12], "int4", "least memory", "ar=gpu:1~ glyph=gpu:1 decoder=gpu:1~ vae=gpu:1", "gpu:1"),
    ([], "default", "auto", "ar=cpu glyph=cpu decoder=cpu vae=cpu", ""),
    ([], "int4", "least memory", "ar=cpu glyph=cpu decoder=cpu vae=cpu", ""),
]


@pytest.mark.parametrize(("gpus", "weights", "strategy", "expected", "turns"), MACHINES)
def test_machines(gpus, weights, strategy, expected, turns) -> None:
    found = plan(gpus, weights, strategy)
    assert where(found) == expected
    names = [device.name for device in found.devices]
    assert [name for name in names if name not in found.together] == turns.split()


@pytest.mark.parametrize("size", [512, 1024, 2048])
@pytest.mark.parametrize("weights", ["default", "fp8_e4m3fn", "int8", "int4"])
@pytest.mark.parametrize("strategy", ["auto", "fastest", "least memory"])
def test_every_byte_is_somewhere_and_no_device_is_overfull(size, weights, strategy) -> None:
    for gpus in ([80], [24], [12], [8], [16, 16], [12] * 4, [24, 8], [8, 8, 8]):
        for references in (0, 2):
            found = plan(gpus, weights, strategy, size, references=references)
            assert not [note for note in found.notes if "ask for a smaller size" in note]
            for stage in stages(components(), weights, Request(size, size, 1, references)):
                parts = found.of_stage(stage.name)
                assert sum(part.weights for part in parts) == stage.weights
                if len(parts) > 1:
                    layers = [i for part in parts for i in part.layers]
                    assert layers == list(range(len(stage.layers)))
                assert all(0 <= part.offloaded <= part.weights for part in parts)
            for device in found.devices:
                assert found.peak(device.name) <= device.room


def test_only_what_does_not_fit_is_offloaded() -> None:
    (ar,) = plan([16]).of_stage("ar")
    assert ar.peak == int(15 * GIB)
    assert ar.weights - ar.resident == ar.offloaded
    assert ar.buffer >= 0.3 * GIB  # a layer is fetched while another one computes


def test_least_memory_keeps_no_layer() -> None:
    found = plan([80], strategy="least memory")
    assert found.peak("gpu:0") < 5 * GIB
    for name in ("ar", "decoder"):
        (stage,) = (
            s for s in stages(components(), "default", Request(1024, 1024)) if s.name == name
        )
        (part,) = found.of_stage(name)
        assert part.offloaded == sum(stage.layers)


def test_work_too_large_for_the_device_gets_a_note() -> None:
    found = plan([8], size=2048, batch=8)
    (note,) = (note for note in found.notes if note.startswith("decoder"))
    assert "may be used: ask for a smaller size or batch" in note


def test_a_large_image_is_decoded_in_tiles() -> None:
    found = plan([12], size=2048)
    (vae,) = found.of_stage("vae")
    assert not vae.offloaded
    assert vae.peak == 11 * GIB
    assert any(note.startswith("vae works in tiles on gpu:0") for note in found.notes)
    assert not any("tiles" in note for note in plan([24], size=2048).notes)


def test_references_too_large_for_the_device_stay_in_host_memory() -> None:
    found = plan([24], size=2048, references=2)
    (decoder,) = found.of_stage("decoder")
    assert not decoder.offloaded
    assert decoder.cache_offloaded == 15 * GIB  # 30 blocks of keys and values of 32,768 tokens
    (note,) = (note for note in found.notes if note.startswith("decoder"))
    assert "15.0 GiB of references' keys and values stay in host memory" in note
    (decoder,) = plan([48], size=2048, references=2).of_stage("decoder")
    assert not decoder.cache_offloaded


def test_the_vision_tower_goes_where_the_text_model_goes() -> None:
    found = plan([24, 24], references=1, pins={"ar": "gpu:1"})
    assert where(found).startswith("vision=gpu:1 ar=gpu:1 ")
    assert not plan([24]).of_stage("vision")


def test_references_add_work_and_a_cache_beside_their_layers() -> None:
    halves = {"decoder": parse_split("gpu:0=0-9,gpu:1=10-29", "decoder", 30)}
    without = plan([24, 24], splits=halves).of_stage("decoder")
    found = plan([24, 24], splits=halves, references=1).of_stage("decoder")
    grown = [part.work - before.work for part, before in zip(found, without, strict=True)]
    cache = 1.875 * GIB  # 30 blocks, 4096 tokens, 4096 wide, keys and values, bf16
    joined = 4096 * 4096 * 2 * 2
    assert grown == [joined + cache / 3, joined + 2 * cache / 3]


# ---- pins and splits -----------------------------------------------------------------------------


def test_pins_and_splits_hold() -> None:
    found = plan(
        [24, 24],
        pins={"decoder": "gpu:0", "vae": "cpu", "glyph": "auto"},
        splits={"ar": parse_split("gpu:1=0-9,cpu=10-39", "ar", 40)},
    )
    assert where(found) == "ar=gpu:1+cpu glyph=gpu:0 decoder=gpu:0 vae=cpu"
    assert [part.layers for part in found.of_stage("ar")] == [range(10), range(10, 40)]
    assert found.notes == ()


def test_a_missing_device_counts_as_auto_with_a_note() -> None:
    found = plan(
        [24],
        pins={"vae": "gpu:3"},
        splits={"decoder": parse_split("gpu:0=0-9,gpu:1=10-29", "decoder", 30)},
    )
    assert where(found) == where(plan([24]))
    assert found.notes == (
        "decoder asks for gpu:1, which this machine does not have: it counts as auto.",
        "vae asks for gpu:3, which this machine does not have: it counts as auto.",
    )


def test_a_stage_is_not_both_pinned_and_split() -> None:
    split = parse_split("gpu:0=0-39", "ar", 40)
    with pytest.raises(GLMImageError, match="ar is set to cpu and ar_split is given too"):
        plan([24], pins={"ar": "cpu"}, splits={"ar": split})


def test_splits_are_parsed() -> None:
    assert parse_split("", "ar", 4) == parse_split("  ", "ar", 4) == ()
    assert parse_split("gpu:0=0-0, gpu:11=1-2 ,cpu=3-3", "ar", 4) == (
        ("gpu:0", range(1)),
        ("gpu:11", range(1, 3)),
        ("cpu", range(3, 4)),
    )


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("gpu:0", "ar_split holds 'gpu:0', which is not of the form device=first-last"),
        ("gpu:0=0", "ar_split holds 'gpu:0=0', which is not of the form"),
        (f"gpu:0=0-{'9' * 5000}", "which is not of the form"),
        ("gpu:0=0-1,", "ar_split holds '', which is not of the form"),
        ("gpu:0=0-1;gpu:1=2-3", "is not of the form"),
        ("cuda:0=0-3", "names the device 'cuda:0'; devices are called cpu, gpu:0, gpu:1"),
        ("gpu:0=3-0", "whose last layer comes before its first"),
        ("gpu:0=0-1,gpu:1=3-3", "gives gpu:1 the layers from 3 on where 2 is next"),
        ("gpu:0=0-1,gpu:1=1-3", "gives gpu:1 the layers from 1 on where 2 is next"),
        ("gpu:0=1-3", "gives gpu:0 the layers from 1 on where 0 is next"),
        ("gpu:0=0-2", "ends at layer 2 and the model's last one is 3"),
        ("gpu:0=0-4", "ends at layer 4 and the model's last one is 3"),
    ],
)
def test_a_wrong_split_is_one_sentence(text: str, sentence: str) -> None:
    with pytest.raises(GLMImageError) as error:
        parse_split(text, "ar", 4)
    assert sentence in str(error.value)


# ---- splitting -----------------------------------------------------------------------------------


def test_segments_are_in_proportion_to_the_room() -> None:
    stage = Stage("ar", (GIB,) * 12, rest=0, work=0)
    parts = plan_stages([stage], [Device("gpu:0", 4 * GIB), Device("gpu:1", 9 * GIB)]).parts
    assert [(part.device, part.layers) for part in parts] == [
        ("gpu:1", range(9)),
        ("gpu:0", range(9, 12)),
    ]


def test_where_all_devices_together_fall_short_each_streams_its_share() -> None:
    stage = Stage("ar", (GIB,) * 12, rest=0, work=0)
    parts = plan_stages([stage], [Device("gpu:0", 4 * GIB), Device("gpu:1", 4 * GIB)]).parts
    assert [part.layers for part in parts] == [range(6), range(6, 12)]
    assert [part.offloaded for part in parts] == [3 * GIB, 3 * GIB]  # two, and the buffer's one


def test_a_device_filled_by_the_other_weights_gets_a_layer_too() -> None:
    """The first device also holds the weights outside layers, and one layer fits beside them."""
    stage = Stage("ar", (GIB,) * 40, rest=9 * GIB, work=0)
    parts = plan_stages([stage], [Device(f"gpu:{i}", 10 * GIB) for i in range(5)]).parts
    assert [len(part.layers) for part in parts] == [1, 10, 10, 10, 9]
    assert sum(part.weights for part in parts) == stage.weights


def test_an_unused_device_without_room_is_no_shortage() -> None:
    stage = Stage("ar", (GIB,) * 4, rest=0, work=0)
    plan = plan_stages(
        [stage], [Device("gpu:0", 9 * GIB), Device("gpu:1", -GIB)], strategy="fastest"
    )
    assert not plan.notes
    assert "gpu:1: unused, 0.0 GiB free" in plan_table(plan)


# ---- the table -----------------------------------------------------------------------------------


def test_table() -> None:
    stage = Stage("ar", (3 * GIB,) * 4, rest=GIB, work=GIB // 2)
    found = plan_stages(
        [stage, Stage("vae", (), GIB, GIB)],
        [Device("gpu:0", 6 * GIB), Device("gpu:1", 8 * GIB), Device("cpu", 64 * GIB)],
        pins={"vae": "gpu:7"},
    )
    assert plan_table(found).splitlines() == [
        "stage          device  weights   offloaded  beside   expected peak",
        "ar layers 0-2  gpu:1   10.0 GiB  5.5 GiB    3.5 GiB  8.0 GiB",
        "ar layers 3-3  gpu:0   3.0 GiB   -          0.5 GiB  3.5 GiB",
        "vae            gpu:0   1.0 GiB   -          1.0 GiB  2.0 GiB",
        "",
        "gpu:0: expected peak 5.0 GiB of 6.0 GiB, all stay loaded",
        "gpu:1: expected peak 8.0 GiB of 8.0 GiB",
        "",
        "vae asks for gpu:7, which this machine does not have: it counts as auto.",
    ]
