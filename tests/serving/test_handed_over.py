"""The LoRA of `cera-export` in other hands: vLLM without the plugin, and llama.cpp's converter. `make test-serving`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("vllm")
pytestmark = pytest.mark.serving

from peft import PeftModel  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from served import BASE, greedy, run_engine, save_base  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from cera_train.serving.export import export  # noqa: E402
from cera_train.training.train import train  # noqa: E402

LLAMA_CPP = Path(sys.prefix) / "llama.cpp"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A base model."""
    return save_base(tmp_path_factory.mktemp("handed_over"), tokenizer)


@pytest.fixture(scope="module")
def exported(compose, folder) -> Path:
    """The LoRA of a short run, whose branches were made to matter."""
    config = compose(
        *(f"model.path={folder / BASE}", "model.dtype=float32", "data.max_length=256", "adapter.r=8"),
        *("adapter.target_modules=all-linear", "train.max_updates=1", "name=run", f"output_dir={folder}"),
    )
    run = Path(train(config)["folder"])
    weights = run / "adapter" / "adapter_model.safetensors"
    save_file({name: torch.randn_like(tensor) * 0.3 for name, tensor in load_file(weights).items()}, weights)
    export(compose(f"run={run}", "tolerance=100", command="export"))
    return run / "export_lora"


def test_vllm_serves_the_export_without_the_plugin(folder, exported, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(folder / BASE, dtype=torch.float32).eval()
    wanted = {"has plugin": False, "base": [tokens for tokens, _ in greedy(base)]}
    wanted["lora"] = [tokens for tokens, _ in greedy(PeftModel.from_pretrained(base, exported).eval())]
    answers = run_engine(tmp_path / "engine.py", folder, {"base": "", "lora": str(exported)}, plugins=False)
    assert answers == wanted
    assert wanted["base"] != wanted["lora"]


@pytest.mark.skipif(not LLAMA_CPP.is_dir(), reason=f"llama.cpp's converter is not at {LLAMA_CPP}: make test-serving")
def test_llama_cpp_converts_the_export(folder, exported, tmp_path):
    import gguf

    file = tmp_path / "lora.gguf"
    done = subprocess.run(
        [sys.executable, LLAMA_CPP / "convert_lora_to_gguf.py", exported, "--base", folder / BASE, "--outfile", file],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    reader = gguf.GGUFReader(file)
    found = {name: reader.get_field(name).contents() for name in ("general.type", "adapter.type", "adapter.lora.alpha")}
    assert found == {"general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8}

    written = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    weights = load_file(exported / "adapter_model.safetensors")
    assert len(written) == len(weights) == 2 * 7 * 2
    layers = "base_model.model.model.layers"
    for ours, theirs in (("self_attn.v_proj", "attn_v"), ("mlp.down_proj", "ffn_down"), ("mlp.gate_proj", "ffn_gate")):
        for number in range(2):
            for part in ("A", "B"):
                tensor = written[f"blk.{number}.{theirs}.weight.lora_{part.lower()}"]
                torch.testing.assert_close(tensor, weights[f"{layers}.{number}.{ours}.lora_{part}.weight"])
