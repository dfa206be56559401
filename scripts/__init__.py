"""Tools: the project's environments, a ComfyUI server for demo and tests, and what feeds them."""
