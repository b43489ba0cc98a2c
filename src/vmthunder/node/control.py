"""The agent's local interface: a unix socket that only root may open, and both ends of what is said over it.

A connection carries one request, one line of JSON, `{"do": "materialize", "image": "debian-12"}`. The answer is lines
too: any number of `{"progress": …}`, then `{"result": …}` or `{"error": "one line", "exit_code": 3}`. Lines instead of
HTTP, because an HTTP library costs each worker 17 MiB and each takeover 0.15 s, while guests wait.

`AgentClient` is for other processes and blocks. `serve` belongs to the worker's event loop.
"""

import asyncio
import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from vmthunder.errors import AgentUnavailable, Failure, VMThunderError
from vmthunder.node import ownership
from vmthunder.node.settings import DEFAULT_RUN_DIR, control_socket

log = logging.getLogger(__name__)

MAX_REQUEST_BYTES = 64 << 10
ANSWER_S = 30.0
"""How long an answer may take that depends on nothing but the agent."""
TAKEOVER_S = 30.0
"""How long a client waits for a worker that is just being replaced."""
_POLL_S = 0.02

Progress = Callable[[Any], Awaitable[None]]
Handler = Callable[[Mapping[str, Any], Progress], Awaitable[Any]]

_ERRORS = {cls.exit_code: cls for cls in reversed(VMThunderError.__subclasses__())}


def error_of(exit_code: int, message: str) -> VMThunderError:
    """The error that crossed a process boundary as its exit code and its line."""
    return _ERRORS.get(exit_code, Failure)(message)


async def serve(path: Path, handlers: Mapping[str, Handler]) -> asyncio.Server:
    """Answer requests at `path`, which replaces what a dead worker left there."""
    # Bound under another name and renamed: whoever finds the socket finds somebody who listens.
    temporary = path.with_name(path.name + ".new")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(temporary))
    finally:
        os.umask(before)
    listener.listen(64)
    temporary.rename(path)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async def send(value: Any) -> None:
            writer.write(json.dumps(value).encode() + b"\n")
            await writer.drain()

        try:
            await send(await _outcome(handlers, await reader.readline(), send))
        except (ConnectionError, ValueError):
            pass  # The client went away, or sent a line without an end: nobody is there to be told.
        finally:
            writer.close()

    return await asyncio.start_unix_server(answer, sock=listener, limit=MAX_REQUEST_BYTES)


async def _outcome(handlers: Mapping[str, Handler], line: bytes, send: Progress) -> dict[str, Any]:
    async def progress(value: Any) -> None:
        await send({"progress": value})

    try:
        request = json.loads(line)
        handler = handlers[request["do"]]
    except (ValueError, TypeError, KeyError):
        return {
            "error": "this agent does not know that request; restart it with `vmthunder agent --restart`",
            "exit_code": 2,
        }
    try:
        return {"result": await handler(request, progress)}
    except VMThunderError as error:
        return {"error": str(error), "exit_code": error.exit_code}
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        log.critical("event=control_request_failed do=%s", request["do"], exc_info=True)
        return {"error": f"the agent failed to {request['do']}; its log says why", "exit_code": 1}


class AgentClient:
    """Talks to the agent of this host. Every method raises AgentUnavailable if there is none."""

    def __init__(self, socket_path: Path | None = None) -> None:
        self._path = socket_path or control_socket(Path(os.environ.get("VMTHUNDER_RUN_DIR", DEFAULT_RUN_DIR)))

    def status(self) -> dict[str, Any]:
        """What the agent does now; the keys are those of `vmthunder status --json`."""
        return self._ask("status", timeout_s=ANSWER_S)

    def resolve(self, name: str) -> dict[str, Any]:
        """The image that `name` (or an image id) names now: `name`, `image_id`, `path`, `virtual_bytes`.

        `path` contains the image id, so a guest that has it open keeps its bytes when the name is published again.

        Raises:
            NotFound, InvalidName, OriginUnavailable.
        """
        return self._ask("resolve", image=name)

    def materialize(
        self, name: str, progress: Callable[[int, int], None] = lambda _done, _total: None
    ) -> dict[str, Any]:
        """Place the whole image on this host; `progress` is told bytes done and bytes of all. Idempotent.

        Raises:
            NotFound, InvalidName, NoSpace.
        """
        return self._ask("materialize", progress, image=name)

    def dematerialize(self, name: str) -> dict[str, Any]:
        """Remove the local copy; `freed_bytes` in the result. Raises NotFound, InvalidName, Conflict (in use)."""
        return self._ask("dematerialize", image=name)

    def precache(
        self,
        name: str,
        what: str,
        rate_bytes_s: int = 0,
        progress: Callable[[int, int], None] = lambda _done, _total: None,
    ) -> dict[str, Any]:
        """Bring an image's boot set, or all of it, into this host's chunk cache; it goes on if we do not wait. Idempotent.

        Raises:
            NotFound, InvalidName, NoSpace.
        """
        return self._ask("precache", progress, image=name, what=what, rate_bytes_s=str(rate_bytes_s))

    def pin(self, name: str, what: str) -> dict[str, Any]:
        """Keep an image's chunks in the cache whatever else comes. Raises NotFound, InvalidName."""
        return self._ask("pin", image=name, what=what)

    def unpin(self, name: str) -> dict[str, Any]:
        """Let them go again. Raises NotFound."""
        return self._ask("unpin", image=name)

    def booted(self, image_id: str) -> None:
        """A guest of this image is ready: what it reads from now on is not its boot."""
        self._ask("booted", timeout_s=ANSWER_S, image=image_id)

    def restart(self, timeout_s: float = 60) -> dict[str, Any]:
        """Hand over to a new worker; returns the status of the new one. Raises Conflict if the keeper is gone."""
        before = self._ask("restart", timeout_s=ANSWER_S)["restarts"]
        deadline = time.monotonic() + timeout_s
        while (status := self.status())["restarts"] == before:
            if time.monotonic() > deadline:
                raise Failure(f"the agent did not hand over within {timeout_s:.0f} s; its log says why")
            time.sleep(_POLL_S)
        return status

    def stop(self, timeout_s: float = 60) -> dict[str, Any]:
        """End the agent and its mount; returns its last status, whose open images are so no more."""
        result = self._ask("stop", timeout_s=ANSWER_S)
        deadline = time.monotonic() + timeout_s
        while self._path.exists() or ownership.is_taken(self._path.parent):
            if time.monotonic() > deadline:
                raise Failure(
                    f"the agent (pid {result['pid']}) did not stop within {timeout_s:.0f} s; its log says why"
                )
            time.sleep(_POLL_S)
        return result

    def _ask(
        self,
        do: str,
        progress: Callable[[int, int], None] | None = None,
        timeout_s: float | None = None,
        **arguments: str,
    ) -> dict[str, Any]:
        """All requests may be repeated; so a worker that dies while it answers costs a repetition, not an error."""
        request = json.dumps({"do": do, **arguments}).encode() + b"\n"
        deadline = time.monotonic() + TAKEOVER_S
        while True:
            try:
                for reply in self._replies(request, timeout_s):
                    if "result" in reply:
                        result: dict[str, Any] = reply["result"]
                        return result
                    if "error" in reply:
                        raise error_of(reply["exit_code"], reply["error"])
                    deadline = time.monotonic() + TAKEOVER_S
                    if progress:
                        progress(reply["progress"]["done_bytes"], reply["progress"]["total_bytes"])
            except PermissionError:
                raise error_of(7, f"only root may talk to the agent at {self._path}") from None
            except OSError as error:
                # Nobody listens. While a keeper lives a new worker will.
                if not ownership.is_taken(self._path.parent) or time.monotonic() > deadline:
                    raise AgentUnavailable(
                        f"no agent answers at {self._path} ({error.strerror or error}); start one: `vmthunder agent`"
                    ) from None
            time.sleep(_POLL_S)

    def _replies(self, request: bytes, timeout_s: float | None) -> Iterator[dict[str, Any]]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(timeout_s)
            connection.connect(str(self._path))
            connection.sendall(request)
            with connection.makefile("rb") as lines:
                for line in lines:
                    if line.endswith(b"\n"):
                        yield json.loads(line)
            raise ConnectionResetError("the worker died before it answered")
