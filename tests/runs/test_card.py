"""The model card of a run."""

from huggingface_hub import ModelCard
from tiny_runs import folder_of, run_card


def test_the_card_has_the_method_the_rows_and_the_perplexity_and_its_code_loads(finished_config):
    adapter = folder_of(finished_config) / "adapter"
    card = ModelCard.load(adapter / "README.md")
    for name in ("Method", "Base model", "Rows", "Perplexity"):
        assert f"\n| {name} | " in card.content
    model = run_card(adapter)["model"]
    assert any("cera_A" in name for name, _ in model.named_parameters())
