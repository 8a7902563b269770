"""A W&B server on this machine, that knows as much as a run needs to begin, to send its metrics and to end."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def environment(url: str) -> dict[str, str]:
    """What makes W&B speak to a server. It takes any forty characters for a key."""
    return {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0123456789" * 4, "WANDB_MODE": "online"}


class WandbServer:
    """Answers while it is open.

    Attributes:
        rows: the rows of metrics that came, by their number: one that comes twice counts once.
        files: the names of the files that came.
    """

    def __init__(self) -> None:
        self.rows: dict[int, dict[str, Any]] = {}
        self.files: list[str] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):  # HTTP/1.0: no connection outlives its answer, nor the server
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                answer = json.dumps(owner.answer(self.path, body)).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            do_GET = do_POST = do_PUT = answer

            def log_message(self, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.environment = environment(self.url)

    def __enter__(self) -> WandbServer:
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *error: Any) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: bytes) -> dict[str, Any]:
        if path == "/graphql":
            request = json.loads(body)
            return {"data": self._data(request["operationName"], request["variables"])}
        if path.startswith("/upload/"):
            self.files.append(path.removeprefix("/upload/"))
        if path.endswith("/file_stream"):
            history = json.loads(body).get("files", {}).get("wandb-history.jsonl", {"offset": 0, "content": []})
            for number, row in enumerate(history["content"], start=history["offset"]):
                self.rows[number] = json.loads(row)
        return {}

    def _data(self, operation: str, variables: dict[str, Any]) -> dict[str, Any]:
        if operation == "UpsertBucket":
            project = {"id": "2", "name": variables["project"], "entity": {"id": "3", "name": "tester"}}
            bucket = {"id": "1", "name": variables["name"], "config": "{}", "historyLineCount": 0, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": True}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/upload/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        return {}
