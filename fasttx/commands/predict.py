"""`fasttx predict`: the labels of texts."""

from __future__ import annotations

import argparse
import codecs
import dataclasses
import sys
from pathlib import Path
from typing import Any

from fasttx import terminal
from fasttx.commands import flags
from fasttx.errors import DataError
from fasttx.load import load


def _read_texts(args: argparse.Namespace) -> list[str]:
    """Those of the command line, then those of the file; without both, those of standard input."""
    texts = [terminal.decoded(text) for text in args.text]
    if args.file is None and texts:
        return texts
    if args.file is None and sys.stdin is not None and sys.stdin.isatty():
        raise DataError("no text: give texts, --file FILE, or lines on standard input")
    if args.file in (None, "-"):
        return texts + lines_of(_standard_input(), "standard input")
    with open(args.file, "rb") as f:
        return texts + lines_of(f.read(), args.file)


def _standard_input() -> bytes:
    if sys.stdin is None:
        raise DataError(
            "no text: standard input is closed; give texts, --file FILE, or lines on standard input"
        )
    buffer = getattr(sys.stdin, "buffer", None)  # a stand-in may have none
    if buffer is None:
        return sys.stdin.read().encode("utf-8", "surrogatepass")
    try:
        content: bytes = buffer.read()
    except OSError as error:
        error.filename = "standard input"
        raise
    return content


def lines_of(content: bytes, where: str) -> list[str]:
    """The lines, blank ones too, of UTF-8 text. They end at \\n or \\r\\n and at nothing else.

    Bytes that are not UTF-8 become U+FFFD, and a note says how many lines have such. Raises
    DataError for UTF-16, which Windows calls Unicode.
    """
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(
            f"{where} is UTF-16; expected UTF-8. Convert it, for instance with: iconv -f utf-16 -t "
            "utf-8"
        )
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    if not lines[-1]:  # what follows the last line's end is no line
        lines.pop()
    texts, undecodable = [], 0
    for line in lines:
        line = line.removesuffix(b"\r")
        try:
            texts.append(line.decode("utf-8"))
        except UnicodeDecodeError:
            texts.append(line.decode("utf-8", "replace"))
            undecodable += 1
    if undecodable:
        terminal.complain(
            f"note: {undecodable:,} of {len(lines):,} lines of {where} are not UTF-8; what cannot "
            "be decoded is read as U+FFFD"
        )
    return texts


def _score_file(args: argparse.Namespace) -> None:
    """A table in, the same table with predictions out."""
    from fasttx.scoring import Scorer, job

    if args.file in (None, "-") or args.text:
        raise DataError("--out takes the table that --file names, and no other texts")
    scorer = Scorer(
        args.run,
        precision=args.precision,
        device=args.device,
        attn_backend=args.attn_backend,
        batch_size=args.batch_size,
        all_probabilities=args.all_probabilities,
        threads=job.threads_of(args.workers),
    )
    source, out = Path(args.file), args.out
    done = job.run(job.Job(source, out, scorer, args.text_column, args.workers))
    rate = (done.rows - done.resumed) / max(done.seconds, 1e-9)
    before = f" ({done.resumed:,} of them before)" if done.resumed else ""
    terminal.say(f"{out}: {done.rows:,} rows{before}, {rate:,.0f} rows/s")


def _predict(args: argparse.Namespace) -> None:
    if args.out is not None:
        _score_file(args)
        return
    classifier = load(
        args.run, device=args.device, attn_backend=args.attn_backend, precision=args.precision
    )
    texts = _read_texts(args)
    for text, p in zip(texts, classifier.predict(texts, batch_size=args.batch_size), strict=True):
        if args.json:
            terminal.say_json({"text": text, **dataclasses.asdict(p)})
        else:
            shown = text if len(text) <= 80 else text[:77] + "..."
            terminal.say(terminal.one_line(f"{p}  {shown}").rstrip())


def add_command(commands: Any) -> None:
    parser = commands.add_parser("predict", help="label texts with a trained run")
    flags.add_run(parser)
    flags.add_inference(parser)
    flags.add_precision(parser)
    parser.add_argument("text", nargs="*", help="texts (default: lines of standard input)")
    parser.add_argument(
        "--file",
        type=flags.path_text,
        help="a UTF-8 file, one text a line, after those given as arguments; -: standard input; "
        "with --out a table (csv, tsv, jsonl, parquet, .gz)",
    )
    table = parser.add_argument_group("a table of any size")
    table.add_argument(
        "--out",
        type=flags.path,
        metavar="FILE",
        help="the table of --file with predictions; the same command goes on after a kill",
    )
    table.add_argument("--text-column", metavar="NAME", help="column of texts (default: found)")
    table.add_argument(
        "--all-probabilities", action="store_true", help="a column for each label's probability"
    )
    table.add_argument(
        "--workers", type=flags.processes, default=1, metavar="N", help="processes (default: 1)"
    )
    parser.set_defaults(run_command=_predict)
