"""A run's adapter in tools that users already have, after nothing more than `import cera_train`."""

import pytest
import torch
from peft import PeftModel
from tiny_runs import folder_of
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the harness' own
def test_lm_evaluation_harness_scores_the_adapter(finished_config, tiny_folder):
    """Its log-likelihoods equal those computed directly, with the adapter and without."""
    harness = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    prompt = "Question: x\nAnswer:"
    choices = [" 0.84", " hello"]

    def scores(**adapter: str) -> list[float]:
        model = harness.HFLM(
            str(tiny_folder), dtype="float32", device="cpu", batch_size=2, **adapter
        )
        requests = [
            instance("loglikelihood", {}, (prompt, choice), place)
            for place, choice in enumerate(choices)
        ]
        return [log_p for log_p, _ in model.loglikelihood(requests)]

    def direct(model: torch.nn.Module) -> list[float]:
        tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
        log_likelihoods = []
        start = len(tokenizer(prompt).input_ids)
        for choice in choices:
            ids = torch.tensor(tokenizer(prompt + choice).input_ids)
            with torch.no_grad():
                log_p = model(ids[None]).logits[0].log_softmax(-1)
            log_likelihoods.append(log_p[start - 1 : -1].gather(1, ids[start:, None]).sum().item())
        return log_likelihoods

    base = AutoModelForCausalLM.from_pretrained(tiny_folder)
    without = direct(base)
    assert scores() == pytest.approx(without, abs=1e-4)
    adapter = folder_of(finished_config) / "adapter"
    adapted = scores(peft=str(adapter))
    assert adapted == pytest.approx(direct(PeftModel.from_pretrained(base, adapter)), abs=1e-4)
    assert adapted != pytest.approx(without, abs=1e-2)
