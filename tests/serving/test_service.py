"""One service, and everything that may be asked of it."""

from __future__ import annotations

import concurrent.futures
import json
import resource
import shutil
import socket
import subprocess
import urllib.parse
from pathlib import Path

import pytest

import fasttx
from tests.serving.services import RUN, Client, Process, serving, until

TEXTS = ["a wonderful film", "a dreadful bore", "", "a " * 1000 + "wonderful"]
LIMITS = (
    "--texts", "5", "--characters", "3000", "--body-bytes", "20000", "--read-seconds", "1.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "requests.jsonl"
    with serving(str(RUN), f"other={RUN}", "--log-file", str(log), *LIMITS) as process:
        process.log = log
        yield process


def lines(service: Process) -> list[dict]:
    return [json.loads(line) for line in service.log.read_text(encoding="utf-8").splitlines()]


def test_predictions_are_those_of_the_library(service):
    expected = fasttx.load(RUN).predict(TEXTS)
    status, answer = service.client.predict(TEXTS)
    assert status == 200 and answer["model"] == RUN.name
    for found, wanted in zip(answer["predictions"], expected, strict=True):
        assert found["label"] == wanted.label
        assert found["probability"] == pytest.approx(wanted.probability, abs=1e-6)
        assert found["probabilities"] == pytest.approx(wanted.probabilities, abs=1e-6)
    assert [p["truncated"] for p in answer["predictions"]] == [False, False, False, True]
    assert answer["predictions"][0]["tokens"] == 3
    (one,) = service.client.predict(TEXTS[0])[1]["predictions"]
    assert one["probabilities"] == pytest.approx(expected[0].probabilities, abs=1e-6)
    assert service.client.predict([]) == (200, {"model": RUN.name, "predictions": []})
    assert service.client.predict("a", model="other")[1]["model"] == "other"


def test_what_it_says_of_itself(service):
    ask = service.client.ask
    status, models, _ = ask("GET", "/v1/models")
    assert status == 200 and [m["name"] for m in models["models"]] == [RUN.name, "other"]
    assert models["default"] == RUN.name
    assert ask("GET", "/healthz")[:2] == (200, {"status": "alive"})
    assert ask("GET", "/readyz")[:2] == (200, {"status": "ready"})
    _, described, _ = ask("GET", "/openapi.json")
    assert {"/predict", "/explain", "/metrics"} <= described["paths"].keys()
    assert described["components"]["schemas"]["Texts"]["properties"]["text"]["oneOf"][1] == {
        "type": "array", "items": {"type": "string", "maxLength": 3000}, "maxItems": 5,
    }  # fmt: skip
    status, page, _ = ask("GET", "/docs")
    assert status == 200 and "POST /predict" in page and "<script" not in page


def test_counters(service):
    from prometheus_client.parser import text_string_to_metric_families

    def counted() -> dict[str, float]:
        _, page, _ = service.client.ask("GET", "/metrics")
        return {
            sample.name: sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.labels.get("model") == "other"
        }

    service.client.predict("a", model="other")
    before = counted()
    service.client.predict(["a b", "c", "word " * 500], model="other")
    after = counted()
    assert after["fasttx_texts_total"] - before["fasttx_texts_total"] == 3
    assert after["fasttx_truncated_texts_total"] == 1
    assert after["fasttx_batch_texts_count"] - before["fasttx_batch_texts_count"] == 1


def test_a_log_line_a_request_without_its_text(service):
    service.client.predict("a secret word")
    _, _, headers = service.client.post("/predict", {"text": ["x", "y"]})
    until(lambda: lines(service)[-1]["id"] == headers["x-request-id"])  # it follows the answer
    line = lines(service)[-1]
    assert {"path": "/predict", "status": 200, "texts": 2, "tokens": 2}.items() <= line.items()
    assert "secret" not in service.log.read_text(encoding="utf-8")


def test_an_explanation(service):
    status, answer, _ = service.client.post("/explain", {"text": "a wonderful <b>film</b>"})
    assert status == 200
    total = sum(word["attribution"] for word in answer["words"])
    assert total == pytest.approx(answer["margin"] - answer["baseline_margin"], abs=0.05)
    assert (
        answer["label"]
        == service.client.predict("a wonderful <b>film</b>")[1]["predictions"][0]["label"]
    )


JSON = {"content-type": "application/json"}
REFUSED = [
    ({"text": ["a"] * 6}, 422, "text holds 6 texts; at most 5 (texts)"),
    ({"text": "a" * 3001}, 422, "text 0 has 3,001 characters; at most 3,000 (characters)"),
    ({"text": ["a", 1]}, 422, "text is missing or no string"),
    ({}, 422, "text is missing or no string"),
    ([], 422, "the body is no JSON object"),
    ({"text": "a", "texts": 1}, 422, "unknown field 'texts'"),
    ({"text": "a", "model": "nix"}, 404, "model is 'nix'"),
    ({"text": "a" * 30_000}, 413, "more than 20,000 bytes (body_bytes)"),
]


@pytest.mark.parametrize(("asked", "status", "said"), REFUSED, ids=[r[2] for r in REFUSED])
def test_refusals_name_the_limit(service, asked, status, said):
    found, answer, _ = service.client.post("/predict", asked)
    assert found == status and said in answer["error"]["message"]
    assert answer["error"]["status"] == status


@pytest.mark.parametrize(
    ("body", "headers", "status", "said"),
    [
        (b'{"text": "\xff"}', JSON, 400, "not UTF-8 (invalid start byte at byte 10)"),
        (b'{"text": ', JSON, 400, "the body is no JSON"),
        (b"[" * 15_000, JSON, 400, "the body is no JSON"),
        (b"", JSON, 400, "the body is no JSON"),
        (b"text=a", {"content-type": "text/plain"}, 415, "content-type is text/plain"),
        (b"{}", {}, 415, "content-type is missing"),
    ],
)
def test_bodies_that_are_no_requests(service, body, headers, status, said):
    found, answer, _ = service.client.ask("POST", "/predict", body, headers)
    assert found == status and said in answer["error"]["message"]


def test_odd_texts_are_texts(service):
    for text in ("\ud800 lone", "\0", "\u202e", "🏳️‍🌈", "<PAD> <UNK>", "a" * 3000):
        status, answer = service.client.predict(text)
        assert status == 200, answer


def test_unknown_paths_and_methods(service):
    assert service.client.ask("GET", "/nix")[0] == 404
    status, answer, _ = service.client.ask("GET", "/predict")
    assert status == 405 and answer["error"]["status"] == 405


def test_no_request_sees_another_s_text(service):
    """Each of many requests at once gets its own texts' answers."""
    classifier = fasttx.load(RUN)
    texts = [f"film {'good ' * (i % 7)}{'bad ' * (i % 5)} number {i}" for i in range(60)]
    wanted = classifier.predict(texts)

    def ask(i: int) -> float:
        return Client(service.port).predict(texts[i])[1]["predictions"][0]["probability"]

    with concurrent.futures.ThreadPoolExecutor(16) as threads:
        found = list(threads.map(ask, range(len(texts))))
    assert found == pytest.approx([p.probability for p in wanted], abs=1e-6)
    assert max(line.get("batch_texts", 0) for line in lines(service)) > 1


# --------------------------------------------------------------------------- clients that misbehave


def raw(service: Process, data: bytes) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", service.port), timeout=20)
    connection.sendall(data)
    return connection


def test_half_a_request_and_silence_are_closed(service):
    begun = [raw(service, b""), raw(service, b"POST /predict HTTP/1.1\r\nHost: x\r\n")]
    kept = raw(service, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while b"alive" not in answer:
        answer += kept.recv(10_000)
    kept.sendall(b"GET /hea")  # half of a second one
    for connection in [*begun, kept]:
        assert connection.recv(100) == b""
    assert service.client.predict("a")[0] == 200


def test_a_slow_body_is_refused(service):
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    slow = raw(service, head + b'Content-Length: 100\r\n\r\n{"te')
    assert b"408" in slow.recv(1000)
    assert service.client.predict("a")[0] == 200


def test_endless_headers_are_closed(service):
    endless = raw(service, b"GET / HTTP/1.1\r\n")
    with pytest.raises(OSError):  # noqa: PT012
        for _ in range(2000):
            endless.sendall(b"x: " + b"y" * 4000 + b"\r\n")
    assert service.client.predict("a")[0] == 200


def test_a_body_of_100_mb_is_refused_before_it_is_read(service):
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    announced = raw(service, head + b"Content-Length: 100000000\r\n\r\n")
    assert b"413" in announced.recv(1000)
    chunked = raw(service, head + b"Transfer-Encoding: chunked\r\n\r\n")
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    answer = b""
    try:
        for _ in range(1600):
            chunked.sendall(chunk)
    except OSError:
        pass
    else:
        chunked.sendall(b"0\r\n\r\n")
    answer = chunked.recv(1000)
    assert b"413" in answer
    assert service.client.predict("a")[0] == 200
    status = Path(f"/proc/{service.pid}/status")
    if status.exists():
        peak = next(x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        assert int(peak.split()[1]) < 2_000_000


def test_many_connections_that_are_left_open(service):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = min(10_000, hard - 500)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count + 400), hard))
    left = [raw(service, b"") for _ in range(count)]
    assert service.client.predict("a")[0] == 200
    for connection in left:
        connection.close()


def test_noise_instead_of_http(service):
    noise = raw(service, bytes(range(256)) * 10)
    assert b"400" in noise.recv(1000)
    tls = raw(service, b"\x16\x03\x01\x02\x00\x01\x00")
    assert b"400" in tls.recv(1000)
    assert service.client.predict("a")[0] == 200


# ----------------------------------------------------------------------------------------- the page


def test_the_page_holds_what_it_needs_and_asks_nobody_else(service):
    status, page, headers = service.client.ask("GET", "/")
    assert status == 200 and f'const models = ["{RUN.name}", "other"];' in page
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "//" not in page.replace("// a link to share", "")


@pytest.mark.skipif(not shutil.which("chromium"), reason="chromium is not installed")
def test_the_page_in_a_browser(service, tmp_path):
    text = "a wonderful film & <b>no</b> bore"
    done = subprocess.run(
        ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
         "--no-first-run", "--disable-background-networking", "--disable-component-update",
         "--disable-sync", f"--user-data-dir={tmp_path}", "--virtual-time-budget=20000",
         "--dump-dom", f"http://127.0.0.1:{service.port}/#{urllib.parse.quote(text)}"],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    wanted = service.client.predict(text)[1]["predictions"][0]
    share = f"{100 * wanted['probability']:.1f}"
    assert f'<p id="label">{wanted["label"]}, {share} %</p>' in done.stdout
    for word in ("wonderful", "film", "bore"):
        assert f">{word}</span>" in done.stdout
    assert 'style="background' in done.stdout
    assert f"speaks for {wanted['label']}" in done.stdout
    assert '<p id="error" role="alert"></p>' in done.stdout
