"""Projections that a model reads past their module: found in its source, and shown by passes."""

from __future__ import annotations

import sys

import pytest
import torch
from architectures import ARCHITECTURES, STATES, Architecture
from cera_models import WARNINGS
from peft import PeftModel, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import WavLMConfig, WavLMModel

from cera_train.cera import CeraConfig, unfuse
from cera_train.cera.bypass import bypassed, fused_kernels, is_unfused

pytestmark = WARNINGS

FAMILIES = {family.model_type: family for family in STATES}
IDS = torch.arange(3, 27).view(2, 12)
ALWAYS = {"mamba": {"dt_proj"}, "falcon_mamba": {"dt_proj"}, "jamba": {"dt_proj"}}
"""What these read in every pass."""
FUSED = {
    **{name: {"x_proj", "out_proj"} for name in ("mamba", "falcon_mamba")},
    **{name: {"out_proj"} for name in ("mamba2", "bamba", "falcon_h1", "zamba2", "granitemoehybrid", "nemotron_h")},
}
"""What a fused kernel of these reads in training."""

every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
fused_families = pytest.mark.parametrize("name", FUSED)


def last(names) -> set[str]:
    return {name.rpartition(".")[2] for name in names}


def layers_of(model: nn.Module, kinds: set[str]) -> list[nn.Module]:
    return [parent for parent in model.modules() if kinds & {name for name, _ in parent.named_children()}]


@pytest.fixture
def with_kernels(monkeypatch):
    """with_kernels(model): its layers get a kernel that multiplies by the weights it is given, past their modules."""

    def install(model: nn.Module) -> None:
        def inner(xz, conv_weight, conv_bias, x_proj, dt_proj, out_proj, *args, **kwargs):
            x = xz.chunk(2, dim=1)[0].transpose(1, 2)
            dt = F.linear(F.linear(x, x_proj)[..., : dt_proj.shape[1]], dt_proj)
            return F.linear(x + dt, out_proj)

        def combined(xz, *args, outproj_weight, **kwargs):
            return F.linear(xz[..., : outproj_weight.shape[1]], outproj_weight)

        module = sys.modules[type(layers_of(model, {"conv1d"})[0]).__module__]
        for name, function in (("mamba_inner_fn", inner), ("mamba2_split_conv1d_scan_combined", combined)):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, function)

    return install


def moves(model: nn.Module, module: nn.Module, train: bool) -> bool:
    """Whether a change of one module's output moves the logits."""
    model.train(train)
    with torch.no_grad():
        before = model(input_ids=IDS, use_cache=False).logits
        hook = module.register_forward_hook(lambda module, args, output: output + 1)
        after = model(input_ids=IDS, use_cache=False).logits
        hook.remove()
    return not torch.equal(before, after)


@every_family
def test_the_source_names_what_is_bypassed(family: Architecture):
    found = bypassed(family.model())
    always = last(name for name, reason in found.items() if not reason.is_fused)
    fused = last(name for name, reason in found.items() if reason.is_fused)
    assert always == ALWAYS.get(family.model_type, set())
    assert fused == FUSED.get(family.model_type, set())


@every_family
def test_a_pass_agrees_with_the_source_on_every_linear_projection(family: Architecture, with_kernels):
    """In eval and train mode, without the fused kernels and with them."""
    model = family.model()
    found = bypassed(model)
    head = model.get_output_embeddings()
    projections = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    for has_kernels in (False, True):
        for name, module in projections:
            reason = found.get(name)
            assert moves(model, module, train=False) == (reason is None or reason.is_fused), name
            runs_in_training = reason is None or (reason.is_fused and not has_kernels)
            assert moves(model, module, train=True) == runs_in_training, name
        if family.model_type not in FUSED:
            break
        with_kernels(model)


@fused_families
def test_an_unfused_model_computes_the_same_and_calls_every_projection(name, with_kernels):
    model = FAMILIES[name].model().train()
    expected = model(input_ids=IDS, use_cache=False).logits  # without kernels
    with_kernels(model)
    assert not torch.equal(model(input_ids=IDS, use_cache=False).logits, expected)
    layers = unfuse(model)
    assert len(layers) == len(layers_of(model, {"conv1d"}))
    assert all(is_unfused(model.get_submodule(layer)) for layer in layers)
    assert torch.equal(model.train()(input_ids=IDS, use_cache=False).logits, expected)
    assert last(bypassed(model)) == ALWAYS.get(name, set())
    assert unfuse(model) == layers  # a second time changes nothing
    for layer in map(model.get_submodule, layers):
        assert all(part.training for part in layer.children())
        assert fused_kernels(layer)
    for projection in FUSED[name]:
        module = getattr(model.get_submodule(layers[0]), projection)
        assert moves(model, module, train=True)
        assert moves(model, module, train=False)


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        (
            "mamba",
            ["x_proj"],
            r"x_proj': mamba_inner_fn of MambaMixer .* Target in_proj instead, or call .*unfuse",
        ),
        ("mamba", ["in_proj", "dt_proj"], r"mixer\.dt_proj': MambaMixer reads .* Target in_proj instead\.$"),
        ("jamba", ["dt_proj"], r"Target in_proj, x_proj, out_proj instead\.$"),
        ("granitemoehybrid", ["out_proj"], "mamba2_split_conv1d_scan_combined of GraniteMoeHybridMambaLayer reads"),
        ("zamba2", r".*mamba\.out_proj", "mamba2_split_conv1d_scan_combined of Zamba2MambaMixer reads"),
    ],
)
def test_a_bypassed_target_is_refused_with_the_reason_and_another_target(name, targets, message):
    with pytest.raises(ValueError, match=message) as caught:
        get_peft_model(FAMILIES[name].model(), CeraConfig(r=4, target_modules=targets))
    assert "\n" not in str(caught.value)
    assert "LORA" not in str(caught.value)


def test_modules_whose_weights_an_attention_function_reads_are_refused():
    settings = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    convolutions = {"conv_dim": (8, 8), "conv_stride": (2, 2), "conv_kernel": (3, 3)}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    model = WavLMModel(WavLMConfig(**settings, **convolutions, **positions))
    assert last(bypassed(model)) == {"q_proj", "k_proj", "v_proj", "out_proj"}
    with pytest.raises(ValueError, match="multi_head_attention_forward of WavLMAttention reads its weight"):
        get_peft_model(model, CeraConfig())  # trained 0 of 8 tensors
    with pytest.warns(UserWarning, match="all-linear leaves out k_proj, v_proj, q_proj, out_proj"):
        adapted = get_peft_model(model, CeraConfig(r=4, target_modules="all-linear"))
    assert adapted.peft_config["default"].exclude_modules == ["k_proj", "out_proj", "q_proj", "v_proj"]
    assert set(bypassed(nn.TransformerEncoderLayer(16, 2))) == {"self_attn.out_proj"}


def test_all_linear_leaves_out_what_is_bypassed_and_records_it(tmp_path):
    with pytest.warns(UserWarning, match=r"all-linear leaves out x_proj, dt_proj, out_proj: mamba_inner_fn"):
        model = get_peft_model(
            FAMILIES["mamba"].model(), CeraConfig(r=4, target_modules="all-linear", init_weights=False)
        )
    config = model.peft_config["default"]
    assert config.exclude_modules == ["dt_proj", "out_proj", "x_proj"]
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(FAMILIES["mamba"].model(), tmp_path)
    assert torch.equal(loaded(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)

    expression = CeraConfig(r=4, target_modules="all-linear", exclude_modules=r".*\.1\..*")
    with pytest.warns(UserWarning, match="all-linear leaves out"):
        model = get_peft_model(FAMILIES["mamba"].model(), expression)
    adapted = {name for name, _ in model.named_modules() if name.endswith("cera_A")}
    assert adapted == {"base_model.model.backbone.layers.0.mixer.in_proj.cera_A"}


def test_an_adapter_that_was_trained_unfused_is_loaded_for_inference_into_a_fused_model(tmp_path):
    base = FAMILIES["bamba"].model()
    assert unfuse(base)
    model = get_peft_model(base, CeraConfig(r=4, target_modules=["out_proj"], init_weights=False)).eval()
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = PeftModel.from_pretrained(FAMILIES["bamba"].model(), tmp_path).eval()
    expected = model(input_ids=IDS).logits
    assert torch.equal(loaded(input_ids=IDS).logits, expected)
    assert not torch.equal(FAMILIES["bamba"].model()(input_ids=IDS).logits, expected)
    with pytest.raises(ValueError, match="unfuse"):
        PeftModel.from_pretrained(FAMILIES["bamba"].model(), tmp_path, is_trainable=True)


def test_a_router_is_no_target():
    """A linear layer of its own class, which returns a tuple."""
    family = ARCHITECTURES["llama4_text"]
    with pytest.raises(
        ValueError, match=r"router': Llama4Router returns a tuple, to which a branch cannot be added\. T"
    ):
        get_peft_model(family.model(), CeraConfig(r=4, target_modules=["q_proj", "router"]))
    with pytest.warns(UserWarning, match="all-linear leaves out router: Llama4Router"):
        model = get_peft_model(family.model(), CeraConfig(r=4, target_modules="all-linear"))
    assert model(input_ids=IDS).logits.isfinite().all()


def test_rwkv_computes_the_same_in_training_and_evaluation():
    """It halves weights past their modules in eval mode, here from the second layer on."""
    base = ARCHITECTURES["rwkv"].model()
    expected = base(input_ids=IDS).logits
    assert base.rwkv.layers_are_rescaled
    model = get_peft_model(base, CeraConfig(r=4, dropout=0.0, target_modules=["output"], init_weights=False))
    evaluated = model.eval()(input_ids=IDS).logits
    torch.testing.assert_close(model.train()(input_ids=IDS, use_cache=False).logits, evaluated)
    with model.disable_adapter():
        torch.testing.assert_close(model.eval()(input_ids=IDS).logits, expected, rtol=1e-2, atol=1e-3)


# --- reading a class -------------------------------------------------------------------------------------------------


class Layer(nn.Module):
    """Reads and calls of every kind."""

    def __init__(self, is_exact: bool = False) -> None:
        super().__init__()
        self.is_exact = is_exact
        self.called, self.read, self.cast, self.exact, self.handed = (nn.Linear(4, 4) for _ in range(5))
        self.read.weight.data.zero_()

    def forward(self, x: torch.Tensor, fast: bool = False) -> torch.Tensor:
        x = self.called(x.to(self.cast.weight.dtype)) @ self.read.weight
        x = self.cast(x) if isinstance(self.cast.weight, nn.Parameter) else x
        x = x @ self.exact.weight if self.is_exact else self.exact(x)
        if fast:
            x = F.linear(x, self.called.weight)
        return nn.Sequential(self.handed)(x) + self.handed.weight.sum()


class Below(Layer):
    def forward(self, x: torch.Tensor, fast: bool = False) -> torch.Tensor:
        return super().forward(x, fast)


@pytest.mark.parametrize("layer", [Layer, Below])
def test_reading_a_class_follows_what_a_layer_decides_and_leaves_the_rest_to_a_pass(layer):
    assert set(bypassed(layer())) == {"read"}
    assert set(bypassed(layer(is_exact=True))) == {"read", "exact"}
    assert str(bypassed(layer())["read"]).startswith(f"{layer.__name__} reads its weight without calling it, so")


def test_a_class_without_source_is_left_to_a_pass():
    scope = {"nn": nn, "__name__": "nowhere"}
    exec("class Hidden(nn.Module):\n    def forward(self, x): return x @ self.proj.weight", scope)
    layer = scope["Hidden"]()
    layer.proj = nn.Linear(4, 4)
    assert bypassed(layer) == {}
