"""What a user can choose: the words of a command line, each named as often as people take it. A row
takes one choice of every factor."""

from cera_train.common.files import options

EVERYDAY = {"adapter=cera": 4, "adapter=lora": 4, "adapter=dora": 2, "adapter=full": 2}

METHODS = "C3A DELORA FOURIERFT GRALORA IA3 LN_TUNING LOHA LOKR OFT ROAD VERA WAVEFT"
"""Of PEFT, beside those of conf/adapter, that `all-linear` takes."""

ADAPTERS = [f"adapter={name}" for name in options("adapter") if name != "peft"]
ADAPTERS += [f"adapter=peft adapter.method={name}" for name in METHODS.split()]

FACTORS: dict[str, dict[str, int]] = {
    "model": {
        "model.path=llama": 5,
        "model.path=tied": 2,
        "model.path=moe": 2,
        "model.path=mamba": 1,
    },
    "adapter": {adapter: EVERYDAY.get(adapter, 1) for adapter in ADAPTERS},
    "targets": {
        "": 3,
        "adapter.target_modules=[q_proj,v_proj]": 1,
        "adapter.experts=true": 1,
    },
    "rows": {
        "data=jsonl data.train_files=[columns.jsonl]": 2,
        "data=jsonl data.train_files=[chats.jsonl]": 2,
        "data=jsonl data.train_files=[tools.jsonl]": 1,
        "data=jsonl data.train_files=[texts.jsonl]": 1,
        "data=preferences data.train_files=[preferences.jsonl] train.objective=dpo": 1,
        "data=logistic_map": 1,
        "data=dates": 1,
        "data=jsonl data.path=hub data.layout=text data.streaming=true data.train_rows=30": 1,
        "data=jsonl data.mix=[{train_files:[columns.jsonl],weight:2},"
        "{train_files:[chats.jsonl],weight:1}]": 1,
    },
    "chat": {"": 2, "data.chat=plain": 1, "data.chat=template": 1},
    "loss_on": {"": 3, "data.loss_on=all": 1},
    "objective": {"": 5, "train.objective=grpo grpo.answers=2 grpo.max_new_tokens=4": 1},
    "dtype": {"model.dtype=float32": 3, "model.dtype=bfloat16": 1, "": 1},
    "quantisation": {"": 4, "model.quantization=nf4": 1},
    "micro-batches": {"": 1, "train.micro_batch_tokens=300": 1},
    "checkpointing": {"": 3, "model.gradient_checkpointing=true": 1},
    "compile": {"": 19, "train.compile=true": 1},
    "optimizer": {"": 3, "optimizer=adamw_8bit": 1, "optimizer=paged_adamw_8bit": 1},
    "schedule": {
        "": 2,
        "optimizer.schedule=cosine optimizer.warmup_ratio=0.1": 1,
        "optimizer.schedule=constant": 1,
    },
    "dropout": {"": 2, "adapter.dropout=0.1": 1},
    "start": {"": 4, "adapter.start_from={life}/start": 1},
    "tasks": {
        "": 2,
        "train.tasks=[held_out] train.task_settings={held_out:{max_new_tokens:8}}": 1,
        "train.tasks=[logistic_map] train.tasks_every=3 train.tasks_limit=2": 1,
    },
    "samples": {
        "": 1,
        "train.samples=2 train.tasks=[held_out] "
        "train.task_settings={held_out:{max_new_tokens:8}}": 1,
    },
    "tracker": {"": 4, "tracker=tensorboard": 1, "tracker=wandb": 1},
    "processes": {
        "": 16,
        "launch.processes=2": 1,
        "launch.processes=2 distributed.strategy=fsdp": 1,
    },
    "killed": {
        "update 1": 1,
        "update 5": 2,
        "evaluation 3": 1,
        "evaluation 6": 1,
        "SIGTERM 4": 1,
    },
    "export": {"": 2, "to=merged": 1},
}
