"""PEFT's adapter_config.json, as our settings."""

from pathlib import Path
from typing import Any

from cera_train.adapters.folder import ADAPTER_CONFIG
from cera_train.common.errors import errors_at
from cera_train.runs.records import Record
from cera_train.settings.adapters import AdapterConfig, AdapterKind


def saved_adapter_config(folder: Path) -> AdapterConfig | None:
    path = folder / ADAPTER_CONFIG
    if not path.is_file():
        return None
    saved = SavedAdapter.read(path)
    with errors_at(str(path)):
        return saved.config


class SavedAdapter(Record):
    """The fields of PEFT's adapter_config.json that a report reads."""

    peft_type: str = ""
    use_dora: bool | None = None
    use_rslora: bool | None = None
    r: int | None = None
    alpha: float | None = None
    lora_alpha: float | None = None
    activation: Any = None
    mix: Any = None

    @property
    def config(self) -> AdapterConfig:
        if self.use_dora:
            kind = "dora"
        elif self.use_rslora:
            kind = "rslora"
        else:
            kind = self.peft_type.lower()
        settings: dict[str, Any] = {"kind": kind}
        if kind not in list(AdapterKind):
            settings = {"kind": AdapterKind.peft, "method": self.peft_type}
        if kind == AdapterKind.cera and self.activation is not None:
            settings["activation"] = self.activation
        if kind == AdapterKind.cera and self.mix is not None:
            settings["mix"] = self.mix
        # PEFT writes a rank of 0 where another setting decides.
        alpha = self.lora_alpha or self.alpha or None
        return AdapterConfig(**settings, r=self.r or None, alpha=alpha)
