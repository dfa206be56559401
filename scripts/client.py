"""A client of ComfyUI's HTTP and websocket interface: queues a prompt and follows it."""

import json
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

import websocket

Prompt = dict[str, dict]
Event = dict


class PromptError(RuntimeError):
    """The server refused a prompt or failed at it; the message is the server's.

    `node_id` is the node that the server names, None if it names none.
    """

    def __init__(self, message: str, node_id: str | None = None, kind: str = "") -> None:
        super().__init__(message)
        self.node_id = node_id
        self.kind = kind


@dataclass
class Run:
    """A finished prompt: node ids in order of execution, seconds and UI outputs by node."""

    prompt_id: str
    cached: set[str] = field(default_factory=set)
    executed: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    outputs: dict[str, dict] = field(default_factory=dict)
    interrupted_at: str | None = None


class Client:
    def __init__(self, address: str, timeout_s: float = 600) -> None:
        self.address = address
        self.id = uuid.uuid4().hex
        self.timeout_s = timeout_s

    def run(
        self,
        prompt: Prompt,
        on_event: Callable[[Event], None] = lambda event: None,
        on_picture: Callable[[bytes], None] = lambda message: None,
        on_queued: Callable[[], None] = lambda: None,
    ) -> Run:
        """Queues `prompt` and waits for its end.

        `on_event` is called with every JSON message of the prompt, `on_picture` with the bytes of
        every live preview, `on_queued` once the prompt stands in the queue.

        Raises:
            PromptError: the prompt is refused or fails; an interrupt is no error.
        """
        url = f"ws://{self.address}/ws?clientId={self.id}"
        socket = websocket.create_connection(url, timeout=self.timeout_s)
        try:
            run = Run(self._queue(prompt))
            on_queued()
            return self._follow(socket, run, on_event, on_picture)
        finally:
            socket.shutdown()  # close() would wait for the server's close message

    def _follow(self, socket: websocket.WebSocket, run: Run, on_event, on_picture) -> Run:
        running, since, error = None, time.perf_counter(), None
        while True:
            message = socket.recv()
            if isinstance(message, bytes):
                on_picture(message)
                continue
            event = json.loads(message)
            data = event["data"]
            if data.get("prompt_id") != run.prompt_id:
                continue
            on_event(event)
            match event["type"]:
                case "execution_cached":
                    run.cached = set(data["nodes"])
                case "executing":
                    now = time.perf_counter()
                    if running is not None:
                        run.seconds[running] = run.seconds.get(running, 0) + now - since
                    running, since = data["node"], now
                    if running is None:
                        break
                    run.executed.append(running)
                case "executed":
                    run.outputs[data["node"]] = data["output"] or {}
                case "execution_interrupted":
                    run.interrupted_at = data["node_id"]
                case "execution_error":
                    sentence = data["exception_message"].strip()
                    error = PromptError(sentence, data["node_id"], data["exception_type"])
        if error:
            raise error
        return run

    def _queue(self, prompt: Prompt) -> str:
        try:
            return self.post("/prompt", {"prompt": prompt, "client_id": self.id})["prompt_id"]
        except urllib.error.HTTPError as refusal:
            raise _refusal(json.loads(refusal.read())) from None

    def interrupt(self) -> None:
        self.post("/interrupt", {})

    def unload_models(self, are_gone: Callable[[], bool], timeout_s: float = 60) -> None:
        """Asks the server to unload all models until they are gone.

        After a prompt ComfyUI collects garbage. It reads what was asked for meanwhile only with the
        next prompt or after 1000 s, unless it is asked again.

        Raises:
            TimeoutError: they are still there.
        """
        deadline = time.monotonic() + timeout_s
        while not are_gone():
            if time.monotonic() > deadline:
                raise TimeoutError(f"The models were not unloaded within {timeout_s:.0f} s.")
            self.post("/free", {"unload_models": True})
            time.sleep(0.1)

    def images(self, run: Run, node_id: str) -> list[bytes]:
        """The encoded images of a node's output, fetched as the page does."""
        return [self.view(image) for image in run.outputs[node_id]["images"]]

    def view(self, image: dict) -> bytes:
        return self.get(f"/view?{urllib.parse.urlencode(image)}")

    def object_info(self) -> dict[str, dict]:
        return json.loads(self.get("/object_info"))

    def get(self, path: str) -> bytes:
        with urllib.request.urlopen(f"http://{self.address}{path}", timeout=60) as answer:
            return answer.read()

    def post(self, path: str, body: dict | list) -> dict:
        request = urllib.request.Request(
            f"http://{self.address}{path}",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
        return json.loads(text) if text else {}


def _refusal(answer: dict) -> PromptError:
    """The first error of a refused prompt, with its node."""
    for node_id, errors in answer.get("node_errors", {}).items():
        for error in errors["errors"]:
            sentence = ": ".join(filter(None, (error["message"], error["details"])))
            return PromptError(sentence, node_id, error["type"])
    error = answer["error"]
    return PromptError(": ".join(filter(None, (error["message"], error["details"]))))
