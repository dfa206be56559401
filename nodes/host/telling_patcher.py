"""ComfyUI's patcher, which also tells of weights that leave the device before the others do."""

from typing import Any

import comfy.model_patcher

ON_PARTIAL_UNLOAD = "glm_on_partial_unload"
"""A kind of callback beside the host's own, called with the patcher before weights are moved."""


class TellingPatcher(comfy.model_patcher.ModelPatcher):
    """What is kept beside the weights may be larger than the part that the host takes away."""

    def partially_unload(self, *args: Any, **kwargs: Any) -> Any:
        for callback in self.get_all_callbacks(ON_PARTIAL_UNLOAD):
            callback(self)
        return super().partially_unload(*args, **kwargs)
