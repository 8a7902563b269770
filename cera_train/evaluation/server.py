"""A running vLLM as the engine of answers: token ids go to `/v1/completions`, token ids come back.

The base model, the model that each answer names, and how an answer ended are checked. Several
requests run at once; where the server is busy or away, each is repeated for about a minute.
"""

import contextlib
import hashlib
import http.client
import json
import math
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import TextStreamer

from cera_train.adapters.families import replaces_base
from cera_train.adapters.folder import ADAPTER_CONFIG
from cera_train.common.errors import UserError, error_text
from cera_train.common.settings import require
from cera_train.common.terminal import announce
from cera_train.evaluation.requests import (
    Answer,
    Request,
    answer_of,
    generation_settings,
    request_seed,
)
from cera_train.model.folder import files_of, load_architecture, model_ends
from cera_train.runs.subject import digest_of
from cera_train.settings.evaluation import GenerationConfig
from cera_train.settings.model import ModelConfig

COMPLETIONS = "/v1/completions"
LOAD = "/v1/load_lora_adapter"
UNLOAD = "/v1/unload_lora_adapter"

AT_ONCE = 64  # concurrent requests, which vLLM batches
PAUSES = (0.5, 1, 2, 4, 8, 15, 30)  # seconds between tries, about a minute in all
SILENCE = 600  # seconds without a token, after which a connection counts as broken
TOKENS_AT_ONCE = 16  # in a message of the server's, where no user watches

PLAIN = {
    "top_k": 0,
    "min_p": 0,
    "repetition_penalty": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
}
"""Replaces the generation settings that came with the model, which vLLM uses where a request has
none."""

FIXES = {
    f"{LOAD}: Not Found": "Start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment.",
    "/version: Not Found": "Name the address of a vLLM.",
    "No adapter found": "The server must see this folder under the same path.",
    "not enabled": "Start vLLM with --enable-lora.",
    "max_lora_rank": "Start vLLM with a higher --max-lora-rank.",
    "lora_alpha": "Install cera-train where vLLM runs: its plugin serves CeRA.",
    "does not exist": "If vLLM was started again, the same command loads the adapter and resumes.",
    "greater than max allowed": "Start vLLM with --max-logprobs=-1.",
    "Unauthorized": "Set VLLM_API_KEY to the server's key.",
}
"""What a refusal of vLLM's contains, PATH: MESSAGE, and the fix."""


class Unavailable(UserError):
    """The server is busy or away, or an answer broke off: trying again may help."""


class Server:
    """A vLLM that answers by an adapter on its base, or by the base alone. Raises UserError where
    it has another base, or no vLLM answers.

    Args:
        url: such as http://localhost:8000.
        model: the base, which the server must have.
        adapter: the folder of the adapter to load; or of a plain model, which then is the base.
    """

    fix = "Start it without --tokenizer, --chat-template and --generation-config."

    def __init__(
        self, url: str, model: ModelConfig, tokenizer: Any, adapter: Path | None = None
    ) -> None:
        if adapter is not None and not (adapter / ADAPTER_CONFIG).is_file():
            model = replace(model, path=str(adapter), revision=None)
            adapter = None
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.tokenizer = tokenizer
        self.vocabulary = range(load_architecture(model).get_text_config().vocab_size)
        self.headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY", "").strip():
            self.headers["Authorization"] = f"Bearer {key}"
        self.stopped = threading.Event()
        self.has_waited = False
        with self._reading("describes itself in another way"):
            self.version = f"vllm {json.loads(self._ask('/version'))['version']}"
            models = json.loads(self._ask("/v1/models"))["data"]
            [served] = [model for model in models if model["parent"] is None][:1]
            self.base = served["id"]
            root = served["root"]
            self.positions = served["max_model_len"]
        folder = files_of(model.path)
        is_same_folder = Path(folder).is_dir() and Path(root).resolve() == Path(folder).resolve()
        if root != str(folder) and not is_same_folder:
            revision = f" --revision {model.revision}" if model.revision else ""
            raise UserError(
                f"server={self.url} serves {root}, not {folder}: start it by `vllm serve "
                f"{folder}{revision}`."
            )
        self.name = self.base
        if adapter is not None:
            self.load_adapter(adapter)

    def load_adapter(self, adapter: Path) -> None:
        """Loads an adapter under a name with its digest, in place of the previous one. Raises
        UserError where the server refuses it."""
        config = (adapter / ADAPTER_CONFIG).read_bytes()
        start = json.loads(config).get("init_lora_weights")
        require(
            not replaces_base(start),
            f"server={self.url} has all of W0, of which {start} moved a part into {adapter}, so it "
            "would compute another model: serve that of `cera-export to=merged`, or train an "
            "adapter with another start.",
        )
        digest = hashlib.sha256(config + digest_of(adapter).encode()).hexdigest()[:16]
        folder = adapter.resolve()
        before = self.name
        self.name = f"{folder.parent.name}-{folder.name}-{digest}"
        try:
            self._ask(LOAD, {"lora_name": self.name, "lora_path": str(folder)})
        except UserError as error:
            if "has already been loaded" not in str(error):
                raise
        if before not in (self.base, self.name):
            with contextlib.suppress(UserError):  # a server that was restarted has none
                self._ask(UNLOAD, {"lora_name": before})

    @contextlib.contextmanager
    def without_adapter(self) -> Iterator[None]:
        """The base answers inside."""
        name = self.name
        self.name = self.base
        try:
            yield
        finally:
            self.name = name

    # --- answers ----------------------------------------------------------------------------------

    def batches(self, requests: Sequence[Request], *_: int) -> list[list[Request]]:
        """Each request by itself: the server makes the batches."""
        return [[request] for request in requests]

    def answers(
        self,
        batches: Sequence[list[Request]],
        max_new_tokens: int,
        stop: list[str],
        config: GenerationConfig,
        streamer: TextStreamer | None = None,
    ) -> Iterator[list[Answer]]:
        """An answer that is streamed and breaks off is not tried again."""
        settings = generation_settings(self.tokenizer, model_ends(self.model), max_new_tokens, stop)

        def answer(request: Request) -> list[Answer]:
            if streamer is not None:
                return [self._answer(request, settings, config, streamer)]
            return [self._patiently(lambda: self._answer(request, settings, config))]

        pool = ThreadPoolExecutor(AT_ONCE)
        try:
            for future in as_completed([pool.submit(answer, request) for [request] in batches]):
                yield future.result()
        finally:
            self.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            self.stopped = threading.Event()  # of later requests; Ctrl-C may end the wait for these
            pool.shutdown()

    def _answer(
        self,
        request: Request,
        settings: transformers.GenerationConfig,
        config: GenerationConfig,
        streamer: TextStreamer | None = None,
    ) -> Answer:
        """Raises Unavailable where the answer breaks off, UserError where it is cut or another
        model's."""
        body = PLAIN | {
            "model": self.name,
            "prompt": request.prompt_ids,
            "max_tokens": settings.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": request_seed(request, config),
            "stop": settings.stop_strings or [],
            "stop_token_ids": settings.eos_token_id,
            "logprobs": 1,
            "stream": True,
            "stream_interval": 1 if streamer else TOKENS_AT_ONCE,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # two tokens may have the same text
        }
        ids = []
        sampled = []
        reason = None
        if streamer is not None:
            streamer.put(torch.tensor(request.prompt_ids))
        for choice in self._choices(body):
            start = len(ids)
            with self._reading("answers without token ids of its vocabulary or their log p"):
                reason = choice["finish_reason"]
                log_ps = choice["logprobs"]["token_logprobs"]
                for token, log_p in zip(choice["token_ids"], log_ps, strict=True):
                    if token not in self.vocabulary or not math.isfinite(log_p):
                        raise LookupError(token, log_p)
                    ids.append(token)
                    sampled.append(log_p)
            if streamer is not None:
                streamer.put(torch.tensor(ids[start:]))
        if streamer is not None:
            streamer.end()
        if reason not in ("stop", "length"):  # None, or abort where the server is being stopped
            raise Unavailable(f"server={self.url} broke off an answer after {len(ids)} tokens")
        if reason == "length" and len(ids) < settings.max_new_tokens:
            raise UserError(
                f"server={self.url} cuts answers at {len(ids)} of {settings.max_new_tokens} "
                "tokens: start vLLM with --generation-config vllm."
            )
        answer = answer_of(request, ids, self.tokenizer, settings)
        return Answer(answer.generation, answer.ids, sampled[: len(answer.ids)])

    def _choices(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The pieces of a streamed answer, as they come. Raises Unavailable where it breaks off,
        UserError where it is another model's."""
        for line in self._lines(COMPLETIONS, body):
            is_whole_event = line.startswith(b"data: {") and line.endswith(b"\n")
            if not is_whole_event:  # also the final [DONE]
                continue
            with self._reading("streams what is no answer of vLLM's"):
                message = json.loads(line.removeprefix(b"data: "))
                if "error" in message:
                    raise Unavailable(f"server={self.url} broke off an answer: {message['error']}")
                model = message["model"]
                choices = message["choices"][:1]
            if model != self.name:
                raise UserError(
                    f"server={self.url} was asked for {self.name}, and {model} answered."
                )
            yield from choices  # none beside the number of tokens, which may come at the end

    @contextlib.contextmanager
    def _reading(self, problem: str) -> Iterator[None]:
        """Turns an error in reading what the server sent into a UserError."""
        try:
            yield
        except UserError:
            raise
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise UserError(f"server={self.url} {problem} ({error!r}): update vLLM.") from error

    # --- what a certificate compares --------------------------------------------------------------

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """[V], of the token after these."""
        log_p = torch.full([len(self.vocabulary)], torch.nan)
        choice = self._complete(ids, 1, logprobs=len(self.vocabulary))
        with self._reading("answers without the log p of its vocabulary"):
            [found] = choice["logprobs"]["top_logprobs"]
            tokens = [int(name.removeprefix("token_id:")) for name in found]
            log_p[tokens] = torch.tensor([*found.values()])
        return log_p

    def ids_of(self, text: str) -> list[int]:
        return self._tokenize(prompt=text, add_special_tokens=False)

    def ends_at(self, token: int) -> bool:
        """Whether an answer ends after this token."""
        return self._complete([token], 2, allowed_token_ids=[token])["finish_reason"] == "stop"

    def has_template_of(self, tokenizer: Any) -> bool:
        """Whether one question becomes the same ids there."""
        if tokenizer.chat_template is None:
            return True
        chat = [{"role": "user", "content": "a"}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        return self._tokenize(messages=chat) == ids

    def _complete(self, prompt: Sequence[int], tokens: int, **fields: Any) -> dict[str, Any]:
        """The greedy answer to a prompt, as a choice of the API."""
        body = PLAIN | {
            "model": self.name,
            "prompt": [*prompt],
            "max_tokens": tokens,
            "temperature": 0,
            "return_tokens_as_token_ids": True,
        }
        with self._reading("answers in another way"):
            return json.loads(self._ask(COMPLETIONS, body | fields))["choices"][0]

    def _tokenize(self, **fields: Any) -> list[int]:
        with self._reading("answers in another way"):
            return json.loads(self._ask("/tokenize", {"model": self.name} | fields))["tokens"]

    # --- HTTP -------------------------------------------------------------------------------------

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """Calls again while the server is unavailable, with growing pauses."""
        stopped = self.stopped
        for pause in (*PAUSES, None):
            try:
                return call()
            except Unavailable as error:
                if pause is None:
                    raise UserError(
                        f"{error}. Once it is back, the same command resumes."
                    ) from error
                if not self.has_waited:
                    self.has_waited = True
                    announce("waiting", f"{error}; trying again for {sum(PAUSES):.0f} seconds")
                if stopped.wait(pause):
                    raise CancelledError from error

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        return self._patiently(lambda: b"".join(self._lines(path, body)))

    def _lines(self, path: str, body: dict[str, Any] | None = None) -> Iterator[bytes]:
        """The lines of the response to one request. Raises Unavailable where trying again may help,
        UserError where it is refused."""
        stopped = self.stopped
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        try:
            with self._opened(request, path) as response:
                for line in response:
                    if stopped.is_set():
                        raise CancelledError
                    yield line
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise Unavailable(
                f"server={self.url} does not answer ({error_text(reason)})"
            ) from error

    def _opened(self, request: urllib.request.Request, path: str) -> http.client.HTTPResponse:
        """The response to a request. Raises as `_lines`; also what reading a refusal raises."""
        try:
            return urllib.request.urlopen(request, timeout=SILENCE)
        except urllib.error.HTTPError as error:
            with error:
                message = message_of(error.read())
            # vLLM answers 500 where its engine died, and also for an adapter that it cannot load
            has_died = error.code == 500 and path == COMPLETIONS
            if has_died or error.code in (429, 502, 503, 504):
                raise Unavailable(f"server={self.url} is busy: {error.code} {message}") from error
            text = f"{path}: {message or error.reason}"
            fix = next((fix for part, fix in FIXES.items() if part in text), "")
            raise UserError(
                f"server={self.url} refuses {text.rstrip('.')}. {fix}".strip()
            ) from error


def message_of(body: bytes) -> str:
    """The message in the body of a refusal, in one line."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, AttributeError):
        tree = json.loads(text)
        text = tree.get("error") or tree["detail"]
        if isinstance(text, dict):
            text = text["message"]
    return " ".join(str(text).split())[:400]
