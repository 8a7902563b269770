"""CeRA as a PEFT method. Importing this package registers it, so that plain PEFT loads and saves
it."""

from peft import PeftType
from peft.utils import register_peft_method

from .config import CeraConfig
from .coverage import check_coverage
from .experts import CeraExperts
from .layer import CeraLayer, CeraLinear, for_inference
from .model import CeraModel

__all__ = [
    "CeraConfig",
    "CeraExperts",
    "CeraLayer",
    "CeraLinear",
    "CeraModel",
    "add_peft_type",
    "check_coverage",
    "for_inference",
]


def add_peft_type(name: str) -> None:
    """Gives the enum `PeftType` one more member.

    PEFT's registry accepts only members of its enum, and Python has no way to extend an enum from
    outside: this does what the enum's metaclass does when it builds a member.
    """
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member._sort_order_ = len(PeftType)
    member.__objclass__ = PeftType
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    # Python 3.13 looks here for `"CERA" in PeftType`.
    vars(PeftType).get("_hashable_values_", []).append(name)
    type.__setattr__(PeftType, name, member)


# A PEFT release that ships CeRA itself has the member already: then its implementation stands.
if "CERA" not in PeftType.__members__:
    add_peft_type("CERA")
    register_peft_method(name="cera", config_cls=CeraConfig, model_cls=CeraModel)
