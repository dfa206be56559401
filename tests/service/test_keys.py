"""Who may ask where there is no key: only clients on the service's own machine."""

import json
import subprocess

from scripts import environment

PROGRAM = """
import asyncio, json
from service.keys import KeyCheck

async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": []})

def status(client, path="/info"):
    found = []
    async def send(message):
        found.append(message.get("status"))
    scope = {"type": "http", "path": path, "client": client, "headers": []}
    asyncio.run(KeyCheck(app, None)(scope, None, send))
    return found[0]

clients = [("127.0.0.1", 1), ("127.9.9.9", 1), ("::1", 1), ("10.0.0.1", 1), ("::", 1), None]
print(json.dumps([status(client) for client in clients] + [status(("10.0.0.1", 1), "/health")]))
"""


def test_without_a_key_only_this_machine_is_answered() -> None:
    command = [environment.service_python(), "-c", PROGRAM]
    out = subprocess.run(command, cwd=environment.ROOT, capture_output=True, text=True, check=True)
    assert json.loads(out.stdout) == [200, 200, 200, 401, 401, 401, 200]
