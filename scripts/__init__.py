"""Tools: the project's environments, and a ComfyUI server and its clients for demo and tests."""
