"""Settings and choices that earlier releases had: recorded configs still hold them, and commands
may still name them."""

from typing import Any, NamedTuple

from cera_train.common.errors import UserError
from cera_train.common.settings import word_of

ANY = "any"


class Gone(NamedTuple):
    instead: str
    unused: Any = None
    """What a recorded config holds where nobody chose it, besides null: it still loads. ANY: no
    value changed a result, so all load."""
    last: str = "0.2.0"
    """The last release that had it."""

    def is_unused(self, value: Any) -> bool:
        """Whether a recorded value means the same to a run as none."""
        return self.unused == ANY or value in (None, self.unused)


ARM = "choose cera, or cera_identity, which merges; an annealed adapter is a LoRA of PEFT"
BY_TRL = "leave it out, or use TRL's trainer, which takes a CeRA after `import cera_train`"
GYM = "write its questions to a file for data.train_files"

GONE = {
    "adapter.activation=gated": Gone("choose silu"),
    "adapter.anneal": Gone(ARM),
    "adapter.expert_r": Gone("set adapter.settings={rank_pattern: {experts.down_proj: 8}}"),
    "adapter.init_scale": Gone("set adapter.settings={init_scale: 3}", 1.0),
    "adapter.kind=anneal": Gone(ARM),
    "adapter.start_rows": Gone("choose a start that reads none, such as adapter=pissa", 256),
    "adapter.target_parameters": Gone("set adapter.settings={target_parameters: [...]}"),
    "adapter=cera_anneal": Gone(ARM),
    "adapter=cera_gated": Gone("choose cera"),
    "calibration_tokens": Gone("leave it out: it is 4,096"),
    "data.facts.estimated": Gone("leave it out", ANY),
    "data.layout=reasoning_gym": Gone(GYM),
    "data.logistic_map.seed": Gone("leave it out: the starting points are those of 0", 0),
    "data.logistic_map.steps": Gone("leave it out: a row asks for 6 values", 6),
    "data.mix.chat": Gone("set data.chat, for all parts"),
    "data.mix.layout=reasoning_gym": Gone(GYM),
    "data.mix.loss_on": Gone("set data.loss_on, for all parts"),
    "data.mix.revision": Gone("leave it out, or name files of that revision"),
    "data.mix.turns": Gone("set data.turns, for all parts"),
    "data.mix_seed": Gone("leave it out: the rows drawn are those of 0", 0),
    "data.reasoning_gym": Gone(GYM, {"generator": "chain_sum", "level": None, "seed": 0}),
    "data=reasoning_gym": Gone(GYM),
    "dpo.label_smoothing": Gone(BY_TRL, 0.0),
    "dpo.loss": Gone(BY_TRL, "sigmoid"),
    "dpo.reference": Gone("leave it out: the reference is the model as the run starts", "start"),
    "dpo.sft_weight": Gone(BY_TRL, 0.0),
    "gguf": Gone("compare the file by cera-export check=FILE, and ask llama.cpp's own server"),
    "grpo.epochs": Gone(BY_TRL, 1),
    "grpo.epsilon": Gone(BY_TRL, 0.2),
    "grpo.epsilon_high": Gone(BY_TRL),
    "grpo.max_sampler_distance": Gone("leave it out, and serve the base of the run", ANY),
    "grpo.scale": Gone(BY_TRL, True),
    "hub.private": Gone("leave it out, and change the repository on its page", True),
    "model.facts.license": Gone("leave it out, and write it into the card on the Hub", ANY),
    "model.quantization=int8": Gone("choose nf4, or none"),
    "model.attn_implementation": Gone(
        "leave it out: sdpa is taken, or eager where it is wrong", "sdpa"
    ),
    "plan.mfu": Gone("leave it out, and scale the time"),
    "recipe=grpo_reasoning_gym": Gone("choose grpo_dates"),
    "study.results": Gone("cera-report compares results of other programs beside runs"),
    "study.set_aside": Gone("let study.tune_seeds choose, and the other seeds judge", 0.0),
    "study.slope": Gone("compare pairs of arms in study.contrasts, [[a, b], [c, d]]", {}),
    "study.tuned_elsewhere": Gone("give several values in study.tune, so that each arm chooses"),
    "task.generator": Gone("write its questions to a file for task=jsonl"),
    "task.kind=reasoning_gym": Gone("write its questions to a file for task=jsonl"),
    "task.revision": Gone("leave it out, or name files of that revision"),
    "task=reasoning_gym": Gone("write its questions to a file for task=jsonl"),
    "tracker.group": Gone("set $WANDB_RUN_GROUP", ANY),
    "tracker=comet": Gone("write 'tracker.kinds={comet_ml: null}'"),
    "tracker=mlflow": Gone("write 'tracker.kinds={mlflow: null}'"),
    "tracker=swanlab": Gone("write 'tracker.kinds={swanlab: null}'"),
    "tracker=trackio": Gone("write 'tracker.kinds={trackio: null}'"),
    "train.batch_layout": Gone("leave it out: rows are flat where the model allows it", ANY),
    "train.probe_tokens": Gone("leave it out: it is 2,048", 2048),
    "train.resume": Gone("leave it out; to start again, remove the run's folder", ANY),
}
"""By setting, SECTION.KEY, or by choice, SECTION.KEY=VALUE or GROUP=NAME. A setting in a list, as
in each part of data.mix, has the key of the list."""


def describe_gone(name: str) -> str | None:
    """What to do instead of a setting or a choice that is gone; None for any other."""
    for known, gone in GONE.items():
        if name == known or name.startswith(f"{known}."):
            return f"{name}: cera-train {gone.last} was the last that had it: {gone.instead}."
    return None


def without_gone(tree: Any, place: str, key: str = "") -> Any:
    """A recorded config without settings that are gone.

    Args:
        key: of the tree, in the whole config.

    Raises:
        UserError: the config used one, or made a choice that is gone.
    """
    if isinstance(tree, dict):
        kept = {}
        for name, value in tree.items():
            inner = f"{key}.{name}" if key else str(name)
            if inner not in GONE or not GONE[inner].is_unused(value):
                kept[name] = without_gone(value, place, inner)
        return kept
    if isinstance(tree, list):
        return [without_gone(each, place, key) for each in tree]
    for name in (key, f"{key}={word_of(tree)}"):
        if message := describe_gone(name):
            raise UserError(f"{place}: {message}")
    return tree
