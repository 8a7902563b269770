"""The commands on existing runs: `cera-eval`, `cera-chat`, `cera-export`, `cera-report`,
`cera-sweep`. A mistake is answered before torch, which takes seconds, is imported."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from cera_train.cli.mistakes import Parser
from cera_train.cli.start import announce_imports, print_error, start_hydra, to_config
from cera_train.common.libraries import heavy_imports
from cera_train.common.settings import require
from cera_train.distributed.processes import in_processes, is_one_of_several
from cera_train.evaluation.tasks.task import AnswerTask, build_task, load_problems
from cera_train.model.folder import check_model
from cera_train.runs.subject import Subject, find_subject
from cera_train.settings.evaluation import ChatConfig, EvalConfig, ExportConfig

EVAL = "cera-eval"
LONGEST_NAME = 100  # characters of a report's folder; a file system takes 255


def checked(composed: DictConfig, schema: type) -> tuple[Any, Subject]:
    """The config of a command, and what its `run` names."""
    config = to_config(composed, HydraConfig.get().overrides.task, schema)
    with heavy_imports():  # of PEFT, for an adapter that is neither CeRA nor LoRA
        subject = find_subject(config)
    check_model(subject.model.path)
    return config, subject


# --- cera-eval ------------------------------------------------------------------------------------


def eval_main() -> None:
    failed = []

    def evaluate(composed: DictConfig) -> None:
        """One evaluation. With -m the others run after one that fails."""
        try:
            measure(composed)
        except Exception as error:
            if (
                HydraConfig.get().mode != RunMode.MULTIRUN or is_one_of_several()
            ):  # others wait for this process
                raise
            print_error(EVAL, error)
            failed.append(error)

    start_hydra(EVAL, evaluate)
    if failed:
        sys.exit(1)


def measure(composed: DictConfig) -> None:
    config, subject = checked(composed, EvalConfig)
    if config.task.files and isinstance(build_task(config.task), AnswerTask):
        load_problems(config.task, subject.data)
    announce_imports()
    with heavy_imports():
        from cera_train.evaluation.evaluate import evaluate

    in_processes(evaluate, config)


# --- cera-chat and cera-export --------------------------------------------------------------------


def chat_main() -> None:
    start_hydra("cera-chat", chat)


def chat(composed: DictConfig) -> None:
    config, _ = checked(composed, ChatConfig)
    if config.compare is not None:
        check_model(find_subject(replace(config, run=config.compare)).model.path)
    if config.prompts is not None:
        require(
            Path(config.prompts).exists(),
            f"prompts={config.prompts}: no such file. Name one that is there.",
        )
    announce_imports()
    with heavy_imports():
        from cera_train.serving.chat import chat

    chat(config)


def export_main() -> None:
    start_hydra("cera-export", export)


def export(composed: DictConfig) -> None:
    config, subject = checked(composed, ExportConfig)
    config.check_model(subject.model)
    announce_imports()
    with heavy_imports():
        from cera_train.serving.export import export

    export(config)


# --- cera-report and cera-sweep -------------------------------------------------------------------


def parser_of(program: str, description: str) -> Parser:
    parser = Parser(program, description=description)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def report() -> None:
    parser = parser_of(
        "cera-report",
        "Compares runs: one table, paired tests on the same problems, pictures. Of a study: its "
        "verdict.",
    )
    parser.add_argument(
        "folders", nargs="+", metavar="DIR", type=Path, help="a run, a folder of runs, or a study"
    )
    parser.add_argument(
        "--output", type=Path, help="where the page goes (default: report/NAMES_OF_THE_FOLDERS)"
    )
    parser.add_argument(
        "--across-engines", action="store_true", help="test answers of different engines too"
    )
    arguments = parser.parse_args()
    folders = arguments.folders
    names = "_and_".join(folder.resolve().name for folder in folders)
    output = arguments.output or Path("report") / names[:LONGEST_NAME]
    is_free = output.is_dir() or not output.exists()
    require(
        is_free, f"--output={output}: it is a file, and a report needs a folder: choose another."
    )
    from cera_train.study.cells import find_study

    if len(folders) == 1 and (study := find_study(folders[0])) is not None:
        from cera_train.study.page import write_study

        page = write_study(study, output)
    else:
        from cera_train.report.page import compare_runs

        page = compare_runs(folders, arguments.across_engines)
        page.write(output)
    page.print(output)


def sweep() -> None:
    from cera_train.sweep.folder import print_sweep

    parser = parser_of(
        "cera-sweep",
        "Shows every job of a sweep, its state and `sweep.metric`, and the best, also while it "
        "runs.",
    )
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="the sweep's folder, such as outputs/rank_lr"
    )
    print_sweep(parser.parse_args().folder)
