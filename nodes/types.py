"""The wire types of the pack, beside ComfyUI's own, and the menu category."""

from comfy_api.latest import io

AR = io.Custom("GLM_AR")
Tokens = io.Custom("GLM_TOKENS")
Layout = io.Custom("GLM_LAYOUT")
References = io.Custom("GLM_REFERENCES")
ReferenceCache = io.Custom("GLM_REFERENCE_CACHE")
DevicePlan = io.Custom("GLM_DEVICE_PLAN")

CATEGORY = "GLM-Image"
