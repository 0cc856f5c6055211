"""Namespace of the device kernels (`fasttx.kernels.<device>`).

A wheel carries them inside this package; in a checkout they lie in the top-level `kernels/`. That
folder must have no `__init__.py`: a top-level package `kernels` would hide Hugging Face's.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2]
if (_checkout / "setup.py").is_file() and (_checkout / "kernels").is_dir():
    __path__.append(str(_checkout / "kernels"))
