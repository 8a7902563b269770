"""Direct preference optimisation: TRL's DPOTrainer is the oracle."""

import math

import pytest
import torch
from built_runs import build_run
from cera_models import WARNINGS
from datasets import Dataset
from tiny_runs import folder_of, metrics_of

from cera_train.data.prepare import prepare_data
from cera_train.training.resolve import resolve
from cera_train.training.train import train

ROWS = [
    {
        "prompt": f"Question: what is {n} and {n}?\nAnswer:",
        "chosen": f" it is {2 * n}",
        "rejected": f" {n}{' or so' * n}",
    }
    for n in range(1, 13)
]


@pytest.fixture
def dpo(tiny_config, write_jsonl):
    """dpo("adapter.r=4", ...): the config of a run on `ROWS`."""
    file = write_jsonl("preferences.jsonl", ROWS)
    words = ["data=jsonl", f"data.train_files=[{file}]", "data.eval_rows=4"]
    words += ["train.objective=dpo", "adapter.dropout=0"]
    return lambda *overrides: tiny_config(
        *words, "train.batch_size=3", "train.max_updates=4", *overrides
    )


@WARNINGS
def test_loss_gradients_and_figures_are_trls_whatever_the_micro_batches(dpo, tokenizer, tmp_path):
    trl = pytest.importorskip("trl")
    run = build_run(dpo("dpo.beta=0.5"), tmp_path / "run")
    model = run.model
    torch.manual_seed(1)
    run.move(0.1)  # at the start every margin is zero
    model.wrapped.train()
    sequences = [*range(6)]
    computed = [run.backward(sequences)]
    run.objective.batches.max_tokens = 30  # the answers of a pair in separate passes
    assert len(run.objective.batches.groups(sequences)) > 3
    computed.append(run.backward(sequences))
    figures = run.objective.draw(sequences).figures

    settings = trl.DPOConfig(
        str(tmp_path / "trl"),
        per_device_train_batch_size=3,
        use_cpu=True,
        bf16=False,
        report_to="none",
        beta=0.5,
    )
    rows = Dataset.from_list(ROWS[:3])
    model.language_model.causal_lm.set_attn_implementation("sdpa")
    trainer = trl.DPOTrainer(
        model.adapted, args=settings, train_dataset=rows, processing_class=tokenizer
    )
    if "ref" in trainer.model.peft_config:  # a copy of this adapter: the base is the reference here
        trainer.model.delete_adapter("ref")
    batch = trainer.data_collator([trainer.train_dataset[row] for row in range(3)])
    expected = trainer.compute_loss(trainer.model, batch)
    expected.backward()
    for loss, gradients in computed:
        assert loss == pytest.approx(expected.item(), rel=1e-5)
        for name, gradient in gradients.items():
            wanted = trainer.model.get_parameter(name).grad
            assert (gradient - wanted).norm() <= 1e-5 * wanted.norm(), name
    for name, values in trainer._metrics["train"].items():
        if name.startswith("rewards/"):
            assert figures[f"train/{name}"] == pytest.approx(values[0], rel=1e-4, abs=1e-6), name


def test_a_run_learns_the_choice_and_is_the_reference_of_one_that_starts_from_it(dpo):
    config = dpo("optimizer.lr=2e-2", "train.max_updates=8")
    result = train(config)
    assert result["perplexity_before"] == pytest.approx(2, rel=1e-6)  # that of a coin flip
    assert result["eval/perplexity"] < 1.9
    assert result["preferences/accuracy"] == 1
    last = metrics_of(config)[-1]
    assert math.log(last["eval/perplexity"]) == pytest.approx(last["eval/loss"])
    assert last["eval/rewards/margins"] == pytest.approx(
        last["eval/rewards/chosen"] - last["eval/rewards/rejected"]
    )

    start = f"adapter.start_from={folder_of(config)}"
    second = train(dpo("name=second", "train.max_updates=1", start))
    assert second["perplexity_before"] == pytest.approx(2, rel=1e-6)


# --- rows -----------------------------------------------------------------------------------------


def test_the_answers_of_a_pair_are_dropped_together(dpo, tokenizer, write_jsonl):
    long = {"prompt": "Is it?", "chosen": " yes", "rejected": " no" * 300}
    file = write_jsonl("rows.jsonl", [{**long, "prompt": "Is it? " * 100}, long, *ROWS])
    resolved = resolve(dpo(f"data.train_files=[{file}]"), folder_of(dpo()))
    data = prepare_data(resolved.config.data, tokenizer).train
    assert len(data) == 18
    assert data.truncated[:3] == [False, True, False]


def test_dropout_is_off(dpo, tmp_path):
    run = build_run(dpo("adapter.dropout=0.5"), tmp_path / "run")
    run.move(0.1)
    run.model.wrapped.train()
    _, gradients = run.backward([0, 1, 4, 5])
    _, again = run.backward([0, 1, 4, 5])
    torch.testing.assert_close(again, gradients, rtol=0, atol=0)
