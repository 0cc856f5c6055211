"""The names of weights in a state dict, whatever the model that it comes from was wrapped in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# What DDP, torch.compile, FSDP and activation checkpointing put into the names of a wrapped module.
_WRAPPERS = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def _bare(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def own_names(state: Mapping[str, Any], wanted: Iterable[str]) -> dict[str, Any]:
    """`state` with the names in `wanted` where only a wrapper's part makes the difference, as in
    `module.embedding`, `_orig_mod.embedding`; other names, and values, as they are."""
    own = set(wanted)
    by_bare_name = {_bare(name): name for name in own}
    renamed: dict[str, Any] = {}
    for name, value in state.items():
        known = name in own or not isinstance(name, str)
        target = name if known else by_bare_name.get(_bare(name), name)
        # Two weights must not become one: the second keeps a name that nobody knows.
        is_taken = target != name and (target in state or target in renamed)
        renamed[name if is_taken else target] = value
    return renamed
