"""Where the numbers of a training go beside metrics.jsonl: `--log-to tensorboard`, wandb, trackio,
mlflow. Each is set up by its own environment variables; docs/tracking.md says which.

A tracker is one class and one line of TRACKERS. One that fails gets no more lines, and the training
goes on.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from fasttx.errors import ConfigError
from fasttx.training.task import Run

log = logging.getLogger("fasttx")


class Tracker(Protocol):
    """One run of a tracker: opened for a new run of ours, or for one that goes on."""

    def log(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self, failed: bool) -> None: ...


class _TensorBoard:
    """Event files in RUN/tensorboard."""

    def __init__(self, run: Run, identity: str, settings: Mapping[str, Any], step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # What an earlier process wrote after its last checkpoint is not shown.
        purge = step if step else None
        self._writer = SummaryWriter(str(run.folder.path / "tensorboard"), purge_step=purge)
        rows = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
        self._writer.add_text("settings", f"| setting | value |\n|---|---|\n{rows}", step)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """WANDB_PROJECT (default fasttx), WANDB_MODE=offline, WANDB_DIR, ..."""

    def __init__(self, run: Run, identity: str, settings: Mapping[str, Any], step: int) -> None:
        import os

        import wandb

        project = os.environ.get("WANDB_PROJECT", "fasttx")
        self._run = wandb.init(
            project=project, name=run.folder.path.name, id=identity, resume="allow",
            config=dict(settings),
        )  # fmt: skip

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class _Trackio:
    """TRACKIO_PROJECT (default fasttx), TRACKIO_DIR, TRACKIO_SPACE_ID, ..."""

    def __init__(self, run: Run, identity: str, settings: Mapping[str, Any], step: int) -> None:
        import os

        import trackio

        self._module = trackio
        trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", "fasttx"),
            name=f"{run.folder.path.name}-{identity[:6]}", resume="allow", config=dict(settings),
        )  # fmt: skip

    def log(self, values: Mapping[str, float], step: int) -> None:
        self._module.log(dict(values), step=step)

    def close(self, failed: bool) -> None:
        self._module.finish()


class _MLflow:
    """MLFLOW_TRACKING_URI, MLFLOW_EXPERIMENT_NAME (default fasttx), ..."""

    def __init__(self, run: Run, identity: str, settings: Mapping[str, Any], step: int) -> None:
        import os

        import mlflow

        self._client = mlflow.MlflowClient()
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "fasttx")
        experiment = mlflow.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else mlflow.create_experiment(name)
        before = self._client.search_runs([number], f"tags.fasttx_run = '{identity}'")
        if before:
            self._id = before[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
            return
        tags = {"fasttx_run": identity, "mlflow.runName": run.folder.path.name}
        self._id = self._client.create_run(number, tags=tags).info.run_id
        for key, value in settings.items():
            self._client.log_param(self._id, key, value)

    def log(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._client.log_metric(self._id, name, value, step=step)

    def close(self, failed: bool) -> None:
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


TRACKERS: dict[str, Callable[..., Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
    "mlflow": _MLflow,
}


def check(names: Sequence[str]) -> None:
    """Raises ConfigError for an unknown tracker, and for one that is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ConfigError(f"--log-to is {name!r}; expected one of {', '.join(TRACKERS)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"--log-to {name} needs the package {name}: pip install {name}")


class Trackers:
    """All trackers of a run. Opened by `begin`, once it is known where the run goes on."""

    def __init__(self, names: Sequence[str] = ()) -> None:
        self._names = list(dict.fromkeys(names))
        self._open: dict[str, Tracker] = {}

    def begin(self, run: Run, step: int) -> None:
        # A run of ours is one run of a tracker, however often it was interrupted.
        content = run.folder.config.read_bytes() + str(run.folder.path.resolve()).encode()
        identity = hashlib.sha256(content).hexdigest()[:16]
        settings = _flat(run.config.train.to_dict()) | {"attn_backend": run.config.attn_backend}

        def open_one(name: str) -> None:
            self._open[name] = TRACKERS[name](run, identity, settings, step)

        for name in self._names:
            self._guarded(name, functools.partial(open_one, name))

    def log(self, row: Mapping[str, Any], step: int) -> None:
        """A row of metrics.jsonl: train/loss, ..., epoch/val_accuracy, ..."""
        kind = row["kind"]
        values = {
            f"{kind}/{name}": float(value)
            for name, value in row.items()
            if name not in ("kind", "step") and isinstance(value, int | float)
        }
        self._each(lambda tracker: tracker.log(values, step))

    def results(self, results: Mapping[str, Any], step: int) -> None:
        """The numbers of results.json: result/test_accuracy, ..."""
        values = {
            f"result/{name}": float(value)
            for name, value in results.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        self._each(lambda tracker: tracker.log(values, step))

    def close(self, failed: bool = False) -> None:
        self._each(lambda tracker: tracker.close(failed))
        self._open.clear()

    def _each(self, use: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            self._guarded(name, functools.partial(use, tracker))

    def _guarded(self, name: str, use: Callable[[], None]) -> None:
        try:
            use()
        except Exception as error:  # services and their clients raise many kinds
            self._open.pop(name, None)
            log.warning(
                "%s failed (%s: %s); the training goes on without it", name, type(error).__name__,
                " ".join(str(error).split())[:200],
            )  # fmt: skip


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested names joined by dots."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
