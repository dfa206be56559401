"""Tools of the project: its environments, a ComfyUI server for demo and tests, and what feeds them."""
