"""What other machines of the cluster may ask of this node's agent: its status, and virtual machines here.

    GET    /status      what `vmthunder status --json` prints
    GET    /vms         {"vms": […]}, as `vmthunder ps --json` prints them
    POST   /vms         boot one; the answer is lines of JSON: {"step": …, "node": …} as things happen, at least one each
                        BEAT_S, then {"report": …}, as `vmthunder boot --json` prints it, or {"error": …, "exit_code": …}
    POST   /precache    bring an image here: lines of {"progress": {"done_bytes": …, "total_bytes": …}}, then {"report": …}
    DELETE /vms[/NAME]  end one, or all: {"destroyed": […]}

Each is done by our own command in a process of its own, so that neither an agent's death nor its handover touches a
guest; a boot that is under way then goes on, though nobody is told. A boot whose asker hangs up is interrupted, and
nothing is left of it. What is not in the tables below is refused; values go to the command as they are and are checked
there. Belongs to the event loop.
"""

import asyncio
import base64
import contextlib
import errno
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from vmthunder.errors import Conflict, NotFound, NotPermitted, Usage
from vmthunder.ids import NodeId
from vmthunder.node.command import Command
from vmthunder.node.control import Handler
from vmthunder.node.exchange import Exchange, json_object, serve
from vmthunder.node.policy import Part
from vmthunder.node.settings import AgentSettings, parse_address
from vmthunder.swarm.key import ClusterKey

MAX_BOOTS: Final = 16
"""At a time; others wait for their turn."""
MAX_COMMANDS: Final = 4
"""Of the others."""
BEAT_S: Final = 0.5
INTERRUPTED_S: Final = 15.0
"""How long a boot may take to clean up after itself."""
MAX_TEXT_CHARS: Final = 4096
MAX_SAID_BYTES: Final = 16 << 10
COUNTERS: Final = ("bytes_from_origin", "bytes_from_peers", "bytes_from_cache", "stalled_s")
"""Of `fetch` in the status."""

OPTIONS: Final[Mapping[str, type]] = {
    "name": str,
    "memory": int,
    "cpus": int,
    "disk_size": int,
    "driver": str,
    "accel": str,
    "cache": str,
    "append": str,
    "forward": list,
    "ready_pattern": str,
    "ready_agent": bool,
    "ready_port": int,
    "timeout": float,
}
"""Of `vmthunder boot`, by name and type."""
FILES: Final = ("user_data", "ssh_key")
"""Those that name a file. Their contents are sent, in base64."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}", re.ASCII)


async def listen(
    settings: AgentSettings, key: ClusterKey, node: NodeId, status: Callable[[], dict[str, Any]], precache: Handler
) -> tuple[asyncio.Server, int]:
    """Answer other machines that sign their orders to this `node`; returns the real port.

    Raises:
        Conflict, NotPermitted, Usage: this address cannot be listened at.
    """
    assert settings.control_listen is not None
    host, port = parse_address(settings.control_listen, "--control-listen")
    try:
        server = await serve(host, port, partial(key.order_mac, node), RemoteControl(settings, status, precache).handle)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise Conflict(f"port {port} of {host} is in use; choose another with --control-listen") from None
        if error.errno == errno.EACCES:
            raise NotPermitted(f"port {port} of {host} needs root") from None
        raise Usage(f"cannot listen for orders at {host}:{port}: {error.strerror or error}") from None
    return server, server.sockets[0].getsockname()[1]


class RemoteControl:
    """The routes."""

    def __init__(self, settings: AgentSettings, status: Callable[[], dict[str, Any]], precache: Handler) -> None:
        self._status = status
        self._precache = precache
        self._vms = [f"--state-dir={settings.state_dir}"]
        self._agent = [f"--run-dir={settings.run_dir}"]
        self._boots = asyncio.Semaphore(MAX_BOOTS)
        self._commands = asyncio.Semaphore(MAX_COMMANDS)

    async def handle(self, exchange: Exchange) -> None:
        """One request. Raises VMThunderError."""
        match exchange.method, exchange.path.split("/")[1:]:
            case "GET", ["status"]:
                await exchange.answer(self._status())
            case "GET", ["vms"]:
                await exchange.answer({"vms": await self._run("ps")})
            case "POST", ["vms"]:
                await self._boot(exchange, json_object(exchange.body))
            case "POST", ["precache"]:
                await self._bring(exchange, json_object(exchange.body))
            case "DELETE", ["vms"]:
                await exchange.answer(await self._run("destroy", "--all"))
            case "DELETE", ["vms", name] if _NAME.fullmatch(name):
                await exchange.answer(await self._run("destroy", "--", name))
            case _:
                raise NotFound(f"there is no {exchange.method} {exchange.path[:200]} here")

    async def _bring(self, exchange: Exchange, wanted: Mapping[str, Any]) -> None:
        if wanted.keys() != {"image", "what", "rate_bytes_s"} or wanted["what"] not in list(Part):
            raise Usage("image, what (boot-set or full) and rate_bytes_s are wanted")
        request = {
            "image": _text("image", wanted["image"]),
            "what": wanted["what"],
            "rate_bytes_s": wanted["rate_bytes_s"],
        }
        if type(wanted["rate_bytes_s"]) is not int or wanted["rate_bytes_s"] < 0:
            raise Usage("rate_bytes_s: a number of bytes is wanted")
        await exchange.line({"report": await self._precache(request, lambda value: exchange.line({"progress": value}))})
        await exchange.end()

    async def _run(self, *arguments: str) -> Any:
        """The JSON that a short command prints."""
        async with self._commands:
            command = Command([arguments[0], "--json", *self._vms, *arguments[1:]])
            await command.listen()
            printed, said = await asyncio.gather(command.output.read(), command.errors.read())
            return await command.result(printed, said)

    async def _boot(self, exchange: Exchange, wanted: Mapping[str, Any]) -> None:
        with _arguments(wanted) as (arguments, files):
            boot = _Boot(exchange, self._status)
            working = asyncio.create_task(boot.run(self._boots, [*self._vms, *self._agent, *arguments], files))
            telling = asyncio.create_task(boot.tell())
            gone = asyncio.create_task(exchange.hung_up())
            try:
                await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
                if not working.done():
                    await boot.interrupt(working)
                    return
            finally:
                for task in (telling, gone):
                    task.cancel()
                # The connection may have broken while something was told: nobody is there to hear of it.
                await asyncio.gather(telling, gone, return_exceptions=True)
        await exchange.line({"report": working.result(), "node": boot.node()})
        await exchange.end()


class _Boot:
    """A boot that somebody waits for: where it is, told when that changes and every BEAT_S."""

    def __init__(self, exchange: Exchange, status: Callable[[], dict[str, Any]]) -> None:
        self._exchange = exchange
        self._status = status
        self._command: Command | None = None
        self._step = "queued"
        self._moved = asyncio.Event()

    async def run(self, slots: asyncio.Semaphore, arguments: Sequence[str], files: Sequence[int]) -> Any:
        """The report. Raises what the command says."""
        async with slots:
            self._enter("launch")
            command = self._command = Command(["boot", "--json", "--progress", *arguments], files)
            await command.listen()
            said = b""
            async for line in command.errors:
                step = _step_of(line)
                if step is None:
                    said = (said + line)[:MAX_SAID_BYTES]
                else:
                    self._enter(step)
            return await command.result(await command.output.read(), said)

    async def interrupt(self, working: "asyncio.Task[Any]") -> None:
        """Nobody waits any longer: the command removes what it has made."""
        if self._command is None:
            working.cancel()
        else:
            self._command.interrupt()
            if not (await asyncio.wait({working}, timeout=INTERRUPTED_S))[0]:
                self._command.kill()
        await asyncio.gather(working, return_exceptions=True)

    async def tell(self) -> None:
        """Go on until cancelled."""
        while True:
            self._moved.clear()
            await self._exchange.line({"step": self._step, "node": self.node()})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await self._moved.wait()

    def node(self) -> dict[str, Any]:
        """What this node has brought in so far, for all guests together, and how long they waited for it."""
        status = self._status()
        return {"pid": status["pid"], **{key: status["fetch"][key] for key in COUNTERS}}

    def _enter(self, step: str) -> None:
        self._step = step
        self._moved.set()


def _step_of(line: bytes) -> str | None:
    """The step that a line of `boot --progress` tells; None: it is something else."""
    try:
        value = json.loads(line)
    except ValueError:
        return None
    step = value.get("step") if isinstance(value, dict) else None
    return step if isinstance(step, str) else None


@contextlib.contextmanager
def _arguments(wanted: Mapping[str, Any]) -> Iterator[tuple[list[str], list[int]]]:
    """Arguments of `vmthunder boot`, and descriptors that it inherits for files that they name. Raises Usage."""
    arguments: list[str] = []
    files: list[int] = []
    try:
        for key, value in wanted.items():
            option = f"--{key.replace('_', '-')}"
            if key in FILES:
                files.append(file := os.memfd_create(key))
                os.write(file, _file_contents(key, value))
                arguments.append(f"{option}=/proc/self/fd/{file}")
            elif key in OPTIONS:
                arguments += _option(option, OPTIONS[key], value)
            elif key != "image":
                raise Usage(f"{key[:80]!r} is no option of a boot on another node")
        yield [*arguments, "--", _text("image", wanted.get("image"))], files
    finally:
        for file in files:
            os.close(file)


def _option(option: str, kind: type, value: Any) -> list[str]:
    if kind is list:
        if not isinstance(value, list) or not all(type(one) is int for one in value):
            raise Usage(f"{option}: a list of numbers is wanted")
        return [f"{option}={one}" for one in value]
    if kind is str:
        return [f"{option}={_text(option, value)}"]
    if kind is bool and isinstance(value, bool):
        return [option] if value else []
    if (kind is not bool and type(value) is int) or (
        kind is float and isinstance(value, float) and math.isfinite(value)
    ):
        return [f"{option}={value}"]
    raise Usage(f"{option}: a {'truth value' if kind is bool else 'number'} is wanted")


def _text(what: str, value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT_CHARS or "\0" in value:
        raise Usage(f"{what}: a text of at most {MAX_TEXT_CHARS} characters is wanted")
    return value


def _file_contents(key: str, value: Any) -> bytes:
    try:
        return base64.b64decode(value, validate=True)
    except (TypeError, ValueError):
        raise Usage(f"{key} is to be sent in base64") from None
