"""Type-checks Metal sources with clang as a C++14 front end: what Apple's compiler would refuse.

Found: pointers without or across address spaces, functions and overloads that Metal lacks, doubles,
text that is not ASCII. Not covered: what is Apple's own beyond C++ (attributes, resource limits).
"""

from __future__ import annotations

import re
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = ("-x", "c++", "-std=c++14", "-nostdinc", "-fsyntax-only", "-Wno-unknown-attributes",
         "-Wno-ignored-attributes", "-Werror=double-promotion")  # fmt: skip


def complaints(source: str) -> list[str]:
    """What is wrong with a source, one line each; empty where nothing is. Needs libclang."""
    from clang import cindex

    if not source.isascii():
        return ["text that is not ASCII, which is what torch hands to Metal"]
    text = re.sub(r"#include\s*<metal_\w+>", "", source)
    text = f'#include "declarations.h"\n#line 1 "kernel.metal"\n{text}'
    unit = cindex.Index.create().parse(
        "kernel.cpp", args=[*FLAGS, f"-I{HERE}"], unsaved_files=[("kernel.cpp", text)]
    )
    found = [
        f"line {d.location.line}: {d.spelling}"
        for d in unit.diagnostics
        if d.severity >= cindex.Diagnostic.Error
    ]
    code = re.sub(r"//[^\n]*", "", source)
    doubles = re.findall(r"\bdouble\b|(?<![\w.])\d+\.\d*(?:[eE][+-]?\d+)?(?![\w.])", code)
    return found + [f"a double, which Metal does not have: {x}" for x in doubles]
