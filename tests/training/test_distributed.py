"""The environment of torchrun, and what is left of it in a shell."""

from __future__ import annotations

import pytest

from fasttx.errors import ConfigError
from fasttx.training import distributed

NAMES = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WHOLE = dict(zip(NAMES, ("2", "0", "0", "127.0.0.1", "29500"), strict=True))


@pytest.fixture(autouse=True)
def _alone(monkeypatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


def test_alone(monkeypatch) -> None:
    assert distributed.start() == distributed.Processes()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.start() == distributed.Processes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"RANK": None, "MASTER_PORT": None}, "WORLD_SIZE is 2, and RANK, MASTER_PORT not set"),
        ({"LOCAL_RANK": None, "MASTER_ADDR": ""}, "LOCAL_RANK, MASTER_ADDR not set"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'; expected a number from 1"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "9" * 5000}, "WORLD_SIZE is '999"),
        ({"RANK": "2"}, "RANK is '2'; expected a number from 0 to 1"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK is 'first'"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'; expected a number from 0 to 65535"),
    ],
)
def test_what_torchrun_would_not_set_is_named(monkeypatch, changes, message: str) -> None:
    for name, value in (WHOLE | changes).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        distributed.start()


def test_processes_that_do_not_meet(monkeypatch) -> None:
    def fails() -> None:
        raise RuntimeError("The client socket has timed out\nmore")

    for name, value in WHOLE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed.dist, "init_process_group", fails)
    with pytest.raises(ConfigError, match=r"do not meet at 127.0.0.1:29500 .*has timed out\. St"):
        distributed.start()
