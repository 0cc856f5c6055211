"""A service as users of ONNX Runtime write it: FastAPI, a queue, batches padded to their longest
text.

    python benchmarks/serving_peer.py FOLDER

FOLDER: model.onnx, tokenizer.json and config.json, as `fasttx export RUN --format onnx` writes
them. POST /predict with {"text": "..."}.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import tokenizers
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel


class Ask(BaseModel):
    text: str


class Model:
    """Texts in, probabilities out: one padded batch."""

    def __init__(self, folder: Path, threads: int) -> None:
        config = json.loads((folder / "config.json").read_text())
        self.labels = [
            name for _, name in sorted(config["id2label"].items(), key=lambda x: int(x[0]))
        ]
        self.tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(
            str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"]
        )

    def __call__(self, texts: list[str]) -> np.ndarray:
        found = self.tokenizer.encode_batch(texts)
        feed = {
            "input_ids": np.array([one.ids for one in found], dtype=np.int64),
            "attention_mask": np.array([one.attention_mask for one in found], dtype=np.int64),
        }
        (logits,) = self.session.run(None, feed)
        e = np.exp(logits - logits.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)


def service(model: Model, batch: int, wait_ms: float) -> FastAPI:
    """Up to `batch` texts that come within `wait_ms` of the first one are one batch."""
    queue: asyncio.Queue[tuple[str, asyncio.Future[Any]]] = asyncio.Queue()
    pool = ThreadPoolExecutor(1)

    async def work() -> None:
        loop = asyncio.get_running_loop()
        while True:
            waiting = [await queue.get()]
            end = loop.time() + wait_ms / 1e3
            while len(waiting) < batch:
                try:
                    left = end - loop.time()
                    waiting.append(await asyncio.wait_for(queue.get(), max(left, 0)))
                except asyncio.TimeoutError:
                    break
            rows = await loop.run_in_executor(pool, model, [text for text, _ in waiting])
            for (_, future), row in zip(waiting, rows.tolist(), strict=True):
                if not future.done():
                    future.set_result(row)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        task = asyncio.create_task(work())
        yield
        task.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.post("/predict")
    async def predict(ask: Ask) -> dict[str, Any]:
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        await queue.put((ask.text, future))
        row = await future
        best = int(np.argmax(row))
        probabilities = dict(zip(model.labels, row, strict=True))
        return {
            "label": model.labels[best],
            "probability": row[best],
            "probabilities": probabilities,
        }

    return app


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=32, help="texts at most (default: 32)")
    parser.add_argument("--wait-ms", type=float, default=5.0, help="for others (default: 5)")
    arguments = parser.parse_args()
    model = Model(arguments.folder, arguments.threads)
    app = service(model, arguments.batch, arguments.wait_ms)
    uvicorn.run(app, port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
