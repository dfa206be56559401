"""ComfyUI-GLM-Image: GLM-Image as native ComfyUI nodes."""


async def comfy_entrypoint():
    """Called by ComfyUI once, at start; nothing of the host is imported before."""
    from .nodes import GLMImageExtension

    return GLMImageExtension()
