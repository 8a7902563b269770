"""`cera-export`: a folder is the run that it was made of, or it is refused."""

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from conftest import make_tiny_llama
from evaluated_runs import checker_of, export
from made_files import change_json, write_json, write_lines
from played_vllm import playing_vllm
from safetensors.torch import load_file, save_file

from cera_train.common.errors import DiffersError, UserError
from cera_train.common.files import read_json
from cera_train.distributed.accelerator import this_device
from cera_train.model.weights import load_model
from cera_train.settings.model import ModelConfig
from cera_train.training.train import train


def chats() -> list[dict]:
    """Chats whose answers follow from their questions."""
    rows = []
    for number in range(48):
        a = number % 8
        b = number // 8 + 1
        question = {"role": "user", "content": f"{a} and {b}"}
        rows.append({"messages": [question, {"role": "assistant", "content": f"it is {a + b}"}]})
    return rows


@pytest.fixture(scope="module")
def base(tokenizer, tmp_path_factory) -> Path:
    """A tiny model as wide as a block of NF4."""
    folder = tmp_path_factory.mktemp("deployed")
    model = make_tiny_llama(len(tokenizer), hidden_size=64)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder / "base"


@pytest.fixture(scope="module")
def run(compose, base) -> Path:
    """A run of the tiny model on chats."""
    output = base.parent
    rows = write_lines(output / "chats.jsonl", chats())
    config = compose(
        f"model.path={base}",
        "model.dtype=float32",
        f"data.train_files=[{rows}]",
        "data.eval_rows=8",
        "data.max_length=128",
        "adapter=lora",
        "adapter.r=4",
        "adapter.target_modules=all-linear",
        "optimizer.lr=1e-2",
        "train.max_updates=20",
        "train.batch_size=16",
        "train.compile=false",
        "name=run",
        f"output_dir={output}",
    )
    return Path(train(config)["folder"])


@pytest.fixture(scope="module")
def forms(run, base) -> dict[str, Path]:
    """The sound folders of a run."""
    merged = base.parent / "merged"
    export(run, "to=merged", f"output={merged}")
    return {"adapter": run / "adapter", "merged": merged}


@pytest.fixture(scope="module")
def check_of(run, compose):
    return checker_of(compose(f"run={run}", command="export"))


# --- faults ---------------------------------------------------------------------------------------


def edit(file: str, **changes: object) -> Callable:
    """A fault: other values in a JSON file."""
    return lambda folder: change_json(folder / file, changes)


def leave_out_a_projection(folder: Path) -> None:
    file = folder / "adapter_model.safetensors"
    weights = load_file(file).items()
    kept = {name: weight for name, weight in weights if "0.self_attn.k_proj" not in name}
    save_file(kept, file, {"format": "pt"})


def round_projections(folder: Path) -> None:
    """To bfloat16."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, weight in weights.items():
        if "_proj" in name:
            weights[name] = weight.bfloat16().to(weight.dtype)
    save_file(weights, file, {"format": "pt"})


def swap_words(folder: Path) -> None:
    """Another vocabulary: two letters change their ids."""
    file = folder / "tokenizer.json"
    tree = read_json(file)
    words = tree["model"]["vocab"]
    words["a"], words["i"] = words["i"], words["a"]
    write_json(file, tree)


def another_template(folder: Path) -> None:
    file = folder / "chat_template.jinja"
    file.write_text(file.read_text().replace("<|im_start|>", "### "))


DISTANT = "its KL divergence from the run may be"
FAULTS = {
    ("adapter", "tensors missing"): (leave_out_a_projection, DISTANT),
    ("adapter", "another template"): (another_template, "chat template or end token is not"),
    ("merged", "rounded to bfloat16"): (round_projections, DISTANT),
    ("merged", "another base of rotations"): (
        edit("config.json", rope_parameters={"rope_type": "default", "rope_theta": 100.0}),
        DISTANT,
    ),
    ("merged", "another end"): (
        edit("generation_config.json", eos_token_id=[1, 3]),
        r"stop at the tokens \[1, 3\]",
    ),
    ("merged", "another vocabulary"): (swap_words, "writes held-out row 1 in other tokens"),
}


@pytest.mark.parametrize(("form", "name"), FAULTS)
def test_a_planted_fault_is_refused(form, name, forms, check_of, tmp_path):
    plant, line = FAULTS[form, name]
    folder = Path(shutil.copytree(forms[form], tmp_path / "form"))
    plant(folder)
    with pytest.raises(DiffersError, match=line):
        check_of(folder)


def test_a_quantised_model_needs_a_limit(forms, check_of, tmp_path):
    model = load_model(ModelConfig(path=str(forms["merged"]), quantization="nf4"), this_device())
    folder = Path(shutil.copytree(forms["merged"], tmp_path / "quantised"))
    model.save_pretrained(folder)
    with pytest.raises(UserError, match="it is quantised, .*: set at_most="):
        check_of(folder)
    assert check_of(folder, at_most=1).kl > 1e-6


def test_the_command_ends_with_status_3_and_one_line(run, run_command, tmp_path, capsys):
    folder = Path(shutil.copytree(run / "adapter", tmp_path / "form"))
    change_json(folder / "adapter_config.json", {"lora_alpha": 64})
    assert run_command("cera-export", f"run={run}", f"check={folder}") == 3
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith(f"cera-export: check={folder}: its KL divergence from the run may be ")


@pytest.mark.parametrize("form", ["adapter", "merged"])
def test_a_sound_folder_is_the_run(form, forms, check_of):
    certificate = check_of(forms[form])
    assert certificate.holds
    assert certificate.kl_upper < 1e-6


def test_what_a_vllm_computes_is_the_run_or_it_is_refused(forms, base, check_of):
    with playing_vllm(ModelConfig(path=str(base), dtype="float32")) as vllm:
        checked = partial(check_of, forms["adapter"], rows=2, server=vllm.url)
        certificate = checked()
        assert certificate.form == "PEFT's LORA, on its base, in vllm 0.32.0"
        assert certificate.kl_upper < 1e-6
        ends = vllm.ends
        vllm.ends = set()
        with pytest.raises(DiffersError, match=r"stop at the tokens \[\]"):
            checked()
        vllm.ends = ends
        template = vllm.tokenizer.chat_template
        vllm.tokenizer.chat_template = template.replace("<|im_start|>", "### ")
        with pytest.raises(DiffersError, match="chat template or end token is not"):
            checked()
        vllm.tokenizer.chat_template = template
        vllm.loaded = dict.fromkeys(vllm.loaded, vllm.unadapted)
        with pytest.raises(DiffersError, match="its KL divergence from the run may be"):
            checked()
