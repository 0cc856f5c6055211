"""A run goes to a hub: huggingface_hub speaks to a small server of its protocol on this machine."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

import fasttx
from fasttx.errors import CheckpointError
from tests.hf.models import transformers

import fasttx.hf  # isort: skip

huggingface_hub = pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.xdist_group("transformers")

RUN = Path(__file__).resolve().parents[1] / "data" / "runs" / "classification-finished"


class Hub(BaseHTTPRequestHandler):
    """Repositories are folders; every file comes within its commit. One token may write."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(200, {})

    def do_POST(self):
        content = self.rfile.read(int(self.headers["content-length"]))
        path = self.path.partition("?")[0]
        self.server.asked.append((path, self.headers.get("authorization")))
        if self.headers.get("authorization") == "Bearer right":
            self.answer(200, self.done(path, content))
        else:
            self.answer(401, {"error": "Invalid username or password."})

    def done(self, path, content):
        where = f"http://127.0.0.1:{self.server.server_port}"
        if path == "/api/repos/create":
            asked = json.loads(content)
            return {"url": f"{where}/{asked['organization']}/{asked['name']}"}
        if path == "/api/validate-yaml":  # of the model card
            return {"errors": [], "warnings": []}
        if path == "/api/models/me/imdb/preupload/main":
            files = json.loads(content)["files"]
            return {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                              for file in files]}  # fmt: skip
        assert path == "/api/models/me/imdb/commit/main"
        for line in map(json.loads, content.splitlines()):
            if line["key"] == "file":
                file = line["value"]
                out = self.server.folder / file["path"]
                out.write_bytes(base64.b64decode(file["content"]))
        return {"commitUrl": f"{where}/me/imdb/commit/1", "commitOid": "1"}

    def answer(self, status, value):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.folder, server.asked = tmp_path / "hub", []
        server.folder.mkdir()
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()
        thread.join()


def test_a_run_and_its_card_arrive(hub):
    url = fasttx.hf.push_run(RUN, "me/imdb", token="right")
    assert url.endswith("/me/imdb/commit/1")
    assert all(token == "Bearer right" for _, token in hub.asked)
    assert sorted(p.name for p in hub.folder.iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip
    card = (hub.folder / "README.md").read_text(encoding="utf-8")
    assert "# imdb\n" in card and "accuracy" in card
    model = transformers.AutoModelForSequenceClassification.from_pretrained(hub.folder)
    for name, weight in fasttx.load(RUN).model.state_dict().items():
        assert torch.equal(model.classifier.state_dict()[name], weight)


def test_what_the_hub_refuses_is_one_error(hub, monkeypatch):
    with pytest.raises(CheckpointError, match=r"me/imdb could not be written.*401.*hf auth login"):
        fasttx.hf.push_run(RUN, "me/imdb", token="wrong")
    with pytest.raises(CheckpointError, match=r"not a name could not be written.*OWNER/NAME"):
        fasttx.hf.push_run(RUN, "not a name", token="right")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"HF_HUB_OFFLINE is set.*fasttx.hf.save_run"):
        fasttx.hf.push_run(RUN, "me/imdb", token="right")
    assert not list(hub.folder.iterdir())
