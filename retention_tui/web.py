"""A run's screen in a browser, for looking only: textual-serve starts one watching process for each visitor.

Run as a module, it is such a process: `python -m retention_tui.web RUN_FOLDER`. That one may only look is not left to
it: it says so when it connects, and the process that trains refuses every command (`engine.control`).
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from engine.errors import ExitCode, UserError
from engine.runs import find_run
from engine.store import RunDirectory
from retention_tui.fresh import fresh_process
from retention_tui.remote import RemoteClient
from retention_tui.session import Session

if TYPE_CHECKING:
    from aiohttp import web
    from textual_serve.app_service import AppService
    from textual_serve.server import Server

VISITORS = 8
"""At once; each is a process that takes some of the machine from the run."""
_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 1.0
_LARGEST_SIDE = 500
"""Cells of a visitor's window."""


def serve(runs_folder: Path, run_name: str, host: str, port: int) -> int:
    """Serves a live run's screen until Ctrl+C. Raises `UserError` where that cannot be."""
    run = find_run(runs_folder, run_name)
    RemoteClient(run, looks_only=True).close()  # raises where the run cannot be watched
    try:
        server = _make_server(run, host, port)
    except ModuleNotFoundError as error:
        raise UserError(f"watch --web needs {error.name}; install it with: pip install 'retention-tui[web]'") from None
    if not _is_loopback(host):
        warning = f"anybody who reaches {host}:{port} can look at this run: there is no password"
        print(f"retention-tui: {warning}", file=sys.stderr)
    try:
        asyncio.run(_serve(server))
    except OSError as error:
        raise UserError(f"{host}:{port} cannot be served: {error.strerror or error}") from None
    return ExitCode.OK


async def _serve(server: Server) -> None:
    """Until SIGINT or SIGTERM."""
    from aiohttp import web

    loop, over = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, over.set)
    runner = web.AppRunner(await server._make_app(), access_log=None, shutdown_timeout=_GRACE_SECONDS)
    await runner.setup()
    try:
        await web.TCPSite(runner, server.host, server.port).start()
        words = f"{server.title}, for looking only, at {server.public_url}; Ctrl+C ends this, and not the run"
        print(words, flush=True)
        await over.wait()
    finally:
        await runner.cleanup()


def _make_server(run: RunDirectory, host: str, port: int) -> Server:
    from aiohttp import web
    from textual_serve.server import Server

    class LookingServer(Server):
        """Lets in pages of its own only, and not too many at once."""

        def __init__(self, command: str) -> None:
            super().__init__(command, host=host, port=port, title=run.name)
            self.visitors = 0
            self._sockets: set[web.WebSocketResponse] = set()

        async def on_startup(self, app: web.Application) -> None:
            """Says nothing: it is said once it serves."""

        async def on_shutdown(self, app: web.Application) -> None:
            """Leaves nobody waiting, and waits for nobody."""
            for socket in tuple(self._sockets):
                with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
                    await asyncio.wait_for(socket.close(), _GRACE_SECONDS)

        async def handle_index(self, request: web.Request) -> Any:
            self.public_url = f"{request.scheme}://{request.host}"  # as the visitor sees it, also through `ssh -L`
            return await super().handle_index(request)

        async def handle_websocket(self, request: web.Request) -> web.WebSocketResponse:
            if not _is_own_page(request.headers.get("Origin"), request.host, loopback_only=_is_loopback(host)):
                raise web.HTTPForbidden(text="a page of another site")
            if self.visitors >= VISITORS:
                raise web.HTTPServiceUnavailable(text="too many visitors")
            size = {name: _sane(request.query.get(name), usual) for name, usual in (("width", 80), ("height", 24))}
            self.visitors += 1
            try:
                return await super().handle_websocket(request.clone(rel_url=request.rel_url.update_query(size)))
            finally:
                self.visitors -= 1

        async def _process_messages(self, websocket: web.WebSocketResponse, app_service: AppService) -> None:
            resize = app_service.set_terminal_size

            async def resize_sanely(width: object, height: object) -> None:
                await resize(_sane(width, 80), _sane(height, 24))

            app_service.set_terminal_size = resize_sanely  # type: ignore[method-assign]
            self._sockets.add(websocket)
            try:
                await super()._process_messages(websocket, app_service)
            finally:
                self._sockets.discard(websocket)

    command = shlex.join(fresh_process([str(run.path)], "retention_tui.web"))
    return LookingServer(f"exec {command}")


def _sane(cells: object, usual: int) -> int:
    """A window's width or height as a visitor gives it: an app that draws millions of cells would stop the machine."""
    try:
        return min(max(int(str(cells)), 1), _LARGEST_SIDE)
    except ValueError:
        return usual


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_own_page(origin: str | None, host: str, *, loopback_only: bool) -> bool:
    """Whether a request comes from a page that this server gave out.

    Any page in the same browser may try; one whose name was made to lead here (DNS rebinding) shows by that name.
    """
    if origin is None or urlsplit(origin).netloc != host:
        return False
    return not loopback_only or _is_loopback(urlsplit(f"//{host}").hostname or "")


def _visit(folder: str) -> int:
    """One visitor's screen; it ends with the server."""
    from retention_tui.app import RetentionApp

    run = RunDirectory(Path(folder))
    threading.Thread(target=_end_with_server, args=(os.getppid(),), daemon=True).start()
    try:
        client = RemoteClient(run, looks_only=True)
    except UserError as error:
        print(f"retention-tui: {error}", file=sys.stderr)
        return ExitCode.BAD_INPUT
    app = RetentionApp(Session(run.path.parent), client)
    app.run()
    return app.return_code or ExitCode.OK


def _end_with_server(server: int) -> None:
    """Textual's driver does not see that nobody is left to show anything to."""
    while os.getppid() == server:
        time.sleep(_LOOK_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    raise SystemExit(_visit(sys.argv[1]))
