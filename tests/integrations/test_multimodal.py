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


@pytest.mark.parametrize("targets", ["[q_proj,v_proj]", "all-linear"])
def test_no_branch_goes_into_the_vision_tower(folder_with, tiny_config, targets):
    _, folder = folder_with("mistral3")
    config = tiny_config(
        f"model.path={folder}", f"adapter.target_modules={targets}", "train.max_updates=1"
    )
    train(config)
    names = load_file(folder_of(config) / "adapter" / "adapter_model.safetensors")
    assert names
    assert all(".language_model." in name for name in names)


def test_an_export_of_a_model_without_a_causal_class_loads(folder_with, tiny_config, compose):
    _, folder = folder_with("mistral3")
    config = tiny_config(f"model.path={folder}", "train.max_updates=1")
    train(config)
    run = folder_of(config)
    export(compose(f"run={run}", "to=merged", "rows=2", "at_most=100", command="export"))
    adapted = run_card(run / "adapter")["model"].get_base_model()
    merged = Mistral3ForConditionalGeneration.from_pretrained(run / "export_merged")
    assert type(adapted) is type(merged) is Mistral3ForConditionalGeneration
