"""Training steps side by side, fasttx's backends and its peers: python benchmarks/side_by_side.py

Every contestant is verified against the reference on the timed inputs first. One step of each in
turn, round after round, so that a busy machine slows all alike; medians, and ratios in one run.
Real review lengths come from $FASTTX_DATA (or --data); without it, lengths like IMDB's are drawn.
Memory is the growth of a fresh process's largest size over three steps, one process a contestant.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F
from peers import PEERS

from fasttx import device as devices
from fasttx.attention.registry import BACKENDS
from fasttx.config import ModelConfig
from fasttx.model import TransformerClassifier
from fasttx.packing import PackedBatch, RaggedIds, pack

Step = Callable[[int], float]


def review_ids(
    data: str | None, count: int, config: ModelConfig, words: bool = False
) -> tuple[RaggedIds, str]:
    """`count` random training reviews as token ids cut to max_len, and where they come from."""
    rng = np.random.default_rng(0)
    if data:
        import pyarrow.parquet as pq

        from fasttx.tokenizer import Tokenizer

        texts = pq.read_table(Path(data) / "train.parquet")["text"].to_pylist()
        texts = [texts[i] for i in rng.permutation(len(texts))[: max(count, 2000)]]
        if words:
            lengths = [min(len(text.split()), config.max_len) for text in texts[:count]]
            drawn = [rng.integers(2, config.vocab_size, n).tolist() for n in lengths]
            return RaggedIds.from_lists(drawn), "real lengths in white-space words"
        tokenizer = Tokenizer.train(texts, config.vocab_size)
        ids = tokenizer.encode_batch(texts[:count]).truncate(config.max_len)
        return ids, "real reviews"
    # Maas et al.'s reviews: median 174 words, 5 % under 64, 5 % over 598.
    lengths = np.exp(rng.normal(np.log(200), 0.68, count)).astype(int).clip(8, config.max_len)
    return RaggedIds.from_lists(
        [rng.integers(2, config.vocab_size, n).tolist() for n in lengths]
    ), "drawn lengths (no $FASTTX_DATA)"


def padded(batch: PackedBatch, length: int) -> torch.Tensor:
    ids = torch.zeros(len(batch), length, dtype=torch.int64)
    cu = batch.cu_seqlens.tolist()
    for row, (start, end) in enumerate(itertools.pairwise(cu)):
        ids[row, : end - start] = batch.input_ids[start:end]
    return ids


def make_batches(ids: RaggedIds, batch_size: int, device: torch.device) -> list[PackedBatch]:
    labels = np.random.default_rng(1).integers(0, 2, len(ids))
    return [
        pack(ids.select(np.arange(i, i + batch_size)), labels[i : i + batch_size]).to(device)
        for i in range(0, len(ids), batch_size)
    ]


def make_contestants(config: ModelConfig, names: list[str], batches: list[PackedBatch],
                     device: torch.device, verify: bool = True) -> dict[str, Step]:  # fmt: skip
    torch.manual_seed(0)
    reference = TransformerClassifier(*_args(config), attn_backend="reference").to(device)
    found: dict[str, Step] = {}
    for name in names:
        if name in PEERS:
            model = PEERS[name](config)
            model.copy_from(reference)
            inputs = [{"input_ids": padded(b, b.max_seqlen).to(device)} for b in batches]
        else:
            backend = name.removeprefix("fasttx ")
            model = TransformerClassifier(*_args(config), attn_backend=backend)
            model.load_state_dict(reference.state_dict())
            inputs = [b.model_inputs() for b in batches]
        model = model.to(device)
        if verify:  # not where memory is measured: the reference would be the largest thing there
            _verify(name, model, inputs[0], reference, batches[0])
        found[name] = _step(model, inputs, batches, device)
    return found


def _args(config: ModelConfig) -> tuple:
    return (config.vocab_size, config.num_classes, config.d_model, config.num_heads,
            config.num_layers, config.d_ff, config.max_len, config.dropout)  # fmt: skip


def _verify(name: str, model: torch.nn.Module, inputs: dict, reference: torch.nn.Module,
            batch: PackedBatch) -> None:  # fmt: skip
    """No time is taken of a contestant that does not compute the same: logits and gradients."""
    gradients = []
    for m, x in ((model.eval(), inputs), (reference.eval(), batch.model_inputs())):
        logits = m(**x)
        F.cross_entropy(logits, batch.labels).backward()
        head = m.head.dense if hasattr(m.head, "dense") else m.head[0]
        table = m.embedding if isinstance(m.embedding, torch.Tensor) else m.embedding.weight
        gradients.append((logits.detach(), head.weight.grad.clone(), table.grad.clone()))
        m.zero_grad(set_to_none=True)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=1e-5, msg=lambda s: f"{name}: {s}")


def _step(model: torch.nn.Module, inputs: list[dict], batches: list[PackedBatch],
          device: torch.device) -> Step:  # fmt: skip
    model.train()
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)

    def step(i: int) -> float:
        i %= len(batches)
        start = time.perf_counter()
        loss = F.cross_entropy(model(**inputs[i]), batches[i].labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        devices.synchronize(device)
        return time.perf_counter() - start

    return step


def scheduler_artefact(milliseconds: float, load: float) -> bool:
    """Short medians at multiples of 8 ms on a busy machine are time slices, not work."""
    near = milliseconds / 8 - round(milliseconds / 8)
    return milliseconds < 100 and load > (os.cpu_count() or 1) / 2 and abs(near) < 0.01


def run(contestants: dict[str, Step], rounds: int, batches: int) -> dict[str, list[float]]:
    """Seconds by contestant: warm-up, then `rounds` times each in turn, each on the same batch."""
    for step in contestants.values():
        step(0), step(1)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    for r in range(rounds):
        for name, step in contestants.items():
            times[name].append(step(r % batches))
    return times


def peak_growth_mb(name: str, arguments: argparse.Namespace) -> float:
    command = [sys.executable, __file__, "--memory-of", name, "--batch-size",
               str(arguments.batch_size), "--threads", str(arguments.threads)]  # fmt: skip
    command += ["--data", arguments.data] if arguments.data else []
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", default=os.environ.get("FASTTX_DATA"))
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="auto")
    parser.add_argument("--contestants", nargs="*", help="default: all that run here")
    parser.add_argument(
        "--words", action="store_true", help="count white-space words: shorter, no punctuation"
    )
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    device, config = devices.pick(arguments.device), ModelConfig()
    usable = [f"fasttx {b.name}" for b in BACKENDS.values()
              if not b.unavailable_reasons(device, torch.float32, 32)]  # fmt: skip
    names = arguments.contestants or [*PEERS, *usable]
    ids, origin = review_ids(arguments.data, 8 * arguments.batch_size, config, arguments.words)
    batches = make_batches(ids, arguments.batch_size, device)

    if arguments.memory_of:
        before = devices.peak_memory_mb(device)
        step = make_contestants(config, [arguments.memory_of], batches[:3], device, verify=False)
        for i in range(3):
            step[arguments.memory_of](i)
        print(devices.peak_memory_mb(device) - before)
        return

    contestants = make_contestants(config, names, batches, device)
    times = run(contestants, arguments.rounds, len(batches))
    load = os.getloadavg()[0]
    hardware = devices.hardware(device)
    print(
        f"training step, batch {arguments.batch_size}, fp32, dropout {config.dropout} everywhere, "
        f"{origin}\n{hardware['cpu']}, {hardware['threads']} threads, torch {torch.__version__}, "
        f"load {load:.1f}, n = {arguments.rounds}, "
        f"OMP_WAIT_POLICY {os.environ.get('OMP_WAIT_POLICY', 'unset')}\n\n"
        f"{'contestant':24} {'samples/s':>9} {'ratio':>6} {'ms':>7} {'quartiles':>13} {'MB':>6}"
    )
    first, rows = None, []
    for name, seconds in times.items():
        ms = 1e3 * statistics.median(seconds)
        low, _, high = (1e3 * q for q in statistics.quantiles(seconds, n=4))
        first = first or ms
        memory = float("nan") if arguments.no_memory else peak_growth_mb(name, arguments)
        rows.append({"contestant": name, "samples_per_second": 1e3 * arguments.batch_size / ms,
                     "ratio": first / ms, "ms": ms, "quartiles_ms": [low, high],
                     "peak_memory_mb": memory})  # fmt: skip
        print(f"{name:24} {1e3 * arguments.batch_size / ms:9.1f} {first / ms:5.2f}x {ms:7.0f} "
              f"{low:6.0f}-{high:<6.0f} {memory:6.0f}")  # fmt: skip
        if scheduler_artefact(ms, load):
            print(f"  ^ {ms:.2f} ms is a multiple of 8 ms at load {load:.1f}: scheduling, not work")
    if arguments.json:
        record = {"rows": rows, "hardware": hardware, "load": load, "versions": devices.versions()}
        arguments.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
