"""A run's adapter in tools that users already have, after nothing more than `import cera_train`."""

import pytest
from peft import PeftModel
from tiny_runs import folder_of
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the harness' own
def test_lm_evaluation_harness_scores_the_adapter(finished_config, tiny_folder):
    """As the model that PEFT loads."""
    harness = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance

    def scores(model, **settings) -> list[float]:
        scored = harness.HFLM(model, dtype="float32", device="cpu", **settings)
        requests = [
            instance("loglikelihood", {}, ("Question: x\nAnswer:", choice), place)
            for place, choice in enumerate((" 0.84", " hello"))
        ]
        return [log_p for log_p, _ in scored.loglikelihood(requests)]

    adapter = str(folder_of(finished_config) / "adapter")
    adapted = scores(str(tiny_folder), peft=adapter)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    loaded = PeftModel.from_pretrained(base, adapter)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    assert adapted == pytest.approx(scores(loaded, tokenizer=tokenizer), abs=1e-4)
