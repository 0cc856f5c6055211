"""Packaging of fasttx. Versions we test with are pinned in constraints.txt, not here."""

import platform
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools < 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
KERNEL_SOURCES = ("*.py", "*.metal", "*.cpp", "*.h")


def kernel_leaves() -> dict[str, str]:
    """Import name -> folder of what lies in kernels/, the device kernels.

    A wheel carries them as fasttx.kernels.<leaf>: a top-level package `kernels` would overwrite
    Hugging Face's. They are listed here since find_packages does not see a mapped folder.
    """
    folders = sorted(p for p in (ROOT / "kernels").glob("*/") if p.is_dir())
    return {
        f"fasttx.kernels.{folder.name}": f"kernels/{folder.name}"
        for folder in folders
        if any(any(folder.glob(pattern)) for pattern in KERNEL_SOURCES)
    }


CPU_KERNELS = "kernels/cpu"
# Not -march=native: a wheel runs on other machines, and the library picks a set when it is loaded.
# No -fopenmp either: threads are torch's, found at run time.
CPU_FLAGS = [
    "-O3", "-g0", "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-fvisibility=hidden",
]  # fmt: skip
AVX512 = [
    "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma",
    "-mprefer-vector-width=512",
]  # fmt: skip
X86_SETS = {
    "avx512bf16": [*AVX512, "-mavx512bf16", "-mavx512vnni"],
    "avx512": AVX512,
    "avx2": ["-mavx2", "-mfma"],
    "baseline": [],
}


class BuildCpuKernels(build_ext):
    """One source, compiled once for each instruction set; the objects make one plain C library.

    The extension is optional: without a compiler the installation goes on, and the `cpu` backend
    says what is missing.
    """

    def get_ext_filename(self, fullname: str) -> str:
        # No Python in it, so no Python version in its name either.
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        if self.compiler.compiler_type == "msvc":
            raise CompileError("the CPU kernels need GCC or Clang (vector extensions)")
        x86 = platform.machine().lower() in ("x86_64", "amd64")
        sets = X86_SETS if x86 else {"native": []}
        *interface, isa = ext.sources
        jobs = [(source, Path(source).stem, []) for source in interface]
        jobs += [(isa, name, flags) for name, flags in sets.items()]
        with ThreadPoolExecutor(len(jobs)) as pool:
            objects = list(pool.map(lambda job: self._compile(*job), jobs))
        self.compiler.link_shared_object(
            [o for each in objects for o in each],
            self.get_ext_fullpath(ext.name),
            target_lang="c++",
        )

    def _compile(self, source: str, name: str, flags: list[str]) -> list[str]:
        folder = Path(self.build_temp) / name  # one each: the objects have one name
        return self.compiler.compile(
            [source], output_dir=str(folder), extra_postargs=[*CPU_FLAGS, *flags]
        )


class PlatformWheel(bdist_wheel):
    """One wheel for every Python 3 of a platform: the library does not use Python's C interface."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def version() -> str:
    """Read, not imported: importing fasttx needs torch, which a build does without."""
    text = (ROOT / "fasttx" / "version.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)[1]


def long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.exists() else ""


leaves = kernel_leaves()

extras = {
    "train": ["datasets>=3", "pyarrow>=15", "tqdm>=4.60"],
    "hf": ["transformers>=4.48", "tokenizers>=0.21", "safetensors>=0.4", "huggingface_hub>=0.26"],
    "export": ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20", "tokenizers>=0.21"],
    "report": ["matplotlib>=3.8"],
    "bench": ["pytest>=9", "pytest-benchmark>=5", "matplotlib>=3.8", "threadpoolctl>=3.5"],
    "peers": ["transformers>=4.48", "x-transformers>=2.31"],
    "baselines": ["scikit-learn>=1.4"],
    "serve": [
        "starlette>=0.40",
        "uvicorn>=0.34",
        "httptools>=0.6",
        'uvloop>=0.21; platform_system != "Windows"',
        "prometheus_client>=0.21",
    ],
}
# Not part of dev: what the engines need takes longer to install than it tells the tests.
engines = ["onnx>=1.17", "onnxruntime>=1.20", "openvino>=2025.0"]
# torch's CUDA builds pin a triton of their own and the CPU builds need none, so a plain install
# asks for none; the extra is for a torch that came without.
triton = ['triton>=3.4; platform_system == "Linux"']
# Hugging Face's `kernels` is there for the test that ours does not get in its way.
tools = [
    "build>=1",
    "hypothesis>=6.100",
    "kernels>=0.9",
    "libclang>=18",  # type-checks the Metal sources
    "mypy>=1.13",
    "peft>=0.14",  # its adapters are layers that a model must honour
    "pytest-xdist>=3.5",
    "ruff>=0.9",
    "setuptools>=77",
    "tensorboard>=2.15",
    # Its kernels are tested without a GPU: interpreted, and compiled ahead of time.
    'triton>=3.4; platform_system == "Linux" and platform_machine == "x86_64"',
    "wheel>=0.40",
]

setup(
    name="fasttx",
    version=version(),
    description="Fast Transformer text classifiers on interchangeable attention backends",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    author="The fasttx authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.10",
    install_requires=["torch>=2.6", "numpy>=1.26"],
    extras_require={
        **extras,
        "engines": engines,
        "triton": triton,
        "dev": sorted({package for extra in extras.values() for package in extra} | set(tools)),
    },
    ext_modules=[
        Extension(
            "fasttx.kernels.cpu._native",
            [f"{CPU_KERNELS}/{name}.cpp" for name in ("library", "encoder", "isa")],
            depends=[str(p.relative_to(ROOT)) for p in sorted((ROOT / CPU_KERNELS).glob("*.h"))],
            language="c++",
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildCpuKernels, "bdist_wheel": PlatformWheel},
    packages=[*find_packages(include=["fasttx", "fasttx.*"]), *leaves],
    package_dir=leaves,
    package_data={
        "fasttx": ["py.typed", "serving/*.html"],
        **{name: ["*.metal", "*.cpp", "*.h"] for name in leaves},
    },
    entry_points={"console_scripts": ["fasttx = fasttx.commands.cli:main"]},
    zip_safe=False,
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
