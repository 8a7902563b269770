"""A run proves its adapters before it costs anything, and prints what they cover."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import STATES

from cera_train.adapters.build import build
from cera_train.adapters.targets import describe_left_out, describe_targets
from cera_train.adapters.unfused import describe_unfused
from cera_train.cera.coverage import Coverage
from cera_train.common.errors import UserError
from cera_train.training.train import train

FAMILIES = {family.model_type: family for family in STATES}


@pytest.fixture
def folder_of(tokenizer, tmp_path):
    """folder_of("mamba"): a tiny model of that family, with the tokenizer, for `model.path`."""

    def folder_of(name: str):
        FAMILIES[name].model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return folder_of


def test_an_adapter_that_never_runs_stops_the_run_before_its_first_evaluation(tiny_config, monkeypatch, capsys):
    """Here the last layer is never reached: the decoder leaves it out."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer,
        "forward",
        lambda self, x, *args, **kwargs: x if self.self_attn.layer_idx == 1 else forward(self, x, *args, **kwargs),
    )
    config = tiny_config("train.max_updates=1")
    with pytest.raises(UserError) as caught:
        train(config)
    assert str(caught.value) == (
        "adapter.target_modules: 2 of 4 adapted modules would not train. model.layers.1.self_attn.q_proj, "
        "model.layers.1.self_attn.v_proj: LlamaAttention, the layer around it, is never reached. Leave them out, or "
        "set train.check_coverage=false."
    )
    assert "evaluation at update" not in capsys.readouterr().out


LEAVES_OUT_THE_LAST_LAYER = """
import sys
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from cera_train.cli import train

forward = LlamaDecoderLayer.forward
LlamaDecoderLayer.forward = (
    lambda self, x, *args, **kwargs: x if self.self_attn.layer_idx == 1 else forward(self, x, *args, **kwargs)
)
sys.argv[0] = "cera-train"
train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_several_processes_refuse_together(tiny_folder, tmp_path, strategy):
    """In one line with status 2, whether each holds the whole model or a shard."""
    (tmp_path / "script.py").write_text(LEAVES_OUT_THE_LAST_LAYER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "script.py"]
    settings = [f"model.path={tiny_folder}", "model.dtype=float32", "data.max_length=256", "adapter.r=4"]
    done = subprocess.run(
        [*command, *settings, f"distributed.strategy={strategy}", "train.max_updates=1"],
        **{"capture_output": True, "text": True, "cwd": tmp_path, "check": False, "timeout": 300},
    )
    assert done.returncode != 0
    assert "2 of 4 adapted modules would not train. model.layers.1.self_attn.q_proj" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert "evaluation at update" not in done.stdout


def test_the_proof_can_be_switched_off(tiny_config, monkeypatch):
    monkeypatch.setattr(Coverage, "problem", lambda coverage: "nothing trains.")
    with pytest.raises(UserError, match="nothing trains"):
        train(tiny_config("train.max_updates=1"))
    train(tiny_config("train.max_updates=1", "train.check_coverage=false"))


@pytest.mark.parametrize(
    "more", [[], ["adapter=full", "adapter.r=null"], ["adapter=lora"]], ids=["cera", "full", "lora"]
)
def test_the_proof_changes_no_number_of_a_run(tiny_config, more):
    folders = [
        train(tiny_config(*more, "train.max_updates=3", f"train.check_coverage={value}", f"name={value}"))["folder"]
        for value in ("true", "false")
    ]
    files = [(Path(folder) / "metrics.jsonl").read_text() for folder in folders]
    lines = [[json.loads(line) for line in file.splitlines()] for file in files]
    losses = [[line.get("train/loss", line.get("eval/loss")) for line in run] for run in lines]
    assert losses[0] == losses[1]


def test_the_start_prints_how_many_projections_are_adapted(tiny_config, capsys):
    train(tiny_config("train.max_updates=1", "adapter.layers=[1]"))
    assert "coverage   q_proj: 1 of 2 layers; v_proj: 1 of 2 layers\n" in capsys.readouterr().out


def test_targets_are_counted_by_name(compose):
    def lines(name: str, *overrides: str) -> tuple[str, str]:
        model = build(FAMILIES[name].model(), compose("adapter.r=4", *overrides).adapter)
        return describe_targets(model), describe_left_out(model)

    whole, left_out = lines("zamba2", "adapter.target_modules=[q_proj,v_proj,in_proj]")
    assert whole == "in_proj q_proj v_proj: 5 of 5 layers"
    whole, left_out = lines("jamba", "adapter.target_modules=all-linear")
    projections = "in_proj x_proj out_proj gate_proj up_proj down_proj q_proj k_proj v_proj o_proj"
    with_router = f"{projections} router: 11 of 11 layers"  # up to transformers 5.20 Jamba's is a linear layer
    assert whole in (f"{projections}: 10 of 10 layers", with_router)
    assert left_out == (
        "without dt_proj: JambaMambaMixer reads its weight without calling it, so an adapter there would never run"
    )


# --- a model with a fused kernel -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cera", "lora"])
def test_a_target_that_a_kernel_bypasses_is_refused_by_name(tiny_config, folder_of, kind):
    config = tiny_config(
        f"model.path={folder_of('mamba')}", f"adapter={kind}", "adapter.target_modules=[in_proj,x_proj]"
    )
    with pytest.raises(UserError) as caught:
        train(config)
    assert str(caught.value) == (
        "adapter.target_modules: x_proj: mamba_inner_fn of MambaMixer reads its weight without calling it in training, "
        "so an adapter there would never run. Target in_proj instead, or set adapter.unfused=true."
    )


def test_unfused_trains_what_the_kernel_bypasses_and_prints_the_cost(tiny_config, folder_of, capsys):
    overrides = [f"model.path={folder_of('mamba')}", "adapter.target_modules=[x_proj,out_proj]", "adapter.unfused=true"]
    result = train(tiny_config(*overrides, "train.max_updates=4", "adapter.r=4"))
    out = capsys.readouterr().out
    assert result["eval/perplexity"] < result["perplexity_before"]
    assert "coverage   x_proj out_proj: 4 of 4 layers\n" in out
    assert (
        "unfused    2 MambaMixer layers train without mamba_inner_fn, which is not installed here: it costs nothing\n"
        in out
    )


def test_the_cost_of_the_unfused_path_is_measured_where_there_is_a_kernel(compose, monkeypatch):
    from transformers.models.mamba2 import modeling_mamba2

    def kernel(xz, *args, outproj_weight, **kwargs):
        return torch.nn.functional.linear(xz[..., : outproj_weight.shape[1]], outproj_weight)

    adapter = compose("adapter.r=4", "adapter.target_modules=[out_proj]", "adapter.unfused=true").adapter
    model = build(FAMILIES["mamba2"].model(), adapter).train()
    assert describe_unfused(model).endswith("not installed here: it costs nothing")
    monkeypatch.setattr(modeling_mamba2, "mamba2_split_conv1d_scan_combined", kernel)
    text = describe_unfused(model)
    assert text.startswith("2 Mamba2Mixer layers train without kernel: 512 tokens take ")
    unfused, fused = (float(part.split(" ms")[0].split()[-1]) for part in text.split("instead of"))
    assert 0 < fused < unfused
    assert not any(module.training for module in model.modules() if type(module).__name__ == "Mamba2Mixer")


def test_unfused_without_a_kernel_to_leave_is_refused(tiny_config):
    with pytest.raises(UserError, match=r"adapter\.unfused=true: no fused kernel of this model"):
        train(tiny_config("adapter.unfused=true"))


def test_a_target_in_none_of_the_layers_is_refused(compose):
    adapter = compose("adapter.r=4", "adapter.target_modules=[in_proj,q_proj]", "adapter.layers=[0]").adapter
    with pytest.raises(UserError, match=r"adapter\.layers=\[0\]: q_proj is in none of them\. .* \(\[1\]\)"):
        build(FAMILIES["bamba"].model(), adapter)
