"""DDP and FSDP2 over NCCL compute what one GPU computes."""

import pytest
import torch
from conftest import TINY
from several_processes import train_in_processes
from tiny_runs import all_losses_of, evaluations_of

from cera_train.training.train import train

pytestmark = pytest.mark.gpu


def test_two_gpus_replicated_or_sharded_give_the_losses_of_one(
    tiny_folder, tmp_path, compose, device
):
    """79 rows in batches of 13: uneven shares, and epochs that end with nothing for one of the
    processes."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    arguments = [
        f"model.path={tiny_folder}",
        *TINY,
        "adapter.r=4",
        "adapter.dropout=0",
        "train.batch_size=13",
        "train.max_updates=14",
        "train.eval_every=7",
        "train.micro_batch_tokens=300",
        "train.save_every=null",
        f"output_dir={tmp_path / 'outputs'}",
        "train.compile=false",
    ]
    one = {
        "float32": [],
        "nf4": ["model.dtype=bfloat16", "model.quantization=nf4"],
    }
    runs = [
        [*arguments, *settings, f"distributed.strategy={strategy}", f"name={strategy}_{base}"]
        for base, settings in one.items()
        for strategy in ("ddp", "fsdp")
    ]
    for base, settings in one.items():
        train(compose(*arguments, *settings, f"name=one_{base}"))
    outputs = tmp_path / "outputs"
    out = train_in_processes(runs, 2, tmp_path)
    assert out.count(f"2 x {device.type}") == 4
    for base, tolerance in (("float32", 1e-4), ("nf4", 5e-3)):
        for strategy in ("ddp", "fsdp"):
            found, expected = (outputs / f"{name}_{base}" for name in (strategy, "one"))
            assert all_losses_of(found) == pytest.approx(all_losses_of(expected), rel=tolerance), (
                strategy,
                base,
            )
    for found, expected in zip(
        evaluations_of(outputs / "fsdp_float32"),
        evaluations_of(outputs / "one_float32"),
        strict=True,
    ):
        assert found == pytest.approx(expected, rel=1e-3)
