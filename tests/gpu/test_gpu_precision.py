"""Bases of 4 and 16 bits and 8-bit optimizers as a GPU computes them: runs learn, answer and
resume."""

import bitsandbytes
import pytest
from accelerate.state import AcceleratorState
from conftest import make_tiny_llama
from oracles import assert_nf4_gradients_are_right
from tiny_runs import assert_resumes_to_the_byte, folder_of, losses_of, train_and_die_after

from cera_train.training.train import train

pytestmark = pytest.mark.gpu


@pytest.fixture
def large(tmp_path, tokenizer) -> list[str]:
    """Settings of a run whose A and B have more than the 100,000 numbers from which bitsandbytes
    pages moments."""
    folder = tmp_path / "large"
    make_tiny_llama(len(tokenizer), hidden_size=512, initializer_range=0.02).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return [
        f"model.path={folder}",
        "adapter.r=256",
        "adapter.target_modules=[q_proj]",
        "optimizer.lr=1e-3",
    ]


@pytest.mark.parametrize(
    "settings",
    [
        ["model.quantization=nf4"],
        [],
        ["model.dtype=float16"],
        ["model.quantization=nf4", "model.dtype=float16"],
    ],
    ids=str,
)
def test_a_run_in_every_precision_learns_answers_and_resumes(tiny_config, device, bf16, settings):
    settings = [
        "model.dtype=bfloat16",
        "train.samples=2",
        "train.tasks=[held_out]",
        "train.tasks_limit=2",
        "train.task_settings={held_out: {max_new_tokens: 8}}",
        "adapter.target_modules=all-linear",
        *settings,
    ]
    whole = tiny_config("name=whole", *settings)
    cut = tiny_config("name=cut", *settings)
    result = train(whole)
    assert result["eval/perplexity"] < 0.9 * result["perplexity_before"]
    assert (folder_of(whole) / "samples.jsonl").read_text().count('"answer"') >= 4
    has_scaler = device.type == "cuda" and "model.dtype=float16" in settings
    assert (AcceleratorState().mixed_precision == "fp16") == has_scaler
    train_and_die_after(cut, 7)
    train(cut)
    assert losses_of(cut) == pytest.approx(losses_of(whole), rel=1e-3)


def test_nf4_gradients_are_those_of_the_dequantised_weights(tiny_folder, device, bf16):
    assert_nf4_gradients_are_right(tiny_folder, device)


def test_paged_moments_are_paged_and_a_run_resumes_with_them(
    tiny_config, large, monkeypatch, device
):
    if device.type != "cuda":
        pytest.skip("a CPU has no such thing")
    settings = ["optimizer=paged_adamw_8bit", *large]
    pages = []
    step = bitsandbytes.optim.PagedAdamW8bit.step

    def watched(self, *arguments):
        result = step(self, *arguments)
        pages.append(
            any(getattr(moments["state1"], "is_paged", False) for moments in self.state.values())
        )
        return result

    monkeypatch.setattr(bitsandbytes.optim.PagedAdamW8bit, "step", watched)
    paged = assert_resumes_to_the_byte(tiny_config, *settings)
    assert all(pages)
    plain = tiny_config("name=plain", "optimizer=adamw_8bit", *large)
    train(plain)
    assert losses_of(paged) == pytest.approx(losses_of(plain), rel=1e-3)
