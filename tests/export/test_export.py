"""`fasttx export`: each format answers as the run, and a file that does not is not kept."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fasttx
import train
from fasttx.commands import cli
from fasttx.errors import ConfigError, ExportError
from fasttx.export import check, formats, job
from fasttx.export.formats import FORMATS
from fasttx.export.padded import PaddedClassifier

# One worker exports; the others would export the same again.
pytestmark = pytest.mark.xdist_group("export")

tokenizers = pytest.importorskip("tokenizers")
RUNS = Path(__file__).resolve().parents[1] / "data" / "runs"
RUN = RUNS / "classification-finished"
TEXTS = ["a wonderful film", "", "dull, dull and dull", "word " * 70, "not a bad film at all"]
BESIDE = ["README.md", "config.json", "example.py", "export.json"]


def exported(tmp_path_factory: pytest.TempPathFactory, *argv: str) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    assert cli.main(["export", *argv, "--out", str(folder)]) == 0
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    return folder


def inputs(folder: Path, texts: list[str] = TEXTS) -> tuple[np.ndarray, np.ndarray]:
    """By the tokenizer.json of the folder alone."""
    encoded = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)
    ids, masks = [e.ids for e in encoded], [e.attention_mask for e in encoded]
    return np.array(ids), np.array(masks)


def answers_as_the_run(
    answer: Callable[[np.ndarray, np.ndarray], np.ndarray], folder: Path, run: Path = RUN
) -> None:
    wanted = fasttx.load(run, device="cpu").logits(TEXTS).numpy()
    ids, mask = inputs(folder)
    np.testing.assert_allclose(answer(ids, mask), wanted, atol=1e-5)
    left = np.flip(ids, 1).copy(), np.flip(mask, 1).copy()
    real = [row[m == 1][::-1] for row, m in zip(*left, strict=True)]
    for row, m, text in zip(*left, real, strict=True):
        row[m == 1] = text
    np.testing.assert_allclose(answer(*left), wanted, atol=1e-5)
    np.testing.assert_allclose(answer(ids[:1, :3], mask[:1, :3]), wanted[:1], atol=1e-5)


# --- the formats ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def onnx_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for package in FORMATS["onnx"].needs:
        pytest.importorskip(package)
    return exported(tmp_path_factory, str(RUN), "--format", "onnx")


def test_onnx_runtime_answers_as_the_run(onnx_folder):
    import onnxruntime

    session = onnxruntime.InferenceSession(onnx_folder / "model.onnx")
    shapes = {x.name: (x.type, x.shape) for x in (*session.get_inputs(), *session.get_outputs())}
    assert shapes == {
        "input_ids": ("tensor(int64)", ["batch", "length"]),
        "attention_mask": ("tensor(int64)", ["batch", "length"]),
        "logits": ("tensor(float)", ["batch", 2]),
    }
    names = "input_ids", "attention_mask"
    answers_as_the_run(
        lambda *x: session.run(None, dict(zip(names, x, strict=True)))[0], onnx_folder
    )
    too_long = np.ones((1, 17), dtype=np.int64)
    with pytest.raises(Exception, match="(?i)indices|gather"):
        session.run(None, dict.fromkeys(names, too_long))


def test_openvino_answers_as_the_run(onnx_folder):
    openvino = pytest.importorskip("openvino")
    core = openvino.Core()
    model = core.compile_model(core.read_model(onnx_folder / "model.onnx"), "CPU")
    answers_as_the_run(lambda *x: model(x)[0], onnx_folder)


def test_the_folder_says_what_it_is(onnx_folder):
    assert sorted(path.name for path in onnx_folder.iterdir()) == [
        *BESIDE, "model.onnx", "tokenizer.json",
    ]  # fmt: skip
    config = json.loads((onnx_folder / "config.json").read_text())
    assert config["id2label"] == {"0": "negative", "1": "positive"}
    assert config["label2id"] == {"negative": 0, "positive": 1}
    assert config["problem_type"] == "single_label_classification"
    record = json.loads((onnx_folder / "export.json").read_text())
    assert record["checked_on"] == "the validation split of demo"
    assert record["largest_difference"] < record["limit"] == 1e-4
    assert f"{record['largest_difference']:.1e}" in (onnx_folder / "README.md").read_text()


def test_the_example_needs_neither_torch_nor_fasttx(onnx_folder):
    code = (
        "import runpy, sys\n"
        "sys.modules |= dict.fromkeys(('torch', 'fasttx', 'transformers', 'onnx'))\n"
        "del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    argv = [sys.executable, "-c", code, str(onnx_folder / "example.py"), *TEXTS[:3]]
    done = subprocess.run(argv, text=True, capture_output=True, cwd=onnx_folder.parent)
    assert done.returncode == 0, done.stderr
    for line, p in zip(done.stdout.splitlines(), fasttx.load(RUN).predict(TEXTS[:3]), strict=True):
        found = ast.literal_eval(line[line.index("{") :])
        assert found == pytest.approx(p.probabilities, abs=1e-4)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run from an ELECTRA: post-norm, learned positions, a projected embedding, first rows."""
    folders = pytest.importorskip("tests.pretrained_folders")
    faults = pytest.importorskip("tests.faults")
    place = tmp_path_factory.mktemp("pretrained")
    folders.write(place / "electra", "electra", num_hidden_layers=1)
    arguments = (
        f"--epochs 1 --batch-size 16 --max-len 12 --attn-backend reference --dataset "
        f"{faults.write_reviews(place / 'data', 60)} --init-from {place / 'electra'} "
        f"--out {place / 'run'}"
    )
    assert train.main(arguments.split()) == 0
    return place / "run"


def test_int8_of_a_pretrained_encoder(pretrained, tmp_path_factory, capsys):
    """What it was in fp32 is checked first: see `job.export`."""
    for package in FORMATS["onnx"].needs:
        pytest.importorskip(package)
    argv = [str(pretrained), "--format", "onnx", "--quantize", "int8"]
    folder = exported(tmp_path_factory, *argv)
    said = capsys.readouterr().out
    import onnx

    graph = onnx.load(folder / "model.onnx").graph
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("MatMulInteger") == 7  # projection; qkv, out, up, down; two of the head
    quality = json.loads((folder / "export.json").read_text())["quality"]
    assert quality["name"] == "accuracy" and f"{quality['after']:.4f} after" in said
    split = check.samples_of(pretrained, job.read_config(pretrained / "config.json"))
    answer = formats._read_onnx(folder / "model.onnx")
    ids, mask = inputs(folder, list(split.texts))
    right = (answer(ids, mask).argmax(-1) == split.labels).mean()
    assert quality["after"] == pytest.approx(right) and quality["texts"] == len(split.labels)


def test_torch_export_is_plain_torch(tmp_path_factory):
    folder = exported(tmp_path_factory, str(RUN), "--format", "torch-export")
    program = torch.export.load(folder / "model.pt2")
    targets = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert all(t.startswith(("aten.", "<built-in")) for t in targets), targets
    answers_as_the_run(formats._answer(program.module()), folder)


def test_aoti_is_machine_code(tmp_path, monkeypatch):
    """Here of a compiler that does not optimise. A minute all the same, so only where it is asked
    for: FASTTX_AOTI=1."""
    if not os.environ.get("FASTTX_AOTI"):
        pytest.skip("FASTTX_AOTI is not set: a C++ compiler reads torch's headers for a minute")
    if reasons := FORMATS["aoti"].unavailable_reasons():
        pytest.skip(reasons[0])
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    from torch._inductor import config

    cheap = {"cpp.cxx": (None, str(compiler)), "compile_threads": 1}
    with config.patch({**cheap, "cpp_cache_precompile_headers": False}):
        folder = job.export(RUN, "aoti", tmp_path / "model").folder
    program = torch._inductor.aoti_load_package(str(folder / "model.pt2"))
    answers_as_the_run(formats._answer(program), folder)


def test_safetensors_is_a_folder_of_hugging_face(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("safetensors")
    folder = exported(tmp_path_factory, str(RUN), "--format", "safetensors")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = model(**tokenizer(TEXTS, truncation=True, padding=True, return_tensors="pt")).logits
    wanted = fasttx.load(RUN, device="cpu").logits(TEXTS)
    torch.testing.assert_close(found.detach(), wanted, atol=1e-5, rtol=0)
    assert "# classification-finished" in (folder / "README.md").read_text()


@pytest.mark.parametrize(
    ("problem", "labels", "name"),
    [
        ("multi_label_classification", [["bad"], ["good", "new"], []], "micro_f1"),
        ("regression", [1.5, -0.5, 0.25], "rmse"),
    ],
)
def test_other_kinds_of_problems(fake, tmp_path, problem, labels, name):
    """The folder names the problem as Hugging Face does; int8 is judged by the run's measure."""
    rows = [json.dumps({"text": f"film {i}", "label": labels[i % 3]}) for i in range(60)]
    for split in ("train", "test"):
        lines = [row.replace("film", split) for row in rows]
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    argv = f"--dataset {tmp_path} --problem-type {problem} --out {tmp_path / 'run'} --epochs 1 "
    argv += "--d-model 16 --num-heads 2 --num-layers 1 --d-ff 16 --max-len 8 --vocab-size 80 "
    assert train.main([*argv.split(), "--attn-backend", "reference"]) == 0
    run = tmp_path / "run"
    classifier = fasttx.load(run, device="cpu")
    right = formats._answer(PaddedClassifier(classifier.model))
    fake(lambda _: right)
    folder = job.export(run, "torch-export", tmp_path / "out").folder
    config = json.loads((folder / "config.json").read_text())
    assert config["problem_type"] == problem
    assert list(config["id2label"].values()) == list(classifier.label_names)
    samples = check.samples_of(run, job.read_config(run / "config.json"))
    quality = check.quality(right, classifier, samples)
    assert (quality.name, quality.texts) == (name, len(samples.texts))
    assert quality.before == pytest.approx(quality.after, abs=1e-5)
    worse = check.quality(lambda *x: 1 - right(*x), classifier, samples)
    assert worse.before == quality.before != worse.after


# --- what is not kept -----------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts a format in the place of torch-export, which writes and answers as it is told to."""

    def put(answer: Any = None, write: Any = None) -> None:
        model = PaddedClassifier(fasttx.load(RUN, device="cpu").model)
        right = formats._answer(model)
        form = dataclasses.replace(
            FORMATS["torch-export"],
            write=write or (lambda model, path: path.write_bytes(b"model")),
            read=lambda path: answer(right) if answer else right,
        )
        monkeypatch.setitem(FORMATS, "torch-export", form)

    return put


def wrong_on_the_left(right):
    """Where a text is padded on the left, and nowhere else."""

    def answer(ids, mask):
        left = (mask[:, 0] == 0) & (mask[:, -1] == 1)
        return right(ids, mask) + left[:, None]

    return answer


WRONG = {
    "a bit off": lambda right: lambda ids, mask: right(ids, mask) + 2e-4,
    "no number": lambda right: lambda ids, mask: right(ids, mask) * np.nan,
    "padding is read": lambda right: lambda ids, mask: right(ids, np.ones_like(mask)),
    "left padding": wrong_on_the_left,
    "classes swapped": lambda right: lambda ids, mask: right(ids, mask)[:, ::-1],
    "one batch for all": lambda right: lambda ids, mask: right(ids[:1], mask[:1]),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_model_that_answers_otherwise_is_not_kept(fake, wrong, tmp_path):
    fake(wrong)
    with pytest.raises(ExportError, match="off, on|answers"):
        job.export(RUN, "torch-export", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_the_right_answer_is_kept(fake, tmp_path):
    fake()
    job.export(RUN, "torch-export", tmp_path / "a" / "out")
    assert (tmp_path / "a" / "out" / "model.pt2").read_bytes() == b"model"


def test_int8_has_a_limit_of_its_own(fake, tmp_path):
    fake(lambda right: lambda ids, mask: right(ids, mask) + 0.25)
    classifier = fasttx.load(RUN, device="cpu")
    answer = FORMATS["torch-export"].read(tmp_path)
    difference = check.compare(answer, classifier, TEXTS)
    assert difference.largest == pytest.approx(0.25, abs=1e-5)
    with pytest.raises(ExportError, match="expected at most 0.2"):
        check.require(difference, check.INT8_LIMIT, "model.onnx")


def test_a_full_disk_leaves_nothing(fake, tmp_path, capsys):
    """The error of the system, whatever library was writing; with the folder that was asked for."""
    formats_here = ["torch-export"]
    if not FORMATS["safetensors"].unavailable_reasons():
        formats_here.append("safetensors")
    fake(write=lambda model, path: path.write_bytes(bytes(1 << 20)))
    for name in formats_here:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            status = cli.main(["export", str(RUN), "--format", name, "--out", str(tmp_path / "o")])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert status == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert f"error: {tmp_path / 'o'}: File too large." in line
        assert not list(tmp_path.iterdir())


def test_a_kill_leaves_nothing_half_written(fake, tmp_path):
    out = tmp_path / "out"

    def killed(model: object, path: Path) -> None:
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    fake(write=killed)
    pid = os.fork()
    if not pid:
        try:
            torch.set_num_threads(1)  # a fork has no threads of OpenMP's
            job.export(RUN, "torch-export", out)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert not out.exists() and left.name.startswith(".out.")
    long_ago = time.time() - 7200
    os.utime(left, (long_ago, long_ago))
    fake()
    job.export(RUN, "torch-export", out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


# --- what is refused, and what is said ------------------------------------------------------------


def test_what_cannot_be_had_is_one_line(fake, tmp_path, capsys, monkeypatch):
    fake()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    (tmp_path / "empty.txt").touch()
    run, out = str(RUN), ["--out", str(tmp_path / "out")]
    for argv, said in (
        ([run, "--format", "torch-export", "--out", str(tmp_path / "full")], "holds something"),
        ([run, "--format", "torch-export", "--quantize", "int8", *out], "goes with --format onnx"),
        (
            [run, "--format", "torch-export", "--texts", str(tmp_path / "empty.txt"), *out],
            "no text",
        ),
        ([run, "--format", "torch-export", "--texts", str(tmp_path / "no.txt"), *out], "no.txt"),
        ([str(RUNS / "lstm-finished"), "--format", "torch-export", *out], "LSTM"),
        ([str(tmp_path / "no-run"), "--format", "torch-export", *out], "not a folder"),
    ):
        assert cli.main(["export", *argv]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert said in line
    assert not (tmp_path / "out").exists()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["x"]
    monkeypatch.setattr(formats.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"onnxscript is not installed: pip install 'fasttx\[exp"):
        job.export(RUN, "onnx", tmp_path / "out")
    monkeypatch.undo()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match="no C\\+\\+ compiler \\(no-such-compiler\\)"):
        job.export(RUN, "aoti", tmp_path / "out")


def test_where_the_texts_are_gone_others_are_taken(fake, tmp_path, capsys):
    """And it is said. The folder's own name is the run's and the format's."""
    fake()
    run = shutil.copytree(RUN, tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["train"]["dataset"] = str(tmp_path / "moved")
    (run / "config.json").write_text(json.dumps(config))
    assert cli.main(["export", str(run), "--format", "torch-export"]) == 0
    said = capsys.readouterr()
    assert "note: checked on random words only" in said.err and "of random words." in said.out
    (tmp_path / "texts").write_text("a film\n\nanother film\n")
    argv = ["--texts", str(tmp_path / "texts"), "--out", str(tmp_path / "b")]
    assert cli.main(["export", str(run), "--format", "torch-export", *argv]) == 0
    said = capsys.readouterr()
    assert "note" not in said.err and "the given texts and random words" in said.out
    assert (tmp_path / "run-torch-export" / "model.pt2").exists()
