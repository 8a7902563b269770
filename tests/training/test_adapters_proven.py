"""A run proves its adapters before it costs anything, and prints what they cover."""

from __future__ import annotations

import subprocess
import sys

import pytest
from architectures import STATES
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_runs import all_losses_of

from cera_train.adapters.build import build
from cera_train.adapters.targets import describe_left_out, describe_targets
from cera_train.common.errors import UserError
from cera_train.training.train import train

FAMILIES = {family.model_type: family for family in STATES}


def test_an_adapter_that_never_runs_stops_the_run_before_its_first_evaluation(tiny_config, monkeypatch, capsys):
    """Here the last layer is never reached: the decoder leaves it out."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer,
        "forward",
        lambda self, x, *args, **kwargs: x if self.self_attn.layer_idx == 1 else forward(self, x, *args, **kwargs),
    )
    with pytest.raises(UserError) as caught:
        train(tiny_config("train.max_updates=1"))
    assert str(caught.value) == (
        "adapter.target_modules: 2 of 4 adapted modules would not train. model.layers.1.self_attn.q_proj, "
        "model.layers.1.self_attn.v_proj: the model never calls it. Leave them out, "
        "with all-linear by adapter.settings.exclude_modules=[...], or set train.check_coverage=false."
    )
    assert "evaluation at update" not in capsys.readouterr().out
    train(tiny_config("train.max_updates=1", "train.check_coverage=false"))


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


@pytest.mark.parametrize("more", [[], ["adapter=full", "adapter.r=null"]], ids=["cera", "full"])
def test_the_proof_changes_no_number_of_a_run(tiny_config, more):
    settings = [*more, "train.max_updates=3"]
    runs = [tiny_config(*settings, f"train.check_coverage={value}", f"name={value}") for value in ("true", "false")]
    for run in runs:
        train(run)
    assert all_losses_of(runs[0]) == all_losses_of(runs[1])


def test_targets_are_counted_by_name(compose):
    def lines(name: str, *overrides: str) -> tuple[str, str]:
        model = build(FAMILIES[name].model(), compose("adapter.r=4", *overrides).adapter)
        return describe_targets(model), describe_left_out(model)

    whole, left_out = lines("zamba2", "adapter.target_modules=[q_proj,v_proj,in_proj]")
    assert whole == "in_proj q_proj v_proj: 5 of 5 layers"
    whole, left_out = lines("jamba", "adapter.target_modules=all-linear")
    projections = "in_proj gate_proj up_proj down_proj q_proj k_proj v_proj o_proj"
    with_router = f"{projections} router: 9 of 9 layers"  # up to transformers 5.20 Jamba's is a linear layer
    assert whole in (f"{projections}: 8 of 8 layers", with_router)
    assert left_out == "without 3 projections that the model or its kernels bypass: x_proj, dt_proj, out_proj"


def test_what_a_mamba_model_does_not_call_is_left_out_of_all_linear_and_refused_by_name(
    tiny_config, tokenizer, tmp_path, capsys
):
    FAMILIES["mamba"].model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    mamba = f"model.path={tmp_path / 'mamba'}"
    train(tiny_config(mamba, "adapter.target_modules=all-linear", "train.max_updates=1"))
    left_out = "without 6 projections that the model or its kernels bypass: x_proj, dt_proj, out_proj"
    assert f"coverage   in_proj: 2 of 2 layers\ncoverage   {left_out}\n" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"\Aadapter.target_modules: 2 of 4 .*dt_proj: the model never calls it"):
        train(tiny_config(mamba, "adapter.target_modules=[in_proj,dt_proj]", "name=dt"))


@pytest.mark.parametrize("kind", ["cera", "miss"])
def test_all_linear_leaves_out_a_layer_that_no_pass_reaches(tiny_llama, compose, kind):
    tiny_llama.config.num_hidden_layers = 1  # the decoder runs so many of its layers
    adapter = compose(f"adapter={kind}", "adapter.r=4", "adapter.target_modules=all-linear").adapter
    model = build(tiny_llama, adapter)
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert len(adapted) == 7
    assert all(".layers.0." in name for name in adapted)
    assert not model.base_model.model.training
    assert not any(module._forward_hooks for module in tiny_llama.modules())
