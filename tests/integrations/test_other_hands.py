"""A run's adapter in tools that users already have, after nothing more than `import cera_train`."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from tiny_runs import folder_of, run_card
from transformers import AutoModelForCausalLM, AutoTokenizer

from cera_train.training.train import train


@pytest.fixture
def finished_run(trained_config) -> Path:
    return folder_of(
        trained_config("optimizer.lr=3e-2", "train.max_updates=6", "train.eval_every=null")
    )


@pytest.mark.filterwarnings("default")  # the harness' own
def test_lm_evaluation_harness_scores_the_adapter(finished_run, tiny_folder):
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
    adapted = scores(peft=f"{finished_run}/adapter")
    assert adapted == pytest.approx(
        direct(PeftModel.from_pretrained(base, finished_run / "adapter")), abs=1e-4
    )
    assert adapted != pytest.approx(without, abs=1e-2)


def test_the_card_describes_the_adapter_and_its_code_loads_it(finished_run, tiny_folder):
    card = ModelCard.load(finished_run / "adapter" / "README.md")
    result = json.loads((finished_run / "result.json").read_text())
    assert card.data.library_name == "peft"
    # Not apache-2.0, the license of the model file that this config started from.
    assert card.data.license is None
    for part in (
        str(tiny_folder),
        "CeRA of rank 4 on q_proj v_proj",
        "logistic_map",
        f"{result['eval/perplexity']:.3f}",
        "import cera_train",
    ):
        assert part in card.text.replace("\\", ""), part
    names = run_card(finished_run / "adapter")
    assert any("cera_A" in name for name, _ in names["model"].named_parameters())
    assert "inputs" not in names


@pytest.mark.parametrize("has_switch", [True, False])
def test_the_code_of_a_card_asks_as_a_run_of_chats_was_trained(
    tiny_config, thinking_folder, write_jsonl, has_switch
):
    """Its answers do not reason, so the run switched reasoning off, or left its opening out."""
    if not has_switch:
        template = thinking_folder / "chat_template.jinja"
        is_on = "enable_thinking is not defined or enable_thinking"
        template.write_text(template.read_text().replace(is_on, "true"))
    user = {"role": "user", "content": "hello"}
    answer = {"role": "assistant", "content": "hello there"}
    rows = write_jsonl("chats.jsonl", [{"messages": [user, answer]}] * 16)
    settings = ("data=jsonl", f"data.train_files=[{rows}]", "data.eval_rows=4", "data.chat=auto")
    config = tiny_config(
        *settings, f"model.path={thinking_folder}", "data.allow_overlap=true", "train.max_updates=1"
    )
    train(config)
    names = run_card(folder_of(config) / "adapter")
    asked = names["tokenizer"].decode(names["inputs"]["input_ids"][0])
    assert asked == "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n"
