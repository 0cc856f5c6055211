"""Who may import whom, and what `import fasttx` may cost."""

from __future__ import annotations

import ast
import graphlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fasttx.ops.registry import BACKENDS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fasttx"

# Below: each module, and all that it may import of fasttx, bottom to top. An arrow that is missing
# here was not meant; whoever means it adds it, if it points down.
LEAVES = {
    "config", "demo", "distributed", "files", "metrics", "packing", "subsets", "tables",
    "version",
}  # fmt: skip
GENERATOR = {"attention.dropout", "attention.padded"}
ADAPTERS = {backend.module.removeprefix("fasttx.") for backend in BACKENDS.values()}
ATTENTION = {"attention", "attention.convenience", "attention.registry", *GENERATOR, *ADAPTERS}
TEXT = {"tokenizer", "token_cache", "tables", "corpora", "data"}
CORE = LEAVES | GENERATOR | {"attention", "attention.registry", "encoder", "model", "device"}
WORK = CORE | TEXT | {"checkpoint", "classifier"}

REPORTING = {"reporting"} | {
    f"reporting.{name}"
    for name in ("attributions", "escaping", "explain", "findings", "finished", "page", "plots")
}

ALLOWED: dict[str, set[str]] = {
    **{leaf: set() for leaf in LEAVES | GENERATOR},
    "device": {"version"},
    # The specification of the row operations draws the dropout that the attention defines.
    "rowops": {"attention.dropout"},
    # An adapter sees the generator, the padded form, its kernels; never a model, never its peers.
    **{adapter: {*GENERATOR, "rowops", "kernels"} for adapter in ADAPTERS | {"attention.metal"}},
    # Except mps, which stands on two adapters that no name leads to, and chooses between them.
    "attention.lean": {*GENERATOR, "rowops"},
    "attention.selfcheck": {"rowops"},
    "attention.mps_check": {"attention.lean", "attention.metal", "attention.selfcheck", "kernels"}
    | {"rowops"},
    "attention.mps": {"attention.lean", "attention.metal", "attention.mps_check", "device"}
    | {"attention.selfcheck", "files", "kernels", "rowops"},
    "doctor": CORE | {"attention.mps", "attention.selfcheck"},
    "attention.registry": {"config", "rowops"},
    "attention.convenience": {"attention.registry", "attention.dropout"},
    "attention": {"attention.convenience", "attention.registry"},
    "kernels": set(),
    # The weights that return_attention shows are the reference's.
    "encoder": {*GENERATOR, "attention", "attention.registry", "attention.reference"}
    | {"config", "packing", "rowops"},
    "model": {"attention", "attention.registry", "config", "encoder", "packing"},
    "masked_lm": {"attention", "attention.registry", "config", "encoder", "packing", "rowops"}
    | {"linear_cross_entropy", "tokenizer"},
    "linear_cross_entropy": set(),
    "tokenizer": {"files", "packing"},
    "token_cache": {"files", "packing", "tokenizer"},
    "textfiles": {"tables"},
    "corpora": {"demo", "tables", "textfiles"},
    "data": {"config", "corpora", "demo", "subsets", "tables"},
    "checkpoint": {"config", "files", "model", "tokenizer"},
    "classifier": CORE | {"checkpoint", "tokenizer"},
    "report": CORE | {"attention.mps", "checkpoint"},
    "predictions": {"checkpoint", "files", "metrics"},
    "trainer": WORK | {"report"},
    "runs": WORK | {"predictions", "report", "trainer"},
    "flags": {"config"},
    "pretrain": WORK | {"flags", "masked_lm", "report", "trainer", "runs"},
    "lstm": GENERATOR | {"config", "model"},
    "bag_of_words": set(),
    "baselines": WORK | {"bag_of_words", "lstm", "report", "trainer", "runs"},
    "ensemble": WORK | {"bag_of_words", "flags", "predictions", "report", "runs"},
    "__main__": {"cli"},
    # What looks at a finished run: from numbers to pictures to pages.
    "reporting": set(),
    "reporting.escaping": set(),
    "reporting.findings": {"metrics", "predictions"},
    "reporting.attributions": WORK,
    "reporting.plots": {"metrics", "reporting.escaping", "reporting.findings"},
    "reporting.page": {"checkpoint", "files", "reporting.escaping", "reporting.plots"},
    "reporting.finished": WORK | {"predictions", "reporting.findings", "runs"},
    "reporting.explain": WORK | REPORTING - {"reporting.explain", "reporting.finished"},
    "reporting.html_report": WORK | REPORTING | {"predictions", "report"},
    "cli": WORK
    | {"bag_of_words", "baselines", "doctor", "ensemble", "flags", "pretrain", "report"}
    | {"reporting", "runs"}
    | {"reporting.explain", "reporting.html_report", "reporting.plots", "trainer"},
    "": {"attention", "classifier", "config", "model", "packing", "tokenizer", "version"},
    "train.py": WORK | {"report", "trainer", "runs", "cli"},
}

# Extras: fasttx imports and classifies without any of them.
OPTIONAL = (
    "datasets", "huggingface_hub", "matplotlib", "pandas", "pyarrow", "safetensors", "scipy",
    "sklearn", "tokenizers", "tqdm", "transformers", "triton",
)  # fmt: skip


def module_name(path: Path, package: Path = PACKAGE) -> str:
    """`attention.sdpa` of fasttx/attention/sdpa.py; the empty name of fasttx/__init__.py."""
    if path.parent == package.parent:
        return path.name
    parts = path.relative_to(package).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    return {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names of everything that a syntax tree imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: a relative import; name it in full"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def arrows(source: str, known: set[str]) -> set[str]:
    """The modules of fasttx that a source imports. `from fasttx import X`, X no module, is ''."""
    found = set()
    for name in imported(ast.parse(source)):
        first, _, name = name.partition(".")
        if first != "fasttx":
            continue
        while name and name not in known:  # from the end: a function, a class
            name = name.rpartition(".")[0]
        found.add(name)
    return found


def wrong_arrows(module: str, source: str, known: set[str]) -> set[str]:
    allowed = ALLOWED[module]
    return {
        arrow
        for arrow in arrows(source, known) - {module}
        if arrow not in allowed and not ("kernels" in allowed and arrow.startswith("kernels."))
    }


def test_the_table_points_down():
    """No cycles: there is an order in which every module comes after all that it may import."""
    order = list(graphlib.TopologicalSorter(ALLOWED).static_order())
    assert order.index("model") > order.index("attention.registry") > order.index("config")
    assert order[-1] in ("train.py", "cli", "")


def test_every_module_has_a_place_in_the_table():
    unknown = set(modules()) - set(ALLOWED)
    assert not unknown, f"{unknown}: say in ALLOWED what they may import"
    gone = set(ALLOWED) - set(modules()) - {"train.py"}
    assert not gone, f"{gone} are in ALLOWED only"


@pytest.mark.parametrize("module", modules())
def test_imports_point_down(module):
    known = modules()
    wrong = wrong_arrows(module, known[module].read_text(encoding="utf-8"), set(known))
    assert not wrong, f"fasttx.{module} imports {sorted(wrong)}, which is not in ALLOWED"


def test_the_training_script_imports_what_it_may():
    wrong = wrong_arrows("train.py", (ROOT / "train.py").read_text(encoding="utf-8"), {*modules()})
    assert not wrong


@pytest.mark.parametrize(
    ("module", "line", "wrong"),
    [
        ("packing", "from fasttx.config import ModelConfig", {"config"}),
        ("packing", "import fasttx.config", {"config"}),
        ("rowops", "def f():\n    from fasttx.ops import registry", {"attention.registry"}),
        ("attention.sdpa", "from fasttx.ops import reference", {"attention.reference"}),
        ("attention.sdpa", "from fasttx.ops.reference import x", {"attention.reference"}),
        ("attention.sdpa", "from fasttx.models.classifier import mean_pool", {"model"}),
        ("attention.sdpa", "from fasttx.ops import dropout", set()),
        ("model", "from fasttx import trainer", {"trainer"}),
        ("model", "from fasttx import TransformerClassifier", {""}),
        (
            "checkpoint",
            "if TYPE_CHECKING:\n    from fasttx.training.trainer import Trainer",
            {"trainer"},
        ),
    ],
)
def test_a_wrong_arrow_is_seen(module, line, wrong):
    known = {*modules(), "trainer", "attention.reference"}
    assert wrong_arrows(module, line, known) == wrong


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


@pytest.mark.parametrize("module", modules())
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
    assert users == ["corpora"], f"{users} import `datasets`: it belongs where corpora come from"


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
assert not [name for name in fasttx.__all__ if not hasattr(fasttx, name)]
import torch
model = fasttx.TransformerClassifier(20, d_model=8, num_heads=1, num_layers=1, d_ff=8, max_len=4)
model(torch.tensor([[3, 4, 0]])).sum().backward()
assert "fasttx.text.splits" not in sys.modules
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
