"""A custom node pack for the tests' server: its simulated memory, over HTTP.

GET /npu: bytes in use and their peak, for each device. POST /npu with a list of sizes: sets the
size of each device, and its peak to the bytes in use.
"""

import torch_npu
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict = {}


@PromptServer.instance.routes.get("/npu")
async def in_use(request: web.Request) -> web.Response:
    return web.json_response([[memory.in_use, memory.peak] for memory in torch_npu.MEMORY])


@PromptServer.instance.routes.post("/npu")
async def resize(request: web.Request) -> web.Response:
    for memory, size in zip(torch_npu.MEMORY, await request.json(), strict=True):
        memory.size, memory.peak = size, memory.in_use
    return web.Response()
