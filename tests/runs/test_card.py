"""The model card of a run."""

from huggingface_hub import ModelCard
from tiny_runs import folder_of


def test_the_card_has_the_method_the_rows_and_the_perplexity(finished_config):
    card = ModelCard.load(folder_of(finished_config) / "adapter" / "README.md")
    for name in ("Method", "Base model", "Rows", "Perplexity"):
        assert f"\n| {name} | " in card.content
