"""`fasttx predict`: the labels of texts."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

from fasttx.commands import flags
from fasttx.errors import DataError
from fasttx.load import load


def _read_texts(args: argparse.Namespace) -> list[str]:
    texts: list[str] = list(args.text)
    if args.file:
        try:
            lines = Path(args.file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{args.file} cannot be read as UTF-8 text: {error}") from error
        texts += [line for line in lines if line.strip()]
    if not texts and not args.file:
        if sys.stdin.isatty():
            raise DataError("no text: give texts, --file FILE, or lines on standard input")
        texts = [line.rstrip("\n") for line in sys.stdin if line.strip()]
    return texts


def _predict(args: argparse.Namespace) -> None:
    classifier = load(args.run, device=args.device, attn_backend=args.attn_backend)
    texts = _read_texts(args)
    for text, p in zip(texts, classifier.predict(texts, batch_size=args.batch_size), strict=True):
        if args.json:
            print(json.dumps({"text": text, **dataclasses.asdict(p)}, ensure_ascii=False))
        else:
            shown = text if len(text) <= 80 else text[:77] + "..."
            print(f"{p.label}  {p.probability:7.2%}  {shown}")


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "predict", help="label texts with a trained run", formatter_class=flags.Formatter
    )
    flags.add_run(parser)
    flags.add_inference(parser)
    parser.add_argument("text", nargs="*", help="texts (default: lines of standard input)")
    parser.add_argument("--file", help="a UTF-8 file, one text a line")
    parser.set_defaults(run_command=_predict)
