"""`hub.push` against a Hub on this machine: what arrives, and a Hub that refuses."""

from __future__ import annotations

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest

from cera_train.training.train import launch


@pytest.fixture
def hub(monkeypatch):
    """A Hub whose `files` are those of the last commit; with `refuses`, it knows nobody."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            answer, status = {}, 200
            if server.refuses:
                answer, status = {"error": "who are you?"}, 401
            elif self.path == "/api/repos/create":
                server.created = json.loads(body)
                answer = {"url": f"{url}/me/mine"}
            elif self.path == "/api/models/me/mine/preupload/main":
                files = json.loads(body)["files"]
                answer = {"files": [file | {"uploadMode": "regular", "shouldIgnore": False} for file in files]}
            elif self.path == "/api/models/me/mine/commit/main":
                lines = [json.loads(line)["value"] for line in body.splitlines() if '"file"' in line[:20]]
                server.files = {line["path"]: base64.b64decode(line["content"]) for line in lines}
                answer = {
                    "commitUrl": f"{url}/me/mine/commit/1",
                    "commitOid": "1",
                    "commitMessage": "",
                    "success": True,
                }
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.refuses, server.files = False, {}
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_the_adapter_and_its_card_reach_the_hub_also_at_the_second_try(hub, tiny_config, tiny_folder, capsys):
    facts = (f"model.facts.of={tiny_folder}", "model.facts.hub_id=an/id")
    config = tiny_config("hub.push=me/mine", "train.max_updates=1", *facts)
    hub.refuses = True
    result = launch(config)
    assert result["updates"] == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "hub.push=me/mine failed (" in line
    assert "The run is finished; to upload it: " in line
    hub.refuses = False
    assert launch(config) == result
    assert "/me/mine" in capsys.readouterr().out
    assert hub.created["visibility"] == "private"
    weights = Path(result["folder"]) / "adapter" / "adapter_model.safetensors"
    assert hub.files[weights.name] == weights.read_bytes()
    assert {"README.md", "tokenizer.json"} <= hub.files.keys()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "an/id"
