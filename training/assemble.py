"""From the training run's snapshot to `tiny/`: bfloat16 weights, one file a component."""

import argparse
import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent
KEPT_WHOLE = ("text_encoder",)  # float32 on the hub as well; a tenth of the bytes
WEIGHTS = "*.safetensors"
PIPELINE = {
    "_class_name": "GlmImagePipeline",
    "processor": ["transformers", "GlmImageProcessor"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "ByT5Tokenizer"],
    "transformer": ["diffusers", "GlmImageTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "vision_language_encoder": ["transformers", "GlmImageForConditionalGeneration"],
}


def assemble(snapshot: Path, target: Path) -> None:
    """Copy every component, its weights in bfloat16; what else lies in `target` stays.

    Raises:
        FileNotFoundError: a component has not been trained yet.
    """
    components = [name for name in PIPELINE if not name.startswith("_")]
    missing = [name for name in components if not (snapshot / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{snapshot} has no {', '.join(missing)}: train these stages first."
        )
    for name in components:
        shutil.rmtree(target / name, ignore_errors=True)
        shutil.copytree(snapshot / name, target / name, ignore=shutil.ignore_patterns(WEIGHTS))
        for file in (snapshot / name).glob(WEIGHTS):
            dtype = torch.float32 if name in KEPT_WHOLE else torch.bfloat16
            _store(file, target / name / file.name, dtype)
    (target / "model_index.json").write_text(json.dumps(PIPELINE, indent=2) + "\n")


def _store(source: Path, target: Path, dtype: torch.dtype) -> None:
    weights = {key: weight.to(dtype) for key, weight in load_file(source).items()}
    save_file(weights, target, {"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.assemble", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "tiny")
    parser.add_argument("--target", type=Path, default=ROOT / "tiny")
    given = parser.parse_args()
    assemble(given.folder / "snapshot", given.target)


if __name__ == "__main__":
    main()
