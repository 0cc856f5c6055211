"""`fasttx export RUN`: a run as a file for other programs."""

from __future__ import annotations

import argparse
from typing import Any

from fasttx import terminal
from fasttx.commands import flags
from fasttx.commands.predict import lines_of
from fasttx.export import job
from fasttx.export.formats import FORMATS


def _export(args: argparse.Namespace) -> None:
    texts = None if args.texts is None else lines_of(args.texts.read_bytes(), str(args.texts))
    done = job.export(
        args.run,
        args.format,
        args.out,
        quantisation=args.quantize,
        texts=texts,
        say=terminal.complain,
    )
    for note in done.notes:
        terminal.complain(f"note: {terminal.one_line(note)}")
    for path in sorted(done.folder.iterdir()):
        terminal.say(f"{path.stat().st_size:>13,} bytes  {path}")
    for sentence in done.measured:
        terminal.say(terminal.one_line(sentence))


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "export",
        help="a run as ONNX, torch.export, AOTInductor or safetensors",
        description="The model, its tokenizer and an example in a new folder. It is compared with "
        "the run, on texts of the run's validation split, before it is kept.",
    )
    flags.add_run(parser)
    parser.add_argument(
        "--format",
        choices=FORMATS,
        required=True,
        help="onnx: for ONNX Runtime and OpenVINO; torch-export: for plain torch; aoti: machine "
        "code for this kind of processor; safetensors: for transformers",
    )
    parser.add_argument("--quantize", choices=job.QUANTISATIONS, help="of onnx: 8-bit weights")
    parser.add_argument(
        "--out", type=flags.path, metavar="DIR", help="new folder (default: RUN-FORMAT)"
    )
    parser.add_argument(
        "--texts",
        type=flags.path,
        metavar="FILE",
        help="check on these texts, one a line (default: the run's validation split)",
    )
    parser.set_defaults(run_command=_export)
