"""A running vLLM as the engine of answers: token ids go to `/v1/completions`, token ids come back.

Nothing is taken for granted: the base model, the model that each answer names, and how an answer ended are checked.
Several requests are under way at once; where the server is busy or away, each is repeated for about a minute.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

import transformers

from cera_train.common.errors import UserError, error_text
from cera_train.common.terminal import announce
from cera_train.evaluation.generate import Answer, Request, generation_of, seed_of
from cera_train.model.folder import files_of
from cera_train.runs.subject import digest_of
from cera_train.settings.evaluation import GenerationConfig
from cera_train.settings.model import ModelConfig

COMPLETIONS, LOAD, UNLOAD = "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter"

AT_ONCE = 64  # requests under way, of which vLLM makes a batch
PAUSES = (0.5, 1, 2, 4, 8, 15, 30)  # seconds between tries, about a minute in all
SILENCE = 600  # seconds without a token, after which a connection counts as broken
TOKENS_AT_ONCE = 16  # in a message of the server's, where nobody reads along

PLAIN = {"top_k": 0, "min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
"""Replaces the generation settings that came with the model, which vLLM uses where a request has none."""

MENDS = {
    f"{LOAD}: Not Found": "Start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment.",
    "/version: Not Found": "Name the address of a vLLM.",
    "No adapter found": "The server must see this folder under the same path.",
    "not enabled": "Start vLLM with --enable-lora.",
    "max_lora_rank": "Start vLLM with a higher --max-lora-rank.",
    "lora_alpha": "Install cera-train where vLLM runs: its plugin serves CeRA.",
    "does not exist": "If vLLM was started again, the same command loads the adapter and resumes.",
    "Unauthorized": "Set VLLM_API_KEY to the server's key.",
}
"""What a refusal of vLLM's contains, PATH: MESSAGE, and the mend."""


class Unavailable(UserError):
    """The server is busy or away, or an answer broke off: another try may do."""


class Server:
    """A vLLM that answers by an adapter on its base, or by the base alone, in a `with` block.

    Args:
        url: such as http://localhost:8000.
        model: the base, which the server must have.
        adapter: its folder, for `load_adapter`.
    """

    def __init__(self, url: str, model: ModelConfig, adapter: Path | None = None) -> None:
        self.url, self.model, self.adapter = url.rstrip("/").removesuffix("/v1"), model, adapter
        self.headers = {"Content-Type": "application/json"}
        if key := os.environ.get("VLLM_API_KEY"):
            self.headers["Authorization"] = f"Bearer {key}"
        self.stopped, self.has_waited = threading.Event(), False

    def __enter__(self) -> Self:
        """Reads what is served. Raises UserError where that is another base, or no vLLM answers."""
        try:
            self.engine = f"vllm {json.loads(self._ask('/version'))['version']}"
            models = json.loads(self._ask("/v1/models"))["data"]
            served = next(model for model in models if model["parent"] is None)
            self.name, root, self.positions = served["id"], served["root"], served["max_model_len"]
        except (json.JSONDecodeError, LookupError, TypeError, StopIteration) as error:
            raise UserError(f"server={self.url} is no vLLM: it describes itself in another way ({error!r}).") from error
        base = str(files_of(self.model.path))
        if root != base and not (Path(base).is_dir() and Path(root).resolve() == Path(base).resolve()):
            raise UserError(f"server={self.url} serves {root}, not {base}: start it by `vllm serve {base}`.")
        self.pool = ThreadPoolExecutor(AT_ONCE)
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.pool.shutdown(cancel_futures=True)

    def load_adapter(self) -> None:
        """Loads the adapter under a name with its digest. Raises UserError where the server refuses it."""
        if self.adapter is None:
            return
        config = (self.adapter / "adapter_config.json").read_bytes()
        digest = hashlib.sha256(config + digest_of(self.adapter).encode()).hexdigest()[:16]
        folder = self.adapter.resolve()
        self.name = f"{folder.parent.name}-{folder.name}-{digest}"
        try:
            self._ask(LOAD, {"lora_name": self.name, "lora_path": str(folder)})
        except UserError as error:
            if "has already been loaded" not in str(error):
                raise

    def replace_adapter(self, adapter: Path) -> None:
        """Loads an adapter in the place of the one before."""
        before, had_one = self.name, self.adapter is not None
        self.adapter = adapter
        self.load_adapter()
        if had_one and self.name != before:
            self._ask(UNLOAD, {"lora_name": before})

    # --- answers -----------------------------------------------------------------------------------------------------

    def answers(
        self,
        requests: Sequence[Request],
        tokenizer: Any,
        settings: transformers.GenerationConfig,
        config: GenerationConfig,
        with_log_p: bool = False,
    ) -> Iterator[Answer]:
        """Answers requests, in the order in which they are done. `settings` define when an answer ends."""
        more = {"stream_interval": TOKENS_AT_ONCE} | ({"logprobs": 1} if with_log_p else {})

        def answer(request: Request) -> Answer:
            pieces = self._patiently(lambda: list(self.stream(request, settings, config, more)))
            ids, log_p = [], [] if with_log_p else None
            for piece in pieces:
                ids += piece["token_ids"]
                if log_p is not None:
                    log_p += piece["logprobs"]["token_logprobs"]
            return Answer(generation_of(request, ids, tokenizer, settings), ids, log_p)

        for future in as_completed([self.pool.submit(answer, request) for request in requests]):
            yield future.result()

    def stream(
        self,
        request: Request,
        settings: transformers.GenerationConfig,
        config: GenerationConfig,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> Iterator[dict[str, Any]]:
        """An answer, piece by piece, each with its `token_ids`. Raises Unavailable where it breaks off, UserError where
        it is cut or another model's.

        Args:
            more: fields of the request.
        """
        body = PLAIN | {
            "model": self.name,
            "prompt": request.prompt_ids,
            "max_tokens": settings.max_new_tokens,
            "temperature": config.temperature,
            "top_p": config.top_p,
            "seed": seed_of(request, config),
            "stop": settings.stop_strings or [],
            "stop_token_ids": settings.eos_token_id,
            "stream": True,
            "return_token_ids": True,
            **more,
        }
        length, reason = 0, None
        for message in self._messages(body):
            if "error" in message:
                raise Unavailable(f"server={self.url} broke off an answer: {message['error']}")
            if message["model"] != self.name:
                raise UserError(f"server={self.url} was asked for {self.name}, and {message['model']} answered.")
            (choice,) = message["choices"]
            reason, length = choice["finish_reason"], length + len(choice["token_ids"])
            yield choice
        if reason not in ("stop", "length"):  # None, or abort where the server is being stopped
            raise Unavailable(f"server={self.url} broke off an answer after {length} tokens")
        if reason == "length" and length < settings.max_new_tokens:
            raise UserError(
                f"server={self.url} cuts answers at {length} of {settings.max_new_tokens} tokens: start vLLM with "
                "--generation-config vllm."
            )

    # --- HTTP --------------------------------------------------------------------------------------------------------

    def _patiently(self, call: Callable[[], Any]) -> Any:
        """Calls again while the server is unavailable, with growing pauses."""
        for pause in (*PAUSES, None):
            try:
                return call()
            except Unavailable as error:
                if pause is None:
                    raise UserError(f"{error}. Once it is back, the same command resumes.") from error
                if not self.has_waited:
                    self.has_waited = True
                    announce("waiting", f"{error}; trying again for {sum(PAUSES):.0f} seconds")
                if self.stopped.wait(pause):
                    raise CancelledError from error

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        def read() -> bytes:
            with self._response(path, body) as response:
                return response.read()

        return self._patiently(read)

    def _messages(self, body: dict[str, Any]) -> Iterator[Any]:
        """The server-sent events of a completion."""
        with self._response(COMPLETIONS, body) as response:
            for line in response:
                if self.stopped.is_set():
                    raise CancelledError
                if line.startswith(b"data: {") and line.endswith(b"\n"):  # neither half a line nor the final [DONE]
                    yield json.loads(line.removeprefix(b"data: "))

    @contextlib.contextmanager
    def _response(self, path: str, body: dict[str, Any] | None = None) -> Iterator[http.client.HTTPResponse]:
        """The response to one request. Raises Unavailable where another try may do, UserError where it is refused."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self.headers)
        try:
            with urllib.request.urlopen(request, timeout=SILENCE) as response:
                yield response
        except urllib.error.HTTPError as error:
            with error:
                message = message_of(error.read())
            # vLLM answers 500 where its engine died, and also for an adapter that it cannot load
            if error.code in (429, 502, 503, 504) or (error.code == 500 and path == COMPLETIONS):
                raise Unavailable(f"server={self.url} is busy: {error.code} {message}") from error
            text = f"{path}: {message or error.reason}"
            mend = next((mend for part, mend in MENDS.items() if part in text), "")
            raise UserError(f"server={self.url} refuses {text.rstrip('.')}. {mend}".strip()) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise Unavailable(f"server={self.url} does not answer ({error_text(reason)})") from error


def message_of(body: bytes) -> str:
    """What the body of a refusal says, in one line."""
    text = body.decode(errors="replace")
    with contextlib.suppress(ValueError, LookupError, AttributeError):
        tree = json.loads(text)
        text = tree.get("error") or tree["detail"]
        text = text["message"] if isinstance(text, dict) else text
    return " ".join(str(text).split())[:400]
