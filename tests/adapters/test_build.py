"""Settings of an adapter: what they build, also on experts; those that contradict each other, PEFT
or the model are refused in one line that names the key."""

import pytest
from conftest import make_tiny_llama
from moe_models import MIXTURES, expert_loras, experts_of, make_mixture

from cera_train.adapters import build
from cera_train.cera import CeraLinear
from cera_train.common.errors import UserError
from cera_train.settings.adapters import AdapterConfig


def refuses(message: str):
    """One line, whose start is the place."""
    return pytest.raises(UserError, match=rf"\A{message}[^\n]*\Z")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            "adapter=full adapter.r=16",
            "adapter.r=16: adapter.kind=full does not use it. Set adapter.r=null",
        ),
        (
            "adapter=full adapter.r=null adapter.target_modules=[q_proj]",
            "adapter.target_modules=.*: .*=null",
        ),
        ("adapter=peft", "adapter.method=null: name a method of PEFT"),
        ("adapter.layers=[]", r"adapter.layers=\[\]: list should have at least 1 item"),
        (
            "adapter=lora adapter.experts=true",
            "adapter.experts=True: adapter.kind=lora does not use it",
        ),
        (
            "adapter.experts=true adapter.settings={target_parameters:[x]}",
            "adapter.experts=true adapts all of them, and",
        ),
    ],
)
def test_a_setting_that_the_kind_ignores_is_refused(compose, overrides, message):
    with pytest.raises(Exception, match=message):
        compose(*overrides.split())


def peft_of(method: str, rank=None, **settings) -> AdapterConfig:
    return AdapterConfig("peft", rank, alpha=None, method=method, settings=settings)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            peft_of("MIST"),
            "adapter.method=MIST is not a method of PEFT.*Choose one of ADAMSS, BEFT, ",
        ),
        (peft_of("IA3", 4), "adapter.r=4: adapter.method=IA3 has no r. Set adapter.r=null"),
        (
            peft_of("MISS", 4, minir=2),
            "adapter.method=MISS adapter.settings.minir=2: .*unexpected keyword argument",
        ),
        *(
            (
                AdapterConfig("lora", 4, settings={"init_lora_weights": start}),
                f"adapter.settings.init_lora_weights={start} .* 0.2.0 .*: choose pissa or olora",
            )
            for start in ("eva", "corda", "lora_ga", "pissa_niter_4")
        ),
        (
            AdapterConfig("lora", 4, settings={"megatron_config": {}}),
            "adapter.settings.megatron_config can import or open files",
        ),
    ],
)
def test_what_peft_does_not_know_is_refused_before_anything_is_loaded(config, message):
    with refuses(message):
        build.check(config)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["adapter=miss", "adapter.settings={init_weights: bat, bias: none}"],
            {"init_weights": "bat", "bias": "none"},
        ),
        (
            ["adapter=pissa", "adapter.settings.init_lora_weights=olora"],
            {"init_lora_weights": "olora"},
        ),
    ],
)
def test_free_form_settings_come_through_the_command_line(compose, overrides, expected):
    assert compose(*overrides).adapter.settings == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (peft_of("C3A"), "adapter.method=C3A: The block size should be a factor"),
        (peft_of("IA3"), "adapter.method=IA3: `feedforward_modules` should be a subset"),
        (
            AdapterConfig("lora", 4, target_modules=["norm"]),
            r"adapter.kind=lora adapter.target_modules=\[norm\]: Target module LlamaRMSNorm",
        ),
        *(
            (
                AdapterConfig(kind, 4, settings={name: value}),
                f"adapter.kind={kind} adapter.settings.{name}=",
            )
            for kind in ("cera", "lora")
            for name, value in (
                ("rank_pattern", {"q_proj": 2, "x_proj": 2}),
                ("exclude_modules", ["x_proj"]),
                ("rank_pattern", {"(": 2}),
            )
        ),
    ],
)
def test_what_peft_refuses_on_this_model_is_a_line_that_names_the_settings(config, message):
    with refuses(message):
        build.build(make_tiny_llama(), config)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
@pytest.mark.parametrize("as_expression", [False, True])
def test_tied_weights_are_not_untied(target, as_expression):
    targets = rf"(.*\.)?{target}" if as_expression else ["q_proj", target]
    with refuses(
        "adapter.kind=lora adapter.target_modules=.*: lm_head and embed_tokens are one weight"
    ):
        build.build(
            make_tiny_llama(tie_word_embeddings=True),
            AdapterConfig("lora", 4, target_modules=targets),
        )


@pytest.mark.parametrize("kind", ["cera", "peft"])
def test_a_mistyped_target_is_refused_even_beside_a_right_one(kind):
    method = "MISS" if kind == "peft" else None
    config = AdapterConfig(kind, 4, alpha=None, target_modules=["q_proj", "v_prj"], method=method)
    with refuses(
        "adapter.target_modules: 'v_prj' matches no module of this model. Its linear projections "
        "are q_proj,"
    ):
        build.build(make_tiny_llama(), config)


def test_all_linear_adapts_only_the_chosen_layers():
    config = AdapterConfig("lora", 4, target_modules="all-linear", layers=[1])
    build.check(config)
    model = build.build(make_tiny_llama(), config)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(names) == 14
    assert all(".layers.1." in name for name in names)
    with refuses(r"adapter.layers: \[2\] is outside this model's layers 0 to 1"):
        build.build(make_tiny_llama(), AdapterConfig(r=4, layers=[2]))


# --- experts --------------------------------------------------------------------------------------

DOWN = ["mlp.experts.down_proj"]


def on_a_mixture(model_type: str = "mixtral", **settings):
    config = AdapterConfig(**({"r": 4, "dropout": 0.0} | settings))
    return build.build(make_mixture(model_type).requires_grad_(False), config)


@pytest.mark.parametrize("model_type", MIXTURES)
def test_all_linear_has_experts_in_or_out(model_type):
    without = on_a_mixture(model_type, target_modules="all-linear")
    ranks = {"rank_pattern": {"experts.gate_up_proj": 2, "experts.down_proj": 2}}
    model = on_a_mixture(model_type, target_modules="all-linear", experts=True, settings=ranks)
    assert not experts_of(without)
    assert len(experts_of(model)) == 2
    linears = [name for name, module in without.named_modules() if type(module) is CeraLinear]
    assert linears == [name for name, module in model.named_modules() if type(module) is CeraLinear]
    layer = experts_of(model)[0]
    assert list(layer.cera_A["default"]) == ["gate_up_proj", "down_proj"]
    assert layer.r["default"] == {"gate_up_proj": 2, "down_proj": 2}
    weights = sum(
        weight.numel()
        for layer in experts_of(model)
        for weight in layer.parameters()
        if weight.requires_grad
    )
    trainable, total = build.parameter_counts(model)
    assert (trainable - weights, total - weights) == build.parameter_counts(without)
    assert model.peft_config["default"].target_parameters == [
        "experts.gate_up_proj",
        "experts.down_proj",
    ]


def test_pefts_lora_takes_experts_by_its_own_settings():
    settings = {
        "kind": "lora",
        "target_modules": ["q_proj"],
        "settings": {"target_parameters": DOWN},
    }
    lora = on_a_mixture(**settings)
    assert [list(wrappers) for wrappers in expert_loras(lora)] == [["down_proj"]] * 2
    with refuses(
        "adapter.kind=lora adapter.settings.target_parameters=.*does not work with lora_dropout"
    ):
        on_a_mixture(dropout=0.1, **settings)


def test_experts_that_a_model_lacks_are_refused():
    with refuses("adapter.experts=true: this model has no experts. Set adapter.experts=false."):
        build.build(make_tiny_llama(), AdapterConfig(r=4, experts=True))
