"""On two accelerators with little memory, through a real server: offloaded, split, out of memory.

The devices are simulated (`tests/simulated`): the CPU computes, under an accelerator's rules. So
the numbers must be the CPU's, and a tensor on the wrong device is an error.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from glm_image.scripts import environment, host
from glm_image.scripts.client import Client, Prompt, PromptError
from graphs import MODEL, add, fresh, planned, the
from pictures import first_image
from reference import reference_snapshot

SIMULATED = Path(__file__).resolve().parents[1] / "simulated"
AMPLE = 4 * 10**9
TIGHT = 1_278_650_000  # the bytes that ComfyUI keeps free of a device, and some of our weights
FULL = 100_000
NOISE_LEVELS = 4000  # bytes of those of a failed run, until Python collects garbage
FP32 = "--force-fp32"  # else bf16, which the server on the CPU does not choose for these files


class Machine:
    """A server with two accelerators."""

    def __init__(self, address: str, log: Path) -> None:
        self.client = Client(address, timeout_s=120)
        self._log = log

    def picture(self, prompt: Prompt) -> np.ndarray:
        return first_image(self.client, self.client.run(prompt), prompt)

    def resize(self, *sizes: int) -> None:
        """Set the bytes of each device, and reset their peaks."""
        self.client.post("/npu", list(sizes))

    @property
    def memory(self) -> list[list[int]]:
        """Bytes in use and their peak, for each device."""
        return json.loads(self.client.get("/npu"))

    def unload(self) -> None:
        """Unload all models, as the page's button does, and wait until the server has done so."""
        self.client.unload_models(lambda: self.memory[0][0] <= NOISE_LEVELS)

    @property
    def log(self) -> str:
        return self._log.read_text()


@contextmanager
def serving(folder: Path, *flags: str, **variables: str) -> Iterator[Machine]:
    base = host.make_base(folder)
    reference_snapshot(base / "models" / "glm_image" / MODEL, "small")
    pack = base / "custom_nodes" / "simulated_npu"
    pack.symlink_to(SIMULATED / pack.name)
    accelerator = {"PYTHONPATH": str(SIMULATED), "NPU_BYTES": f"{AMPLE},{AMPLE}", **variables}
    server = host.serve(environment.host(), base, FP32, *flags, threads=1, accelerator=accelerator)
    with server as address:
        yield Machine(address, base / "server.log")


def assert_alike(ours: np.ndarray, cpus: np.ndarray) -> None:
    """Equal but for rounding; with other tokens it would be another picture."""
    assert np.abs(ours - cpus).max() <= 1


@pytest.fixture(scope="module")
def running(tmp_path_factory) -> Iterator[Machine]:
    with serving(tmp_path_factory.mktemp("accelerators")) as machine:
        yield machine


@pytest.fixture
def machine(running: Machine) -> Machine:
    running.unload()
    running.resize(AMPLE, AMPLE)
    return running


@pytest.mark.parametrize("name", ["text_to_image", "style_transfer"])
@pytest.mark.parametrize("room", [AMPLE, TIGHT])
def test_pictures_are_the_cpus(machine, picture, name: str, room: int) -> None:
    prompt = fresh(name)
    machine.resize(room, AMPLE)
    before = machine.log.count("loaded partially")
    assert_alike(machine.picture(prompt), picture(prompt))
    assert (machine.log.count("loaded partially") > before) == (room == TIGHT)
    (_, peak), (_, other) = machine.memory
    assert 0 < peak <= room
    assert other == 0


@pytest.mark.parametrize("split", ["gpu:0=0-0,gpu:1=1-1", "gpu:1=0-0,cpu=1-1", "cpu=0-0,gpu:0=1-1"])
def test_a_split_model_runs_on_both_devices(machine, picture, split: str) -> None:
    prompt = fresh("style_transfer")
    expected = picture(prompt)
    shown = planned(prompt, ar_split=split, decoder_split=split)
    run = machine.client.run(prompt)
    assert_alike(first_image(machine.client, run, prompt), expected)
    (table,) = run.outputs[shown]["text"]
    assert split.split("=")[0] in table
    assert "does not have" not in table


def test_least_memory_takes_less(machine, picture) -> None:
    prompt, peaks = fresh(), []
    expected = picture(prompt)
    for strategy in ("auto", "least memory"):
        changed_plan = json.loads(json.dumps(prompt))
        planned(changed_plan, strategy=strategy)
        machine.unload()
        machine.resize(AMPLE, AMPLE)
        assert_alike(machine.picture(changed_plan), expected)
        peaks.append(machine.memory[0][1])
    assert peaks[1] < peaks[0]


@pytest.mark.parametrize(
    ("workflow", "node", "name", "value", "stage"),
    [
        ("text_to_image", "GLMImageSampleTokens", "seed", 1, "The AR model"),
        ("text_to_image", "GLMImageDecode", "seed", 1, "The decoder"),
        ("style_transfer", "GLMImageReferenceCache", "precision", "fp8", "The reference cache"),
    ],
)
def test_out_of_memory_is_a_sentence_and_leaves_nothing_behind(
    machine, picture, workflow: str, node: str, name: str, value: object, stage: str
) -> None:
    """Ten failures at a stage whose inputs were made before; with memory again it works."""
    prompt = fresh(workflow)
    machine.client.run(prompt)
    prompt[the(prompt, node)]["inputs"][name] = value
    machine.resize(FULL, FULL)
    for _ in range(10):
        with pytest.raises(
            PromptError, match=f"{stage} (ran out of memory|needs .* GiB) on gpu:0.* use "
        ):
            machine.client.run(prompt)
    machine.resize(AMPLE, AMPLE)
    assert_alike(machine.picture(prompt), picture(prompt))
    machine.unload()
    assert machine.memory[0][0] in (0, NOISE_LEVELS)
    assert machine.memory[1][0] == 0


@pytest.mark.parametrize("flag", ["--lowvram", "--novram", "--highvram"])
def test_the_hosts_flags(tmp_path, picture, flag: str) -> None:
    prompt = fresh("style_transfer")
    with serving(tmp_path, flag) as machine:
        assert_alike(machine.picture(prompt), picture(prompt))
        assert machine.memory[0][1] > 0


def test_without_numbers_as_many_bytes_are_counted(machine, tmp_path) -> None:
    """`make simulated-cards` counts so, for networks too large for a test to compute."""
    prompt = fresh()
    machine.client.run(prompt)
    with serving(tmp_path, NPU_EMPTY="1") as empty:
        empty.client.run(prompt)
        difference = np.subtract(machine.memory, empty.memory)
    assert set(difference.flatten()) <= {0, NOISE_LEVELS}


if (environment.host().path / "comfy_extras" / "nodes_multigpu.py").exists():  # not in 0.3.75

    @pytest.mark.parametrize("name", ["text_to_image", "style_transfer"])
    @pytest.mark.parametrize(
        ("node", "how"),
        [("SelectModelDevice", {"device": "gpu:1"}), ("MultiGPU_WorkUnits", {"max_gpus": 2})],
    )
    def test_the_hosts_device_nodes(machine, name: str, node: str, how: dict) -> None:
        """A reference cache that was made on the first device is copied to the second."""
        prompt = fresh(name)
        expected = machine.picture(prompt)
        decoder, decode = the(prompt, "GLMImageLoadDecoder"), the(prompt, "GLMImageDecode")
        machine.unload()
        machine.resize(AMPLE, AMPLE)
        placed = add(prompt, node, model=[decoder, 0], **how)
        prompt[decode]["inputs"]["model"] = [placed, 0]
        assert_alike(machine.picture(prompt), expected)
        assert machine.memory[1][1] > 0
