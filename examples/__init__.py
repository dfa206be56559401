"""Scripts that use `glm_core` alone."""
