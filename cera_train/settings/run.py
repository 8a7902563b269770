"""The settings of a whole run, assembled from those of each part, and of a plan. Hydra fills them
from conf/ and recipes/; every `__post_init__` checks its part."""

from dataclasses import dataclass
from enum import StrEnum

from pydantic import PositiveFloat, PositiveInt

from cera_train.common.settings import require, section, setting
from cera_train.settings.adapters import AdapterConfig, AdapterKind
from cera_train.settings.data import DataConfig, Layout, LossOn
from cera_train.settings.distributed import DistributedConfig, LaunchConfig, Strategy
from cera_train.settings.model import ModelConfig, Quantization
from cera_train.settings.sweep import StudyConfig, SweepConfig
from cera_train.settings.training import (
    OPTIMIZERS,
    DpoConfig,
    GrpoConfig,
    HubConfig,
    ObjectiveKind,
    OptimizerConfig,
    TrackerConfig,
    TrainConfig,
    Work,
)
from cera_train.settings.values import FolderName, Settings


@dataclass
class Config(Settings):
    """A training run. The sections have no defaults here: conf/config.yaml names them."""

    model: ModelConfig = section()
    adapter: AdapterConfig = section()
    data: DataConfig = section()
    optimizer: OptimizerConfig = section()
    train: TrainConfig = section(TrainConfig)
    dpo: DpoConfig = section(DpoConfig)
    grpo: GrpoConfig = section(GrpoConfig)
    tracker: TrackerConfig = section()
    hub: HubConfig = section(HubConfig)
    launch: LaunchConfig = section(LaunchConfig)
    distributed: DistributedConfig = section(DistributedConfig)
    sweep: SweepConfig = section(SweepConfig)
    study: StudyConfig | None = section(None)
    """The study that this run belongs to; null in other runs."""
    name: FolderName = setting("default", "nothing")
    """The run's folder is output_dir/name."""
    output_dir: str = setting("outputs", "nothing")

    def __post_init__(self) -> None:
        length = self.data.max_length
        require(
            self.train.micro_batch_tokens >= length,
            f"train.micro_batch_tokens={self.train.micro_batch_tokens} holds no sequence of "
            f"data.max_length={length}. Set train.micro_batch_tokens={length} or more.",
        )
        check_objective(self.train.objective, self.data)
        if self.distributed.strategy == Strategy.fsdp:
            self._check_sharding()

    def _check_sharding(self) -> None:
        """Raises UserError for what sharded weights do not allow."""
        settings = self.adapter.settings
        is_dora = self.adapter.kind == AdapterKind.dora or settings.get("use_dora")
        generates = self.train.tasks or self.work.answers
        refused = {
            "the model of train.tasks or train.objective=grpo": generates,
            f"the moments of optimizer={self.optimizer.kind}": (
                OPTIMIZERS[self.optimizer.kind].bits < 32
            ),
            "adapter=dora over model.quantization=nf4, whose weights it reads": (
                is_dora and self.model.quantization == Quantization.nf4
            ),
            "adapter.settings.modules_to_save": "modules_to_save" in settings,
        }
        for choice, is_chosen in refused.items():
            fix = "leave it out, or choose ddp"
            require(not is_chosen, f"distributed.strategy=fsdp does not shard {choice}: {fix}.")

    @property
    def work(self) -> Work:
        """The passes that the objective runs."""
        objectives = {
            ObjectiveKind.sft: Work(),
            ObjectiveKind.dpo: self.dpo.work,
            ObjectiveKind.grpo: self.grpo.work,
        }
        work = objectives[self.train.objective]
        if work.answers and self.train.server is not None:  # whose log p are compared
            work = work._replace(forward_passes=work.forward_passes + 1)
        return work

    @property
    def learns_answers(self) -> bool:
        """Whether the model learns the answers of the rows, not answers of its own."""
        return not self.work.answers

    @property
    def sequences(self) -> int:
        """Sequences that an update trains on for each of its rows."""
        return self.work.answers or self.data.sequences


def check_objective(objective: ObjectiveKind, data: DataConfig) -> None:
    """Raises UserError if the rows do not fit the objective. Rows whose layout is still `auto`
    pass: the config is checked again once it is decided."""
    if any(part.layout == Layout.auto for _, part in data.parts()):
        return
    place = f"train.objective={objective}"
    if objective == ObjectiveKind.dpo:
        fix = "name rows with the columns prompt, chosen and rejected, or set data.rejected"
        require(
            data.is_paired, f"{place} learns from preferences, and {data.title} has none: {fix}."
        )
    else:
        fix = "set train.objective=dpo"
        if data.layout == Layout.text:  # lists of messages are no texts
            fix += ", or for the chosen answers $'data.prompt={prompt}' $'data.completion={chosen}'"
        require(not data.is_paired, f"{place}: {data.title} holds preferences: {fix}.")
    if objective == ObjectiveKind.grpo:
        have_prompts = all(has_prompts(part) for _, part in data.trained_parts())
        fix = "name rows with a prompt and an answer, and leave data.loss_on at completion"
        require(have_prompts, f"{place} answers prompts, and {data.title} has text without: {fix}.")


def has_prompts(data: DataConfig) -> bool:
    """Whether a row has a prompt before the text that is supervised."""
    return data.asks and data.loss_on != LossOn.all


GpuKind = StrEnum("GpuKind", ["h100", "a100", "l40s", "rtx4090", "cpu"])


@dataclass
class PlanConfig(Settings):
    gpu: GpuKind = setting(GpuKind.h100, "cost")
    """cpu: this machine's CPU; measuring its speed takes half a second."""
    gpus: PositiveInt = setting(1, "cost")
    price_per_hour: PositiveFloat | None = setting(None, "cost")
    """Price of one GPU, in any currency."""
    tokens_per_row: PositiveFloat | None = setting(None, "cost")
    """null: from data.facts, or counted by the model's tokenizer where the rows are local files or
    computed."""

    @property
    def on_gpu(self) -> bool:
        return self.gpu != GpuKind.cpu


@dataclass
class PlanRun(Config):
    """Settings of `cera-plan`: a run's, and the hardware to plan for."""

    plan: PlanConfig = section(PlanConfig)
