"""Ways to fine-tune the same base on the same rows: the published protocol, TRL with PEFT, and ours. Each makes one
optimiser update on the rows it is given, supervising the answers and nothing else."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

PROMPT, COMPLETION = "Question: {question}\nAnswer:", " {answer}"
RANK, DROPOUT, LEARNING_RATE = 64, 0.1, 3e-4
TARGETS = ["q_proj", "v_proj"]


class Contestant:
    """Built once, in a process of its own.

    Args:
        base: a folder with model and tokenizer.
        file: jsonl rows with `question` and `answer`.
        rows: the same, read.
        dtype: of the base's weights.
    """

    def __init__(self, base: str, file: Path, rows: Sequence[dict[str, str]], dtype: torch.dtype) -> None:
        raise NotImplementedError

    def update(self, rows: Sequence[int]) -> None:
        """One update on these rows."""
        raise NotImplementedError


class Published(Contestant):
    """The protocol of the published runs: CeRA as two linears and a dropout beside each projection, sequences padded to
    512, gradient checkpointing, the loss on the logits of every position, micro-batches of 4."""

    LENGTH, MICRO_BATCH = 512, 4

    def __init__(self, base: str, file: Path, rows: Sequence[dict[str, str]], dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype).requires_grad_(False)
        for layer in self.model.model.layers:
            for name in TARGETS:
                setattr(layer.self_attn, name, PublishedBranch(getattr(layer.self_attn, name)))
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LEARNING_RATE)
        self.batches = [self._padded(row, tokenizer) for row in rows]

    def _padded(self, row: dict[str, str], tokenizer: Any) -> tuple[list[int], list[int], list[int]]:
        prompt = tokenizer(PROMPT.format(**row), add_special_tokens=False).input_ids
        completion = [*tokenizer(COMPLETION.format(**row), add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = [*prompt, *completion][: self.LENGTH]
        padding = self.LENGTH - len(ids)
        labels = [*[-100] * len(prompt), *completion][: self.LENGTH]
        return (
            ids + [tokenizer.eos_token_id] * padding,
            [1] * len(ids) + [0] * padding,
            labels + [-100] * padding,
        )

    def update(self, rows: Sequence[int]) -> None:
        for start in range(0, len(rows), self.MICRO_BATCH):
            columns = zip(*(self.batches[row] for row in rows[start : start + self.MICRO_BATCH]), strict=True)
            ids, mask, labels = (torch.tensor(column) for column in columns)
            with self.autocast:
                loss = self.model(input_ids=ids, attention_mask=mask, labels=labels).loss
            (loss / (len(rows) / self.MICRO_BATCH)).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


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
    """TRL's SFTTrainer with PEFT's LoRA, its defaults: the trainer's own collator, loss, step and optimizer."""

    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, base: str, file: Path, rows: Sequence[dict[str, str]], dtype: torch.dtype) -> None:
        import datasets
        import peft
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from trl import SFTConfig, SFTTrainer

        self.folder = tempfile.TemporaryDirectory()
        self.trainer = SFTTrainer(
            AutoModelForCausalLM.from_pretrained(base, dtype=dtype),
            SFTConfig(
                self.folder.name,
                use_cpu=True,
                bf16=dtype == torch.bfloat16,
                report_to=[],
                disable_tqdm=True,
                learning_rate=LEARNING_RATE,
                **self.settings,
            ),
            processing_class=AutoTokenizer.from_pretrained(base),
            train_dataset=datasets.Dataset.from_list(
                [{"prompt": PROMPT.format(**row), "completion": COMPLETION.format(**row)} for row in rows]
            ),
            peft_config=peft.LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=DROPOUT, target_modules=TARGETS),
        )
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1  # which its own loop over batches sets
        self.model = self.trainer.accelerator.prepare(self.trainer.model)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def update(self, rows: Sequence[int]) -> None:
        columns = self.trainer._signature_columns or ["input_ids", "completion_mask"]
        examples = [
            {name: value for name, value in self.trainer.train_dataset[row].items() if name in columns} for row in rows
        ]
        batch = self.trainer.data_collator(examples)
        self.trainer.training_step(self.model, batch)
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.trainer.optimizer.step()
        self.trainer.optimizer.zero_grad()


class TunedTrl(Trl):
    """The same with its best settings on a CPU: nothing recomputed. Its own loss is in chunks already. Without flash
    attention, its packing and padding-free batches put a T x T mask over a row, which takes longer than the padding."""

    settings: ClassVar[dict[str, Any]] = {"gradient_checkpointing": False}


class Ours(Contestant):
    """An update of cera-train, as its loop makes it."""

    kind = "cera"
    is_compiled = False
    MICRO_BATCH_TOKENS = 1024

    def __init__(self, base: str, file: Path, rows: Sequence[dict[str, str]], dtype: torch.dtype) -> None:
        from cera_train.config import (
            AdapterConfig,
            AdapterKind,
            BatchLayout,
            DataConfig,
            Dtype,
            ModelConfig,
            OptimizerConfig,
        )
        from cera_train.data import prepare_data
        from cera_train.data.batches import MicroBatches
        from cera_train.loss import SupervisedLoss, choose_layout
        from cera_train.model import add_adapter, load_model, load_tokenizer
        from cera_train.optimizer import build_optimizer

        model_config = ModelConfig(path=base, dtype=Dtype(str(dtype).removeprefix("torch.")))
        data_config = DataConfig(
            train_files=[str(file)], eval_rows=1, prompt=PROMPT, completion=COMPLETION, allow_overlap=True
        )
        device = torch.device("cpu")
        model = load_model(model_config, device)
        adapted = add_adapter(model, AdapterConfig(AdapterKind(self.kind), RANK, dropout=DROPOUT))
        self.loss = SupervisedLoss(
            adapted, model, lambda: torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)
        )
        is_flat = choose_layout(BatchLayout.auto, self.loss, device) == BatchLayout.flat
        if self.is_compiled:
            self.loss.compile_layers()
        self.loss.train()
        self.parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
        self.optimizer = build_optimizer(self.parameters, OptimizerConfig(lr=LEARNING_RATE), device)
        data = prepare_data(data_config, load_tokenizer(model_config))
        self.batches = MicroBatches(data.train, is_flat, self.MICRO_BATCH_TOKENS, device)

    def update(self, rows: Sequence[int]) -> None:
        supervised = sum(self.batches.supervised[row] for row in rows)
        for group, _ in self.batches.passes(rows, 1, 0, in_step=False):
            (self.loss(self.batches.load(group)) / supervised).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


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
