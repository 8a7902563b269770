"""CeRA under the usual trainers, unchanged: transformers' Trainer and those of TRL."""

from pathlib import Path

import pytest
import torch
from cera_models import WARNINGS, logits
from datasets import Dataset
from peft import AutoPeftModelForCausalLM, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, Trainer, TrainerState, TrainingArguments

from cera_train.adapters.saved import attach
from cera_train.cera import CeraConfig

pytestmark = WARNINGS

CONFIG = {"r": 4, "dropout": 0.2, "task_type": "CAUSAL_LM"}
ROWS = [f"Question: what is the next value?\nAnswer: it is 0.{number}" for number in range(16)]


def arguments(folder: Path) -> dict:
    return {
        "output_dir": str(folder),
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 4,
        "seed": 7,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }


@pytest.fixture
def ids(tokenizer) -> torch.Tensor:
    rows = tokenizer(ROWS, padding=True, return_tensors="pt").input_ids
    assert len(rows) == 16
    return rows


def tensors(model: nn.Module, adapter: bool) -> dict[str, torch.Tensor]:
    return {
        key: value.clone()
        for key, value in model.state_dict().items()
        if ("cera_" in key) is adapter
    }


def plain(tiny_folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)


def assert_the_adapter_alone_moved(model: PeftModel, base: nn.Module) -> None:
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == set(
        tensors(model, adapter=True)
    )
    for name, value in tensors(model, adapter=True).items():
        assert value.abs().max() > 0, name  # B has left zero
        assert value.isfinite().all(), name
    expected = base.state_dict()
    for name, value in tensors(model, adapter=False).items():
        assert torch.equal(
            value, expected[name.removeprefix("base_model.model.").replace(".base_layer", "")]
        ), name


def trainer_of(folder: Path, tiny_folder: Path, ids: torch.Tensor) -> Trainer:
    torch.manual_seed(1)
    model = get_peft_model(plain(tiny_folder), CeraConfig(**CONFIG))
    rows = [{"input_ids": row, "labels": row} for row in ids]
    settings = TrainingArguments(**arguments(folder), gradient_accumulation_steps=2)
    return Trainer(model=model, args=settings, train_dataset=rows)


def test_transformers_trainer_trains_saves_and_resumes_to_the_bit(tiny_folder, tmp_path, ids):
    trainer = trainer_of(tmp_path / "run", tiny_folder, ids)
    start = tensors(trainer.model, adapter=True)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert_the_adapter_alone_moved(trainer.model, plain(tiny_folder))
    end = tensors(trainer.model, adapter=True)
    assert not any(torch.equal(end[key], value) for key, value in start.items())

    resumed = trainer_of(tmp_path / "run", tiny_folder, ids)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run/checkpoint-2"))
    assert resumed.state.global_step == 4
    assert all(
        torch.equal(value, end[key]) for key, value in tensors(resumed.model, adapter=True).items()
    )


TRL_ROWS = {
    "SFT": [{"text": row} for row in ROWS],
    "DPO": [{"prompt": row[:-3], "chosen": row[-3:], "rejected": " no"} for row in ROWS],
    "GRPO": [{"prompt": row[:-3]} for row in ROWS],
}


def count_letters(completions: list[str], trainer_state: TrainerState, **_: object) -> list[float]:
    """GRPO's reward. In the first update all answers get the same, so that no gradient is left."""
    return [
        float(trainer_state.global_step and sum(letter.isalpha() for letter in text))
        for text in completions
    ]


@pytest.mark.parametrize(
    "name",
    [
        "SFT",
        pytest.param("DPO", marks=pytest.mark.slow),
        pytest.param("GRPO", marks=pytest.mark.slow),
    ],
)
def test_trls_trainers_train_from_a_cera_config_and_save(
    tiny_folder, tmp_path, tokenizer, ids, name
):
    trl = pytest.importorskip("trl")
    settings = arguments(tmp_path / "run")
    if name == "GRPO":
        settings |= {"num_generations": 4, "max_completion_length": 4}
    trainer = getattr(trl, f"{name}Trainer")(
        model=plain(tiny_folder),
        args=getattr(trl, f"{name}Config")(**settings),
        train_dataset=Dataset.from_list(TRL_ROWS[name]),
        processing_class=tokenizer,
        peft_config=CeraConfig(**CONFIG),
        **({"reward_funcs": count_letters} if name == "GRPO" else {}),
    )
    assert isinstance(trainer.model, PeftModel)
    # B starts at zero
    assert torch.equal(logits(trainer.model.eval(), ids), logits(plain(tiny_folder), ids))
    trainer.train()
    assert_the_adapter_alone_moved(trainer.model, plain(tiny_folder))

    checkpoint = tmp_path / "run/checkpoint-4"
    expected = logits(trainer.model.eval(), ids)
    assert not torch.equal(expected, logits(plain(tiny_folder), ids))
    assert torch.equal(
        logits(PeftModel.from_pretrained(plain(tiny_folder), checkpoint), ids), expected
    )
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(checkpoint), ids), expected)


def test_an_adapter_saved_without_task_type_is_attached(tiny_folder, tmp_path, ids):
    """PEFT then writes an auto_mapping, the base's class."""
    model = get_peft_model(plain(tiny_folder), CeraConfig(r=4, init_weights=False))
    model.save_pretrained(tmp_path)
    assert (
        '"base_model_class": "LlamaForCausalLM"' in (tmp_path / "adapter_config.json").read_text()
    )
    assert torch.equal(logits(attach(plain(tiny_folder), tmp_path), ids), logits(model, ids))
