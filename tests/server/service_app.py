"""The AR service's web application without Ray: `python service_app.py MODEL PORT KEY`."""

import sys

import torch
import uvicorn
from starlette.requests import Request
from starlette.responses import JSONResponse

from service.bounds import Bounds
from service.engine import Engine
from service.keys import digest
from service.model import ServedModel
from service.web import web_app

ROWS = 4

if __name__ == "__main__":
    _, path, port, key = sys.argv
    torch.set_num_threads(1)
    bounds = Bounds()
    model = ServedModel(path, torch.device("cpu"), ROWS, bounds)
    engine = Engine(model, bounds.queued)

    async def counts(_: Request) -> JSONResponse:
        return JSONResponse(engine.counts)

    app = web_app(model, engine, digest(key))
    app.add_route("/counts", counts)
    uvicorn.run(app, host="127.0.0.1", port=int(port))
