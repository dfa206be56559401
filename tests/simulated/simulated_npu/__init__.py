"""A custom node pack for the tests' server: its simulated memory, over HTTP.

GET /npu: bytes taken and the most so far, of each device. POST /npu with a list of sizes: the
devices have those from then on, and the most so far is what is taken.
"""

import torch_npu
from aiohttp import web
from server import PromptServer

NODE_CLASS_MAPPINGS: dict = {}


@PromptServer.instance.routes.get("/npu")
async def taken(request: web.Request) -> web.Response:
    return web.json_response([[memory.taken, memory.peak] for memory in torch_npu.MEMORY])


@PromptServer.instance.routes.post("/npu")
async def resize(request: web.Request) -> web.Response:
    for memory, size in zip(torch_npu.MEMORY, await request.json(), strict=True):
        memory.size, memory.peak = size, memory.taken
    return web.Response()
