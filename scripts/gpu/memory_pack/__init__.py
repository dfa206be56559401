"""A custom node pack for the measured server: torch's count of its memory, over HTTP.

GET /memory: bytes in use and their peak, for each device. POST /memory with a list of one size:
the process may use so many bytes of the device, and its peak becomes the bytes in use.
"""

import torch
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict = {}


@PromptServer.instance.routes.get("/memory")
async def in_use(request: web.Request) -> web.Response:
    if not torch.cuda.is_available():
        return web.json_response([[0, 0]])
    return web.json_response([[torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()]])


@PromptServer.instance.routes.post("/memory")
async def limit(request: web.Request) -> web.Response:
    (size,) = await request.json()
    if torch.cuda.is_available():
        share = min(size / torch.cuda.mem_get_info()[1], 1.0)
        torch.cuda.set_per_process_memory_fraction(share)
        torch.cuda.reset_peak_memory_stats()
    return web.Response()
