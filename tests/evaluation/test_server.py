"""Answers through a server: those of the model in this process, whatever fails on the way; and what is refused. The
server here plays vLLM's routes and makes its faults; tests/serving/test_vllm.py has the real one."""

import json
import os
import shutil
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from evaluated_runs import contents, read
from tiny_runs import wait_until

import cera_train.evaluation.server as server_module
from cera_train.common.errors import UserError
from cera_train.evaluation.evaluate import evaluate, load_subject
from cera_train.model.folder import load_tokenizer
from cera_train.runs.subject import find_subject
from cera_train.serving.chat import chat

pytest_plugins = ("evaluated_runs",)


class PlayedVllm(ThreadingHTTPServer):
    """Serves a run's base and its adapter by the routes of vLLM 0.32."""

    daemon_threads = True

    def __init__(self, config) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        subject = find_subject(config)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.served = {"id": "base", "root": subject.model.path, "parent": None, "max_model_len": 512}
        self.model, _ = load_subject(subject, torch.device("cpu"))
        self.tokenizer = load_tokenizer(subject.model)
        self.loaded, self.asked, self.lock = set(), [], threading.Lock()
        self.refusals = {}  # path -> status and body
        self.faults = []  # of the next completions

    def answer(self, body: dict) -> tuple[list[int], str]:
        """Greedy tokens and why they ended."""
        ids = torch.tensor([body["prompt"]])
        with self.lock:
            output = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=body["max_tokens"], do_sample=False,
                eos_token_id=body["stop_token_ids"], pad_token_id=0,
                stop_strings=body["stop"] or None, tokenizer=self.tokenizer,
            )  # fmt: skip
        tokens = output[0, ids.shape[1] :].tolist()
        return tokens, "length" if len(tokens) == body["max_tokens"] else "stop"


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
        server, body = self.server, json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path in server.refusals:
            self.respond(*server.refusals[self.path])
        elif self.path == "/v1/load_lora_adapter":
            if body["lora_name"] in server.loaded:
                return self.respond(400, {"error": {"message": f"'{body['lora_name']}' has already been loaded."}})
            server.loaded.add(body["lora_name"])
            self.respond(200, {})
        else:
            self.complete(body)

    def complete(self, body: dict) -> None:
        server = self.server
        with server.lock:
            server.asked.append(body)
            fault = server.faults.pop(0) if server.faults else ""
        if body["model"] not in server.loaded:
            return self.respond(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        if fault.isdecimal():
            return self.respond(int(fault), {"error": {"message": "it is overloaded"}})
        tokens, reason = server.answer(body)
        self.send_response(200)
        self.end_headers()
        name = "base" if fault == "another model" else body["model"]
        if fault == "interrupt":
            wait_until(server.may_interrupt)
            os.kill(os.getpid(), signal.SIGINT)
            fault = "endless"
        while fault == "endless":
            self.send(name, tokens[:1], None)
            time.sleep(0.01)
        if fault in ("gone", "aborted", "broken"):
            self.send(name, tokens[:2], "abort" if fault == "aborted" else None)
            if fault == "broken":
                self.wfile.write(b'data: {"error": {"message": "EngineDeadError"}}\n\n')
            return None
        if fault == "cut":
            return self.send(name, tokens[:2], "length")
        self.send(name, tokens[:1], None)
        self.send(name, tokens[1:], reason)
        self.wfile.write(b"data: [DONE]\n\n")

    def send(self, model: str, tokens: list[int], reason: str | None) -> None:
        choice = {"index": 0, "text": "?", "token_ids": tokens, "finish_reason": reason}
        self.wfile.write(f"data: {json.dumps({'model': model, 'choices': [choice]})}\n\n".encode())


@pytest.fixture
def vllm(eval_config, monkeypatch):
    monkeypatch.setattr(server_module, "PAUSES", (0, 0, 0))
    with PlayedVllm(eval_config()) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def served_config(eval_config, vllm):
    return lambda *overrides: eval_config(f"server={vllm.url}", *overrides)


def move_away(run: Path, name: str) -> Path:
    return Path(shutil.move(run / "eval", run.parent / name)) / "gsm8k"


STOP = 'task.stop=["e"]'  # a letter that its answers have


@pytest.mark.parametrize("stop", [[], [STOP]])
def test_a_server_that_fails_now_and_then_gives_the_answers_of_the_model_in_this_process(
    eval_config, served_config, vllm, run, stop
):
    result = evaluate(eval_config(*stop))
    here = move_away(run, "here")
    assert any(answer["tokens"] < 8 for answer in read(here / "generations.jsonl")) == bool(stop)
    vllm.faults = ["503", "gone", "", "429", "aborted", "500", "broken"]
    assert evaluate(served_config(*stop)) == result
    assert contents(run / "eval" / "gsm8k") == contents(here)
    config = yaml.safe_load((run / "eval" / "gsm8k" / "config.yaml").read_text())
    assert config["engine"] == "vllm 0.32.0"
    assert len(vllm.asked) == 8 + 6
    evaluate(served_config("generation=sample", "generation.samples=2", "name=sampled"))
    sampled = vllm.asked[14:]
    assert len({body["seed"] for body in sampled}) == len(sampled) == 16
    assert {body["repetition_penalty"] for body in vllm.asked} == {1}


def test_a_server_that_goes_is_one_line_and_the_same_command_resumes(eval_config, served_config, vllm, run):
    evaluate(eval_config())
    expected = contents(move_away(run, "here"))
    vllm.faults = ["", "", ""] + ["503"] * 99
    with pytest.raises(UserError) as caught:
        evaluate(served_config("grading_seconds=9"))
    assert str(caught.value) == (
        f"server={vllm.url} is busy: 503 it is overloaded. Once it is back, the same command resumes."
    )
    kept = read(run / "eval" / "gsm8k" / "generations.jsonl")
    vllm.faults, vllm.asked, vllm.loaded = [], [], set()
    evaluate(served_config())
    assert len(vllm.asked) == 8 - len(kept) > 0
    assert contents(run / "eval" / "gsm8k") == expected


def test_ctrl_c_keeps_the_answers_so_far(served_config, vllm, run):
    answers = run / "eval" / "gsm8k" / "generations.jsonl"
    vllm.may_interrupt = lambda: len(read(answers)) == 3
    vllm.faults = ["", "", "", "interrupt", "endless", "endless", "endless", "endless"]
    with pytest.raises(KeyboardInterrupt):
        evaluate(served_config())
    assert len(read(answers)) == 3


REFUSALS = {
    "another base": (lambda vllm: vllm.served.update(root="org/other"), ["serves org/other, not ", "`vllm serve "]),
    "no vLLM": (
        lambda vllm: vllm.refusals.update({"/version": (404, {"detail": "Not Found"})}),
        ["refuses /version: Not Found. Name the address of a vLLM."],
    ),
    "another kind of server": (lambda vllm: vllm.served.pop("root"), ["is no vLLM", "'root'"]),
    "no loading": (
        lambda vllm: vllm.refusals.update({server_module.LOAD: (404, {"detail": "Not Found"})}),
        ["Start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"],
    ),
    "few positions": (lambda vllm: vllm.served.update(max_model_len=16), ["beyond the 16 positions"]),
    "another model": (
        lambda vllm: vllm.faults.append("another model"),
        ["asked for run-adapter-", "base answered"],
    ),
    "cut answers": (lambda vllm: vllm.faults.append("cut"), ["cuts answers at 2 of 8 tokens", "--generation-config"]),
}


@pytest.mark.parametrize(("change", "parts"), REFUSALS.values(), ids=REFUSALS)
def test_what_a_server_cannot_answer_is_one_line(served_config, vllm, change, parts):
    change(vllm)
    with pytest.raises(UserError) as caught:
        evaluate(served_config("task.limit=1"))
    for part in (f"server={vllm.url} " * ("positions" not in parts[0]), *parts):
        assert part in str(caught.value)


def test_an_evaluation_is_not_resumed_by_another_engine(eval_config, served_config):
    evaluate(eval_config("task.limit=1"))
    with pytest.raises(UserError, match="engine was None, is 'vllm 0.32.0'"):
        evaluate(served_config("task.limit=1"))


def test_a_chat_with_a_server_is_that_with_the_model_in_this_process(compose, run, vllm, capsys):
    def answer(*settings: str) -> str:
        chat(compose(f"run={run}", "prompt=How many?", "max_new_tokens=8", *settings, command="chat"))
        return capsys.readouterr().out

    assert answer(f"server={vllm.url}/v1/") == answer() != ""
    vllm.faults = ["gone"]
    with pytest.raises(UserError, match="broke off an answer after 2 tokens"):
        answer(f"server={vllm.url}")
