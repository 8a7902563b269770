"""Ways to fine-tune the same base on the same rows: the published protocol, TRL with PEFT, and
ours. Each makes one optimiser update on the rows it is given, supervising the answers and nothing
else."""

from __future__ import annotations

import contextlib
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import is_flash_attn_2_available, is_liger_kernel_available

from benchmarks.rows import read_rows, trained
from cera_train.cli.compose import compose
from cera_train.model.weights import nf4_config
from cera_train.settings.model import Quantization

RANK = 64
DROPOUT = 0.1
LEARNING_RATE = 3e-4
TARGETS = ["q_proj", "v_proj"]
MICRO_BATCHES = {"cpu": (1, 2, 4), "cuda": (4, 8, 16, 32)}
"""Sequences of one pass of TRL, of which its tuned contestant takes the fastest: few on a CPU,
since they are padded to the longest."""


@dataclass(frozen=True)
class Work:
    """The work that all contestants do."""

    precision: str
    """The frozen weights: float32, bfloat16 or nf4."""
    sequences: int
    """An update's: a whole number of the published protocol's micro-batches, few enough for five
    rounds in minutes."""
    device: str = "cpu"
    rank: int = RANK
    alpha: int = RANK
    targets: list[str] | str = field(default_factory=TARGETS.copy)
    """Names of modules, as PEFT takes them."""
    max_length: int = 512
    """Tokens of a sequence."""
    micro_batch_tokens: int = 1024
    """Tokens of one pass of ours: few on a CPU, to keep memory small."""

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.precision == "float32" else torch.bfloat16

    @property
    def quantization(self) -> Quantization:
        return Quantization.nf4 if self.precision == "nf4" else Quantization.none

    def load_base(self, base: str, **more: Any) -> nn.Module:
        """The base as a user of transformers loads it."""
        # With an index, which Accelerate compares with that of its device
        device = torch.device("cuda", 0) if self.device == "cuda" else "cpu"
        return AutoModelForCausalLM.from_pretrained(
            base,
            dtype=self.dtype,
            device_map={"": device},
            quantization_config=nf4_config(self.dtype) if self.precision == "nf4" else None,
            **more,
        )

    def autocast(self) -> contextlib.AbstractContextManager:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)


class Published:
    """The protocol of the published runs: CeRA as two linears and a dropout beside each projection,
    sequences padded to 512, gradient checkpointing, the loss on the logits of every position,
    micro-batches of 4."""

    LENGTH = 512
    MICRO_BATCH = 4

    def __init__(self, work: Work, base: str, file: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(base)
        self.work = work
        self.model = work.load_base(base).requires_grad_(False)
        for layer in self.model.model.layers:
            for name in TARGETS:
                branch = PublishedBranch(getattr(layer.self_attn, name))
                setattr(layer.self_attn, name, branch.to(work.device))
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.parameters = trained(self.model)
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)
        self.rows = [self._padded(row, tokenizer) for row in read_rows(file)]

    def _padded(self, row: dict[str, str], tokenizer: Any) -> torch.Tensor:
        """Ids, attention mask and labels: [3, LENGTH]."""
        prompt, completion = (
            tokenizer(row[column], add_special_tokens=False).input_ids
            for column in ("prompt", "completion")
        )
        ids = torch.tensor([*prompt, *completion, tokenizer.eos_token_id])[: self.LENGTH]
        padding = torch.tensor([[tokenizer.eos_token_id], [0], [-100]])
        padded = padding.repeat(1, self.LENGTH)
        padded[0, : len(ids)] = ids
        padded[1, : len(ids)] = 1
        padded[2, len(prompt) : len(ids)] = ids[len(prompt) :]
        return padded

    def update(self, rows: Sequence[int]) -> int:
        supervised = 0
        passes = torch.stack([self.rows[row] for row in rows]).split(self.MICRO_BATCH)
        for batch in passes:
            ids, mask, labels = batch.to(self.work.device).unbind(1)
            with self.work.autocast():
                loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
            (loss / len(passes)).backward()
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


class Trl:
    """TRL's SFTTrainer with PEFT's LoRA: the trainer's own collator, loss, step and optimizer.

    Tuned, it has its best settings: nothing recomputed, micro-batches of near-equal length of the
    fastest size. Its own loss is in chunks already. Without flash attention, its packing and
    padding-free batches put a T x T mask over a row, which takes longer than the padding.
    """

    def __init__(self, work: Work, base: str, file: Path, is_tuned: bool = False) -> None:
        from trl import SFTConfig, SFTTrainer  # only here, since memory is compared

        self.is_tuned = is_tuned
        is_16bit_gpu = work.device == "cuda" and work.dtype == torch.bfloat16
        has_flash = is_tuned and is_16bit_gpu and is_flash_attn_2_available()
        tuned = {
            "gradient_checkpointing": False,
            "max_length": None,
            "use_liger_kernel": is_16bit_gpu and is_liger_kernel_available(),
            "padding_free": has_flash,
        }
        self.folder = tempfile.TemporaryDirectory()
        self.trainer = SFTTrainer(
            work.load_base(base, attn_implementation="flash_attention_2" if has_flash else None),
            SFTConfig(
                self.folder.name,
                use_cpu=work.device == "cpu",
                bf16=work.dtype == torch.bfloat16,
                report_to=[],
                disable_tqdm=True,
                learning_rate=LEARNING_RATE,
                **(tuned if is_tuned else {}),
            ),
            processing_class=AutoTokenizer.from_pretrained(base),
            train_dataset=datasets.Dataset.from_list(read_rows(file)),
            peft_config=peft.LoraConfig(
                r=work.rank,
                lora_alpha=work.alpha,
                lora_dropout=DROPOUT,
                target_modules=work.targets,
            ),
        )
        # As `train` begins, without its loop over batches.
        if (args := self.trainer.args).gradient_checkpointing:
            self.trainer.model.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
        self.trainer.create_optimizer()
        self.model = self.trainer.accelerator.prepare(self.trainer.model)
        self.parameters = trained(self.model)
        self.micro_batch = args.per_device_train_batch_size
        if is_tuned:
            self.micro_batch = min(MICRO_BATCHES[work.device], key=self._seconds)
            print(f"TRL, best: {self.micro_batch} sequences at once", flush=True)

    def _seconds(self, micro_batch: int) -> float:
        """Seconds of an update in passes of so many sequences; infinite where they do not fit the
        GPU."""
        self.micro_batch = micro_batch
        rows = range(MICRO_BATCHES[self.trainer.args.device.type][-1])
        try:
            self.update(rows)  # a warm-up
            started = time.perf_counter()
            self.update(rows)
        except torch.OutOfMemoryError:
            self.trainer.optimizer.zero_grad()
            return math.inf
        return time.perf_counter() - started

    def update(self, rows: Sequence[int]) -> int:
        examples = [self.trainer.train_dataset[row] for row in rows]
        if self.is_tuned:  # as train_sampling_strategy="group_by_length" would, to pad less
            examples.sort(key=lambda example: -len(example["input_ids"]))
        batches = [
            self.trainer.data_collator(examples[start : start + self.micro_batch])
            for start in range(0, len(rows), self.micro_batch)
        ]
        device = self.trainer.args.device
        supervised = sum((batch["labels"] != -100).sum() for batch in batches).to(device)
        self.trainer.current_gradient_accumulation_steps = len(batches)
        for batch in batches:
            self.trainer.training_step(self.model, batch, num_items_in_batch=supervised)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()
        return int(supervised)


class Ours:
    """An update of cera-train, as its loop makes it."""

    def __init__(
        self, work: Work, base: str, file: Path, kind: str = "cera", is_compiled: bool = False
    ) -> None:
        # Only here, since memory is compared.
        from cera_train.runs.folder import RunFolder
        from cera_train.training.resolve import resolve
        from cera_train.training.train import build_parts

        config = compose(
            f"model.path={base}",
            f"model.dtype={str(work.dtype).removeprefix('torch.')}",
            f"model.quantization={work.quantization}",
            f"adapter={kind}",
            f"adapter.r={work.rank}",
            f"adapter.alpha={work.alpha}",
            f"adapter.dropout={DROPOUT}",
            f"adapter.target_modules={work.targets}",
            f"data.train_files=[{file}]",
            "data.eval_rows=1",
            f"data.max_length={work.max_length}",
            "data.allow_overlap=true",
            f"optimizer.lr={LEARNING_RATE}",
            f"train.micro_batch_tokens={work.micro_batch_tokens}",
            f"train.compile={is_compiled}",
        )
        path = Path(tempfile.mkdtemp())
        config = resolve(config, path).config
        _, self.ours, _, _, self.objective = build_parts(config, RunFolder(path))
        device = self.ours.accelerator.device.type
        assert device == work.device, "WITHOUT_GPUS came too late"
        self.ours.wrapped.train()

    def update(self, rows: Sequence[int]) -> int:
        from cera_train.training.train import backward

        ours = self.ours
        if refused := ours.language_model.allowed.refused:
            raise RuntimeError(f"it fell back: {'; '.join(refused)}")
        drawn = self.objective.draw(list(rows))
        backward(ours, drawn)
        ours.accelerator.clip_grad_norm_(ours.trained, 1.0)
        ours.optimizer.step()
        ours.optimizer.zero_grad()
        return sum(drawn.batches.supervised[row] for row in rows)


CONTESTANTS: dict[str, Callable] = {
    "published protocol": Published,
    "TRL + LoRA, defaults": Trl,
    "TRL + LoRA, best": partial(Trl, is_tuned=True),
    "ours with LoRA": partial(Ours, kind="lora"),
    "ours with CeRA": Ours,
    "ours with CeRA, compiled": partial(Ours, is_compiled=True),
}
"""Builders of each from its work, a folder with model and tokenizer, and a file of rows with
`prompt` and `completion`. Its method `update` makes an update on rows, and returns the tokens that
it supervised."""
