"""The service as an ASGI application: what it answers to which request."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from fasttx.serving import openapi
from fasttx.serving.batching import Answer
from fasttx.serving.limits import Limits, Refused
from fasttx.serving.logs import RequestLog
from fasttx.serving.metrics import Metrics
from fasttx.serving.models import ServedModel

log = logging.getLogger("fasttx.serving")

# Words of a text that /explain takes, and requests that may wait for it.
MOST_WORDS, MOST_EXPLANATIONS = 1000, 4

Handler = Callable[[Request], Awaitable[Response]]


class Service:
    """Models by name, the first one the default, behind an ASGI `app`."""

    def __init__(
        self, models: Sequence[ServedModel], limits: Limits, metrics: Metrics, requests: RequestLog
    ) -> None:
        self.models = {model.name: model for model in models}
        self.default = models[0]
        self.limits, self.metrics, self.requests = limits, metrics, requests
        self.stopping = False
        self._explaining = 0
        self._explainer = ThreadPoolExecutor(1, "explain")
        page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
        names = json.dumps(list(self.models)).replace("<", "\\u003c")
        self._page = page.replace("/*MODELS*/[]", names)
        described = openapi.document(limits, self.default.name)
        routes: list[tuple[str, str, Handler]] = [
            ("POST", "/predict", self._predict),
            ("POST", "/explain", self._explain),
            ("GET", "/v1/models", self._models),
            ("GET", "/healthz", self._alive),
            ("GET", "/readyz", self._ready),
            ("GET", "/metrics", self._metrics_page),
            ("GET", "/openapi.json", _constant(JSONResponse, described)),
            ("GET", "/docs", _constant(HTMLResponse, openapi.page(described))),
            ("GET", "/", _constant(HTMLResponse, self._page, _ONLY_ITSELF)),
        ]
        app = Starlette(
            routes=[Route(path, handler, methods=[method]) for method, path, handler in routes],
            exception_handlers={Refused: _refusal, HTTPException: _http_error},
        )
        self._paths = {path for _, path, _ in routes}
        self._inner = app
        self.app = self._observed

    @property
    def idle(self) -> bool:
        return all(model.batcher.idle for model in self.models.values())

    def close(self) -> None:
        self._explainer.shutdown(cancel_futures=True)
        for model in self.models.values():
            model.batcher.close()

    # --- around every request ---------------------------------------------------------------------

    async def _observed(self, scope: Any, receive: Any, send: Any) -> None:
        """Counts and logs a request, and answers with 500 where its handler fails."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        begin, status = time.monotonic(), 500
        said: dict[str, Any] = scope.setdefault("fasttx", {})
        said["id"] = uuid.uuid4().hex[:16]

        async def counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message["headers"], (b"x-request-id", said["id"].encode()),
                ]  # fmt: skip
            await send(message)

        try:
            await self._inner(scope, receive, counted)
        except ClientDisconnect:
            status = 499  # as nginx counts them; nobody reads the answer
        except Exception:
            # Starlette has answered with 500, and raises for the server to log.
            log.exception("request %s failed", said["id"])
        finally:
            seconds = time.monotonic() - begin
            path = scope["path"] if scope["path"] in self._paths else "other"
            self.metrics.requests.labels(path, str(status)).inc()
            self.metrics.request_seconds.labels(path).observe(seconds)
            client = scope["client"][0] if scope.get("client") else None
            self.requests.write(
                {"method": scope["method"], "path": scope["path"], "status": status,
                 "ms": round(1e3 * seconds, 2), "client": client, **said}
            )  # fmt: skip

    # --- requests ---------------------------------------------------------------------------------

    async def _predict(self, request: Request) -> Response:
        self._refuse_while_stopping()
        asked = await self._asked(request)
        model = self._model(asked)
        texts = self._texts(asked)
        said = request.scope["fasttx"]
        said |= {"model": model.name, "texts": len(texts)}
        self.requests.add_texts(said, texts)
        answers = await model.batcher.submit(texts)
        if answers:
            said["tokens"] = sum(answer.tokens for answer in answers)
            said["queue_ms"] = round(1e3 * max(answer.waited for answer in answers), 2)
            said["batch_texts"] = max(answer.batch for answer in answers)
        predictions = [_prediction(answer) for answer in answers]
        return JSONResponse({"model": model.name, "predictions": predictions})

    async def _explain(self, request: Request) -> Response:
        """The words of one text with what each contributed: see `fasttx explain`."""
        self._refuse_while_stopping()
        asked = await self._asked(request)
        model = self._model(asked)
        (text, *others) = self._texts(asked) or [""]
        if others:
            raise Refused(422, "text is a list; /explain takes one text")
        if len(text.split()) > MOST_WORDS:
            words = len(text.split())
            raise Refused(422, f"text has {words:,} words; /explain takes at most {MOST_WORDS:,}")
        if self._explaining >= MOST_EXPLANATIONS:
            raise Refused(429, f"{MOST_EXPLANATIONS} explanations are waiting; try again later", 2)
        request.scope["fasttx"] |= {"model": model.name, "texts": 1}
        self._explaining += 1
        try:
            loop = asyncio.get_running_loop()
            found = await loop.run_in_executor(self._explainer, model.explain, text)
        finally:
            self._explaining -= 1
        return JSONResponse({"model": model.name, **found})

    async def _models(self, request: Request) -> Response:
        described = [model.described() for model in self.models.values()]
        return JSONResponse({"models": described, "default": self.default.name})

    async def _alive(self, request: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def _ready(self, request: Request) -> Response:
        self._refuse_while_stopping()
        return JSONResponse({"status": "ready"})

    async def _metrics_page(self, request: Request) -> Response:
        return Response(self.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    # --- what a request asks for ------------------------------------------------------------------

    def _refuse_while_stopping(self) -> None:
        if self.stopping:
            raise Refused(503, "the service is stopping; ask another one", 1)

    async def _asked(self, request: Request) -> dict[str, Any]:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, f"content-type is {kind or 'missing'}; expected application/json")
        body = await self._body(request)
        try:
            asked = json.loads(body.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise Refused(
                400, f"the body is not UTF-8 ({error.reason} at byte {error.start})"
            ) from error
        except (ValueError, RecursionError) as error:
            raise Refused(400, f"the body is no JSON: {error}") from error
        if not isinstance(asked, dict):
            raise Refused(422, 'the body is no JSON object; expected {"text": "..."}')
        if unknown := sorted(asked.keys() - {"text", "model"}):
            raise Refused(422, f"unknown field {unknown[0][:80]!r}; expected text, model")
        return asked

    async def _body(self, request: Request) -> bytes:
        most = self.limits.body_bytes
        too_large = Refused(413, f"the body has more than {most:,} bytes (body_bytes)")
        try:
            announced = int(request.headers.get("content-length", "0"))
        except ValueError as error:
            raise Refused(400, "content-length is no number") from error
        if announced > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self.limits.read_seconds):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise too_large
        except TimeoutError as error:
            seconds = self.limits.read_seconds
            raise Refused(
                408, f"the body took more than {seconds:g} s to arrive (read_seconds)"
            ) from error
        return bytes(body)

    def _model(self, asked: dict[str, Any]) -> ServedModel:
        name = asked.get("model", self.default.name)
        if not isinstance(name, str) or name not in self.models:
            known = ", ".join(self.models)
            raise Refused(404, f"model is {str(name)[:80]!r}; expected one of {known}")
        return self.models[name]

    def _texts(self, asked: dict[str, Any]) -> list[str]:
        texts = asked.get("text")
        if isinstance(texts, str):
            texts = [texts]
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise Refused(422, "text is missing or no string; expected a string or a list of them")
        most = self.limits
        if len(texts) > most.texts:
            raise Refused(422, f"text holds {len(texts):,} texts; at most {most.texts:,} (texts)")
        for i, text in enumerate(texts):
            if len(text) > most.characters:
                length = len(text)
                raise Refused(
                    422,
                    f"text {i} has {length:,} characters; at most {most.characters:,} (characters)",
                )
        return texts


def _prediction(answer: Answer) -> dict[str, Any]:
    return {
        **dataclasses.asdict(answer.prediction),
        "tokens": answer.tokens,
        "truncated": answer.truncated,
    }


# The page runs its own script and asks its own server, and nothing else.
_ONLY_ITSELF = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src "
    "'unsafe-inline'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors "
    "'none'",
    "x-content-type-options": "nosniff",
}


def _constant(kind: Any, content: Any, headers: dict[str, str] | None = None) -> Handler:
    async def answer(request: Request) -> Response:
        response: Response = kind(content, headers=headers)
        return response

    return answer


async def _refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)
    headers = {} if error.retry_after is None else {"retry-after": str(error.retry_after)}
    return _error(error.status, error.message, headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, error.detail, dict(error.headers or {}))


def _error(status: int, message: str, headers: dict[str, str]) -> Response:
    return JSONResponse({"error": {"status": status, "message": message}}, status, headers)
