"""What a study's folder records of it: its file, and its bases. Imports no torch."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from cera_train.common.settings import key_of
from cera_train.settings.gone import without_gone
from cera_train.settings.sweep import StudyConfig
from cera_train.settings.values import checked
from cera_train.sweep.folder import RECORD, SweepRecord

ARM = "study.arm"
BASE = "study.base"
SEED = "train.seed"


@dataclass(frozen=True, eq=False)
class StudyRecord:
    """A study's folder, which has, or will have, this record."""

    folder: Path
    record: SweepRecord

    @cached_property
    def config(self) -> StudyConfig:
        tree = without_gone(self.record.study, str(self.folder / RECORD), "study")
        return checked(StudyConfig, tree, "study")

    @cached_property
    def bases(self) -> list[str | None]:
        """Bases of the record's jobs; [None] where a study has none."""
        words = {word for overrides in self.record.jobs.values() for word in overrides}
        return [name for name in self.config.bases if f"{BASE}={name}" in words] or [None]

    def words_of_base(self, name: str | None) -> list[str]:
        """The overrides that choose a base."""
        return [f"{BASE}={name}", *self.config.bases[name]]

    @cached_property
    def keys_of_bases(self) -> set[str]:
        """The settings of all bases."""
        return {key_of(word) for words in self.config.bases.values() for word in words}
