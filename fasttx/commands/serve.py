"""`fasttx serve RUN`: labels over HTTP."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
from typing import Any

from fasttx.commands import ending, flags
from fasttx.errors import ConfigError
from fasttx.serving.limits import Limits


def _serve(args: argparse.Namespace) -> int:
    try:
        from fasttx.serving import app, server  # noqa: F401 - each needs packages of its own
    except ImportError as error:
        raise ConfigError(
            f"fasttx serve needs {error.name}: pip install 'fasttx[serve]'"
        ) from error
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    limits = {f.name: getattr(args, f.name) for f in dataclasses.fields(Limits) if f.name in args}
    settings = server.Settings(
        server.sources_of(args.runs, args.device, args.attn_backend, args.precision),
        args.host,
        args.port,
        Limits(**limits),
        args.workers,
        args.threads,
        args.drain_seconds,
        args.log_file,
        args.log_texts,
    )
    return server.serve(settings, _worker)


def _worker(settings: Any, sock: Any) -> None:
    """One of several processes."""
    from fasttx.serving.server import run_one

    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.exit(ending.exit_status("fasttx", lambda: run_one(settings, sock)))


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="answer HTTP requests with a trained run",
        description='POST /predict with {"text": "..."} or a list of texts. A page to try it is at '
        "/, a description at /docs, counters at /metrics. SIGTERM answers what waits and ends; "
        "SIGHUP reads the runs again.",
    )
    parser.add_argument(
        "runs", metavar="[NAME=]RUN", nargs="+", help="run folders; the first one is the default"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port; 0: any")
    parser.add_argument(
        "--workers", type=flags.processes, default=1, metavar="N", help="processes (default: 1)"
    )
    parser.add_argument(
        "--threads", type=flags.threads, metavar="N", help="threads of each (default: the cores)"
    )
    flags.add_device(parser)
    parser.add_argument("--attn-backend", help="instead of the run's own choice")
    flags.add_precision(parser)
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=30.0,
        metavar="X",
        help="how long SIGTERM waits for requests (default: 30)",
    )
    parser.add_argument(
        "--log-file", type=flags.path, metavar="FILE", help="of requests (default: standard error)"
    )
    parser.add_argument(
        "--log-texts", action="store_true", help="log the texts too; without it none is kept"
    )
    flags.add_settings(parser, Limits)
    parser.set_defaults(run_command=_serve)
