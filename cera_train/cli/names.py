"""Suggestions for a setting that does not exist: the field's usual names for what we call otherwise, then the nearest
spelling."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

TABLE = """
adapter=NAME               peft_type peft_method use_dora use_rslora
adapter.r                  rank lora_r lora_rank lora_dim r
adapter.alpha              lora_alpha scaling scale
adapter.dropout            lora_dropout dropout_rate
adapter.activation         gate act nonlinearity activation_function
adapter.init               init_lora_weights init_weights lora_init
adapter.target_modules     lora_target lora_target_modules lora_modules targets
adapter.layers             layers_to_transform lora_layers
data=NAME                  dataset dataset_name datasets
data.mix                   dataset_mixer dataset_mixture dataset_weights mixture interleave_probs data_mix
                           concat_sampling_probabilities
data.max_length            max_seq_length max_seq_len seq_length seq_len sequence_length sequence_len block_size
                           cutoff_len context_length model_max_length max_len
data.prompt                template prompt_template
data.train_files           train_file train_data train_path data_path data_files dataset_path
data.eval_files            eval_file validation_file validation_files val_files eval_data valid_data
data.train_rows            max_train_samples max_samples num_train_samples
data.eval_rows             max_eval_samples val_set_size val_size num_eval_samples
generation.samples         num_samples num_return_sequences n_samples
generation.batch_tokens    per_device_eval_batch_size eval_batch_size
launch.processes           num_processes nproc nproc_per_node num_gpus gpus n_gpus devices world_size
distributed.strategy       fsdp deepspeed ddp sharding
model.path                 model_name_or_path model_name model_id base_model pretrained checkpoint model_path
model.dtype                torch_dtype precision mixed_precision bf16 fp16 float16 bfloat16
model.quantization         load_in_4bit load_in_8bit quantize quant bits qlora
model.attn_implementation  flash_attn use_flash_attn flash_attention use_flash_attention_2
model.gradient_checkpointing
                           activation_checkpointing use_gradient_checkpointing grad_checkpointing
name                       run_name experiment experiment_name exp_name run_id job_name
output_dir                 out_dir out output output_path save_dir logging_dir log_dir
optimizer=NAME             optim optimizer_name optimizer_type
optimizer.lr               learning_rate base_lr max_lr peak_lr step_size lr_rate
optimizer.schedule         scheduler lr_scheduler lr_scheduler_type lr_schedule decay
optimizer.warmup_ratio     warmup warmup_steps num_warmup_steps warmup_updates warmup_iters
optimizer.weight_decay     wd l2
optimizer.max_grad_norm    grad_clip clip_grad gradient_clip_val gradient_clipping clip_norm
optimizer.beta1            adam_beta1 betas
optimizer.beta2            adam_beta2
optimizer.eps              adam_epsilon epsilon adam_eps
task=NAME                  benchmark benchmarks
task.limit                 max_problems num_problems limit_examples
tracker=NAME               report_to logger wandb tensorboard log_with use_wandb
tracker.project            wandb_project project_name
train.batch_size           bs train_batch_size global_batch_size total_batch_size batch
train.micro_batch_tokens   per_device_train_batch_size micro_batch_size per_device_batch_size device_batch_size
                           gradient_accumulation_steps grad_accum grad_accumulation_steps accumulation_steps
train.epochs               num_epochs num_train_epochs n_epochs max_epochs epoch
train.max_updates          max_steps num_steps steps total_steps train_steps num_training_steps iters max_iters
                           iterations updates
train.eval_every           eval_steps eval_interval evaluation_steps eval_freq val_check_interval
train.save_every           save_steps save_interval checkpoint_every checkpoint_interval save_freq
train.keep                 save_total_limit keep_checkpoints
train.patience             early_stopping_patience early_stopping
train.resume               resume_from_checkpoint resume_from
train.compile              torch_compile use_compile
train.seed                 random_seed random_state
"""
"""What Transformers, PEFT, TRL, axolotl, nanochat and others call a setting of ours, compared without its section."""

ROWS = [row.split() for row in re.split(r"\n(?=\S)", TABLE.strip())]
USUAL_NAMES = {ours: usual for ours, *usual in ROWS}
OURS = {usual: ours for ours, names in USUAL_NAMES.items() for usual in names}

NOTES = {
    "train.micro_batch_tokens": (
        "train.batch_size counts the sequences of a whole update; train.micro_batch_tokens bounds what is in memory at "
        "once, and accumulation follows from both. "
    ),
    "optimizer.warmup_ratio": "It is a share of all updates. ",
}


def did_you_mean(key: str, known: Iterable[str]) -> str:
    """`Did you mean optimizer.lr? ` with a trailing space; empty where nothing that is known is near."""
    section, _, last = key.rpartition(".")
    ours = OURS.get(last.lower().replace("-", "_"), "")
    parts = {other: other.rpartition(".") for other in known}
    same = [other for other, part in parts.items() if part[2] == last]
    if ours.partition("=")[0] in parts and all(other.count(".") > 1 for other in same):
        return f"Did you mean {ours}? {NOTES.get(ours, '')}"
    siblings = {part[2]: other for other, part in parts.items() if part[0] == section}
    anywhere = {part[2]: other for other, part in parts.items()} if not section else {}
    whole = {other: other for other in parts}
    near: list[str] = []
    for word, names, count, cutoff in (
        *((last, siblings, 1, 0.8), (last, siblings, 2, 0.6)),
        *((last, anywhere, 1, 0.8), (key, whole, 2, 0.8)),
    ):
        near = near or [names[name] for name in difflib.get_close_matches(word, names, n=count, cutoff=cutoff)]
    near = list(dict.fromkeys(same + near))
    return f"Did you mean {' or '.join(near[:3])}? " if near else ""
