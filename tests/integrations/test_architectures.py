"""Every check of `make architectures` finds what docs/architectures.md says, for one type of each
mechanism in CI, for the others in `make test-nightly`."""

import pytest

from benchmarks.architectures import BUILT, CHECKS, PAGE, cell, cell_of
from benchmarks.cells import YES
from benchmarks.tiny_models import MODEL_TYPES

MECHANISMS = {
    "llama": "rotary positions",
    "gpt2": "learned positions, Conv1D",
    "gemma2": "windows and capped scores",
    "gemma3": "a vision tower",
    "gpt_oss": "sinks, experts with biases",
    "deepseek_v3": "latent attention",
    "deepseek_v4": "compressed attention, grouped projections",
    "jamba": "layers of several kinds",
    "qwen3_next": "a delta rule, shared experts",
    "rwkv": "a state without a cache",
}
COMPILED = ("llama",)
"""Compiled here too: it takes as long as all other checks."""

pytestmark = pytest.mark.filterwarnings("ignore")  # other libraries' of 196 types


def marks(model_type: str) -> list[pytest.MarkDecorator]:
    return [pytest.mark.slow if model_type in MECHANISMS else pytest.mark.nightly]


@pytest.mark.parametrize(
    "model_type", [pytest.param(name, marks=marks(name)) for name in MODEL_TYPES]
)
def test_the_page_says_what_the_checks_find(model_type):
    found = {BUILT: cell(model_type, BUILT)}
    if found[BUILT] == YES:
        checks = [name for name in CHECKS if name != "compiled" or model_type in COMPILED]
        found |= {name: cell(model_type, name) for name in checks}
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    tables = [[cell.strip() for cell in row.split("|")[1:-1]] for row in rows]
    assert [cell for names, cell in tables if model_type in names.split(", ")] == [cell_of(found)]
