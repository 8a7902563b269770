"""Tiny random models in the layout of the Hub's cache, under the names that PEFT's tests load."""

import sys
from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers import AutoModelForSequenceClassification as AutoModelForClassification

SMALL = {
    "vocab_size": 1024,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA = SMALL | {"num_key_value_heads": 2}
BERT = SMALL | {"num_labels": 2, "initializer_range": 0.2}
GPT = {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}
GPT |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
BART = {
    "vocab_size": 1024,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "max_position_embeddings": 512,
}
BART |= {
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
}
T5 = {"vocab_size": 1024, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
T5 |= {"decoder_start_token_id": 0}
OPT = SMALL | {"ffn_dim": 64, "word_embed_proj_dim": 32}

MODELS = {
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("opt", AutoModelForCausalLM, OPT),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": ("gpt2", AutoModelForCausalLM, GPT),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "gptj",
        AutoModelForCausalLM,
        GPT | {"rotary_dim": 4},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("llama", AutoModelForCausalLM, LLAMA),
    "peft-internal-testing/tiny-dummy-qwen2": ("qwen2", AutoModelForCausalLM, LLAMA),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "gemma3_text",
        AutoModelForCausalLM,
        LLAMA | {"head_dim": 8},
    ),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": (
        "bert",
        AutoModelForClassification,
        BERT,
    ),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": (
        "roberta",
        AutoModelForClassification,
        BERT,
    ),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "llama",
        AutoModelForClassification,
        LLAMA,
    ),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": (
        "t5",
        AutoModelForSeq2SeqLM,
        T5,
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": (
        "bart",
        AutoModelForSeq2SeqLM,
        BART,
    ),
    "peft-internal-testing/tiny-random-BertModel": ("bert", AutoModel, BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("roberta", AutoModel, BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("deberta", AutoModel, BERT),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("deberta-v2", AutoModel, BERT),
}


def save(hub: Path) -> None:
    for name, (model_type, model_class, settings) in MODELS.items():
        torch.manual_seed(0)
        folder = hub / f"models--{name.replace('/', '--')}"
        commit = "0" * 40
        model_class.from_config(CONFIG_MAPPING[model_type](**settings)).save_pretrained(
            folder / "snapshots" / commit
        )
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text(commit)


if __name__ == "__main__":
    save(Path(sys.argv[1]))
