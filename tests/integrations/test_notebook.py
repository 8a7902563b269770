"""docs/notebook.ipynb runs from top to bottom, and shows what it prints. To write that again:
`jupyter execute --inplace docs/notebook.ipynb`, and take the warnings out."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import needs_smollm2

NOTEBOOK = Path(__file__).resolve().parents[2] / "docs" / "notebook.ipynb"


def shown(notebook: dict) -> list[tuple[str, int]]:
    """What each cell printed, without its numbers, and how many pictures it drew. Which warnings there are depends on
    what is installed."""
    cells = [cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code"]
    printed = [[output["text"] for output in outputs if output.get("name") == "stdout"] for outputs in cells]
    drawn = [sum("image/png" in output.get("data", {}) for output in outputs) for outputs in cells]
    texts = ["".join("".join(text) for text in texts) for texts in printed]
    return [(re.sub(r"\d+(\.\d+)?", "#", text), pictures) for text, pictures in zip(texts, drawn, strict=True)]


@pytest.mark.slow
@needs_smollm2
@pytest.mark.filterwarnings("default")  # Jupyter's, of its event loop
def test_the_notebook_prints_what_it_shows(tmp_path):
    """Its last cell compares the answers of the adapter, loaded, with those of the one that was saved."""
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    expected = shown(notebook)
    nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    assert shown(notebook) == expected
    assert (tmp_path / "outputs/capitals/adapter_model.safetensors").exists()
