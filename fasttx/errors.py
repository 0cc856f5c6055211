"""What fasttx raises where a person can mend it: one family, each also the builtin that fits.

Every message names the thing, its value, what was expected, and what to do. The commands show it in
one line; any other exception is a defect of fasttx.
"""

from __future__ import annotations


class FasttxError(Exception):
    """The family: `except fasttx.FasttxError` catches them all."""


def first_line(error: BaseException) -> str:
    """The first line of what an exception of another library says; its kind, if it says nothing."""
    return (str(error).strip() or type(error).__name__).split("\n", 1)[0].rstrip(".")


class Interrupted(Exception):
    """Ctrl-C or SIGTERM in a training: the run has been saved and can be resumed. No error, and not
    of the family."""


class ConfigError(FasttxError, ValueError):
    """A setting has a value that cannot work."""


class DataError(FasttxError, ValueError):
    """A dataset cannot be used."""


class DeviceError(FasttxError, ValueError):
    """This machine lacks the device or the precision that was asked for."""


class TokenizerError(FasttxError, RuntimeError):
    """A tokenizer file is missing, damaged, or of another kind."""


class CheckpointError(FasttxError, RuntimeError):
    """A file of a run is missing, damaged, or not what it should be."""


class InUseError(FasttxError, RuntimeError):
    """Another process has the run folder open; two would write into each other's files."""


class NotFiniteError(FasttxError, ValueError):
    """Numbers that should be finite are NaN or infinite."""


class DivergedError(NotFiniteError, RuntimeError):
    """The loss or the weights of a training are no longer finite."""


class BackendUnavailableError(FasttxError, RuntimeError):
    """A backend was asked for by name and cannot run here; the message lists every reason."""


class MetalError(FasttxError, RuntimeError):
    """FASTTX_MPS=metal, and the Metal kernels cannot be used; the message lists why."""


class UnsupportedError(FasttxError, NotImplementedError):
    """A model of another library asks for something that fasttx does not compute."""


class ExportError(FasttxError, RuntimeError):
    """An exported model does not answer as the run does."""


class BaselineError(FasttxError, RuntimeError):
    """A linear model cannot be fitted here."""


class PlotsError(FasttxError, RuntimeError):
    """There is nothing to draw with."""
