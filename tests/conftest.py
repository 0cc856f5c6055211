"""What every test runs under: fixed seeds, few threads, no network; and fixtures on request."""

from __future__ import annotations

import ipaddress
import os
import random
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

# A thread that spins for another one's result takes the core that this one needs. Read by OpenMP
# when torch is imported, also in the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Two processes might find different products the faster ones, and so other bits.
os.environ.setdefault("FASTTX_PRODUCTS", "own")

import torch

# Hooks: which tests the PTX machine takes, and under which schedule.
from tests.ptx.plugin import _schedule, pytest_collection_modifyitems

__all__ = ["_schedule", "pytest_collection_modifyitems"]

# Beside other workers a second thread mostly waits for its time slice.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))


def pytest_report_header() -> list[str]:
    """Which backends are tested here, and why the others are not."""
    from tests.backends import MISSING, TARGETS

    here = ", ".join(str(target) for target in TARGETS)
    return [f"backends: {here}", *(f"  not {name}: {why}" for name, why in MISSING.items())]


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    torch.manual_seed(0)
    random.seed(0)


def _is_loopback(host: object) -> bool:
    if host in (None, "", "localhost", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """A test that reaches for another machine fails at once, with or without a network."""
    connect, getaddrinfo = socket.socket.connect, socket.getaddrinfo

    def guarded_connect(self: socket.socket, address, /):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not _is_loopback(address[0]):
            raise OSError(f"the tests have no network: connect to {address!r}")
        return connect(self, address)

    def guarded_getaddrinfo(host, *args, **kwargs):
        if not _is_loopback(host.decode() if isinstance(host, bytes) else host):
            raise OSError(f"the tests have no network: look up {host!r}")
        return getaddrinfo(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", guarded_connect)
        patch.setattr(socket, "getaddrinfo", guarded_getaddrinfo)
        yield


@pytest.fixture
def unlisted_backends(monkeypatch) -> None:
    """Backends that are tested and in no table can be asked for by name too."""
    from fasttx.ops import registry
    from tests.backends import EVERY

    monkeypatch.setattr(registry, "BACKENDS", EVERY)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote holds NaN (floats) or the largest value (integers).

    It reaches `torch.empty` and its kin in Python and in C++. torch does this in its deterministic
    mode only, so what tests reproducibility must not run under it.
    """
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode(mode)


@pytest.fixture(scope="session")
def imdb() -> Path:
    """$FASTTX_DATA, where the IMDB reviews lie; skips where it is not set."""
    path = os.environ.get("FASTTX_DATA")
    if not path:
        pytest.skip("FASTTX_DATA is not set: it names the folder that holds the IMDB reviews")
    if not Path(path).exists():
        pytest.fail(f"FASTTX_DATA is {path!r}, which does not exist")
    return Path(path)
