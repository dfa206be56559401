"""ComfyUI-GLM-Image: GLM-Image as native ComfyUI nodes."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """Called by ComfyUI once, at start; nothing of the host is imported before."""
    from .nodes import GLMImageExtension

    return GLMImageExtension()
