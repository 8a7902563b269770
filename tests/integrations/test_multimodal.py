"""Models that also take images train on text: their language model alone, or the whole model
without branches in its vision tower."""

import pytest
import torch
from evaluated_runs import export
from safetensors.torch import load_file
from tiny_runs import folder_of, run_card
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    Mistral3ForConditionalGeneration,
)

from benchmarks.tiny_models import shrunk
from cera_train.model.weights import load_model
from cera_train.settings.model import Dtype, ModelConfig
from cera_train.training.train import train

IDS = torch.arange(5, 21).view(2, 8)


@pytest.fixture
def folder_with(tmp_path, tokenizer):
    """folder_with("mistral3") -> (model, its folder), as its publisher saves it."""

    def folder_with(model_type: str):
        torch.manual_seed(0)
        config = shrunk(CONFIG_MAPPING[model_type](), {})
        model = AutoModelForImageTextToText.from_config(config).eval()
        model.save_pretrained(tmp_path / model_type)
        tokenizer.save_pretrained(tmp_path / model_type)
        return model, tmp_path / model_type

    return folder_with


@pytest.mark.parametrize("model_type", ["mistral3", "qwen3_5"])
def test_the_text_of_a_multimodal_model_gets_the_logits_of_the_whole(folder_with, model_type):
    model, folder = folder_with(model_type)
    base = load_model(ModelConfig(str(folder), dtype=Dtype.float32), torch.device("cpu"))
    with torch.no_grad():
        torch.testing.assert_close(base(input_ids=IDS).logits, model(input_ids=IDS).logits)


@pytest.mark.parametrize(
    "targets", ["all-linear", pytest.param("[q_proj,v_proj]", marks=pytest.mark.slow)]
)
def test_no_branch_goes_into_the_vision_tower_and_every_form_loads(
    folder_with, tiny_config, targets
):
    """As does the code of the cards, although the model has no causal class."""
    _, folder = folder_with("mistral3")
    adapter = ("adapter=lora", "adapter.r=4", f"adapter.target_modules={targets}")
    config = tiny_config(f"model.path={folder}", *adapter, "train.max_updates=1")
    train(config)
    run = folder_of(config)
    names = load_file(run / "adapter" / "adapter_model.safetensors")
    assert names
    assert all(".language_model." in name for name in names)
    for form in (f"check={run / 'adapter'}", "to=merged"):
        assert export(run, form, "rows=2").holds
    adapted = run_card(run / "adapter")["model"].get_base_model()
    merged = Mistral3ForConditionalGeneration.from_pretrained(run / "export_merged")
    assert type(adapted) is type(merged) is Mistral3ForConditionalGeneration
