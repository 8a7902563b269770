"""Ways to fine-tune the same base on the same rows: the published protocol, TRL with PEFT, and
ours. Each makes one optimiser update on the rows it is given, supervising the answers and nothing
else."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from cera_train.common.settings import to_plain
from cera_train.model.weights import quantization_config
from cera_train.settings.adapters import AdapterConfig, AdapterKind
from cera_train.settings.data import DataConfig
from cera_train.settings.model import Dtype, ModelConfig, Quantization
from cera_train.settings.run import Config
from cera_train.settings.training import OptimizerConfig, TrainConfig

if TYPE_CHECKING:
    from cera_train.training.build import Data, Model
    from cera_train.training.objectives.objective import Objective

PROMPT = "Question: {question}\nAnswer:"
COMPLETION = " {answer}"
RANK = 64
DROPOUT = 0.1
LEARNING_RATE = 3e-4
TARGETS = ["q_proj", "v_proj"]
MICRO_BATCH_TOKENS = {"cpu": 1024, "cuda": 4096}
"""Tokens of one pass of ours, by device: few on a CPU to keep memory small, the default on a
GPU."""

MICRO_BATCHES = {"cpu": (1, 2, 4), "cuda": (4, 8, 16, 32)}
"""Sequences of one pass of TRL, of which its tuned contestant takes the fastest: few on a CPU,
since they are padded to the longest."""


@dataclass(frozen=True)
class Adapter:
    """What all contestants train."""

    rank: int = RANK
    alpha: int = RANK
    dropout: float = DROPOUT
    targets: Any = tuple(TARGETS)
    """As PEFT takes them."""

    def lora(self) -> dict[str, Any]:
        """The arguments of PEFT's LoRA."""
        targets = self.targets if isinstance(self.targets, str) else [*self.targets]
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "target_modules": targets,
        }


PAPER = Adapter()


@dataclass(frozen=True)
class Setting:
    """What all contestants of a race share."""

    base: str
    """A folder with model and tokenizer."""
    file: Path
    """jsonl rows with `question` and `answer`."""
    rows: Sequence[dict[str, str]]
    """The same, read."""
    precision: str
    """The base's weights: float32, bfloat16 or nf4."""
    device: torch.device
    adapter: Adapter = PAPER
    max_length: int = 512
    """Tokens of a sequence."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "float32" else torch.bfloat16

    @property
    def quantization(self) -> Quantization:
        return Quantization.nf4 if self.precision == "nf4" else Quantization.none

    def load_base(self, **more: Any) -> nn.Module:
        """The base as a user of transformers loads it."""
        return AutoModelForCausalLM.from_pretrained(
            self.base,
            dtype=self.dtype,
            device_map={"": self.device},
            quantization_config=quantization_config(self.quantization, self.dtype),
            **more,
        )

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )


class Contestant:
    """Built once, in a separate process."""

    model: nn.Module

    def __init__(self, setting: Setting) -> None:
        raise NotImplementedError

    def update(self, rows: Sequence[int]) -> int:
        """One update on these rows; returns the tokens it supervised."""
        raise NotImplementedError


class Published(Contestant):
    """The protocol of the published runs: CeRA as two linears and a dropout beside each projection,
    sequences padded to 512, gradient checkpointing, the loss on the logits of every position,
    micro-batches of 4."""

    LENGTH = 512
    MICRO_BATCH = 4

    def __init__(self, setting: Setting) -> None:
        tokenizer = AutoTokenizer.from_pretrained(setting.base)
        self.setting = setting
        self.model = setting.load_base().requires_grad_(False)
        for layer in self.model.model.layers:
            for name in TARGETS:
                setattr(
                    layer.self_attn,
                    name,
                    PublishedBranch(getattr(layer.self_attn, name)).to(setting.device),
                )
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.parameters = [
            parameter for parameter in self.model.parameters() if parameter.requires_grad
        ]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)
        self.batches = [self._padded(row, tokenizer) for row in setting.rows]

    def _padded(
        self, row: dict[str, str], tokenizer: Any
    ) -> tuple[list[int], list[int], list[int]]:
        prompt = tokenizer(PROMPT.format(**row), add_special_tokens=False).input_ids
        completion = [
            *tokenizer(COMPLETION.format(**row), add_special_tokens=False).input_ids,
            tokenizer.eos_token_id,
        ]
        ids = [*prompt, *completion][: self.LENGTH]
        padding = self.LENGTH - len(ids)
        labels = [*[-100] * len(prompt), *completion][: self.LENGTH]
        return (
            ids + [tokenizer.eos_token_id] * padding,
            [1] * len(ids) + [0] * padding,
            labels + [-100] * padding,
        )

    def update(self, rows: Sequence[int]) -> int:
        supervised = 0
        for start in range(0, len(rows), self.MICRO_BATCH):
            columns = zip(
                *(self.batches[row] for row in rows[start : start + self.MICRO_BATCH]), strict=True
            )
            ids, mask, labels = (
                torch.tensor(column, device=self.setting.device) for column in columns
            )
            with self.setting.autocast():
                loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
            (loss / (len(rows) / self.MICRO_BATCH)).backward()
            supervised += int((labels != -100).sum())
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return supervised


class PublishedBranch(nn.Module):
    """W0 x + B dropout(silu(A x)), as plainly as it is written."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.A = nn.Linear(linear.in_features, RANK, bias=False)
        self.B = nn.Linear(RANK, linear.out_features, bias=False)
        self.dropout = nn.Dropout(DROPOUT)
        nn.init.kaiming_normal_(self.A.weight, nonlinearity="relu")
        nn.init.zeros_(self.B.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.B(self.dropout(nn.functional.silu(self.A(x))))


class Trl(Contestant):
    """TRL's SFTTrainer with PEFT's LoRA, its defaults: the trainer's own collator, loss, step and
    optimizer."""

    is_tuned = False

    def __init__(self, setting: Setting) -> None:
        from trl import SFTConfig, SFTTrainer  # only here, since memory is compared

        is_16bit_gpu = setting.device.type == "cuda" and setting.dtype == torch.bfloat16
        has_flash = self.is_tuned and is_16bit_gpu and is_flash_attn_2_available()
        tuned = {}
        if self.is_tuned:
            has_liger = is_16bit_gpu and is_liger_kernel_available()
            tuned = {
                "gradient_checkpointing": False,
                "max_length": None,
                "use_liger_kernel": has_liger,
                "padding_free": has_flash,
            }
        self.folder = tempfile.TemporaryDirectory()
        attention = "flash_attention_2" if has_flash else None
        self.trainer = SFTTrainer(
            setting.load_base(attn_implementation=attention),
            SFTConfig(
                self.folder.name,
                use_cpu=setting.device.type == "cpu",
                bf16=setting.dtype == torch.bfloat16,
                report_to=[],
                disable_tqdm=True,
                learning_rate=LEARNING_RATE,
                **tuned,
            ),
            processing_class=AutoTokenizer.from_pretrained(setting.base),
            train_dataset=datasets.Dataset.from_list(
                [
                    {"prompt": PROMPT.format(**row), "completion": COMPLETION.format(**row)}
                    for row in setting.rows
                ]
            ),
            peft_config=peft.LoraConfig(**setting.adapter.lora()),
        )
        # As `train` begins, without its loop over batches.
        if (args := self.trainer.args).gradient_checkpointing:
            self.trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        self.trainer.create_optimizer()
        self.trainer._set_signature_columns_if_needed()
        self.model = self.trainer.accelerator.prepare(self.trainer.model)
        self.parameters = [
            parameter for parameter in self.model.parameters() if parameter.requires_grad
        ]
        self.micro_batch = self.trainer.args.per_device_train_batch_size
        if self.is_tuned:
            self.micro_batch = min(MICRO_BATCHES[setting.device.type], key=self._seconds)
            print(f"TRL, best: {self.micro_batch} sequences at once", flush=True)

    def _seconds(self, micro_batch: int) -> float:
        """Of an update in passes of so many sequences; infinite where they do not fit the GPU."""
        device = self.trainer.args.device.type
        self.micro_batch = micro_batch
        rows = range(MICRO_BATCHES[device][-1])
        synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
        try:
            self.update(rows)  # a warm-up
            synchronize()
            started = time.perf_counter()
            self.update(rows)
            synchronize()
        except torch.OutOfMemoryError:
            self.trainer.optimizer.zero_grad()
            return math.inf
        return time.perf_counter() - started

    def update(self, rows: Sequence[int]) -> int:
        columns = self.trainer._signature_columns
        examples = [
            {
                name: value
                for name, value in self.trainer.train_dataset[row].items()
                if name in columns
            }
            for row in rows
        ]
        if self.is_tuned:  # as train_sampling_strategy="group_by_length" would, to pad less
            examples.sort(key=lambda example: -len(example["input_ids"]))
        starts = range(0, len(rows), self.micro_batch)
        batches = [
            self.trainer.data_collator(examples[start : start + self.micro_batch])
            for start in starts
        ]
        supervised = sum((batch["labels"] != -100).sum() for batch in batches)
        self.trainer.current_gradient_accumulation_steps = len(batches)
        for batch in batches:
            self.trainer.training_step(
                self.model, batch, num_items_in_batch=supervised.to(self.trainer.args.device)
            )
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return int(supervised)


class TunedTrl(Trl):
    """The same with its best settings: nothing recomputed, micro-batches of near-equal length of
    the fastest size. Its own loss is in chunks already. Without flash attention, its packing and
    padding-free batches put a T x T mask over a row, which takes longer than the padding."""

    is_tuned = True


def our_run(
    setting: Setting,
    kind: str,
    compile: bool = False,
    micro_batch_tokens: int | None = None,
) -> tuple[Data, Model, Objective]:
    """A run of cera-train, built as the command builds it."""
    # Only here, since memory is compared.
    from cera_train.runs.folder import RunFolder
    from cera_train.training.resolve import resolve
    from cera_train.training.train import build_parts

    adapter = setting.adapter
    dtype = Dtype(str(setting.dtype).removeprefix("torch."))
    tokens = micro_batch_tokens or MICRO_BATCH_TOKENS[setting.device.type]
    config = Config(
        model=ModelConfig(path=setting.base, dtype=dtype, quantization=setting.quantization),
        adapter=AdapterConfig(
            AdapterKind(kind),
            adapter.rank,
            alpha=adapter.alpha,
            dropout=adapter.dropout,
            target_modules=adapter.lora()["target_modules"],
        ),
        data=DataConfig(
            train_files=[str(setting.file)],
            eval_rows=1,
            max_length=setting.max_length,
            prompt=PROMPT,
            completion=COMPLETION,
            allow_overlap=True,
        ),
        optimizer=OptimizerConfig(lr=LEARNING_RATE),
        train=TrainConfig(micro_batch_tokens=tokens, compile=compile),
    )
    path = Path(tempfile.mkdtemp())
    config = resolve(config, path).config
    data, model, _, _, objective = build_parts(config, RunFolder(path, to_plain(config)))
    assert model.accelerator.device.type == setting.device.type, "WITHOUT_GPUS came too late"
    model.wrapped.train()
    return data, model, objective


class Ours(Contestant):
    """An update of cera-train, as its loop makes it."""

    kind = "cera"
    is_compiled = False

    def __init__(self, setting: Setting) -> None:
        _, self.ours, self.objective = our_run(setting, self.kind, compile=self.is_compiled)
        self.model = self.ours.adapted

    def update(self, rows: Sequence[int]) -> int:
        from cera_train.model.compiled import at_recompile_limit
        from cera_train.training.train import backward

        ours = self.ours
        if self.is_compiled and at_recompile_limit():
            raise RuntimeError("torch compiles no further variant of the layers")
        if fallbacks := ours.language_model.fallbacks:
            raise RuntimeError(f"it fell back: {'; '.join(fallbacks)}")
        drawn = self.objective.draw(list(rows))
        backward(ours, drawn)
        ours.accelerator.clip_grad_norm_(ours.trained, 1.0)
        ours.optimizer.step()
        ours.optimizer.zero_grad()
        return sum(drawn.batches.supervised[row] for row in rows)


class OursCompiled(Ours):
    """The same with train.compile=true."""

    is_compiled = True


class OursWithLora(Ours):
    """The same with LoRA at equal rank."""

    kind = "lora"


CONTESTANTS: dict[str, type[Contestant]] = {
    "published protocol": Published,
    "TRL + LoRA, defaults": Trl,
    "TRL + LoRA, best": TunedTrl,
    "ours with LoRA": OursWithLora,
    "ours with CeRA": Ours,
    "ours with CeRA, compiled": OursCompiled,
}
