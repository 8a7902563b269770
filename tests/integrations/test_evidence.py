"""The benchmarks of `make evidence`: on inputs of known distribution the controls of
one_projection.py come out right, and every dose of ground_truth.py's teachers has the same power.
dose.py and forgetting.py find what made-up results hold."""

import itertools

import numpy as np
import pytest
import torch
from made_files import write_json
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import dose, forgetting, ground_truth, one_projection
from benchmarks.ground_truth import SEED, Teacher
from benchmarks.one_projection import TEACHERS, Data, Mixture, train
from benchmarks.tiny_models import byte_tokenizer


@pytest.fixture
def data_of(monkeypatch):
    """data_of(teacher) -> 3,000 normal inputs of width 16 with a mean, and its targets."""
    monkeypatch.setattr(one_projection, "HELD_OUT", 1_000)
    monkeypatch.setattr(one_projection, "STEPS", 300)
    monkeypatch.setattr(one_projection, "BATCH", 256)
    monkeypatch.setattr(one_projection, "RANK", 16)
    x = torch.randn(3_000, 16, generator=torch.Generator().manual_seed(0)) + 1
    return lambda teacher: Data.of(x, Mixture(x, 192, TEACHERS[teacher], SEED)(x))


def test_a_gate_wins_on_the_even_teacher_and_not_on_the_linear_one(data_of):
    even = data_of("even")
    linear = data_of("linear")
    half_scale = {"activation": "identity", "alpha": one_projection.RANK / 2}
    assert even.r2(even.best_affine()) < 0.1
    assert train(even, 1e-2) > 0.3
    assert train(even, 1e-2, **half_scale) < 0.1
    best = linear.r2(linear.best_of_rank(linear.best_affine()))
    for settings in ({}, half_scale):
        assert 0.9 < train(linear, 1e-2, **settings) < best


ROWS = [("Tom", f" has {number} apples and {number**3} pears.") for number in range(60)]


@pytest.fixture
def teacher_of(monkeypatch):
    """teacher_of(dose, place=...) beside a tiny Llama of random weights."""
    monkeypatch.setattr(one_projection, "HELD_OUT", 500)
    torch.manual_seed(0)
    tokenizer = byte_tokenizer()
    base = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **ground_truth.SIZES)).eval()
    return lambda dose, **settings: Teacher(base, tokenizer, dose, SEED, ROWS, **settings)


@pytest.mark.parametrize("place", dose.PLACES.values())
def test_every_dose_has_the_same_power_and_less_of_it_is_affine(teacher_of, place):
    shares = []
    for amount in dose.DOSES:
        teacher = teacher_of(amount, place=place)
        x, output = teacher.record(ROWS)
        power = teacher.branch(x).square().mean() / output.square().mean()
        assert power.item() == pytest.approx(ground_truth.GAIN**2, rel=1e-4)
        shares.append(teacher.r2_of_affine)
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == pytest.approx(1)


def test_the_gain_of_a_gate_is_found_where_it_grows_with_the_dose(tmp_path, monkeypatch):
    """At v_proj the gate gains the dose, a little more on each base; at down_proj nothing."""
    monkeypatch.setattr(dose, "FOLDER", tmp_path)
    cells = [dict(arm="half_qv", chosen={}, outcomes=dict(loss=[2.4, 2.6]))]
    seeds = range(4)
    for seed in seeds:
        ends = {}
        for place, amount in itertools.product(dose.PLACES, dose.DOSES):
            gain = -amount - seed / 100 if place == "v_proj" else seed / 100 - 0.015
            found = dict(difference=gain, between=0.001, obstacles=[])
            pairs = dose.ARMS.values()
            contrasts = [found | dict(first=first, second=second) for first, second in pairs]
            name = dose.name_of(place, amount)
            ends[name] = dict(base=3.0, teacher=1.0)
            study = dict(contrasts=contrasts, cells=cells)
            write_json(dose.folder_of(seed) / name / "report" / "study_results.json", study)
        write_json(dose.folder_of(seed) / "ends.json", ends)
    judged = dose.judge([dose.gather(seed) for seed in seeds])
    adapted, other = judged["primary"]
    assert adapted["difference"] == pytest.approx(-1)
    assert adapted["p_holm"] < 0.001
    assert other["p_holm"] == 1
    assert judged["smallest_dose"]["v_proj, adapters on q and v"] == 0.1
    assert judged["shares"]["v_proj_d0"] == {"half_qv": 0.25}


def test_arms_are_compared_at_one_loss_however_their_rates_differ():
    """Linear in the logarithm of the loss where it first falls to that loss."""
    losses = np.array([0.3, 0.15, 0.08, 0.2])
    rises = np.array([1, 2]) - np.log(losses)[:, None]
    assert forgetting.at_loss(losses, rises, 0.1) == pytest.approx([1, 2] - np.log(0.1))
    assert np.isnan(forgetting.at_loss(losses, rises, 0.05)).all()


def test_a_method_that_forgets_less_at_equal_loss_is_found():
    draw = np.random.default_rng(0)
    losses = np.array([0.3, 0.15, 0.08, 0.05])

    def frontier(faster: float, less: float) -> forgetting.Frontiers:
        rises = 1 - np.log(losses * faster) - less + draw.normal(0, 0.01)
        of_rows = {
            text: rises[:, None] + draw.normal(0, 0.1, (4, rows))
            for text, rows in forgetting.ROWS.items()
        }
        return {"losses": losses * faster} | of_rows

    tokens = {text: np.full(rows, 30) for text, rows in forgetting.ROWS.items()}
    others = set(forgetting.RATES) - {"cera"}
    seeds = [
        {"tokens": tokens, "cera": frontier(0.9, 0.3)} | {arm: frontier(1, 0) for arm in others}
        for _ in range(6)
    ]
    del seeds[0]["lora_kaiming"]
    judged = forgetting.judge(seeds)
    assert {each["asked"]: each["seeds"] for each in judged["beside"]}[
        "gsm8k at 0.1: lora_kaiming - lora"
    ] == 5
    cera, half, gate = judged["primary"]
    assert cera["difference"] == pytest.approx(-0.3, abs=0.03)
    assert cera["p_holm"] < 0.01
    assert half["p_holm"] > 0.05
    assert gate["p_holm"] < 0.01
