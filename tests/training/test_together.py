"""Several runs on one base at once: each has the numbers, the files and the errors that it would have alone."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import pytest
from safetensors.torch import load_file
from tiny_runs import folder_of, timeless_metrics

from cera_train.adapters.together import twin
from cera_train.common.errors import UserError
from cera_train.distributed.signals import Interrupted
from cera_train.evaluation.held_out import HeldOut
from cera_train.model.precision import choose_precision
from cera_train.runs.folder import RunFolder
from cera_train.runs.outcomes import read_losses
from cera_train.settings.model import Dtype
from cera_train.training.train import train, train_together

ARMS = {
    "cera": ["adapter.dropout=0"],
    "relu": ["adapter.activation=relu", "adapter.dropout=0", "optimizer.lr=3e-3", "train.seed=1"],
    "rank": [
        "adapter.r=8",
        "adapter.alpha=16",
        "adapter.dropout=0",
        "optimizer.schedule=cosine",
        "train.max_updates=4",
    ],
    "lora": ["adapter=lora", "adapter.r=4", "adapter.dropout=0", "train.seed=2"],
    "rslora": ["adapter=rslora", "adapter.r=4", "adapter.dropout=0"],
    "mix": ["adapter.mix=learned", "adapter.dropout=0", "adapter.target_modules=all-linear", "train.eval_every=2"],
    "input": ["adapter.dropout_on=input", "adapter.dropout=0", "adapter.target_modules=[down_proj]"],
}


def weights(config) -> dict:
    return load_file(folder_of(config) / "adapter" / "adapter_model.safetensors")


def assert_equal_runs(config, other) -> None:
    ours, theirs = timeless_metrics(config), timeless_metrics(other)
    assert len(ours) == len(theirs)
    for line, expected in zip(ours, theirs, strict=True):
        assert line == pytest.approx(expected, rel=1e-5, abs=1e-7)
    for name, value in weights(config).items():
        assert (value - weights(other)[name]).abs().max() < 1e-4
    for losses, others in zip(read_losses(folder_of(config)), read_losses(folder_of(other)), strict=True):
        assert losses.losses == pytest.approx(others.losses, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(("layout", "tokens"), [("flat", 512), pytest.param("padded", 4096, marks=pytest.mark.slow)])
def test_each_arm_has_the_numbers_of_its_run_alone(tiny_config, layout, tokens):
    fixed = (f"train.batch_layout={layout}", f"train.micro_batch_tokens={tokens}", "train.max_updates=5")
    arms = [tiny_config(*fixed, *arm, f"name=together_{name}") for name, arm in ARMS.items()]
    outcomes = train_together(arms)
    for name, arm, config, outcome in zip(ARMS, ARMS.values(), arms, outcomes, strict=True):
        alone = tiny_config(*fixed, *arm, f"name=alone_{name}")
        result = train(alone)
        assert outcome["eval/perplexity"] == pytest.approx(result["eval/perplexity"], rel=1e-5)
        assert outcome.keys() == result.keys()
        assert_equal_runs(config, alone)


def test_the_base_is_evaluated_once_for_all_arms_that_add_nothing_yet(trained_config, tiny_config, monkeypatch):
    """An adapter that starts from a trained one adds something."""
    start = f"adapter.start_from={folder_of(trained_config())}"
    measure, measured = HeldOut.token_losses, []
    monkeypatch.setattr(HeldOut, "token_losses", lambda rows: measured.append(rows) or measure(rows))
    changes = {"first": [], "second": ["optimizer.lr=3e-3"], "started": [start]}
    configs = [tiny_config("train.max_updates=2", *words, f"name={name}") for name, words in changes.items()]
    train_together(configs)
    assert len(measured) == 2 + 3  # before the first update, and after the last
    first, second, started = (read_losses(folder_of(config))[0].losses for config in configs)
    assert (first == second).all()
    assert (first != started).any()


def test_dropout_depends_on_nothing_but_the_arm(tiny_config):
    cera = ("adapter.dropout=0.3", "train.max_updates=3", "adapter.target_modules=[v_proj]")
    lora = ("adapter=lora", "adapter.r=4", "adapter.dropout=0.3", "train.max_updates=3")
    before = tiny_config("adapter.dropout=0.3", "train.max_updates=2", "train.seed=3", "name=before")
    pairs = [
        [tiny_config(*arm, f"name={name}_{part}") for name, arm in (("cera", cera), ("lora", lora))] for part in "ab"
    ]
    train_together(pairs[0])
    train_together([before, *pairs[1][::-1]])
    for first, second in zip(*pairs, strict=True):
        assert_equal_runs(first, second)
    without = tiny_config(*cera, "adapter.dropout=0", "name=without")
    train(without)
    ours, dropped = timeless_metrics(without), timeless_metrics(pairs[0][0])
    assert ours[1]["train/loss"] == pytest.approx(dropped[1]["train/loss"])  # B is zero
    assert ours[-1] != pytest.approx(dropped[-1], rel=1e-5)


def test_recomputed_layers_drop_the_same(tiny_config):
    arms = [("adapter.dropout=0.3",), ("adapter=lora", "adapter.r=4", "adapter.dropout=0.3")]
    plain, checkpointed = (
        [
            tiny_config(*arm, more, "train.max_updates=3", f"name={more[-4:]}_{number}")
            for number, arm in enumerate(arms)
        ]
        for more in ("model.gradient_checkpointing=false", "model.gradient_checkpointing=true")
    )
    train_together(plain)
    train_together(checkpointed)
    for first, second in zip(plain, checkpointed, strict=True):
        assert_equal_runs(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("order", ["together first", "alone first"])
def test_a_run_goes_on_in_the_other_way(trained_config, tiny_config, order, monkeypatch):
    """A checkpoint of a run among others is that of a run alone."""
    fixed = ("adapter.dropout=0", "train.max_updates=6", "train.save_every=2", "train.eval_every=2")
    whole = trained_config(*fixed)
    cut, beside = tiny_config(*fixed, "name=cut"), tiny_config(*fixed, "name=beside", "adapter.r=2")
    begin, go_on = (train_together, train) if order == "together first" else (train, train_together)
    as_given = {train: lambda: [train(cut)], train_together: lambda: train_together([beside, cut])}
    with monkeypatch.context() as patch:
        log = RunFolder.append_metrics
        patch.setattr(
            RunFolder, "append_metrics", lambda self, line: (log(self, line), line["update"] == 5 and die(self, cut))
        )
        with pytest.raises(KeyboardInterrupt):
            as_given[begin]()
    assert timeless_metrics(cut)[-1]["update"] == 5
    as_given[go_on]()
    assert_equal_runs(cut, whole)


def die(folder: RunFolder, config) -> None:
    """Ends the process where that run has come so far."""
    if folder.path.name == config.name:
        raise KeyboardInterrupt


def test_an_arm_that_fails_ends_alone(trained_config, tiny_config):
    diverging = tiny_config("adapter.dropout=0", "optimizer.lr=1e30", "name=diverging")
    locked = tiny_config("adapter.dropout=0", "name=locked")
    missing = tiny_config("adapter.dropout=0", "adapter.target_modules=[no_such]", "name=missing")
    patient = tiny_config(
        "adapter.dropout=0", "optimizer.lr=1e-12", "train.eval_every=1", "train.patience=2", "name=patient"
    )
    fine = tiny_config("adapter.dropout=0", "name=fine")
    with RunFolder(folder_of(locked), {}):
        outcomes = train_together([diverging, locked, missing, patient, fine])
    errors = [str(outcome) for outcome in outcomes if isinstance(outcome, Exception)]
    assert [type(outcome) for outcome in outcomes] == [UserError, UserError, UserError, dict, dict]
    for error, part in zip(errors, ("not finite", "another run is writing", "no_such"), strict=True):
        assert part in error
    assert outcomes[3]["updates"] == 2
    assert_equal_runs(fine, trained_config("adapter.dropout=0"))
    assert not (folder_of(diverging) / "result.json").exists()


@pytest.mark.slow
def test_a_signal_stops_all_arms_and_the_same_call_goes_on(tiny_config, monkeypatch):
    arms = [tiny_config("adapter.dropout=0", f"adapter.r={r}", f"name=r{r}", "train.max_updates=6") for r in (2, 4)]
    whole = [replace(arm, name=f"whole_{arm.name}") for arm in arms]
    train_together(whole)
    log = RunFolder.append_metrics

    def append(self, line):
        log(self, line)
        if line["update"] == 3 and self.path.name == "r2":
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", append)
        with pytest.raises(Interrupted):
            train_together(arms)
    for arm in arms:  # the signal came when the update was over: the next one noticed it
        assert [path.name for path in (folder_of(arm) / "checkpoints").iterdir()] == ["4"]
    train_together(arms)
    for arm, other in zip(arms, whole, strict=True):
        assert_equal_runs(arm, other)


def test_finished_runs_are_not_trained_again(tiny_config, capsys):
    done, new = (tiny_config("train.max_updates=2", "adapter.dropout=0", f"name={name}") for name in ("done", "new"))
    result = train(done)
    outcomes = train_together([done, new])
    assert outcomes[0] == result
    assert outcomes[1]["updates"] == 2
    assert "Its result stands" in capsys.readouterr().out


def test_bytes_of_the_base_are_held_once(tiny_llama):
    copied = twin(tiny_llama)
    pairs = zip(tiny_llama.named_parameters(), copied.named_parameters(), strict=True)
    assert all(name == other and weight is shared for (name, weight), (other, shared) in pairs)
    copied.model.layers[0].self_attn.q_proj = None
    assert tiny_llama.model.layers[0].self_attn.q_proj is not None


def test_a_run_that_was_begun_in_another_precision_does_not_join(tiny_config):
    here = choose_precision(Dtype.auto).dtype
    other = Dtype.bfloat16 if here == Dtype.float32 else Dtype.float32
    train(tiny_config(f"model.dtype={other}", "train.max_updates=4", "train.stop_at=2", "name=begun"))
    auto = ("model.dtype=auto", "train.max_updates=4")
    first, begun = train_together([tiny_config(*auto, "name=first"), tiny_config(*auto, "name=begun")])
    assert first["updates"] == 4
    with pytest.raises(UserError, match="begun was begun in another precision than the others: train it alone"):
        raise begun
