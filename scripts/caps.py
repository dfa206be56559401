"""`make caps`: what a full-size run takes of cards of 24, 16, 12 and 8 GiB, counted without one.

The server's device is simulated (`tests/simulated`) and holds no numbers, so that networks of the
real size run on any machine. What the host loads, leaves out and streams there, and what every
operation allocates, is counted; kernels' workspaces and an allocator's slack are not. The AR model
is stopped after some tokens: its cache is made for all of them before the first.
"""

import json
import math
import shutil
import struct
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

from glm_core.ar.model import ARConfig, ARModel
from glm_core.data.token_file import save_tokens
from glm_core.data.tokens import SemanticTokens
from glm_core.decoder.model import Decoder, DecoderConfig
from glm_core.glyph.encoder import GlyphConfig, GlyphEncoder
from glm_core.placement.plan import GIB
from glm_core.vae import AutoencoderKL, VAEConfig

from . import demo, environment, host
from .client import Client, Event, Prompt

SIMULATED = environment.ROOT / "tests" / "simulated"
HUB = environment.ROOT / "tests" / "configs" / "hub"
BASE = environment.CACHE / "caps"
CARDS = (24, 16, 12, 8)
SIDE = 1024
DRAWN = 8  # tokens after which the AR model is stopped
PARTS = {
    "vision_language_encoder": ("model", torch.bfloat16, ARModel, ARConfig),
    "transformer": ("diffusion_pytorch_model", torch.bfloat16, Decoder, DecoderConfig),
    "text_encoder": ("model", torch.float32, GlyphEncoder, GlyphConfig),
    "vae": ("diffusion_pytorch_model", torch.bfloat16, AutoencoderKL, VAEConfig),
}
"""Of the hub's snapshot: a part's file, its weights' dtype, its network and that one's config."""


def main(cards: list[float]) -> None:
    base = host.make_base(BASE)
    model = _write_checkpoint(base / "models" / "glm_image" / "Full-Size")
    _write_tokens(base / "input" / "tokens.safetensors")
    pack = base / "custom_nodes" / "simulated_npu"
    pack.unlink(missing_ok=True)
    pack.symlink_to(SIMULATED / pack.name)
    accelerator = {"PYTHONPATH": str(SIMULATED), "NPU_BYTES": str(80 * GIB), "NPU_EMPTY": "1"}
    print("| card | AR model | decoder | VAE |\n|---|---|---|---|")
    for gib in cards or CARDS:
        with host.serve(environment.host(), base, accelerator=accelerator) as address:
            peaks = _Card(Client(address), int(gib * GIB)).peaks(model)
            print(f"| {gib:g} |", " | ".join(f"{peak:.1f}" for peak in peaks), "|", flush=True)


class _Card:
    """A size of the server's device."""

    def __init__(self, client: Client, size: int) -> None:
        self._client = client
        self._size = size

    def peaks(self, model: str) -> tuple[float, float, float]:
        """GiB: of the AR model, of the decoder with what is left of the glyph encoder, of the VAE
        with what is left of both."""
        prompt = json.loads(demo.WORKFLOW.read_text())
        size = {"width": SIDE, "height": SIDE, "steps": 1}
        demo.set_inputs(prompt, {"model_name": model, "seed": self._size, **size})
        sampler = next(k for k, node in prompt.items() if "SampleTokens" in node["class_type"])
        return (self._ar(prompt), *self._decoder_and_vae(prompt, sampler))

    def _ar(self, prompt: Prompt) -> float:
        self._begin()
        peaks: list[float] = []

        def stop(event: Event) -> None:
            if event["type"] == "progress" and event["data"]["value"] >= DRAWN and not peaks:
                peaks.append(self._peak())
                self._client.interrupt()

        self._client.run(prompt, stop)
        return peaks[0]

    def _decoder_and_vae(self, prompt: Prompt, sampler: str) -> tuple[float, float]:
        """With tokens from a file."""
        node = {"class_type": "GLMImageLoadTokens", "inputs": {"file": "tokens.safetensors"}}
        prompt[sampler] = node
        running, peaks = "", {}
        self._unload()

        def begin(event: Event) -> None:
            nonlocal running
            if event["type"] == "executing":
                peaks[running] = self._peak()
                self._begin()
                running = event["data"]["node"]

        self._client.run(prompt, begin)
        by_type = {prompt[key]["class_type"]: peak for key, peak in peaks.items() if key}
        return by_type["GLMImageDecode"], by_type["VAEDecode"]

    def _unload(self) -> None:
        """The server does so when it next looks."""
        self._client.post("/free", {"unload_models": True})
        while self._memory()[0] > GIB:
            time.sleep(0.1)

    def _begin(self) -> None:
        self._client.post("/npu", [self._size])

    def _peak(self) -> float:
        return self._memory()[1] / GIB

    def _memory(self) -> tuple[int, int]:
        """Bytes taken, and the most since `_begin`."""
        ((taken, peak),) = json.loads(self._client.get("/npu"))
        return taken, peak


def _write_checkpoint(folder: Path) -> str:
    """A snapshot of the hub's sizes whose weights are holes in files; its name."""
    ignored = shutil.ignore_patterns("*.safetensors")
    shutil.copytree(demo.TINY, folder, ignore=ignored, dirs_exist_ok=True)
    for part, (file, dtype, network, read) in PARTS.items():
        config = json.loads((HUB / f"{part}_config.json").read_text())
        (folder / part / "config.json").write_text(json.dumps(config))
        with torch.device("meta"):
            state = network(read.from_dict(config)).state_dict()
        _write_empty(folder / part / f"{file}.safetensors", state, dtype)
    return folder.name


def _write_empty(path: Path, state: dict[str, Tensor], dtype: torch.dtype) -> None:
    """A safetensors file of zeros that takes no room: a header, and a hole as long as the data."""
    header, end = {}, 0
    name = {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
    for key, tensor in state.items():
        start, end = end, end + math.prod(tensor.shape) * dtype.itemsize
        header[key] = {"dtype": name, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _write_tokens(path: Path) -> None:
    codebook = json.loads((HUB / "vision_language_encoder_config.json").read_text())
    grid = torch.zeros(1, SIDE // 32, SIDE // 32, dtype=torch.int32)
    codes = codebook["vq_config"]["num_embeddings"]
    save_tokens(path, SemanticTokens(grid, codes, SIDE, SIDE, {}))


if __name__ == "__main__":
    main([float(size) for size in sys.argv[1:]])
