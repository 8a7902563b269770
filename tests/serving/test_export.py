"""`cera-export`: the nearest LoRA, what it loses, and that plain PEFT and transformers take it."""

import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from evaluated_runs import evaluate, export, keep_adapter
from made_files import write_json
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from cera_train.common.errors import DiffersError, UserError
from cera_train.common.files import read_json
from cera_train.evaluation.generate import LoadedModel
from cera_train.model.batches import flat_batch
from cera_train.runs.records import load_config
from cera_train.runs.subject import find_subject
from cera_train.serving.export import describe_serving, fit
from cera_train.serving.verify import Certificate, compare_models
from cera_train.training.train import train

FULL = ("adapter=full", "adapter.r=null", "adapter.target_modules=null")


@pytest.fixture(scope="module")
def trained(tiny_config_in, tmp_path_factory):
    """trained("adapter.activation=relu", ...) -> the folder of a short run on seven linears."""
    output = tmp_path_factory.mktemp("exported")
    short = ("adapter.target_modules=all-linear", "train.max_updates=4")

    def trained(*overrides: str, name: str = "run") -> Path:
        config = tiny_config_in(output, *short, f"name={name}", *overrides)
        return Path(train(config)["folder"])

    return trained


def test_the_map_is_the_least_squares_solution():
    z = torch.randn(200, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64) + 0.5
    h = torch.nn.functional.silu(z)
    torch.testing.assert_close(fit(z, h), torch.linalg.lstsq(z, h).solution.T)


@pytest.mark.parametrize(
    ("gate", "loses_nothing"),
    [
        ("adapter.activation=identity", True),
        ("adapter=cera_mix", False),
    ],
)
def test_an_identity_gate_loses_nothing_and_a_learned_one_little(trained, gate, loses_nothing):
    beside = "adapter.settings={modules_to_save:[norm]}"  # trained whole
    folder = trained(gate, beside, name=gate.replace("=", "_"))
    certificate = export(folder, "at_most=100")
    assert certificate.loss_form == pytest.approx(
        certificate.loss_run, abs=1e-5 if loses_nothing else 0.3
    )
    assert (certificate.kl_upper < 1e-6) == loses_nothing


@pytest.mark.parametrize("method", ["LOHA", "MISS"])
def test_a_method_of_pefts_becomes_a_lora_that_plain_peft_loads(trained, tiny_folder, method):
    folder = trained("adapter=peft", f"adapter.method={method}", name=method)
    certificate = export(folder)
    assert certificate.form.startswith("PEFT's LORA")

    def computed(*adapter: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(tiny_folder)
        model = PeftModel.from_pretrained(model, *adapter) if adapter else model
        with torch.no_grad():
            return model.eval()(input_ids=torch.arange(3, 23)[None]).logits

    exported = computed(folder / "export_lora")
    torch.testing.assert_close(exported, computed(folder / "adapter"), atol=0.05, rtol=0)
    assert (computed() - exported).abs().max() > 0.5


def test_the_certificate_compares_token_by_token():
    rows = [flat_batch([[1, 2, 3]], [[False, True, True]]), flat_batch([[4, 0]], [[True, True]])]
    table = torch.randn(2, 5, 5, dtype=torch.float64)

    def loaded(each: torch.Tensor) -> LoadedModel:
        def model(input_ids, use_cache):
            return SimpleNamespace(logits=each[input_ids])

        return LoadedModel(SimpleNamespace(model=model, autocast=nullcontext), None)

    figures = compare_models(loaded(table[0]), loaded(table[1]), rows)
    inputs = [1, 2, 4]
    targets = [2, 3, 0]
    p, q = table.log_softmax(-1)[:, inputs]
    kl = (p.exp() * (p - q)).sum(-1)
    assert figures["tokens"] == 3
    assert figures["loss_run"] == pytest.approx(-p[range(3), targets].mean().item(), rel=1e-5)
    assert figures["loss_form"] == pytest.approx(-q[range(3), targets].mean().item(), rel=1e-5)
    assert figures["kl"] == pytest.approx(kl.mean().item(), rel=1e-5)
    means = (kl[:2].mean().item(), kl[2].item())  # drawn twice, one of two rows is the mean
    assert (figures["kl_lower"], figures["kl_upper"]) == pytest.approx((min(means), max(means)))

    of_one = compare_models(loaded(table[0]), loaded(table[1]), rows[:1])
    certificate = Certificate(form="a LoRA", **of_one, at_most=0.01, reason="a fit")
    assert certificate.shown()["KL"].endswith("no interval from one row")


def test_what_loses_too_much_is_not_exported(trained):
    folder = trained(name="steep")
    weights = folder / "adapter" / "adapter_model.safetensors"
    output = folder / "export_lora"
    save_file(
        {
            name: tensor * (20 if "_B." in name else 3)
            for name, tensor in load_file(weights).items()
        },
        weights,
    )
    keep_adapter(folder)
    with pytest.raises(
        DiffersError, match=r"KL divergence from the run may be .* above at_most=0 "
    ):
        export(folder, "at_most=0")
    assert not output.exists()
    assert export(folder, "at_most=100").holds

    # The next refusal leaves that export and its certificate as they are.
    before = {file.name: file.read_bytes() for file in output.iterdir()}
    assert "adapter_model.safetensors" in before
    with pytest.raises(DiffersError):
        export(folder, "at_most=0")
    assert {file.name: file.read_bytes() for file in output.iterdir()} == before
    assert not list(folder.glob(".writing-*"))


def test_an_adapter_and_its_export_name_the_revision_of_their_base_and_are_measured_as_the_run(
    compose, trained, monkeypatch
):
    folder = trained("model.revision=v1", name="pinned")
    exported = folder / "export_lora"
    loaded = []
    load = AutoModelForCausalLM.from_pretrained

    def from_pretrained(path, revision=None, **settings):
        loaded.append(revision)
        return load(path, revision=revision, **settings)

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    export(folder, "at_most=100", "rows=2")
    elsewhere = shutil.copytree(folder / "adapter", folder.parent / "pinned_adapter")
    for place in (elsewhere, exported):
        AutoPeftModelForCausalLM.from_pretrained(place)  # what a card tells to run
        assert find_subject(compose(f"run={place}", command="chat")).model.revision == "v1"
    assert {*loaded} == {"v1"}

    words = (f"run={exported}", "task=perplexity", "name=exported")
    evaluate(compose(*words, command="eval"))
    subject = find_subject(compose(f"run={exported}", command="chat"))
    run = load_config(folder / "config.yaml")
    assert (subject.model, subject.data) == (run.model, run.data)
    assert (exported / "eval" / "exported" / "result.json").is_file()
    (folder / "result.json").unlink()  # as where an adapter and its config were copied
    evaluate(compose(f"run={folder / 'adapter'}", "task=perplexity", command="eval"))


def test_a_plain_model_has_the_settings_of_its_base_and_stops_where_its_run_does(
    trained, tiny_folder, tmp_path
):
    base = shutil.copytree(tiny_folder, tmp_path / "base")
    published = {"temperature": 0.6, "eos_token_id": 2}  # without do_sample: never saved if changed
    write_json(base / "generation_config.json", published)
    short = (f"model.path={base}", "train.max_updates=1")
    lora = trained(*short, "adapter=lora", name="published")
    export(lora, "to=merged", "rows=2")
    full = trained(*short, *FULL, name="full")
    for plain in (lora / "export_merged", full / "adapter"):
        settings = read_json(plain / "generation_config.json")
        assert (settings["temperature"], settings["eos_token_id"]) == (0.6, [1, 2])


def test_what_cannot_be_exported_is_refused_in_one_line(trained):
    def refusal(run: Path) -> str:
        with pytest.raises(UserError) as caught:
            export(run)
        return str(caught.value)

    short = "train.max_updates=1"
    lora = trained("adapter=lora", short, name="lora")
    assert "is a LoRA already" in refusal(lora)
    full = trained(*FULL, short, name="whole")
    assert "to=merged" in refusal(full)
    multiplied = trained("adapter=hira", short, name="hira")
    assert "to=lora: PEFT makes no LoRA of this run" in refusal(multiplied)
    head = trained("adapter.target_modules=[q_proj,lm_head]", short, name="head")
    assert "adapts lm_head, for which a LoRA has no place" in refusal(head)


def test_the_rank_to_serve_with_is_one_that_vllm_accepts():
    assert describe_serving(257).endswith("--max-lora-rank 320")
    assert "too high" in describe_serving(513)
