"""Group relative policy optimisation: TRL's GRPOTrainer is the oracle."""

import itertools
import math
import os
import signal
import sys
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from built_runs import build_run
from cera_models import WARNINGS
from datasets import Dataset
from evaluated_runs import evaluate
from played_vllm import playing_vllm
from several_processes import train_in_processes
from tiny_runs import adapter_bytes, folder_of, metrics_of, once_logged, train_and_die_after

from cera_train.common.errors import UserError
from cera_train.evaluation import server
from cera_train.runs.evaluation_folder import Problem
from cera_train.runs.records import read_lines
from cera_train.runs.results import SAMPLES, Sample
from cera_train.training.objectives.grpo import KL, MOST_WEIGHT
from cera_train.training.rewards import grade, right_answer
from cera_train.training.train import backward, train

ROWS = [
    {"prompt": f"Say {word}:", "completion": f" {word}"}
    for word in ("one", "two", "six", "ten", "many", "few")
]


def vowels(prompt: str, answer: str, right: str) -> float:
    assert (prompt.startswith("Say "), right.strip() in prompt) == (True, True)
    return sum(letter in "aeiou" for letter in answer)


def fails(*_: str) -> float:
    raise LookupError("no such key")


@pytest.fixture
def on_rows(write_jsonl) -> list[str]:
    """Settings of a run on `ROWS`."""
    return [
        "data=jsonl",
        f"data.train_files=[{write_jsonl('rows.jsonl', ROWS)}]",
        "data.eval_rows=2",
        "train.objective=grpo",
        "grpo.answers=4",
        "grpo.max_new_tokens=6",
        "train.batch_size=3",
    ]


@pytest.fixture
def grpo(tiny_config, on_rows):
    """grpo("adapter.r=4", ...): the config of a run on `ROWS`, rewarded for vowels."""
    words = [
        *on_rows,
        f"grpo.rewards=[{__name__}.vowels]",
        "train.max_updates=4",
        "train.patience=null",
    ]
    return lambda *overrides: tiny_config(*words, *overrides)


@pytest.fixture
def in_processes(tiny_folder, tmp_path, on_rows, monkeypatch):
    """Settings of a run on `ROWS` in processes, which find rewards_of_a_test.py in `tmp_path`."""
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    return [
        f"model.path={tiny_folder}",
        "model.dtype=float32",
        "data.max_length=256",
        "adapter.r=4",
        *on_rows,
        "grpo.rewards=[rewards_of_a_test.vowels]",
    ]


@WARNINGS
@pytest.mark.parametrize(
    ("words", "is_served"),
    [
        ([], False),
        (["grpo.beta=0.5"], False),
        (["grpo.beta=0.5"], True),
    ],
    ids=["plain", "with a reference", "likewise, sampled by a server"],
)
def test_loss_gradients_and_figures_are_trls(
    grpo, tokenizer, tmp_path, monkeypatch, words, is_served
):
    trl = pytest.importorskip("trl")
    settings = ("adapter.r=4", "adapter.dropout=0", "train.micro_batch_tokens=256", *words)
    run = build_run(grpo(*settings), tmp_path / "run")
    model = run.model
    objective = run.objective
    causal_lm = model.language_model.causal_lm
    config = run.config.grpo

    @torch.no_grad()
    def move() -> None:
        for parameter in model.trained:
            parameter += 0.1 * torch.randn_like(parameter)

    torch.manual_seed(1)
    move()
    model.wrapped.train()
    questions = [objective.questions[number] for number in (0, 2, 3)]
    answers = objective._sample(questions, 4)
    groups = [[answer.ids for answer in group] for group in answers]
    rewards = torch.tensor(
        [[vowels("Say ", tokenizer.decode(ids), "") for ids in group] for group in groups]
    ).float()
    advantages = rewards - rewards.mean(1, keepdim=True)
    advantages /= rewards.std(1, keepdim=True) + 1e-4

    def padded(parts: list[list[int]], side: str) -> tuple[torch.Tensor, torch.Tensor]:
        parts = [torch.tensor(part) for part in parts]
        pad = torch.nn.utils.rnn.pad_sequence
        return pad(parts, True, 0, side), pad(
            [torch.ones_like(part) for part in parts], True, 0, side
        )

    prompt_ids, prompt_mask = padded(
        [question.prompt_ids for question in questions for _ in range(4)], "left"
    )
    ids, mask = padded([answer for group in groups for answer in group], "right")
    inputs = {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": ids,
        "completion_mask": mask,
    }
    inputs |= {"advantages": advantages.flatten(), "num_items_in_batch": mask.sum()}

    def log_p() -> torch.Tensor:
        attention = causal_lm.config._attn_implementation
        causal_lm.set_attn_implementation("sdpa")
        whole = torch.cat([prompt_ids, ids], 1), torch.cat([prompt_mask, mask], 1)
        logits = model.adapted(*whole).logits[:, prompt_ids.shape[1] - 1 : -1].log_softmax(-1)
        causal_lm.set_attn_implementation(attention)
        return logits.gather(-1, ids[..., None])[..., 0].detach()

    if config.beta:
        with model.adapted.disable_adapter():
            inputs["ref_per_token_logps"] = log_p()
    if is_served:
        here = log_p()
        sampled = (here + torch.randn(mask.shape)) * mask
        weights = (here - sampled).exp()
        assert (weights[mask > 0] > MOST_WEIGHT).any()
        inputs["importance_sampling_ratio"] = weights.clamp(max=MOST_WEIGHT)
        rows = iter(sampled.tolist())
        served = [
            [answer._replace(sampled=next(rows)[: len(answer.ids)]) for answer in group]
            for group in answers
        ]
        monkeypatch.setattr(objective, "sampler", SimpleNamespace(is_served=True))
        monkeypatch.setattr(objective, "_sample", lambda *_: served)
        monkeypatch.setattr(objective, "_check_policy", lambda *_: {})
    drawn = objective.draw([0, 2, 3])
    assert 0 < len(drawn.sequences) <= 12
    assert drawn.figures["train/reward"] == pytest.approx(rewards.mean().item())
    # As on a process without rows: it changes no loss, gradient or figure.
    idle = [([drawn.sequences[0]], False)]
    of_process = drawn.batches.of_process
    drawn.batches.of_process = lambda *arguments: [*of_process(*arguments), *idle]
    loss = backward(model, drawn)
    gradients = run.take_gradients()

    causal_lm.set_attn_implementation("sdpa")
    options = {
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "use_cpu": True,
        "bf16": False,
    }
    options |= {"beta": config.beta}
    settings = trl.GRPOConfig(str(tmp_path / "trl"), report_to="none", **options)
    rows_of = Dataset.from_list([{"prompt": "Say"}] * 4)
    trainer = trl.GRPOTrainer(
        model.adapted, vowels, args=settings, train_dataset=rows_of, processing_class=tokenizer
    )
    trainer.current_gradient_accumulation_steps = 1
    trainer.use_vllm = is_served
    expected = trainer._compute_loss(trainer.model, inputs)
    expected.backward()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
    for name, gradient in gradients.items():
        wanted = trainer.model.get_parameter(name).grad
        assert (gradient - wanted).norm() <= 1e-5 * wanted.norm(), name
    if config.beta:
        logged = trainer._metrics["train"]
        assert drawn.figures[KL].item() == pytest.approx(logged["kl"][0], rel=1e-4)


def test_rewards_rise_and_answers_are_kept_with_their_rewards(grpo):
    config = grpo("optimizer.lr=5e-2", "adapter.dropout=0", "grpo.answers=8", "train.samples=3")
    config.train.max_updates = 16
    train(config)
    rewards = [line["train/reward"] for line in metrics_of(config) if "train/reward" in line]
    assert sum(rewards[-4:]) > sum(rewards[:4])
    samples = read_lines(folder_of(config) / SAMPLES, Sample)
    first = [sample for sample in samples if sample.update == 1 and sample.reward is not None]
    assert len(first) == 3 * 8
    assert fmean(sample.reward for sample in first) == pytest.approx(rewards[0])
    assert all(
        sample.reward == vowels(sample.prompt, sample.answer, sample.gold) for sample in first
    )
    assert max(sample.tokens for sample in first) == 6


def test_a_run_killed_between_answers_and_update_resumes_byte_for_byte(grpo):
    words = [
        "optimizer.lr=5e-2",
        "grpo.beta=0.01",
        "train.samples=1",
        "train.save_every=2",
    ]
    whole, part = (grpo(*words, "train.eval_every=2", name) for name in ("name=whole", "name=part"))
    train(whole)
    with once_logged(1, lambda: os.kill(os.getpid(), signal.SIGTERM)), pytest.raises(SystemExit):
        train(part)  # saved after update 2, whose evaluation is due
    train_and_die_after(part, 4, log=SAMPLES)
    assert metrics_of(part)[-1]["update"] == 3
    train(part)
    assert adapter_bytes(part) == adapter_bytes(whole)
    assert (folder_of(part) / SAMPLES).read_bytes() == (folder_of(whole) / SAMPLES).read_bytes()


def test_nothing_is_lost_if_a_reward_fails(grpo, monkeypatch):
    words = ["optimizer.lr=5e-2", "train.save_every=null"]
    whole, part = (grpo(*words, name) for name in ("name=whole", "name=part"))
    train(whole)
    reward = vowels
    calls = itertools.count()

    def fails_at_update_3(*words: str) -> float:
        return reward(*words) if next(calls) < 2 * 3 * 4 else math.nan

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[__name__], "vowels", fails_at_update_3)
        with pytest.raises(UserError, match=r"vowels\] gives nan for the answer"):
            train(part)
    assert [path.name for path in folder_of(part).glob("checkpoints/*")] == ["2"]
    train(part)
    assert adapter_bytes(part) == adapter_bytes(whole)


def test_a_server_answers_with_the_adapter_of_each_update(grpo):
    tasks = [
        "train.tasks=[held_out]",
        "train.task_settings={held_out: {max_new_tokens: 8}}",
        "train.samples=1",
    ]
    words = ["adapter.r=4", "adapter.dropout=0", "optimizer.lr=5e-2", "train.max_updates=3", *tasks]
    with playing_vllm(grpo(*words).model) as vllm:
        config = grpo(*words, f"train.server={vllm.url}")
        train(config)
    # the base shows what rounding explains
    asked = [body["model"] for body in vllm.asked if body["model"] != "base"]
    assert len(vllm.asked) - len(asked) == 3
    adapters = list(dict.fromkeys(asked))
    assert len(adapters) == 4  # those of three updates, and of the end
    # No adapter answers after the next was loaded.
    assert asked == sorted(asked, key=adapters.index)
    assert [*vllm.loaded] == adapters[3:]
    updates = [line for line in metrics_of(config) if "train/reward" in line]
    assert max(line["train/sampling/log_p_difference"] for line in updates) < 1e-4
    assert not (folder_of(config) / "served").exists()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("503", "Once it is back, the same command resumes"),
        ("unknown ids", "answers without token ids of its vocabulary .*: update vLLM"),
        ("restart", "does not exist. If vLLM was started again, the same command loads the"),
    ],
)
def test_nothing_is_lost_if_a_server_fails(grpo, monkeypatch, fault, message):
    monkeypatch.setattr(server, "PAUSES", ())
    words = ["adapter.r=4", "optimizer.lr=5e-2", "train.save_every=null"]
    with playing_vllm(grpo(*words).model) as vllm:
        config = grpo(*words, f"train.server={vllm.url}")
        away = once_logged(2, lambda: vllm.faults.extend([fault] * 999))
        with away, pytest.raises(UserError, match=message):
            train(config)
        assert [path.name for path in folder_of(config).glob("checkpoints/*")] == ["2"]
        vllm.faults = []
        train(config)
    assert [line["update"] for line in metrics_of(config) if "train/reward" in line] == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_processes_sample_and_learn_the_same_as_one(
    in_processes, tmp_path, compose, monkeypatch
):
    # A judge that answers differently when another process asks: only the main one asks.
    sign = "import os\n\nSIGN = 1 if os.environ.get('RANK', '0') == '0' else -1\n"
    reward = (
        "def vowels(prompt, answer, right):\n    return SIGN * sum(letter in 'aeiou' for letter "
        "in answer)\n"
    )
    (tmp_path / "rewards_of_a_test.py").write_text(sign + reward)
    monkeypatch.syspath_prepend(tmp_path)
    words = [
        *in_processes,
        "adapter.dropout=0",
        "train.max_updates=1",
        "train.micro_batch_tokens=256",
        "optimizer.lr=2e-2",
        f"output_dir={tmp_path / 'outputs'}",
    ]
    train(compose(*words, "name=one"))
    train_in_processes([[*words, "name=two"]], 2, tmp_path)
    one, two = (metrics_of(tmp_path / "outputs" / name) for name in ("one", "two"))
    # One update only: Adam turns the rounding error of a gradient into a full step, and then other
    # tokens are sampled.
    for key in ("train/reward", "train/grad_norm", "train/completions/mean_length"):
        assert two[1][key] == pytest.approx(one[1][key], rel=1e-5), key
    assert one[1]["train/grad_norm"] > 0


def test_an_answer_is_graded_as_in_a_task():
    assert [grade("", answer, "a b", "text") for answer in (" a  b", "a c", "")] == [1, 0, 0]
    assert grade("", "so 1,0 is 10.", "#### 10", "number") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            [f"grpo.rewards=[{__name__}.fails]"],
            r"^grpo.rewards=\[.*fails\] fails for the answer .*: LookupError: no such key "
            r"\(.*/test_grpo.py:\d+\)\.$",
        ),
        (
            ["grpo.rewards=[nowhere.at_all]"],
            r"^grpo.rewards=\[nowhere.at_all\] cannot be imported: ModuleNotFoun",
        ),
        (
            ["grpo.grader=choice"],
            r"rows.jsonl:1: grpo.grader=choice finds no answer .*: fix the row",
        ),
        (
            ["data.loss_on=all"],
            "^train.objective=grpo answers prompts, and rows.jsonl has text without: name",
        ),
        (
            ["grpo.max_new_tokens=256"],
            "^grpo.max_new_tokens=256 after a prompt of .* beyond the 256 positions",
        ),
        (
            ["grpo.beta=0.1", "adapter=full", "adapter.r=null", "adapter.dropout=0"],
            "^grpo.beta=0.1 needs the base as",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_rewarded_is_refused(grpo, words, message):
    with pytest.raises(UserError, match=message):
        train(grpo(*words))


def test_evaluations_ask_as_updates_do(grpo, thinking_folder, compose, write_jsonl, monkeypatch):
    """The rows' answers do not reason; those that updates learn from follow the prompt of
    inference, which opens reasoning."""
    monkeypatch.setitem(globals(), "vowels", lambda _, answer, right: float(len(answer)))
    chats = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in ROWS
    ]
    rows = f"data.train_files=[{write_jsonl('chats.jsonl', chats)}]"
    settings = ("data.layout=messages", "data.chat=auto", "train.samples=1", "train.max_updates=1")
    words = (rows, *settings, f"model.path={thinking_folder}")
    trained = train(grpo(*words))
    run = trained["folder"]
    samples = read_lines(Path(run) / SAMPLES, Sample)
    held_out = ("task=held_out", "task.max_new_tokens=4")
    evaluate(compose(f"run={run}", *held_out, command="eval"))
    problems = read_lines(Path(run) / "eval" / "held_out" / "problems.jsonl", Problem)
    prompts = [*samples, *problems]
    assert {sample.reward is None for sample in samples} == {True, False}
    assert {each.prompt.partition("assistant")[2] for each in prompts} == {"\n<think>"}
    result = evaluate(compose(f"run={run}", "task=perplexity", command="eval"))
    assert result["perplexity"] == pytest.approx(trained["eval/perplexity"], rel=1e-6)

    # A start that learned not to reason is asked so.
    start = train(grpo(*words, "train.objective=sft", "name=start"))["folder"]
    further = train(grpo(*words, f"adapter.start_from={start}", "name=further"))["folder"]
    asked = {sample.prompt for sample in read_lines(Path(further) / SAMPLES, Sample)}
    assert {prompt.partition("assistant")[2] for prompt in asked} == {"\n"}


def test_an_answer_that_only_calls_a_tool_cannot_be_graded():
    with pytest.raises(
        UserError, match=r"finds no text in an answer, .* a tool: mark it weight: 0"
    ):
        right_answer("", "text")
