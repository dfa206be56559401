"""The one exception that the pack raises on purpose."""


class GLMImageError(ValueError):
    """A sentence for the person at the graph: what was wrong, the value, what to do."""

    __module__ = "glm_image"  # hosts show it, and import the pack under its path
