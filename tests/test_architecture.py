"""Who imports whom, as docs/architecture.md draws it; and what `import fasttx` costs."""

from __future__ import annotations

import ast
import graphlib
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fasttx.ops.registry import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fasttx"

GROUND = {"config", "device", "errors", "files", "terminal", "version", "weights"}
CONTRACT = {"ops.arguments", "ops.contract", "ops.dropout"}

# Extras: fasttx imports and classifies without any of them.
OPTIONAL = (
    "datasets", "httptools", "huggingface_hub", "matplotlib", "onnx", "onnxruntime", "onnxscript",
    "pandas", "prometheus_client", "pyarrow", "safetensors", "scipy",
    "sklearn", "starlette", "tokenizers", "tqdm", "transformers", "triton", "uvicorn",
)  # fmt: skip


def module_name(path: Path) -> str:
    """`ops.sdpa` of fasttx/ops/sdpa.py; `ops` and "" of their __init__.py."""
    if path.is_relative_to(ROOT / "kernels"):
        parts = path.relative_to(ROOT).with_suffix("").parts
    else:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """Every module of fasttx by its name without the first `fasttx.`, device kernels among them."""
    paths = [*PACKAGE.rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    return {module_name(path): path for path in sorted(paths)}


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of everything that a syntax tree imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; name it in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(source: str, known: set[str]) -> set[str]:
    """The modules of fasttx that a source imports. `from fasttx import X`, X no module, is ""."""
    found = set()
    for name in imported(ast.parse(source)):
        first, _, name = name.partition(".")
        if first != "fasttx":
            continue
        while name and name not in known:  # from the end: a function, a class
            name = name.rpartition(".")[0]
        found.add(name)
    return found


def module_arrows() -> dict[str, set[str]]:
    known = modules()
    return {
        module: arrows(path.read_text(encoding="utf-8"), set(known)) - {module}
        for module, path in known.items()
    }


# ------------------------------------------------------------------------------------------- rooms


def room_of(module: str) -> str:
    first = module.partition(".")[0]
    if module in CONTRACT:
        return "contract"
    if first in GROUND:
        return "ground"
    return "fasttx" if first in ("", "__main__") else first


def drawing() -> dict[str, set[str]]:
    """Each room and the rooms that it imports, from the block `rooms` of docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    block = re.search(r"```rooms\n(.*?)```", text, re.DOTALL)
    assert block, "docs/architecture.md has no block that begins with ```rooms"
    lines = [line.partition("->") for line in block[1].splitlines() if line.strip()]
    return {room.strip(): set(imports.split()) for room, _, imports in lines}


def rooms() -> dict[str, set[str]]:
    """The same, from the code."""
    found: dict[str, set[str]] = {}
    for module, imports in module_arrows().items():
        room = room_of(module)
        found.setdefault(room, set()).update({room_of(i) for i in imports} - {room})
    script = arrows((ROOT / "train.py").read_text(encoding="utf-8"), set(modules()))
    return found | {"train.py": {room_of(i) for i in script}}


def test_the_drawing_is_the_code():
    """An arrow that one of them has and the other has not is a fault of either."""
    drawn, built = drawing(), rooms()
    assert drawn.keys() == built.keys()
    for room, imports in built.items():
        missing, unbuilt = imports - drawn[room], drawn[room] - imports
        assert not missing, f"{room} imports {missing}, which docs/architecture.md does not draw"
        assert not unbuilt, f"docs/architecture.md draws {room} -> {unbuilt}, and no import is so"


def test_the_drawing_points_down():
    """Each room stands below the line of all that it imports: no room knows the one above it."""
    seen: set[str] = set()
    for room, imports in drawing().items():
        assert imports <= seen, f"{room} imports {imports - seen}, which stand further down"
        seen.add(room)


def test_no_module_is_part_of_a_cycle():
    order = list(graphlib.TopologicalSorter(module_arrows()).static_order())
    assert order.index("models.encoder") > order.index("ops.registry") > order.index("config")


def test_implementations_of_one_thing_do_not_import_each_other():
    own = {b.module.removeprefix("fasttx.") for b in BACKENDS.values()}
    for module, imports in module_arrows().items():
        if module in own:
            assert not imports & (own - {module}), f"{module} imports another backend"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("from fasttx.config import ModelConfig", {"config"}),
        ("import fasttx.config", {"config"}),
        ("def f():\n    from fasttx.ops import registry", {"ops.registry"}),
        ("from fasttx.ops.reference import attention_weights", {"ops.reference"}),
        ("from fasttx import TransformerClassifier", {""}),
        (
            "if TYPE_CHECKING:\n    from fasttx.training.trainer import Trainer",
            {"training.trainer"},
        ),
        ("import torch", set()),
    ],
)
def test_an_arrow_is_seen(line, found):
    assert arrows(line, set(modules())) == found


def test_kernels_know_nothing_of_fasttx():
    """They take pointers and strides. One kernel may import another file of kernels/."""
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        for name in imported(ast.parse(path.read_text(encoding="utf-8"))):
            assert not name.startswith("fasttx") or name.startswith("fasttx.kernels."), (
                f"{path} imports {name}"
            )


def test_the_top_level_kernels_folder_is_no_package():
    """It would hide Hugging Face's package `kernels`, and break `import transformers`."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_tests_reach_no_other_machine():
    with pytest.raises(OSError, match="no network"):
        socket.create_connection(("192.0.2.1", 80), timeout=1)
    with pytest.raises(OSError, match="no network"):
        socket.getaddrinfo("huggingface.co", 443)
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname(), timeout=10).close()


# ----------------------------------------------------------------------------------- lazy imports


# Rooms for those who have the package; nothing else imports them before it is needed.
FOR_THEIR_PACKAGE = ("kernels.triton.", "hf", "serving.")


@pytest.mark.parametrize("module", [m for m in modules() if not m.startswith(FOR_THEIR_PACKAGE)])
def test_optional_packages_are_imported_inside_functions(module):
    tree = ast.parse(modules()[module].read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        for_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if for_types or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            node.body = []
    early = {name.partition(".")[0] for name in imported(tree)} & set(OPTIONAL)
    assert not early, f"fasttx.{module} imports {early} when it is itself imported"


def test_only_corpora_imports_datasets():
    users = [
        module
        for module, path in modules().items()
        if any(
            name.partition(".")[0] == "datasets"
            for name in imported(ast.parse(path.read_text(encoding="utf-8")))
        )
    ]
    assert users == ["text.corpora"], (
        f"{users} import `datasets`: it belongs where corpora come from"
    )


def test_the_package_imports_what_is_asked_for():
    code = (
        "import sys, fasttx\n"
        "assert 'torch' not in sys.modules and set(fasttx.__all__) <= set(dir(fasttx))\n"
        "import fasttx.load\n"
        "assert callable(fasttx.load) and fasttx.load.__module__ == 'fasttx.load'\n"
        "from fasttx.load import TextClassifier\n"
        "assert fasttx.load is sys.modules['fasttx.load'].load\n"
        "assert fasttx.config.TrainConfig is fasttx.TrainConfig\n"
        "from fasttx import *\n"
        "assert TransformerClassifier is fasttx.TransformerClassifier\n"
        "assert not hasattr(fasttx, 'nothing')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)},
        text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


# Run apart: refuses the named packages and notes who asked, beginning after `import {first}`.
PROBE = """
import sys, time

class Blocker:
    asked = []
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            self.asked.append(name)
            raise ImportError(name + " is blocked by the test")

sys.meta_path.insert(0, Blocker())
import {first}
Blocker.asked.clear()
start = time.perf_counter()
import fasttx
seconds = time.perf_counter() - start
assert not Blocker.asked, f"import fasttx asked for {{Blocker.asked}}"
{then}
print(seconds)
"""

CLASSIFY = """
early = {adapters!r} & set(sys.modules)
assert not early, f"import fasttx imported {{early}}: adapters are imported when first asked for"
import torch
model = fasttx.TransformerClassifier(20, d_model=8, num_heads=1, num_layers=1, d_ff=8, max_len=4)
model(torch.tensor([[3, 4, 0]])).sum().backward()
assert "fasttx.text.splits" not in sys.modules
assert not [name for name in fasttx.__all__ if not hasattr(fasttx, name)]
"""


def probe(
    path: Path, blocked: tuple[str, ...], first: str = "sys", then: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROBE.format(blocked=blocked, first=first, then=then)],
        env=os.environ | {"PYTHONPATH": str(path)}, cwd=path, text=True, capture_output=True,
    )  # fmt: skip


def test_import_needs_and_asks_for_nothing_optional(record_property):
    adapters = {backend.module for backend in BACKENDS.values()}
    done = probe(ROOT, OPTIONAL, "torch", CLASSIFY.format(adapters=adapters))
    assert done.returncode == 0, done.stderr
    record_property("seconds to import fasttx, torch being there", done.stdout.strip())
    print("seconds to import fasttx, torch being there:", done.stdout)


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("import colorsys", "colorsys is blocked by the test"),
        ("try:\n    import colorsys\nexcept ImportError: pass", "asked for ['colorsys']"),
        ("try:\n    from colorsys import x\nexcept ImportError: pass", "asked for ['colorsys']"),
        ("import string", None),
    ],
)
def test_the_probe_bites(tmp_path, line, complaint):
    """colorsys is there and imports well, unless blocked."""
    (tmp_path / "fasttx").mkdir()
    (tmp_path / "fasttx" / "__init__.py").write_text(line)
    done = probe(tmp_path, ("colorsys",))
    assert (done.returncode == 0) == (complaint is None), done.stderr
    assert complaint is None or complaint in done.stderr
