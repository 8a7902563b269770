"""A server that imitates the routes of vLLM 0.32, and its faults."""

import json
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from cera_train.adapters.saved import attach
from cera_train.model.folder import load_tokenizer
from cera_train.model.weights import load_model
from cera_train.settings.model import ModelConfig


class PlayedVllm(ThreadingHTTPServer):
    """Serves a base with adapters that it loads."""

    daemon_threads = True

    def __init__(self, base: ModelConfig) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.served = {"id": "base", "root": base.path, "parent": None, "max_model_len": 512}
        self.base = base
        self.tokenizer = load_tokenizer(base)
        self.ends = {self.tokenizer.eos_token_id}  # where it stops of itself
        self.loaded = {}
        self.asked = []
        self.lock = threading.Lock()
        self.refusals = {}  # path -> status and body
        self.faults = []  # of the next completions
        self.temperature = 1.0  # in place of the one that a request sets

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], BrokenPipeError):  # the client stopped reading
            super().handle_error(request, client_address)

    def load(self, name: str, adapter: str) -> None:
        self.loaded[name] = attach(load_model(self.base, torch.device("cpu")), Path(adapter)).eval()

    @cached_property
    def unadapted(self) -> torch.nn.Module:
        return load_model(self.base, torch.device("cpu")).eval()

    def model(self, name: str) -> torch.nn.Module | None:
        return self.unadapted if name == self.served["id"] else self.loaded.get(name)

    def answer(self, body: dict) -> tuple[list[int], dict[str, list], str]:
        """Tokens, their log p and those of the likeliest, and why they ended."""
        ids = torch.tensor([body["prompt"]])
        is_sampled = body["temperature"] > 0
        with self.lock:
            torch.manual_seed(body["seed"])
            output = self.model(body["model"]).generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=body["max_tokens"],
                do_sample=is_sampled,
                top_k=0 if is_sampled else None,
                temperature=self.temperature if is_sampled else None,
                output_logits=True,
                return_dict_in_generate=True,
                eos_token_id=body["stop_token_ids"],
                pad_token_id=0,
                stop_strings=body["stop"] or None,
                tokenizer=self.tokenizer,
            )
        tokens = output.sequences[0, ids.shape[1] :]
        log_p = (torch.cat(output.logits).float() / self.temperature).log_softmax(-1)
        highest, likeliest = log_p.max(-1)
        log_p = log_p.gather(1, tokens[:, None])[:, 0]
        sent = [
            {f"token_id:{sampled}": p} | {f"token_id:{first}": p_first}
            for sampled, p, first, p_first in zip(
                tokens.tolist(),
                log_p.tolist(),
                likeliest.tolist(),
                highest.tolist(),
                strict=True,
            )
        ]
        return (
            tokens.tolist(),
            {"token_logprobs": log_p.tolist(), "top_logprobs": sent},
            "length" if len(tokens) == body["max_tokens"] else "stop",
        )

    def next_token(self, body: dict) -> dict:
        """Of an answer that is not streamed: the log p of every token, and how it ends where only
        one is allowed."""
        ids = torch.tensor([body["prompt"]])
        with self.lock, torch.no_grad():
            log_p = self.model(body["model"])(input_ids=ids).logits[0, -1].float().log_softmax(-1)
        sent = {f"token_id:{token}": p for token, p in enumerate(log_p.tolist())}
        ends = {*body.get("allowed_token_ids", [])} & self.ends
        return {
            "logprobs": {"top_logprobs": [sent]},
            "finish_reason": "stop" if ends else "length",
        }

    def ids_of(self, body: dict) -> list[int]:
        if "messages" in body:
            return self.tokenizer.apply_chat_template(
                body["messages"], add_generation_prompt=True, return_dict=False
            )
        special = body["add_special_tokens"]
        return self.tokenizer(body["prompt"], add_special_tokens=special).input_ids


class Handler(BaseHTTPRequestHandler):
    server: PlayedVllm

    def log_message(self, *_) -> None:
        pass

    def respond(self, status: int, tree: dict) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(tree).encode())

    def do_GET(self) -> None:
        routes = {"/version": {"version": "0.32.0"}, "/v1/models": {"data": [self.server.served]}}
        self.respond(*self.server.refusals.get(self.path, (200, routes[self.path])))

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path in server.refusals:
            self.respond(*server.refusals[self.path])
        elif self.path == "/v1/load_lora_adapter":
            if body["lora_name"] in server.loaded:
                return self.respond(
                    400, {"error": {"message": f"'{body['lora_name']}' has already been loaded."}}
                )
            server.load(body["lora_name"], body["lora_path"])
            self.respond(200, {})
        elif self.path == "/v1/unload_lora_adapter":
            known = server.loaded.pop(body["lora_name"], None) is not None
            self.respond(
                *((200, {}) if known else (404, {"error": {"message": "it cannot be found."}}))
            )
        elif self.path == "/tokenize":
            self.respond(200, {"tokens": server.ids_of(body)})
        else:
            self.complete(body)

    def complete(self, body: dict) -> object:
        server = self.server
        with server.lock:
            server.asked.append(body)
            fault = server.faults.pop(0) if server.faults else ""
        if fault == "restart":
            server.loaded.clear()
        if server.model(body["model"]) is None:
            return self.respond(
                404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
            )
        if fault.isdecimal():
            return self.respond(int(fault), {"error": {"message": "it is overloaded"}})
        if fault == "half a refusal":
            self.send_response(500)
            self.send_header("Content-Length", "100")
            self.end_headers()
            return self.wfile.write(b'{"error": ')
        if not body.get("stream"):
            return self.respond(200, {"choices": [server.next_token(body)]})
        tokens, logprobs, reason = server.answer(body)
        first, rest = (
            {key: values[part] for key, values in logprobs.items()}
            for part in (slice(1), slice(1, None))
        )
        self.send_response(200)
        self.end_headers()
        name = "base" if fault == "another model" else body["model"]
        if fault in ("gone", "aborted", "broken"):
            self.send(name, tokens[:1], "abort" if fault == "aborted" else None, first)
            if fault == "broken":
                self.wfile.write(b'data: {"error": {"message": "EngineDeadError"}}\n\n')
            return None
        if fault == "cut":
            return self.send(name, tokens[:1], "length", first)
        if fault == "no log p":
            return self.send(name, tokens, reason, None)
        self.send(name, tokens[:1], None, first)
        self.send(name, tokens[1:], reason, rest)
        if fault == "usage":
            self.wfile.write(f"data: {json.dumps({'model': name, 'choices': []})}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def send(
        self, model: str, tokens: list[int] | None, reason: str | None, logprobs: dict | None
    ) -> None:
        choice = {"index": 0, "text": "?", "token_ids": tokens, "finish_reason": reason}
        choice["logprobs"] = logprobs
        self.wfile.write(f"data: {json.dumps({'model': model, 'choices': [choice]})}\n\n".encode())


@contextmanager
def playing_vllm(base: ModelConfig) -> Iterator[PlayedVllm]:
    with PlayedVllm(base) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
