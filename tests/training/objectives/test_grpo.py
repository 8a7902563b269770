"""Group relative policy optimisation: TRL's GRPOTrainer is the oracle."""

import math
import os
from pathlib import Path
from statistics import fmean

import pytest
import torch
from built_runs import build_run
from cera_models import WARNINGS
from conftest import make_tiny_llama
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
from cera_train.training.objectives.grpo import MOST_WEIGHT, group_advantages, grpo_loss
from cera_train.training.rewards import grade_by
from cera_train.training.train import train

ROWS = [
    {"prompt": f"Say {word}:", "completion": f" {word}"}
    for word in ("one", "two", "six", "ten", "many", "few")
]


def vowels(prompt: str, answer: str, right: str) -> float:
    assert (prompt.startswith("Say "), right.strip() in prompt) == (True, True)
    return sum(letter in "aeiou" for letter in answer)


def fails(*_: str) -> float:
    raise LookupError("no such key")


def unknown(*_: str) -> float:
    return math.nan


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


@WARNINGS
@pytest.mark.parametrize("is_served", [False, True], ids=["plain", "sampled by a server"])
def test_the_loss_is_trls(tokenizer, tmp_path, is_served):
    """For log p drawn at random: the loss and its gradient."""
    trl = pytest.importorskip("trl")
    rewards = torch.rand(2, 4)
    mask = torch.arange(6) < torch.tensor([6, 1, 3, 6, 2, 4, 5, 1])[:, None]
    log_p = (-3 * torch.rand(mask.shape)).requires_grad_()
    before = log_p.detach()
    sampled = before + torch.randn(mask.shape)
    weights = (before - sampled).exp()
    assert (weights[mask] > MOST_WEIGHT).any()

    loss = grpo_loss(
        log_p[mask],
        group_advantages(rewards).flatten().repeat_interleave(mask.sum(1)),
        sampled[mask] if is_served else None,
    )
    [gradient] = torch.autograd.grad(loss / mask.sum(), log_p)

    settings = trl.GRPOConfig(
        str(tmp_path),
        per_device_train_batch_size=4,
        num_generations=4,
        use_cpu=True,
        bf16=False,
        report_to="none",
    )
    trainer = trl.GRPOTrainer(
        make_tiny_llama(),
        vowels,
        args=settings,
        train_dataset=Dataset.from_list([{"prompt": "Say"}] * 4),
        processing_class=tokenizer,
    )
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: (log_p, before, None)
    inputs = {
        "prompt_ids": mask,
        "prompt_mask": mask,
        "completion_ids": mask,
        "completion_mask": mask.long(),
        "advantages": (
            (rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)
        ).flatten(),
        "num_items_in_batch": mask.sum(),
        "old_per_token_logps": before,
    }
    trainer.use_vllm = is_served
    inputs["importance_sampling_ratio"] = weights.clamp(max=MOST_WEIGHT)
    expected = trainer._compute_loss(trainer.model, inputs)
    [wanted] = torch.autograd.grad(expected, log_p)
    assert (loss / mask.sum()).item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(gradient, wanted)


def test_an_update_is_the_mean_over_the_tokens_of_its_answers(grpo, tokenizer, tmp_path):
    """Each by its answer's advantage. Many tokens without a vowel end an answer."""
    run = build_run(grpo("grpo.max_new_tokens=2"), tmp_path)
    run.move(0.1)
    ends = [
        token for token in range(len(tokenizer)) if not vowels("Say ", tokenizer.decode(token), "")
    ]
    run.model.language_model.causal_lm.generation_config.eos_token_id = ends[::2]
    drawn = run.objective.draw([0, 2, 3])
    batches = [drawn.batches.load([sequence]) for sequence in range(12)]
    answers = [batch.input_ids[batch.loss_mask] for batch in batches]
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
    rewards = torch.tensor([vowels("Say ", text, "") for text in texts]).view(3, 4).float()
    assert drawn.figures["train/reward"] == pytest.approx(rewards.mean().item())
    kinds = [(len(ids), ids[-1].item() in ends[::2]) for ids in answers]
    assert {(2, True), (2, False)} <= {*kinds}
    assert drawn.figures["train/completions/clipped_ratio"] == kinds.count((2, False)) / 12
    advantages = group_advantages(rewards).flatten()
    assert drawn.sequences == advantages.nonzero().flatten().tolist()
    for sequence in drawn.sequences:
        log_p = torch.randn(len(answers[sequence]))
        expected = grpo_loss(log_p, advantages[sequence])
        part = drawn.loss(log_p, [sequence])
        assert part.item() == pytest.approx((expected / sum(map(len, answers))).item(), rel=1e-4)


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
    words = ["optimizer.lr=5e-2", "train.samples=1", "train.save_every=2"]
    whole, part = (grpo(*words, "train.eval_every=2", name) for name in ("name=whole", "name=part"))
    train(whole)
    train_and_die_after(part, 4, log=SAMPLES)
    assert metrics_of(part)[-1]["update"] == 3
    train(part)
    assert adapter_bytes(part) == adapter_bytes(whole)
    assert (folder_of(part) / SAMPLES).read_bytes() == (folder_of(whole) / SAMPLES).read_bytes()


def test_a_server_answers_with_the_adapter_of_each_update(grpo):
    tasks = [
        "train.tasks=[held_out]",
        "train.task_settings={held_out: {max_new_tokens: 8}}",
        "train.samples=1",
    ]
    words = ["adapter.dropout=0", "optimizer.lr=5e-2", "train.max_updates=3", *tasks]
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


def test_nothing_is_lost_if_a_server_fails(grpo, monkeypatch):
    monkeypatch.setattr(server, "PAUSES", ())
    words = ["train.save_every=null", "train.eval_every=null"]
    with playing_vllm(grpo(*words).model) as vllm:
        config = grpo(*words, f"train.server={vllm.url}")
        for update, fault, message in (
            (2, "503", "Once it is back, the same command resumes"),
            (3, "restart", "does not exist. If vLLM was started again, the same command loads the"),
        ):
            away = once_logged(update, lambda fault=fault: vllm.faults.extend([fault] * 999))
            with away, pytest.raises(UserError, match=message):
                train(config)
            assert (folder_of(config) / "checkpoints" / str(update)).exists()
            vllm.faults = []
        train(config)
    assert [line["update"] for line in metrics_of(config) if "train/reward" in line] == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_processes_sample_and_learn_the_same_as_one(
    on_rows, tiny_folder, tmp_path, compose, monkeypatch
):
    # A judge that answers differently when another process asks: only the main one asks.
    sign = "import os\n\nSIGN = 1 if os.environ.get('RANK', '0') == '0' else -1\n"
    reward = (
        "def vowels(prompt, answer, right):\n    return SIGN * sum(letter in 'aeiou' for letter "
        "in answer)\n"
    )
    (tmp_path / "rewards_of_a_test.py").write_text(sign + reward)
    monkeypatch.syspath_prepend(tmp_path)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", path)
    words = [
        f"model.path={tiny_folder}",
        "model.dtype=float32",
        "data.max_length=256",
        "adapter.r=4",
        *on_rows,
        "grpo.rewards=[rewards_of_a_test.vowels]",
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
    assert [grade_by("text")("", answer, "a b") for answer in (" a  b", "a c", "")] == [1, 0, 0]
    assert grade_by("number")("", "so 1,0 is 10.", "#### 10") == 1
    with pytest.raises(UserError, match="^grpo.grader=text finds no answer in '': fix the row"):
        grade_by("text")("", "a", "")


@pytest.mark.parametrize(
    ("reward", "what"),
    [
        ("fails", r"fails for the answer .*: LookupError: no such key \(.*/test_grpo.py:\d+\)\.$"),
        ("unknown", "gives nan for the answer"),
    ],
)
def test_a_reward_that_fails_is_named_with_its_place(grpo, reward, what):
    with pytest.raises(UserError, match=rf"^grpo.rewards=\[.*{reward}\] {what}"):
        train(grpo(f"grpo.rewards=[{__name__}.{reward}]", "train.eval_every=null"))


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
    tasks = ("train.tasks=[held_out]", "train.task_settings={held_out: {max_new_tokens: 4}}")
    words = (rows, *settings, *tasks, f"model.path={thinking_folder}")
    run = train(grpo(*words))["folder"]
    samples = read_lines(Path(run) / SAMPLES, Sample)
    held_out = ("task=held_out", "task.max_new_tokens=4")
    evaluate(compose(f"run={run}", *held_out, command="eval"))
    problems = read_lines(Path(run) / "eval" / "held_out" / "problems.jsonl", Problem)
    prompts = [*samples, *problems]
    assert {sample.reward is None for sample in samples} == {True, False}
    assert {each.prompt.partition("assistant")[2] for each in prompts} == {"\n<think>"}

    # A start that learned not to reason is asked so.
    start = train(grpo(*words, "train.objective=sft", "name=start"))["folder"]
    further = train(grpo(*words, f"adapter.start_from={start}", "name=further"))["folder"]
    asked = {sample.prompt for sample in read_lines(Path(further) / SAMPLES, Sample)}
    assert {prompt.partition("assistant")[2] for prompt in asked} == {"\n"}
