"""A run checks its adapters before it costs anything, and prints what they cover."""

import pytest
from commands import command
from conftest import TINY
from peft.tuners.tuners_utils import BaseTunerLayer
from tiny_runs import all_losses_of

from benchmarks.tiny_models import tiny_model
from cera_train.adapters.build import build
from cera_train.common.errors import UserError
from cera_train.training.train import train

IDLE = ["adapter.target_modules=[in_proj,dt_proj]", "train.max_updates=1"]


@pytest.fixture
def mamba(tokenizer, tmp_path) -> str:
    """A tiny model that never calls dt_proj, so that an adapter on it would never run."""
    tiny_model("mamba", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "mamba")
    tokenizer.save_pretrained(tmp_path / "mamba")
    return f"model.path={tmp_path / 'mamba'}"


def test_an_adapter_that_never_runs_stops_the_run_before_its_first_evaluation(
    tiny_config, mamba, capsys
):
    settings = [mamba, *IDLE, "train.eval_every=null"]
    with pytest.raises(UserError) as caught:
        train(tiny_config(*settings))
    assert str(caught.value) == (
        "adapter.target_modules: 2 of 4 adapted modules would not train. "
        "backbone.layers.0.mixer.dt_proj, backbone.layers.1.mixer.dt_proj: the model never calls "
        "it. Leave them out, with all-linear by adapter.settings.exclude_modules=[...], or set "
        "train.check_coverage=false."
    )
    assert "evaluation at update" not in capsys.readouterr().out
    train(tiny_config(*settings, "train.check_coverage=false"))


@pytest.mark.slow
def test_several_processes_refuse_an_idle_adapter_together(mamba, tmp_path):
    """In one line with status 2, where each holds a shard."""
    settings = ["launch.processes=2", "distributed.strategy=fsdp", "adapter.r=4"]
    done = command("cera-train", mamba, *IDLE, *TINY, *settings, cwd=tmp_path)
    assert done.returncode == 2
    [line] = [line for line in done.stderr.splitlines() if line.startswith("cera-train: ")]
    assert "2 of 4 adapted modules would not train. backbone.layers.0.mixer.dt_proj" in line
    assert "evaluation at update" not in done.stdout


def test_the_coverage_check_changes_no_number_of_a_run(tiny_config, finished_config):
    unchecked = tiny_config("train.check_coverage=false")
    train(unchecked)
    assert all_losses_of(unchecked) == all_losses_of(finished_config)


@pytest.mark.parametrize("kind", ["cera", "miss"])
def test_all_linear_leaves_out_a_layer_that_no_pass_reaches(tiny_llama, compose, kind):
    tiny_llama.config.num_hidden_layers = 1  # the decoder runs only this many of its layers
    adapter = compose(f"adapter={kind}", "adapter.r=4", "adapter.target_modules=all-linear").adapter
    model = build(tiny_llama, adapter)
    adapted = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    assert len(adapted) == 7
    assert all(".layers.0." in name for name in adapted)
    assert not model.base_model.model.training
    assert not any(module._forward_hooks for module in tiny_llama.modules())
