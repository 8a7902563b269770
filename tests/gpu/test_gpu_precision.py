"""Bases of 4, 8 and 16 bits and 8-bit optimizers as a GPU computes them: runs learn, answer and resume."""

import math

import bitsandbytes
import pytest
from accelerate.state import AcceleratorState
from conftest import make_tiny_llama
from oracles import assert_nf4_gradients_are_right
from tiny_runs import adapter_bytes, folder_of, losses_of, train_and_die_after

from cera_train.training.train import train

pytest_plugins = ["gpu_tests"]
pytestmark = pytest.mark.gpu


@pytest.fixture
def large(tmp_path, tokenizer) -> list[str]:
    """Settings of a run whose A and B have more than the 100,000 numbers from which bitsandbytes pages moments."""
    folder = tmp_path / "large"
    make_tiny_llama(len(tokenizer), hidden_size=512, initializer_range=0.02).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [f"model.path={folder}", "adapter.r=256", "adapter.target_modules=[q_proj]", "optimizer.lr=1e-3"]


@pytest.mark.parametrize("base", ["nf4", "int8", "none"])
def test_a_run_on_every_base_learns_and_answers(tiny_config, device, bf16, base):
    settings = [f"model.quantization={base}", "model.dtype=bfloat16", "train.samples=2", "train.max_updates=24"]
    config = tiny_config(*settings, "adapter.target_modules=all-linear")
    result = train(config)
    assert math.isfinite(result["eval/perplexity"])
    assert result["eval/perplexity"] < 0.9 * result["perplexity_before"]
    assert (folder_of(config) / "samples.jsonl").read_text().count('"answer"') >= 4


def test_nf4_gradients_are_those_of_the_dequantised_weights(tiny_folder, device, bf16):
    assert_nf4_gradients_are_right(tiny_folder, device)


@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_a_quantised_run_resumes_where_it_was(tiny_config, device, bf16, base):
    settings = [f"model.quantization={base}", "model.dtype=bfloat16"]
    whole, cut = tiny_config("name=whole", *settings), tiny_config("name=cut", *settings)
    train(whole)
    train_and_die_after(cut, 7)
    train(cut)
    assert losses_of(cut) == pytest.approx(losses_of(whole), rel=1e-3)


def test_float16_runs_under_a_scaler_and_resumes(tiny_config, device):
    whole, cut = (tiny_config(f"name={name}", "model.dtype=float16") for name in ("whole", "cut"))
    result = train(whole)
    assert AcceleratorState().mixed_precision == ("fp16" if device.type == "cuda" else "no")
    assert result["eval/perplexity"] < result["perplexity_before"]
    train_and_die_after(cut, 7)
    train(cut)
    assert losses_of(cut) == pytest.approx(losses_of(whole), rel=1e-3)


def test_paged_moments_are_paged_and_a_run_resumes_with_them(tiny_config, large, monkeypatch, cuda):
    settings = ["optimizer=paged_adamw_8bit", *large]
    whole, cut = tiny_config("name=whole", *settings), tiny_config("name=cut", *settings)
    pages = []
    step = bitsandbytes.optim.PagedAdamW8bit.step

    def watched(self, *arguments):
        result = step(self, *arguments)
        pages.append(any(getattr(moments["state1"], "is_paged", False) for moments in self.state.values()))
        return result

    with monkeypatch.context() as patch:
        patch.setattr(bitsandbytes.optim.PagedAdamW8bit, "step", watched)
        train(whole)
    assert all(pages)
    plain = tiny_config("name=plain", "optimizer=adamw_8bit", *large)
    train(plain)
    assert losses_of(whole) == pytest.approx(losses_of(plain), rel=1e-3)
    train_and_die_after(cut, 7)
    train(cut)
    assert adapter_bytes(cut) == adapter_bytes(whole)
