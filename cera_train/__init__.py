"""cera-train: fine-tune language models with CeRA, a non-linear low-rank adapter, against LoRA and DoRA.

Importing this package registers CeRA with PEFT, so that `PeftModel.from_pretrained` loads CeRA adapters: at once where
PEFT is loaded already, otherwise the moment it is. The command line imports this package too, and its `--help` should
not wait seconds for PEFT and torch.
"""

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.1.0"


class _RegisterOnImport:
    """A finder that has the others find PEFT, and registers CeRA once PEFT has run.

    It stays in place: transformers asks for PEFT's spec, to know whether there is a PEFT, long before it imports it.
    """

    def find_spec(self, name: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "peft":
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next(filter(None, specs), None)
        if spec is None:
            return None
        run_peft = spec.loader.exec_module

        def run_peft_then_register(module: ModuleType) -> None:
            run_peft(module)
            import cera_train.cera  # noqa: F401

        spec.loader.exec_module = run_peft_then_register
        return spec


if "peft" in sys.modules:
    import cera_train.cera  # noqa: F401
elif not any(type(finder).__name__ == _RegisterOnImport.__name__ for finder in sys.meta_path):  # not after a reload
    sys.meta_path.insert(0, _RegisterOnImport())
