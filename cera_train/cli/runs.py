"""The commands on existing runs: `cera-eval`, `cera-chat`, `cera-export`, `cera-report`,
`cera-sweep`.

The first three check their settings; only then do they import torch, which takes seconds."""

from pathlib import Path

from omegaconf import DictConfig

from cera_train.cli.config import call, start_hydra, to_config
from cera_train.cli.mistakes import Parser
from cera_train.common.files import cut_name
from cera_train.settings.evaluation import EvalConfig
from cera_train.settings.serving import ChatConfig, ExportConfig
from cera_train.study.folder import find_study
from cera_train.sweep.folder import print_sweep

# --- cera-eval, cera-chat and cera-export ---------------------------------------------------------


def eval_main() -> None:
    start_hydra("cera-eval", measure)


def measure(composed: DictConfig) -> None:
    call("cera_train.evaluation.evaluate:start_evaluation", to_config(composed, EvalConfig))


def chat_main() -> None:
    start_hydra("cera-chat", chat)


def chat(composed: DictConfig) -> None:
    call("cera_train.serving.chat:ask", to_config(composed, ChatConfig))


def export_main() -> None:
    start_hydra("cera-export", export)


def export(composed: DictConfig) -> None:
    call("cera_train.serving.export:export_run", to_config(composed, ExportConfig))


# --- cera-report and cera-sweep -------------------------------------------------------------------


def parser_of(program: str, description: str) -> Parser:
    parser = Parser(program, description=description)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def report() -> None:
    parser = parser_of(
        "cera-report",
        "Compares runs, of any program: one table, paired tests on the same problems, pictures. "
        "Of a study: its verdict.",
    )
    parser.add_argument(
        "folders",
        nargs="+",
        metavar="PATH",
        type=Path,
        help="a run, a folder of runs, a study, the studies of a family; or results of lm-eval, "
        "or JSON lines of problems and scores",
    )
    parser.add_argument(
        "--output", type=Path, help="where the page goes (default: report/NAMES_OF_THE_FOLDERS)"
    )
    arguments = parser.parse_args()
    folders = arguments.folders
    names = "_and_".join(folder.resolve().name for folder in folders)
    output = arguments.output or Path("report") / cut_name(names)
    studies = list(filter(None, map(find_study, folders)))
    if len(studies) == len(folders):
        from cera_train.study.page import write_studies

        page = write_studies(studies, output)
    else:
        from cera_train.report.page import compare_runs

        page = compare_runs(folders)
        page.write(output)
    page.print(output)


def sweep() -> None:
    parser = parser_of(
        "cera-sweep",
        "Shows every job of a sweep, its state and `sweep.metric`, and the best, also while it "
        "runs.",
    )
    parser.add_argument(
        "folder", metavar="DIR", type=Path, help="the sweep's folder, such as outputs/rank_lr"
    )
    print_sweep(parser.parse_args().folder)
