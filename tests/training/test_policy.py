"""Answers of a server by another policy than the model's are refused, and the refusal names what
they look like; sound answers pass. A played server makes the mistakes; tests/serving has those of a
real vLLM."""

import json

import pytest
import torch
from built_runs import BuiltRun, build_run
from played_vllm import playing_vllm
from tiny_runs import metrics_of
from wrong_policies import WRONG_ADAPTERS, Stale, changed_adapters

from cera_train.common.errors import UserError
from cera_train.evaluation import generate
from cera_train.evaluation.engine import Sampler
from cera_train.evaluation.generate import LoadedModel, TokenChoice
from cera_train.evaluation.requests import SampledTokens
from cera_train.model.language_model import LanguageModel
from cera_train.training.objectives.policy import (
    DISTANCE,
    LIMIT,
    MOST_SURPRISE,
    log_p_distance,
    surprise,
)
from cera_train.training.train import train

WORDS = ("one", "two", "six", "ten")
ROWS = [{"prompt": f"Say {word}:", "completion": f" {word}"} for word in WORDS]


def length(prompt: str, answer: str, right: str) -> float:
    return len(answer)


def vowels(prompt: str, answer: str, right: str) -> float:
    return sum(letter in "aeiou" for letter in answer)


# --- the statistics -------------------------------------------------------------------------------


def draws(updates: int, tokens: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """[updates, tokens] log p of the likeliest token in places from certain to open, and whether
    it was drawn at a temperature."""
    random = torch.Generator().manual_seed(0)
    spread = torch.rand(1, tokens, 1, generator=random) * 8
    logits = torch.randn(updates, tokens, 20, generator=random) * spread
    drawn = torch.multinomial((logits / temperature).softmax(-1).flatten(0, 1), 1, generator=random)
    highest, likeliest = logits.log_softmax(-1).max(-1)
    return highest, likeliest == drawn.view(updates, tokens)


def test_the_surprise_at_sound_draws_is_as_rare_as_its_bound():
    found = torch.tensor([surprise(*update) for update in zip(*draws(2000, 100, 1.0), strict=True)])
    for bound in (1, 2, 3, 4):
        assert (found > bound).float().mean() < 2 * torch.exp(torch.tensor(-float(bound)))
    assert found.max() > 3  # neither is it far too small
    certain = torch.zeros(9)
    assert surprise(certain, certain == 0) == 0


@pytest.mark.parametrize("temperature", [0.7, 1.4])
def test_draws_at_another_temperature_surprise(temperature):
    found = [surprise(*update) for update in zip(*draws(20, 4000, temperature), strict=True)]
    assert min(found) > MOST_SURPRISE


def test_one_token_of_any_log_p_adds_at_most_one_nat():
    here = torch.tensor([-1.0, -2.0, -3.0, -0.5])
    assert log_p_distance(here, here - torch.tensor([0, 0.5, -0.5, 9999])) == 0.5
    assert log_p_distance(here, here * torch.nan) == 1


# --- ten mistakes ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tiny_config_in, tiny_folder, tmp_path_factory):
    """A run whose adapter matters, and the server of its answers."""
    folder = tmp_path_factory.mktemp("policy")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f"{json.dumps(row)}\n" for row in ROWS))
    words = [
        "data=jsonl",
        f"data.train_files=[{rows}]",
        "data.eval_rows=1",
        "train.objective=grpo",
        "grpo.answers=2",
        "grpo.max_new_tokens=8",
        f"grpo.rewards=[{__name__}.length]",
        "adapter.r=8",
        "adapter.alpha=8",
        "adapter.target_modules=all-linear",
        "adapter.dropout=0.3",
    ]
    with playing_vllm(tiny_config_in(folder, *words).model) as vllm:
        run = build_run(tiny_config_in(folder, *words, f"train.server={vllm.url}"), folder / "run")
        torch.manual_seed(0)
        move(run, 0.2)
        yield run, vllm


@torch.no_grad()
def move(run: BuiltRun, distance: float) -> None:
    """As an update does."""
    for weight in run.model.trained:
        weight += distance * torch.randn_like(weight)
    run.progress.update += 1


def draw(run: BuiltRun) -> dict[str, float]:
    """Figures of answers by the adapter that the server is given now."""
    run.evaluation.sampler.served_update = None
    return run.objective.draw([0, 1, 2]).figures


@pytest.mark.parametrize(("change", "looks"), WRONG_ADAPTERS.values(), ids=WRONG_ADAPTERS)
def test_answers_by_a_wrong_adapter_are_refused_by_its_name(served, change, looks):
    run, _ = served
    figures = draw(run)
    assert figures[DISTANCE] < figures[LIMIT] / 10
    move(run, 0.01)
    weights = [weight.clone() for weight in run.model.trained]
    with changed_adapters(change), pytest.raises(UserError) as caught:
        draw(run)
    assert "answers by another policy than the adapter in training: its log p are" in str(
        caught.value
    )
    assert f"as if by {looks} (" in str(caught.value)
    assert all(map(torch.equal, weights, run.model.trained))
    draw(run)  # nothing of the search for a cause is left


def test_answers_by_the_adapter_of_the_update_before_are_refused(served):
    run, _ = served
    with changed_adapters(Stale()):
        draw(run)
        move(run, 0.01)
        with pytest.raises(UserError, match="as if by the adapter of the update before "):
            draw(run)


@pytest.mark.parametrize("temperature", [0.5, 1.5])
def test_answers_at_another_temperature_are_refused(served, monkeypatch, temperature):
    run, vllm = served
    monkeypatch.setattr(vllm, "temperature", temperature)
    monkeypatch.setattr(vllm, "sends_processed", True)
    with pytest.raises(UserError, match=f"as if by a temperature of {temperature} "):
        draw(run)
    # Also where there is no earlier update to compare with.
    monkeypatch.setattr(run.objective.policy, "limit", None)
    with pytest.raises(UserError, match=f"base without .* as if by a temperature of {temperature}"):
        draw(run)


def test_answers_at_a_temperature_that_their_log_p_hide_are_refused(served, monkeypatch):
    run, vllm = served
    monkeypatch.setattr(vllm, "temperature", 0.1)
    with pytest.raises(UserError, match="it samples at a temperature below 1, or from a part"):
        draw(run)


def test_answers_by_another_base_are_refused(served, monkeypatch):
    run, vllm = served
    monkeypatch.setattr(run.objective.policy, "limit", None)
    head = vllm.unadapted.get_output_embeddings().weight
    monkeypatch.setattr(head, "data", head + 0.1 * torch.randn_like(head))
    with pytest.raises(UserError, match="the base without an adapter.* are its base weights those"):
        draw(run)


def test_a_limit_of_the_users_lets_a_wrong_policy_pass(served, monkeypatch):
    run, _ = served
    monkeypatch.setattr(run.objective.policy, "limit", 1.0)
    change, _ = WRONG_ADAPTERS["no gate"]
    with changed_adapters(change):
        assert draw(run)[DISTANCE] > 0.01


# --- sound answers --------------------------------------------------------------------------------


class RecordedChoice(TokenChoice):
    """Records log p of every token that it chooses, by the row of the batch."""

    def __init__(self, batch, *settings) -> None:
        super().__init__(batch, *settings)
        self.sampled = [SampledTokens([], [], []) for _ in batch]
        self.rows = self.sampled

    def tokens(self, logits_BV):
        tokens_B = super().tokens(logits_BV)
        log_p_BV = logits_BV.float().log_softmax(-1)
        log_p_B = log_p_BV.gather(-1, tokens_B[:, None])[:, 0]
        highest_B, likeliest_B = log_p_BV.max(-1)
        found = (log_p_B, highest_B, likeliest_B == tokens_B)
        for row, *values in zip(self.rows, *(each.tolist() for each in found), strict=True):
            for part, value in zip(row, values, strict=True):
                part.append(value)
        return tokens_B

    def keep(self, rows_B):
        super().keep(rows_B)
        self.rows = [self.rows[row] for row in rows_B.tolist()]


class RecordedModel(LoadedModel):
    """The engine of this process as if it were a server's."""

    def without_adapter(self):
        return self.model.disable_adapter()

    def generate(self, batch, config, streamer=None):
        choices = []

        def choose(*settings):
            choices.append(RecordedChoice(*settings))
            return choices[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generate, "TokenChoice", choose)
            for answers in super().generate(batch, config, streamer):
                [choice] = choices
                rows = {
                    request.key: row for request, row in zip(batch, choice.sampled, strict=True)
                }
                yield [answer._replace(sampled=rows[answer.generation.key]) for answer in answers]


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("dtype", "autocasts"),
    [("float32", True), ("bfloat16", True), ("bfloat16", False)],
    ids=["float32", "bfloat16", "bfloat16 beside float32 adapters"],
)
def test_no_sound_answer_is_refused_in_1000_updates(
    tiny_config, write_jsonl, monkeypatch, dtype, autocasts
):
    """By two computations of the same model: with a cache and without."""
    start = Sampler.__init__

    def record(sampler, config, tokenizer, language_model, *rest) -> None:
        start(sampler, config, tokenizer, language_model, *rest)
        sampler.is_served = True
        sampler._serve = lambda: None
        model = language_model.model
        base = language_model.causal_lm
        engine = language_model if autocasts else LanguageModel(model, base)
        sampler.engine = RecordedModel(model, base, tokenizer, engine.generating)

    monkeypatch.setattr(Sampler, "__init__", record)
    config = tiny_config(
        "data=jsonl",
        f"data.train_files=[{write_jsonl('rows.jsonl', ROWS)}]",
        "data.eval_rows=1",
        f"model.dtype={dtype}",
        "train.objective=grpo",
        "train.eval_every=null",
        "train.save_every=null",
        "train.batch_size=3",
        "train.max_updates=1000",
        "optimizer.lr=1e-2",
        "adapter.r=8",
        "adapter.alpha=8",
        "adapter.target_modules=all-linear",
        "grpo.answers=4",
        "grpo.max_new_tokens=6",
        f"grpo.rewards=[{__name__}.vowels]",
    )
    train(config)
    updates = [line for line in metrics_of(config) if "train/reward" in line]
    assert len(updates) == 1000
    assert sum(line["train/reward"] for line in updates[-50:]) > sum(
        line["train/reward"] for line in updates[:50]
    )
    furthest = max(updates, key=lambda line: line[DISTANCE])
    print(f"{furthest[DISTANCE]:.2g} of {furthest[LIMIT]:.2g} at update {furthest['update']}")
