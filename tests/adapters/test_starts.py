"""Starts that W0 alone does not give again: the adapter begins where the paper says, and the model
as the base; what a run saves is a plain LoRA; a cut run ends with the same bytes."""

from dataclasses import replace
from functools import partial

import peft
import pytest
import torch
from branches import MASKS, ROWS
from conftest import make_tiny_llama
from several_processes import cut_copy
from tiny_runs import adapter_bytes, folder_of
from transformers import AutoModelForCausalLM

from cera_train.adapters import build, saved, starts
from cera_train.adapters.families import family
from cera_train.common.errors import UserError
from cera_train.model.batches import MicroBatches, padded_batch
from cera_train.model.language_model import LanguageModel
from cera_train.runs.results import LOSSES_AFTER, TokenLosses
from cera_train.settings.adapters import AdapterConfig
from cera_train.training.build import build_data
from cera_train.training.train import train

STARTS = ("eva", "corda", "lora_ga")
R = 3
ALL = range(len(ROWS))
PLACE = "model.layers.1.mlp.up_proj"
IDS = torch.arange(3, 75).view(3, 24)

every_start = pytest.mark.parametrize("start", STARTS)


def lora(start: str, **changes) -> AdapterConfig:
    return AdapterConfig("lora", R, 2.0 * R, settings={"init_lora_weights": start} | changes)


def rows_of(base, numbers=ALL) -> starts.StartRows:
    def load(group: list[int]):
        return padded_batch([ROWS[row] for row in group], [MASKS[row] for row in group])

    supervised = [sum(mask[1:]) for mask in MASKS]
    return starts.StartRows([*numbers], supervised, load, LanguageModel(base, base))


def built(config: AdapterConfig, numbers=ALL):
    base = make_tiny_llama().requires_grad_(False)
    attach = partial(starts.attach_started, rows=rows_of(base, numbers))
    return build.build(base, config, attach=attach)


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def main_directions(start: str) -> torch.Tensor:
    """[R, d_in] orthonormal rows: what the rows of A span, by a few lines over all tokens at
    once."""
    base = make_tiny_llama()
    module = base.get_submodule(PLACE)
    inputs = []
    module.register_forward_hook(lambda _, args, output: inputs.append(args[0][0]))
    rows = rows_of(base)
    for batch in rows.each():
        (rows.losses(batch).mean() / len(ROWS)).backward()
    if start == "lora_ga":
        return torch.linalg.svd(module.weight.grad).Vh[:R]
    if start == "eva":
        masks = [torch.tensor(mask) for mask in MASKS]
        x = torch.cat([x[mask] for x, mask in zip(inputs, masks, strict=True)]).detach()
        return torch.linalg.svd(x - x.mean(0)).Vh[:R]
    scaled = [(x / x.max().abs()).detach() for x in inputs]
    C = sum(x.T @ x for x in scaled) / len(scaled)
    C += 0.01 * C.diagonal().mean() * torch.eye(len(C))
    part = torch.linalg.svd(module.weight @ C).Vh[:R] @ torch.linalg.inv(C)
    return torch.linalg.qr(part.T).Q.T.detach()


@every_start
def test_a_spans_the_directions_of_the_paper_and_update_0_is_the_base(start):
    settings = {"eva_config": {"rho": 1.0, "tau": 0.999}} if start == "eva" else {}
    model = built(lora(start, **settings))  # with rho = 1 no rank moves to another module
    A = model.get_submodule(f"base_model.model.{PLACE}").lora_A["default"].weight.detach()
    Q = torch.linalg.qr(A.T).Q
    cosines = torch.linalg.svdvals(main_directions(start) @ Q)
    assert cosines.min() > 0.97  # EVA stops before its directions are those of all rows
    torch.testing.assert_close(logits(model), logits(make_tiny_llama()), rtol=1e-4, atol=1e-4)
    assert saved.keeps_base(model) == (start == "eva")


@pytest.mark.parametrize(
    "start", [pytest.param(start, marks=pytest.mark.slow) for start in STARTS[:2]] + ["lora_ga"]
)
def test_a_run_saves_a_plain_lora_and_a_cut_run_ends_with_the_same_bytes(start, tiny_config):
    words = [f"adapter.settings={{init_lora_weights: {start}}}", "adapter.start_rows=8"]
    config = tiny_config("adapter=lora", "adapter.alpha=6", *words, "train.max_updates=8")
    train(config)
    cut = replace(config, name="cut")
    cut_copy(folder_of(config), folder_of(cut), 4)
    train(cut)
    assert adapter_bytes(cut) == adapter_bytes(config)

    folder = folder_of(config) / "adapter"
    written = peft.PeftConfig.from_pretrained(folder)
    assert written.init_lora_weights is True
    assert written.r == (4 if start == "eva" else 8)
    base = AutoModelForCausalLM.from_pretrained(config.model.path)
    loaded = peft.PeftModel.from_pretrained(base, folder).eval()
    rows = build_data(config).rows.evaluation
    batch = MicroBatches(rows, False, 1, torch.device("cpu")).load([0])
    losses = LanguageModel(loaded, loaded.get_base_model())(batch).tolist()
    expected = TokenLosses.read(folder_of(config) / LOSSES_AFTER).losses[: len(losses)]
    assert losses == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_eva_moves_ranks_between_modules():
    model = built(lora("eva"))
    ranks = {layer.r["default"] for layer in starts.lora_layers(model).values()}
    assert len(ranks) > 1


@pytest.mark.parametrize(
    ("config", "numbers", "message"),
    [
        (
            replace(lora("eva"), r=30),
            [0],
            "adapter.start_rows=1: they have 36 .* EVA at this rank needs 60",
        ),
        (lora("eva", eva_config={"tau": 1.0}), range(2), "not converged .*eva_config.tau"),
        (replace(lora("lora_ga"), r=9), range(2), r"adapter.r=9: .* model\.\S+ has 16"),
        (
            replace(lora("pissa_niter_4"), target_modules=["q_proj", "embed_tokens"]),
            range(2),
            "init_lora_weights=pissa_niter_4 .* leave .*embed_tokens out",
        ),
        (lora("corda", corda_config={"cache_file": "/x"}), range(2), "corda_config can import"),
    ],
)
def test_a_start_that_cannot_work_is_refused(monkeypatch, config, numbers, message):
    monkeypatch.setattr(starts, "MOST_PASSES", 2)
    with pytest.raises(UserError, match=message):
        built(config, numbers)


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_an_adapter_without_the_part_of_w0_that_it_took_is_refused(start, tmp_path):
    """PEFT saves the trained adapter without the start. Its LoRA-GA then loads, without a word, on
    the whole W0."""
    model = built(lora(start))
    peft.PeftModel.save_pretrained(model, tmp_path)
    with pytest.raises(UserError, match=rf"^{tmp_path} .*{start}, .*path_initial_model_"):
        saved.attach(make_tiny_llama(), tmp_path)


@pytest.mark.parametrize("start", ["corda", "lora_ga"])
def test_quantised_weights_and_shards_give_no_part_away(start):
    base = make_tiny_llama()
    base.is_quantized = True
    with pytest.raises(UserError, match=f"init_lora_weights={start} .*model.quantization=none"):
        build.build(base, lora(start), attach=partial(starts.attach_started, rows=rows_of(base)))
    with pytest.raises(UserError, match=f"init_lora_weights={start} .*distributed.strategy=ddp"):
        starts.check_shards(family("lora").peft_config(lora(start)))
