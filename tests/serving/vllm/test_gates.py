"""The gates of the vLLM plugin, without vLLM."""

import logging

import pytest
import torch

from cera_train.cera.gates import GATES as MODULES
from cera_train.serving import vllm as plugin


def test_the_plugin_knows_every_gate_of_cera():
    assert tuple(MODULES) == plugin.GATES
    z = torch.randn(5, 7, dtype=torch.float64)
    for name in plugin.GATES:
        torch.testing.assert_close(plugin.formula(name)(z), MODULES[name]()(z))


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4)])
def test_each_token_has_the_gate_of_its_code(shape):
    z = torch.randn(shape)
    codes = torch.tensor([0, 1, 2, 3, plugin.NO_ADAPTER, 1])
    h = plugin.gate(z, codes[:, None], plugin.ALL_CODES)
    for token, code in enumerate(codes.tolist()):
        wanted = 0 * z if code == plugin.NO_ADAPTER else plugin.formula(plugin.GATES[code])(z)
        assert h[..., token, :].equal(wanted[..., token, :])


def test_where_vllm_lacks_a_name_nothing_is_replaced(monkeypatch, caplog):
    monkeypatch.setattr(
        plugin,
        "REPLACED",
        {"json:no_such_function": (None, ()), "json:dumps": (None, ("no_such",))},
    )
    with caplog.at_level(logging.WARNING, "vllm.cera_train"):
        plugin.register()
    assert "lacks json:no_such_function, json:dumps, as" in caplog.text
