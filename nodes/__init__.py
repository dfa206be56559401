"""The nodes, one file per stage."""

from comfy_api.latest import ComfyExtension, io

from .apply_tokens import ApplyTokens
from .crop import CropToSize
from .decode import Decode, ModelSampling, Scheduler
from .device_plan import MakeDevicePlan
from .glyph import GlyphEncode
from .host import paths
from .join import CellsToMask, JoinTokens, PromptLines
from .keep_best import KeepBest
from .layout import ComposeLayouts, LayoutToTokens, LockLayout
from .loaders import LoadAR, LoadCheckpoint, LoadDecoder, LoadGlyphEncoder, LoadVAE
from .lora import LoadLora
from .read_text import ReadText
from .references import EncodeReference, EncodeTokens, MakeReferenceCache
from .remote import RemoteAR, watch_queue
from .score_tokens import ScoreTokens
from .semantic import SampleLayout, SampleTokens
from .show_tokens import ShowTokens
from .split_batch import SplitBatch
from .token_files import LoadTokens, SaveTokens

NODES: list[type[io.ComfyNode]] = [
    LoadCheckpoint,
    LoadAR,
    RemoteAR,
    LoadDecoder,
    LoadGlyphEncoder,
    LoadVAE,
    LoadLora,
    SampleTokens,
    SampleLayout,
    LockLayout,
    ComposeLayouts,
    LayoutToTokens,
    ShowTokens,
    SaveTokens,
    LoadTokens,
    EncodeTokens,
    GlyphEncode,
    EncodeReference,
    MakeReferenceCache,
    ApplyTokens,
    SplitBatch,
    Scheduler,
    ModelSampling,
    Decode,
    CropToSize,
    MakeDevicePlan,
    ScoreTokens,
    ReadText,
    KeepBest,
    JoinTokens,
    CellsToMask,
    PromptLines,
]


class GLMImageExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        paths.register()  # not in on_load, which ComfyUI 0.3.75 never calls
        watch_queue()
        return NODES
