"""The ways in: bare checkout, editable install, wheel; and Hugging Face's `kernels` beside ours.

Everything is built from a copy of the sources with one kernel folder more, `kernels/probe`, so the
tests also show that a new folder needs no change elsewhere.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

# One worker builds; the others would build the same again.
pytestmark = pytest.mark.xdist_group("packaging")

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("fasttx", "kernels", "tests", "benchmarks", "docs")
FILES = ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE", "README.md", "Makefile",
         "constraints.txt", "train.py")  # fmt: skip

COMPILER = shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")

# Run in each environment. What a plain install does not bring cannot be imported there.
PROBE = """
import sys
for extra in ("datasets", "huggingface_hub", "matplotlib", "pyarrow", "safetensors", "sklearn",
              "tokenizers", "tqdm", "transformers", "triton"):
    sys.modules[extra] = None
import importlib.resources, importlib.util
import torch
import fasttx, fasttx.kernels.probe

model = fasttx.TransformerClassifier(50, d_model=16, num_heads=2, num_layers=1, d_ff=32, max_len=8)
logits = model(torch.tensor([[5, 6, 7, 0]]))
assert logits.shape == (1, 2) and logits.isfinite().all(), logits
logits.sum().backward()
assert fasttx.kernels.probe.FOUND
assert importlib.resources.files("fasttx.kernels.probe").joinpath("probe.metal").is_file()
for leaf in sys.argv[1:]:
    assert importlib.util.find_spec("fasttx.kernels." + leaf), leaf
print(fasttx.__file__)
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output of a command that must succeed, away from this process' own import path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "COV_"))}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env | environment, text=True,
        capture_output=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def kernel_leaves(root: Path) -> list[str]:
    files = (p for p in (root / "kernels").glob("*/*") if p.suffix in {".py", ".metal", ".cpp"})
    return sorted({p.parent.name for p in files} - {"__pycache__"})


@pytest.fixture(scope="module", autouse=True)
def quick_compiler(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Builds here are not optimised, which takes a tenth of the time. One that is optimised has
    installed what the other tests run on."""
    if COMPILER is None:
        yield
        return
    path = tmp_path_factory.mktemp("compiler") / "c++"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(COMPILER)} "$@" -O0\n')
    path.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("CC", "CXX"):
            patch.setenv(name, str(path))
        yield


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("checkout")
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    for name in FILES:
        if (ROOT / name).exists():  # a source distribution lacks a few
            shutil.copy(ROOT / name, copy / name)
    probe = copy / "kernels" / "probe"
    probe.mkdir()
    (probe / "__init__.py").write_text("FOUND = True\n")
    (probe / "probe.metal").write_text("// a source that is not Python\n")
    return copy


@pytest.fixture(scope="module")
def distributions(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(source distribution, the wheel that was built from it)."""
    out = tmp_path_factory.mktemp("dist")
    # From elsewhere, since -m looks for `build` in the current folder first.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout, cwd=out)
    return next(out.glob("*.tar.gz")), next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def metadata(distributions: tuple[Path, Path]) -> Message:
    with zipfile.ZipFile(distributions[1]) as archive:
        name = next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def requirements(metadata: Message) -> list[Requirement]:
    return [Requirement(line) for line in metadata.get_all("Requires-Dist")]


class Environment:
    """A virtual environment that borrows torch, numpy and setuptools from this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        builder = venv.EnvBuilder(symlinks=os.name != "nt")
        builder.create(folder)
        context = builder.ensure_directories(folder)
        self.python, self.scripts = Path(context.env_exe), Path(context.bin_path)
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        self.packages = Path(run(self.python, "-I", "-c", where, cwd=folder).strip())
        # A path file inside these folders is not read, so an editable fasttx there stays unseen.
        origins = [importlib.util.find_spec(n).origin for n in ("torch", "numpy", "setuptools")]
        borrowed = sorted({str(Path(origin).parents[1]) for origin in origins})
        (self.packages / "borrowed.pth").write_text("\n".join(borrowed))

    def install(self, *what: str | Path) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install")
        offline = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
        run(*pip, *offline, *what, cwd=self.folder)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("bare"))


@pytest.fixture(scope="module")
def editable(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("editable"))
    environment.install("-e", checkout)
    return environment


@pytest.fixture(scope="module")
def from_wheel(
    distributions: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Environment:
    environment = Environment(tmp_path_factory.mktemp("wheel"))
    environment.install(distributions[1])
    return environment


# --- what is built --------------------------------------------------------------------------------


def test_wheel_carries_the_library_and_nothing_else(
    distributions: tuple[Path, Path], checkout: Path
) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = set(archive.namelist())
    info = next(n for n in names if n.endswith(".dist-info/METADATA")).split("/")[0]
    assert {n.split("/")[0] for n in names} == {"fasttx", info}  # no `kernels`, no `tests`
    sources = {
        p.relative_to(checkout).as_posix()
        for kind in ("py", "html")
        for p in checkout.glob(f"fasttx/**/*.{kind}")
    }
    for folder in (checkout / "kernels").glob("*/"):
        files = (f for f in folder.iterdir() if f.suffix in {".py", ".metal", ".cpp", ".h"})
        sources |= {f"fasttx/kernels/{folder.name}/{f.name}" for f in files}
    packaged = {n for n in names if n.startswith("fasttx/")}
    library = {"fasttx/kernels/cpu/_native.so"} if COMPILER else set()
    assert packaged == sources | library | {"fasttx/py.typed"}
    assert "-py3-none-" in distributions[1].name  # one for every Python of the platform
    assert "fasttx/kernels/probe/probe.metal" in packaged
    assert f"{info}/licenses/LICENSE" in names or f"{info}/LICENSE" in names


def test_source_distribution_is_the_checkout(
    distributions: tuple[Path, Path], checkout: Path
) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
    files = [p.relative_to(checkout) for p in checkout.rglob("*") if p.is_file()]
    made = {"__pycache__", "fasttx.egg-info", "build"}
    expected = {f.as_posix() for f in files if not made & set(f.parts) and f.suffix != ".so"}
    assert expected <= names
    assert not [n for n in names if n.endswith(".so")]


def test_plain_install_asks_for_torch_and_numpy_alone(metadata: Message) -> None:
    plain = {r.name: str(r.specifier) for r in requirements(metadata) if "extra" not in str(r)}
    assert set(plain) == {"torch", "numpy"}
    assert plain["torch"] == ">=2.6"
    assert metadata["Requires-Python"] == ">=3.10"


def test_version_is_the_library_s(metadata: Message) -> None:
    import fasttx

    assert metadata["Version"] == fasttx.__version__


def test_every_requirement_is_pinned(metadata: Message) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    assert all(re.fullmatch(r"==[\w.]+", str(pin.specifier)) for pin in pins)
    named = {canonicalize_name(r.name) for r in requirements(metadata)}
    for version in ("3.10", "3.11", "3.14"):
        applying = [
            canonicalize_name(pin.name)
            for pin in pins
            if pin.marker is None or pin.marker.evaluate({"python_version": version})
        ]
        assert len(applying) == len(set(applying)), f"pinned twice for Python {version}"
        assert named <= set(applying), f"not pinned for Python {version}"


# --- the three ways in ----------------------------------------------------------------------------


def test_checkout_runs_uninstalled(bare: Environment, checkout: Path, tmp_path: Path) -> None:
    here = run(bare.python, "-c", PROBE, *kernel_leaves(checkout), cwd=checkout)
    elsewhere = run(bare.python, "-c", PROBE, cwd=tmp_path, PYTHONPATH=str(checkout))
    assert {Path(p.strip()).parents[1] for p in (here, elsewhere)} == {checkout}
    assert "--attn-backend" in run(bare.python, "train.py", "--help", cwd=checkout)


def test_editable_install_runs(editable: Environment, checkout: Path, tmp_path: Path) -> None:
    origin = run(editable.python, "-I", "-c", PROBE, *kernel_leaves(checkout), cwd=tmp_path)
    assert Path(origin.strip()).parents[1] == checkout


def test_wheel_runs(from_wheel: Environment, checkout: Path, tmp_path: Path) -> None:
    origin = run(from_wheel.python, "-I", "-c", PROBE, *kernel_leaves(checkout), cwd=tmp_path)
    assert Path(origin.strip()).parents[1] == from_wheel.packages


def test_checkout_runs_where_a_wheel_is_installed(from_wheel: Environment, checkout: Path) -> None:
    origin = run(from_wheel.python, "-c", PROBE, *kernel_leaves(checkout), cwd=checkout)
    assert Path(origin.strip()).parents[1] == checkout


@pytest.mark.parametrize("way", ["editable", "from_wheel"])
def test_console_script(way: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from fasttx import __version__

    environment: Environment = request.getfixturevalue(way)
    assert __version__ in run(environment.scripts / "fasttx", "--version", cwd=tmp_path)


CPU_BACKEND = """
import torch, fasttx.ops.registry as registry
print(registry.BACKENDS["cpu"].unavailable_reasons("cpu", torch.float32, 32))
print(registry.resolve_name("auto", "cpu", torch.float32, 32))
"""


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler here: the kernels are not built")
@pytest.mark.parametrize("way", ["editable", "from_wheel"])
def test_an_install_builds_the_cpu_kernels(
    way: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    environment: Environment = request.getfixturevalue(way)
    reasons, chosen = run(environment.python, "-I", "-c", CPU_BACKEND, cwd=tmp_path).splitlines()
    assert (reasons, chosen) == ("[]", "cpu")


def test_an_install_without_a_compiler_succeeds_and_says_so(
    checkout: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    sources = tmp_path / "checkout"
    shutil.copytree(checkout, sources, ignore=shutil.ignore_patterns("build", "*.so", "*.egg-info"))
    for name in ("CC", "CXX"):
        monkeypatch.setenv(name, "no-such-compiler")
    environment = Environment(tmp_path_factory.mktemp("no_compiler"))
    environment.install(sources)
    reasons, chosen = run(environment.python, "-I", "-c", CPU_BACKEND, cwd=tmp_path).splitlines()
    assert "install a C++ compiler" in reasons
    assert chosen == "sdpa"


# --- Hugging Face's `kernels` ---------------------------------------------------------------------


def test_kernels_folder_is_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.skipif(
    not {"kernels", "transformers"} <= {d.name for d in importlib.metadata.distributions()},
    reason="needs transformers and Hugging Face's kernels: pip install -e .[dev]",
)
def test_transformers_imports_from_the_checkout() -> None:
    """With a kernels/__init__.py it dies: cannot import name 'CUDAProperties' from 'kernels'."""
    code = (
        "import fasttx, fasttx.kernels, transformers, kernels\n"
        "from transformers import BertModel\n"
        "from transformers.utils import is_kernels_available\n"
        "assert is_kernels_available()\n"
        "print(kernels.__file__)"
    )
    found = Path(run(sys.executable, "-c", code, cwd=ROOT).strip())
    assert ROOT / "kernels" not in found.parents
