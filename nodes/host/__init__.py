"""The only place that touches ComfyUI's internals: model objects, patchers, memory, progress."""
