"""`fasttx.export.job.export`: a run in a folder of its own, checked before it is kept."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fasttx.errors import ConfigError, ExportError
from fasttx.export import beside, check
from fasttx.export.formats import FORMATS, Answer, Format, quantize
from fasttx.export.padded import PaddedClassifier
from fasttx.files import atomic_folder, json_text
from fasttx.load import TextClassifier, load
from fasttx.tasks import read_config
from fasttx.training.folder import RunFolder
from fasttx.version import __version__

QUANTISATIONS = ("int8",)
_MISREAD = 0.01  # of all texts
Say = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """The folder; what was measured, in sentences and as export.json has it; what a reader of the
    folder has to know."""

    folder: Path
    measured: list[str]
    record: dict[str, Any]
    notes: list[str]


def export(
    run: str | Path, form: str, out: str | Path | None = None, *, quantisation: str | None = None,
    texts: Sequence[str] | None = None, say: Say = lambda line: None,
) -> Exported:  # fmt: skip
    """The best model of a run in the folder `out`, by default <run>-<form> beside it.

    form: a name of `FORMATS`. quantisation: None, or int8 (ONNX only). texts: what it is checked
    on, instead of the run's validation split. Raises ConfigError for what cannot be had here,
    ExportError for a model that does not answer as the run does, and as `fasttx.load`; then there
    is no folder.
    """
    run = Path(run).expanduser()
    chosen = _format(form, quantisation)
    name = "-".join(part for part in (run.resolve().name, form, quantisation) if part)
    folder = run.resolve().with_name(name) if out is None else Path(out).expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} holds something; expected a new or an empty folder for --out")
    classifier = load(run, device="cpu", attn_backend="auto")
    config = read_config(RunFolder(run).config)
    if texts is None:
        samples = check.samples_of(run, config)
    elif texts:
        samples = check.Samples(texts, "the given texts")
    else:
        raise ConfigError("there is no text to check the export on; expected at least one")
    with atomic_folder(folder) as temporary:
        path = temporary / chosen.file
        first = temporary / "fp32" / chosen.file if quantisation else path
        first.parent.mkdir(exist_ok=True)
        say(f"writing {form} ...")
        chosen.write(run if chosen.of_run else PaddedClassifier(classifier.model), first)
        measured, record = _checked(chosen, first, classifier, samples, check.LIMIT)
        if quantisation:
            say(f"quantising to {quantisation} and measuring on {len(samples.texts):,} texts ...")
            quantize(first, path)
            shutil.rmtree(first.parent)
            measured, record = _checked(chosen, path, classifier, samples, check.INT8_LIMIT, True)
        if chosen.of_run:
            notes = beside.long_texts(classifier)
        else:
            notes = _write_beside(temporary, folder.name, form, classifier, samples, measured)
        record = {
            "format": form, "quantize": quantisation, "fasttx": __version__,
            "torch": torch.__version__, "machine": platform.machine(),
            "notes": notes, **record,
        }  # fmt: skip
        _write(temporary / "export.json", json_text(record))
    return Exported(folder, measured, record, [*filter(None, [samples.note]), *notes])


def _format(form: str, quantisation: str | None) -> Format:
    if form not in FORMATS:
        raise ConfigError(f"the format is {form!r}; expected one of {', '.join(FORMATS)}")
    if quantisation not in (None, *QUANTISATIONS):
        raise ConfigError(f"--quantize is {quantisation!r}; expected int8, or leave it away")
    if quantisation and form != "onnx":
        raise ConfigError(f"--quantize {quantisation} goes with --format onnx, not with {form}")
    if reasons := FORMATS[form].unavailable_reasons():
        raise ConfigError(f"--format {form} cannot be written here: {'; '.join(reasons)}")
    return FORMATS[form]


def _checked(
    form: Format, path: Path, classifier: TextClassifier, samples: check.Samples, limit: float,
    quantised: bool = False,
) -> tuple[list[str], dict[str, Any]]:  # fmt: skip
    """What the file at `path` answers, against the run: sentences, and entries of export.json.

    Raises ExportError where it is further off than `limit`.
    """
    answer: Answer = form.read(path)
    difference = check.compare(answer, classifier, samples.texts)
    check.require(difference, limit, form.file or "the folder")
    allowed = limit * max(1.0, difference.scale)
    said = f"Logits are at most {difference.largest:.1e} off the run's (limit {allowed:.1e}), on "
    said += f"{difference.texts} texts of {samples.origin}"
    sentences = [said + ("." if not samples.texts else " and random words.")]
    record: dict[str, Any] = {
        "checked_on": samples.origin, "texts": difference.texts,
        "largest_difference": difference.largest, "largest_logit": difference.scale,
        "limit": allowed,
    }  # fmt: skip
    if quantised and (quality := check.quality(answer, classifier, samples)):
        title = classifier.problem.measure.chosen_title
        sentences.append(
            f"{title[0].upper()}{title[1:]} on {samples.origin} ({quality.texts:,} texts): "
            f"{quality.before:.4f} before quantisation, {quality.after:.4f} after "
            f"({quality.after - quality.before:+.4f})."
        )
        record["quality"] = vars(quality)
    elif quantised:
        sentences.append("What quantisation costs was not measured: these texts have no labels.")
    return sentences, record


def _write_beside(
    folder: Path, name: str, form: str, classifier: TextClassifier,
    samples: check.Samples, measured: list[str],
) -> list[str]:  # fmt: skip
    """Tokenizer, labels, example and README; returns what a tokenizer.json cannot say."""
    tokenizer = beside.tokenizer_json(classifier)
    notes, texts = beside.notes(classifier, tokenizer), len(samples.texts)
    # Libraries may differ in what the lower case of a rare letter is, not in more than that.
    if other := check.misread(tokenizer, classifier, samples.texts):
        notes.append(f"tokenizer.json reads {other:,} of {texts:,} texts otherwise than the run")
        if other > max(1, _MISREAD * texts):
            raise ExportError(
                f"{notes[-1]}; expected at most {_MISREAD:.0%}. Nothing was kept. Please report "
                "it: this is a defect of the export"
            )
    _write(folder / "tokenizer.json", tokenizer)
    _write(folder / "config.json", json_text(beside.config_json(classifier)))
    _write(folder / "example.py", beside.example_py(form, classifier.problem_type))
    _write(folder / "README.md", beside.readme(name, FORMATS[form], classifier, measured, notes))
    return notes


def _write(path: Path, text: str) -> None:
    """Into a folder that nobody sees yet."""
    path.write_text(text, encoding="utf-8", newline="\n")
