"""From a service to a process that listens: sockets, signals, slow clients, several workers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fasttx import terminal
from fasttx.errors import ConfigError
from fasttx.serving.limits import Limits
from fasttx.serving.models import Source

if TYPE_CHECKING:
    from fasttx.serving.app import Service

log = logging.getLogger("fasttx.serving")

MOST_HEADER_BYTES = 65_536
MOST_RESTARTS, RESTART_SECONDS = 5, 60.0  # of workers, in so many seconds


@dataclass(frozen=True)
class Settings:
    """What a service is started with."""

    sources: tuple[Source, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    limits: Limits = field(default_factory=Limits)
    workers: int = 1
    threads: int | None = None
    drain_seconds: float = 30.0
    log_file: Path | None = None
    log_texts: bool = False


def listen(host: str, port: int) -> socket.socket:
    """Raises ConfigError where nobody can listen there."""
    if not 0 <= port < 65536:
        raise ConfigError(f"port is {port}; expected 0 (any) to 65535")
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=2048, reuse_port=False)
    except OSError as error:
        said = error.strerror or str(error)
        raise ConfigError(
            f"cannot listen on {host} port {port}: {said}. Choose another --port or --host"
        ) from error


def _more_files() -> None:
    """Each connection is an open file: as many as the system allows without asking."""
    try:
        import resource
    except ImportError:  # Windows
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 20), hard))


# --- one process ----------------------------------------------------------------------------------


def _protocol(limits: Limits) -> type[asyncio.Protocol]:
    """HTTP connections that are closed when no whole request header comes in time."""

    class Impatient(HttpToolsProtocol):
        _deadline: asyncio.TimerHandle | None = None
        _header_bytes = 0

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            self._header_bytes += len(data)
            super().data_received(data)
            cycle: Any = self.cycle  # None before the first request
            if cycle is not None and not cycle.response_complete:
                self._unwatch()
            elif self._header_bytes > MOST_HEADER_BYTES:
                self.transport.close()
            elif self._deadline is None:
                self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._unwatch()
            super().connection_lost(exc)

        def _watch(self) -> None:
            self._deadline = self.loop.call_later(limits.read_seconds, self.transport.close)

        def _unwatch(self) -> None:
            self._header_bytes = 0
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = None

    return Impatient


class Server(uvicorn.Server):
    """Signals: SIGTERM or Ctrl-C answers what waits and ends, a second one ends at once; SIGHUP
    reads the models again."""

    def __init__(self, service: Service, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                service.app,
                http=_protocol(settings.limits),
                interface="asgi3",
                proxy_headers=False,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=15,
                timeout_graceful_shutdown=max(1, int(settings.drain_seconds)),
                backlog=2048,
            )
        )
        self.service, self.settings = service, settings
        self.received: int | None = None  # the signal that ends it
        self._tasks: set[asyncio.Task[None]] = set()

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, number)
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        # Who reads this line may send requests, and signals.
        where = _address(sockets[0]) if sockets else ""
        terminal.say(f"serving {', '.join(self.service.models)} on http://{where}")
        terminal.flush_output()

    def stop(self, number: int) -> None:
        if self.received is not None:
            os._exit(128 + number)
        self.received = number
        self.service.stopping = True
        log.info("stopping: what waits is answered first")
        self._later(self._drain())

    async def _drain(self) -> None:
        """New requests get 503 while those that wait are answered."""
        until = time.monotonic() + self.settings.drain_seconds
        while not self.service.idle and time.monotonic() < until:
            await asyncio.sleep(0.01)
        self.should_exit = True

    def reload(self) -> None:
        self.service.requests.reopen()
        for model in self.service.models.values():
            self._later(asyncio.to_thread(model.reload))

    def _later(self, what: Any) -> None:
        async def done() -> None:
            await what

        task = asyncio.get_running_loop().create_task(done())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def run_one(settings: Settings, sock: socket.socket) -> int:
    """Serve until a signal; the exit status."""
    import torch

    from fasttx.serving.app import Service
    from fasttx.serving.logs import RequestLog
    from fasttx.serving.metrics import Metrics
    from fasttx.serving.models import ServedModel

    _more_files()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    metrics = Metrics()
    requests = RequestLog(metrics, settings.log_file, settings.log_texts)
    models = [ServedModel(source, settings.limits, metrics) for source in settings.sources]
    service = Service(models, settings.limits, metrics, requests)
    server = Server(service, settings)
    server.run(sockets=[sock])
    service.close()
    return 0 if server.received in (None, signal.SIGTERM) else 128 + server.received


def _address(sock: socket.socket) -> str:
    host, port = sock.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


# --- several processes ----------------------------------------------------------------------------


Worker = Callable[[Settings, socket.socket], None]


class Workers:
    """Processes that share one socket. One that dies is started again."""

    def __init__(self, settings: Settings, sock: socket.socket, worker: Worker) -> None:
        self._settings, self._sock, self._worker = settings, sock, worker
        self._context = multiprocessing.get_context("spawn")
        self._running: list[Any] = []
        self._signal: int | None = None
        self._deaths: list[float] = []

    def run(self) -> int:
        with tempfile.TemporaryDirectory(prefix="fasttx-metrics-") as folder:
            os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, self._pass_on)
            try:
                for _ in range(self._settings.workers):
                    self._start()
                return self._watch()
            finally:
                del os.environ["PROMETHEUS_MULTIPROC_DIR"]

    def _start(self) -> None:
        process = self._context.Process(target=self._worker, args=(self._settings, self._sock))
        process.start()
        self._running.append(process)

    def _pass_on(self, number: int, frame: Any) -> None:
        ends = number != signal.SIGHUP
        if ends and self._signal is not None:
            number = signal.SIGKILL
        for process in self._running:
            if process.pid:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, number)
        if ends:
            self._signal = number

    def _watch(self) -> int:
        status = 0
        while self._running:
            multiprocessing.connection.wait([p.sentinel for p in self._running], timeout=1.0)
            for process in [p for p in self._running if not p.is_alive()]:
                process.join()
                self._running.remove(process)
                if self._signal is not None:
                    continue
                # A status of its own is an error that a new start would meet too.
                if process.exitcode is not None and process.exitcode > 0:
                    status = process.exitcode
                    self._pass_on(signal.SIGTERM, None)
                    continue
                if not self._may_restart():
                    terminal.complain(f"fasttx: error: {len(self._deaths)} workers died; giving up")
                    status = 1
                    self._pass_on(signal.SIGTERM, None)
                    continue
                log.error("a worker died (%s); another one starts", process.exitcode)
                self._start()
        if status or self._signal in (None, signal.SIGTERM):
            return status
        return 128 + int(self._signal)

    def _may_restart(self) -> bool:
        now = time.monotonic()
        self._deaths = [t for t in self._deaths if now - t < RESTART_SECONDS] + [now]
        return len(self._deaths) <= MOST_RESTARTS


def serve(settings: Settings, worker: Worker) -> int:
    """Until a signal; `worker` is what each of several processes runs, and calls `run_one`.

    Raises ConfigError where nobody can listen, and as `fasttx.load`.
    """
    _more_files()
    with listen(settings.host, settings.port) as sock:
        if settings.workers == 1:
            return run_one(settings, sock)
        return Workers(settings, sock, worker).run()


def sources_of(
    runs: Sequence[str], device: str, attn_backend: str | None, precision: str
) -> tuple[Source, ...]:
    """[NAME=]RUN each; without a name the folder's. Raises ConfigError for a name twice."""
    found: dict[str, Source] = {}
    for text in runs:
        name, separator, path = text.partition("=")
        run = Path(os.path.expanduser(path if separator else text))
        name = name if separator else run.resolve().name
        if not name or name in found:
            wrong = "taken" if name else "empty"
            raise ConfigError(
                f"the model name {name!r} of {text} is {wrong}; expected a name of its own for "
                "each: NAME=RUN"
            )
        found[name] = Source(name, run, device, attn_backend, precision)
    return tuple(found.values())
