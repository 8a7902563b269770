"""Training objectives: their interface and supervised fine-tuning in one file; preferences and
rewards in a file each.

To add one, write a file with a subclass of `objective.Objective`, and a line in `build_objective`;
its loss should be a pure function of tensors with a test of its own.
"""

from cera_train.runs.folder import Progress, RunFolder
from cera_train.settings.run import Config
from cera_train.settings.training import ObjectiveKind
from cera_train.training.build import Data, Evaluator, Model
from cera_train.training.objectives.objective import Objective, Sft


def build_objective(
    config: Config,
    data: Data,
    model: Model,
    evaluator: Evaluator,
    folder: RunFolder,
    progress: Progress,
) -> Objective:
    """The objective of a config. DPO keeps its reference in the run's folder, GRPO its answers."""
    kind = config.train.objective
    if kind == ObjectiveKind.dpo:
        from cera_train.training.objectives.dpo import Dpo

        resumes = progress.update > 0
        return Dpo(config, data, model, evaluator.held_out, folder.path, resumes)
    if kind == ObjectiveKind.grpo:
        from cera_train.training.objectives.grpo import Grpo

        return Grpo(config, data, model, evaluator.sampler, folder, progress)
    batches = model.micro_batches(data.rows.train)
    return Sft(batches, model.accelerator.num_processes)
