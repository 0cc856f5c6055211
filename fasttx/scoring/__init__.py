"""Files too large for memory, labelled: `fasttx predict RUN --file IN --out OUT`, and the same
scorer as a callable for Ray Data and Hugging Face `datasets`.
"""

from __future__ import annotations

from fasttx.scoring.scorer import Scorer

__all__ = ["Scorer"]
