"""cera-train: fine-tune language models with CeRA, a non-linear low-rank adapter, against LoRA and
DoRA.

Importing this package registers CeRA with PEFT, so that `PeftModel.from_pretrained` loads CeRA
adapters: at once where PEFT is loaded, else as soon as it is. So the package costs nothing until
then, and the commands' `--help`, errors and tables and the graders' processes never load torch.
"""

import importlib
import logging
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__version__ = "0.3.0.dev0"


class _RegisterAfterPeft(MetaPathFinder):
    """Finds `peft` as the other finders do, and registers CeRA once it is executed.

    Python has no hook after an import, and PEFT no entry point for methods from outside.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "peft":
            return None
        specs = (each.find_spec(name, path, target) for each in sys.meta_path if each is not self)
        spec = next(filter(None, specs), None)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            bitsandbytes = logging.getLogger("bitsandbytes")
            level = bitsandbytes.level
            bitsandbytes.setLevel(logging.ERROR)  # it misses a kernel that nothing here uses
            execute(module)
            bitsandbytes.setLevel(level)
            # PEFT reads it from every model that it adapts.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            sys.meta_path.remove(self)
            importlib.import_module("cera_train.cera")

        spec.loader.exec_module = execute_and_register
        return spec


if "peft" in sys.modules:
    importlib.import_module("cera_train.cera")
else:
    sys.meta_path.insert(0, _RegisterAfterPeft())
