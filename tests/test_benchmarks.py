"""The benchmarks: what they count, whom they refuse, how they take turns, what they save and print.

That each of them runs is CI's own step, `make bench-once`. Nothing here asserts a time.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import attention_level
import contest as contests
import data_level
import device_report
import figures
import limit
import model_level
import peers
import side_by_side
from workload import SMALL, make_batches, padded, review_ids, slices

from fasttx.ops import reference
from fasttx.ops.registry import BACKENDS, Backend

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"
CPU = torch.device("cpu")
CONFIG = SMALL.config
LENGTHS = [[5, 16, 9], [16, 2, 11]]


def attention_contest(**options):
    return attention_level.attention(LENGTHS, CONFIG, CPU, what="test", **options)


def training_contest(batch_size=4):
    ids, _ = review_ids(None, 2 * batch_size, CONFIG)
    return model_level.training(ids, batch_size, CONFIG, CPU, what="test")


# ---------------------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("peer", ["padded-sdpa", "nn.TransformerEncoder"])
def test_model_flops_are_torch_s(peer, backward):
    """Of texts of one length, where padded and packed are the same work."""
    config = dataclasses.replace(CONFIG, dropout=0.0)
    model = peers.TRAINING_PEERS[peer](config).train()  # in eval mode fused kernels count nothing
    ids = torch.randint(2, config.vocab_size, (3, 13))
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        loss = model(ids).sum()
        if backward:
            loss.backward()
    assert counter.get_total_flops() == limit.model_flops(config, [13] * 3, backward)


@pytest.mark.parametrize("backward", [False, True])
def test_attention_flops_are_torch_s(backward):
    q, k, v = torch.randn(3, 2, 4, 11, 8, requires_grad=True)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        if backward:
            out.sum().backward()
    assert counter.get_total_flops() == limit.attention_flops([11, 11], 4, 8, backward)


def test_attention_flops_grow_with_the_square_of_each_length():
    one = limit.attention_flops([7], 2, 8, False)
    assert limit.attention_flops([7, 14], 2, 8, False) == 5 * one


def test_attention_bytes_are_those_of_its_tensors():
    qkv = torch.randn(10, 3, 2, 8, dtype=torch.bfloat16)
    out = torch.randn(10, 2, 8, dtype=torch.bfloat16)
    forward = qkv.nbytes + out.nbytes
    assert limit.attention_bytes(10, 2, 8, 2, False) == forward
    backward = forward + out.nbytes + qkv.nbytes  # reads all and the gradient, writes three
    assert limit.attention_bytes(10, 2, 8, 2, True) == forward + backward


def test_the_limit_multiplies_what_it_counts():
    """Every product, at its shape: torch's counter sees the FLOPs of one block."""
    work = limit.Work.of_model(CONFIG, [7, 9], backward=True)
    measured = limit.Limit([work], CPU, torch.float32)
    counter = FlopCounterMode(display=False)
    with counter:
        seconds = measured.seconds(0)
    assert counter.get_total_flops() == limit.product_flops(work.products)
    total = CONFIG.num_layers * limit.product_flops(work.products) + work.flops
    assert total == limit.model_flops(CONFIG, [7, 9], True)
    assert seconds == pytest.approx(total / measured.rates[-1])


# --------------------------------------------------------------------------------------- who may in


def fake_backend(monkeypatch, name="fake", factor=1.0, reasons=(), dropout="shared"):
    """A backend that is listed: the reference, its output times `factor`."""
    module = types.ModuleType(f"fasttx_{name}")
    module.attention = lambda *a, **k: reference.attention(*a, **k) * factor
    module.attention_qkv, module.rowops = reference.attention_qkv, reference.rowops
    module.unavailable_reasons = lambda device, dtype, head_dim: list(reasons)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    backend = Backend(name, module.__name__, "", (), (torch.float32,), dropout)
    monkeypatch.setitem(BACKENDS, name, backend)


def test_a_listed_backend_takes_part(monkeypatch):
    fake_backend(monkeypatch)
    assert "fasttx-fake" in {*attention_level.attention_names()} & {*model_level.training_names()}
    assert "fasttx-fake" in model_level.inference_names()
    for made in (attention_contest(), training_contest()):
        made.enter("fasttx-fake").step(0)


@pytest.mark.parametrize("make", [attention_contest, training_contest])
def test_an_unavailable_backend_gives_its_reasons(monkeypatch, make):
    fake_backend(monkeypatch, reasons=["no such chip: buy one", "too old: renew it"])
    with pytest.raises(contests.Unavailable, match=r"no such chip: buy one; too old: renew it"):
        make().enter("fasttx-fake")


@pytest.mark.parametrize("make", [attention_contest, training_contest])
def test_who_computes_something_else_is_not_timed(monkeypatch, make):
    fake_backend(monkeypatch, factor=1.01)
    with pytest.raises(AssertionError, match="fasttx-fake: .* from the reference's"):
        make().enter("fasttx-fake")


def test_wrong_gradients_are_not_timed(monkeypatch):
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * 1.01

    fake_backend(monkeypatch)
    wrong = lambda *a, **k: Wrong.apply(reference.attention(*a, **k))  # noqa: E731
    monkeypatch.setattr(sys.modules["fasttx_fake"], "attention", wrong)
    with pytest.raises(AssertionError, match="dqkv is 0.01 from"):
        attention_contest().enter("fasttx-fake")
    attention_contest(backward=False).enter("fasttx-fake")


@pytest.mark.parametrize("dropout", ["shared", "torch"])
def test_who_drops_nothing_is_not_timed(monkeypatch, dropout):
    fake_backend(monkeypatch, dropout=dropout)
    module = sys.modules["fasttx_fake"]
    monkeypatch.setattr(
        module, "attention", lambda *a, **k: reference.attention(*a, **{**k, "dropout_p": 0.0})
    )
    attention_contest(p=0.0).enter("fasttx-fake")
    with pytest.raises(AssertionError, match="dropout is asked for and changes nothing"):
        attention_contest(p=0.1).enter("fasttx-fake")


def test_shared_masks_have_to_be_the_reference_s(monkeypatch):
    fake_backend(monkeypatch)

    def other_masks(*args, seed=None, **options):
        return reference.attention(*args, seed=None if seed is None else seed + 1, **options)

    monkeypatch.setattr(sys.modules["fasttx_fake"], "attention", other_masks)
    with pytest.raises(AssertionError, match="out with dropout"):
        attention_contest(p=0.1).enter("fasttx-fake")


def test_a_peer_with_a_wrong_weight_is_not_timed(monkeypatch):
    copy_from = peers.PaddedSdpa.copy_from

    def wrong(self, model):
        copy_from(self, model)
        self.blocks[1].up.bias.data += 0.1

    monkeypatch.setattr(peers.PaddedSdpa, "copy_from", wrong)
    with pytest.raises(AssertionError, match=r"padded-sdpa: logits is .* from the reference's"):
        training_contest().enter("padded-sdpa")


@pytest.mark.parametrize("name", ["x-transformers", "hf-bert-sdpa"])
def test_a_peer_that_is_not_installed_says_so(monkeypatch, name):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda package: None)
    with pytest.raises(contests.Unavailable, match="is not installed: pip install"):
        training_contest().enter(name)


def test_slices_are_the_batch():
    ids, _ = review_ids(None, 7, CONFIG)
    (batch,) = make_batches(ids, 7, CPU)
    parts = slices(batch, 3)
    assert [len(part) for part in parts] == [3, 3, 1]
    assert torch.equal(torch.cat([part.input_ids for part in parts]), batch.input_ids)
    assert torch.equal(torch.cat([part.labels for part in parts]), batch.labels)
    assert torch.equal(padded(batch)[padded(batch) != 0], batch.input_ids)


# ----------------------------------------------------------------------------------------- in turns


class Recorder:
    """A contestant that writes down its steps."""

    note = ""

    def __init__(self, name, log):
        self.name, self.log = name, log

    def prepare(self):
        self.log.append((self.name, "prepare"))

    def verify(self):
        self.log.append((self.name, "verify"))

    def step(self, i):
        self.log.append((self.name, i))


class RecordedLimit:
    rates, bandwidth = (), None

    def __init__(self, log):
        self.log = log

    def seconds(self, i):
        self.log.append(("limit", i))
        return 1e-3


def test_all_take_turns_on_the_same_input():
    log = []
    entrants = {name: Recorder(name, log) for name in ("peer", "fasttx-a", "fasttx-b")}
    made = contests.Contest("q", CPU, 3, 1, entrants, RecordedLimit(log))
    entered = side_by_side.enter_all(made, [])
    assert log == [(n, w) for n in entrants for w in ("prepare", "verify")]
    log.clear()
    found = side_by_side.run(made, entered, rounds=5)
    turns = log[-20:]
    assert turns == [(n, r % 3) for r in range(5) for n in (*entrants, "limit")]
    assert [row.contestant for row in found] == [*entrants]
    assert {row.rounds for row in found} == {5}
    assert side_by_side.run(made, entered, seconds=0.0)[0].rounds == 3  # time or not
    assert side_by_side.run(made, entered, seconds=60.0)[0].rounds == 30  # enough


def test_figures_come_from_medians():
    made = contests.Contest("q", CPU, 1, 32, {n: Recorder(n, []) for n in ("fasttx-a", "peer")})
    times = {"fasttx-a": [0.1, 0.2, 9.0], "peer": [0.4, 0.3, 0.5]}
    nothing = dict.fromkeys(times, math.nan)
    ours, peer = figures.rows(made, times, [0.05, 0.01, 0.06], nothing, nothing)
    assert ours.samples_per_second == pytest.approx(160)
    assert (ours.ratio, peer.ratio) == (pytest.approx(2), 1)
    assert ours.ms == pytest.approx(200)
    assert ours.limit_share == pytest.approx(0.25)
    assert ours.record()["peak_memory_mb"] is None
    alone = figures.rows(made, {"fasttx-a": [0.1, 0.2]}, [0.1, 0.1], nothing, nothing)
    assert math.isnan(alone[0].ratio)  # no peer ran: nothing to be compared with
    assert "nan" not in figures.table(alone)


@pytest.mark.parametrize(
    ("milliseconds", "load", "artefact"),
    [
        ([8.0, 16.01, 7.99, 24.0], 9.0, True),
        ([31.99, 32.0, 32.02, 31.0], 9.0, True),
        ([8.0, 16.01, 7.99, 24.0], 0.0, False),  # nobody else was there
        ([8.4, 15.1, 9.3, 12.5], 9.0, False),
        ([0.01, 0.02, 0.01, 0.01], 9.0, False),  # near the multiple zero
        ([800.0, 1600.0, 800.0], 9.0, False),  # long: some multiple is always near
        ([8.0, 8.0], 9.0, False),
    ],
)
def test_time_slices_are_not_work(milliseconds, load, artefact):
    assert figures.scheduler_artefact([ms / 1e3 for ms in milliseconds], load) == artefact


def test_an_artefact_is_said_and_not_reported(monkeypatch):
    monkeypatch.setattr(figures, "load_average", lambda: 99.0)
    made = contests.Contest("q", CPU, 1, 1, {"peer": Recorder("peer", [])})
    nothing = {"peer": math.nan}
    found = figures.rows(made, {"peer": [0.008, 0.016, 0.008]}, [math.nan], nothing, nothing)
    assert "scheduling, not work" in figures.table(found)
    assert "125.0" not in figures.table(found)


def test_the_table_in_markdown():
    made = contests.Contest("q", CPU, 1, 8, {n: Recorder(n, []) for n in ("peer", "fasttx-a")})
    some = {"peer": 3.0, "fasttx-a": 1.0}
    nothing = dict.fromkeys(some, math.nan)
    times = {"peer": [0.2, 0.2], "fasttx-a": [0.1, 0.1]}
    found = figures.rows(made, times, [0.05, 0.05], some, nothing)
    lines = figures.table(found, markdown=True).splitlines()
    assert lines[0] == "| contestant | samples/s | ratio | ms (quartiles) | limit | MB |"
    assert lines[3] == "| fasttx-a | 80.0 | 2.00x | 100.0 (100.0-100.0) | 50 % | 1 |"


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="Linux counts the peak")
def test_peak_memory_sees_what_a_step_needs_and_gives_back():
    size = 64
    assert side_by_side.peak_memory_mb(lambda: None, CPU) < size / 4
    peak = side_by_side.peak_memory_mb(lambda: torch.ones(size, 2**18).sum(), CPU)
    assert 0.9 * size < peak < 1.5 * size


def test_data_contests_check_their_ids():
    made = data_level.batching(review_ids(None, 8, CONFIG)[0], 4, "test")
    for name in data_level.BATCHERS:
        made.enter(name)
    made.entrants["fasttx"].expected = lambda i: [0]
    made.entered.clear()
    with pytest.raises(AssertionError, match="fasttx: other ids"):
        made.enter("fasttx")


# ---------------------------------------------------------------------------------- as they are run


def run(*command, cwd=ROOT, **environment):
    # pytest-benchmark takes no times in a worker of xdist, and this process may be one.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment = {"FASTTX_DATA": "", "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=cwd, text=True, capture_output=True,
        env=inherited | environment,
    )  # fmt: skip


PLANTED = """
import time
from pathlib import Path

import pytest
import torch
from contest import Contest


class Sleeper:
    note = ""
    def prepare(self): pass
    def verify(self): pass
    def step(self, i):
        time.sleep(float(Path(__file__).with_name("seconds").read_text()))


def make(setting):
    return Contest("sleep", setting.device, 1, 1, {"peer": Sleeper(), "fasttx-x": Sleeper()})


@pytest.mark.parametrize("contest", [pytest.param(make, id="batch1")], indirect=True)
@pytest.mark.parametrize("name", ["peer", "fasttx-x"])
def test_sleep(compete, name):
    compete(name)
"""


def test_saving_and_comparing(tmp_path):
    """The first run has nothing to compare with, the second has, a slow-down is found."""
    folder = tmp_path / "benchmarks"
    shutil.copytree(BENCHMARKS, folder, ignore=shutil.ignore_patterns("bench_*", "__pycache__"))
    (tmp_path / "fasttx").symlink_to(ROOT / "fasttx")
    (folder / "bench_planted.py").write_text(PLANTED)
    (folder / "seconds").write_text("0.01")
    # As a person would ask: 10 %. Two honest runs on a busy machine may differ by more.
    fail, lenient = (f"--benchmark-compare-fail=median:{n}%" for n in (10, 300))
    pytest_ = ("-m", "pytest", "-p", "no:xdist")

    first = run(
        *pytest_,
        "benchmarks/",
        "--benchmark-compare",
        lenient,
        cwd=tmp_path,
        OMP_WAIT_POLICY="PASSIVE",
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert "there is nothing to compare with" in " ".join(first.stdout.split())
    assert "Warning" not in first.stdout + first.stderr
    assert "contestant  samples/s  ratio" in first.stdout

    second = run(*pytest_, "--benchmark-compare", lenient, cwd=folder, OMP_WAIT_POLICY="ACTIVE")
    assert second.returncode == 0, second.stdout + second.stderr
    assert "(0001_run)" in second.stdout and "(NOW)" in second.stdout
    assert "changed: OMP_WAIT_POLICY PASSIVE then, ACTIVE now." in second.stdout

    saved = sorted((tmp_path / ".benchmarks").rglob("*.json"))
    assert [path.name for path in saved] == ["0001_run.json", "0002_run.json"]
    record = json.loads(saved[1].read_text())
    infos = {b["name"]: b["extra_info"] for b in record["benchmarks"]}
    assert infos["test_sleep[fasttx-x-batch1]"]["samples_per_second"] > 0
    assert record["machine_info"]["fasttx"]["cpu"] == figures.environment(CPU)["cpu"]

    (folder / "seconds").write_text("0.1")
    third = run(*pytest_, folder, "--benchmark-compare", fail, cwd=ROOT)
    assert third.returncode == 1, third.stdout + third.stderr
    assert "Performance has regressed" in third.stdout + third.stderr


def test_side_by_side(tmp_path):
    path = tmp_path / "figures.json"
    done = run(
        BENCHMARKS / "side_by_side.py", "--level", "latency", "--rounds", "2", "--json", path,
        "--contestants", "padded-sdpa", "fasttx-sdpa", "--allocator", "tuned", "--d-model", "64",
        "--num-heads", "2", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ", d_model 64, num_heads 2" in done.stdout
    assert "tuned allocator" in done.stdout and "fasttx-sdpa" in done.stdout
    (record,) = json.loads(path.read_text())
    assert [row["contestant"] for row in record["rows"]] == ["padded-sdpa", "fasttx-sdpa"]
    assert record["level"] == "latency" and record["environment"]["load"] is not None


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--rounds", "1"], "--rounds is 1; expected at least 2"),
        (["--d-model", "100"], "d_model is 100 and num_heads is 8; expected a d_model that"),
        (["--level", "latency", "--contestants", "nobody"], "nobody; expected some of nn.Trans"),
    ],
)
def test_side_by_side_refuses(arguments, complaint):
    done = run(BENCHMARKS / "side_by_side.py", *arguments)
    assert done.returncode == 2
    assert complaint in done.stderr


def test_side_by_side_says_in_one_line_who_fails_verification(monkeypatch):
    def enter(self, name):
        raise AssertionError(f"{name}: logits are 0.2 from the reference's")

    monkeypatch.setattr(side_by_side.Contest, "enter", enter)
    arguments = ["--level", "latency", "--contestants", "fasttx-sdpa", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["side_by_side.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        side_by_side.main()
    assert stopped.value.code == "side_by_side.py: fasttx-sdpa: logits are 0.2 from the reference's"


def saved_run(path):
    def benchmark(contest, name, **facts):
        row = {
            "contestant": name, "samples_per_second": 10.0, "ms": 5.0, "ideal_ms": 2.0,
            "artefact": False, "rounds": 3, "note": "", **facts,
        }  # fmt: skip
        return {"group": contest, "extra_info": row}

    attention = {"level": "attention", "backward": True, "p": 0.1, "dtype": "float32"}
    records = [
        benchmark(f"n{n}", name, **attention, lengths=f"{n} tokens each", tokens=8192.0)
        for n in (64, 128)
        for name in ("padded-sdpa", "fasttx-sdpa")
    ]
    training = {"level": "training", "batch": 32, "lengths": "real reviews"}
    records += [benchmark("t", name, **training) for name in ("padded-sdpa", "fasttx-sdpa")]
    where = figures.environment(CPU) | {"cpu": "A fine processor"}
    path.write_text(json.dumps({"machine_info": {"fasttx": where}, "benchmarks": records}))


def test_plots(tmp_path):
    pytest.importorskip("matplotlib")
    saved_run(tmp_path / "0001_run.json")
    done = run(BENCHMARKS / "plots.py", tmp_path / "0001_run.json", "--folder", tmp_path)
    assert done.returncode == 0, done.stderr
    for name in ("samples-per-second", "attention-throughput", "attention-time"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        drawn = (tmp_path / f"{name}.svg").read_text()
        assert "<!-- fasttx-sdpa -->" in drawn and "A fine processor" in drawn
    empty = tmp_path / "0002_run.json"
    where = {"machine_info": {"fasttx": figures.environment(CPU)}, "benchmarks": []}
    empty.write_text(json.dumps(where))
    done = run(BENCHMARKS / "plots.py", empty, "--folder", tmp_path / "none")
    assert done.stdout.count("not measured") == 3
    assert not list((tmp_path / "none").iterdir())


def test_curves(tmp_path):
    pytest.importorskip("matplotlib")
    epoch = {"seconds": 2.0, "samples_per_second": 500.0, "train_loss": 0.5, "val_loss": 0.6,
             "train_accuracy": 0.8, "val_accuracy": 0.75}  # fmt: skip
    results = {
        "history": [epoch, epoch], "best_epoch": 1, "test_accuracy": 0.7, "val_accuracy": 0.75,
        "seed": 3, "hardware": {"cpu": "A fine processor", "threads": 2},
        "versions": {"torch": "9.9"},
    }  # fmt: skip
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(json.dumps(results))
    arguments = (f"the first={tmp_path / 'a'}", tmp_path / "b", "--folder", tmp_path)
    done = run(BENCHMARKS / "curves.py", *arguments)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "learning-curves.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "learning-curves.svg").read_text()
    for text in ("the first", ">b<", "seed 3", "A fine processor, 2 threads, torch 9.9"):
        assert text in drawn
    done = run(BENCHMARKS / "curves.py", tmp_path / "none")
    assert done.returncode == 2
    assert "none is no finished run of train.py" in done.stderr


def test_device_report(tmp_path):
    path = tmp_path / "report.json"
    done = run(BENCHMARKS / "device_report.py", "--small", "--device", "cpu", "--minutes", "0.7",
               "--json", path, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) <= device_report.LINES
    assert "FAILED" not in done.stdout and "TOO FAR" not in done.stdout
    for part in ("errors of reference", "attention, forward + backward", "training step"):
        assert part in done.stdout
    assert json.loads(path.read_text())["lines"] == lines


def test_device_report_goes_on_after_a_failure(capsys):
    report = device_report.Report(seconds=60)

    def fails():
        raise RuntimeError("no\nluck")

    report.part("first", 1, fails)
    report.part("second", 1e6, fails)
    report.part("third", 1, lambda: report.say("fine"))
    first, second, third = report.lines
    assert first == "first: FAILED: RuntimeError: no luck"
    assert second.startswith("second: left out") and third == "fine"
    for _ in range(100):
        report.say("more")
    assert len(report.lines) == device_report.LINES


def test_device_report_measures_errors(monkeypatch):
    fake_backend(monkeypatch, factor=1.001)
    report = device_report.Report(seconds=60)
    device_report.errors(report, BACKENDS["fake"], [5, 0, 9], CPU)
    device_report.errors(report, BACKENDS["reference"], [5, 0, 9], CPU)
    assert "TOO FAR" in report.lines[0] and "TOO FAR" not in report.lines[1]


def test_device_report_names_the_fastest_peer_of_the_same_function():
    def row(name: str, ms: float, kernel_ms: float = math.nan, note: str = "") -> figures.Row:
        return figures.Row(name, 1.0, 1.0, ms, (ms, ms), 1.0, 0.5, 0.0, kernel_ms, 3, note, False)

    ours, peer = row("fasttx-a", 4.0), row("peer", 6.0)
    found = [peer, row("fasttx-b", 5.0), ours, row("other", 1.0, note="no dropout")]
    assert "fasttx-a is 1.50x as fast as the fastest peer, peer, at 50 %" in device_report.lead(
        found
    )
    timed_kernels = [row("fasttx-a", 4.0, 1.0), row("peer", 3.0, 2.0)]
    assert "fasttx-a is 2.00x" in device_report.lead(timed_kernels)
    assert device_report.lead([ours]) == device_report.lead([peer]) == ""


def test_device_report_shows_what_the_suite_found(monkeypatch):
    says = "print('FAILED tests/x.py::y'); print('1 failed, 8 passed in 2 s'); raise SystemExit(1)"
    monkeypatch.setattr(device_report, "suite_command", lambda _: [sys.executable, "-c", says])
    report = device_report.Report(seconds=60)
    device_report.equivalence_suite(report, CPU)
    assert "1 failed, 8 passed" in report.lines[0] and "tests/x.py::y" in report.lines[1]
    monkeypatch.undo()
    command = device_report.suite_command(torch.device("cuda"))
    assert command[-1] == "cuda"
    files = [word for word in command if word.startswith("tests/")]
    assert files and all((ROOT / name).exists() for name in files)


def test_device_report_sanitizes_what_runs_on_cuda(monkeypatch, tmp_path):
    """With an allocation for each tensor; and says how where the tool is missing."""
    cuda = torch.device("cuda")
    ours = dataclasses.replace(BACKENDS["reference"], name="ours", devices=("cuda",))
    monkeypatch.setattr(device_report, "BACKENDS", {"ours": ours})
    monkeypatch.setattr(device_report.shutil, "which", lambda *_, **__: None)
    report = device_report.Report(seconds=60)
    device_report.sanitizer(report, cuda)
    assert device_report.UNCACHED in report.lines[0] and "--once triton" in report.lines[0]
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        '#!/bin/sh\necho "ERROR SUMMARY: $PYTORCH_NO_CUDA_MEMORY_CACHING errors in $6"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setattr(Backend, "unavailable_reasons", lambda *_: [])
    monkeypatch.setattr(device_report.shutil, "which", lambda *_, **__: str(tool))
    device_report.sanitizer(report, cuda)
    assert report.lines[1] == "compute-sanitizer, ours: ERROR SUMMARY: 1 errors in ours"


def test_device_report_s_pass_for_the_sanitizer(monkeypatch):
    """Every operation, on every kind of sequence, forward and backward."""
    monkeypatch.setattr(device_report.devices, "pick", lambda: CPU)
    shapes = []
    outcome = device_report.outcome
    monkeypatch.setattr(
        device_report, "outcome", lambda *x: shapes.append(x[1].name) or outcome(*x)
    )
    device_report.once("reference")
    assert set(shapes) == {"whole rows", "online"}
