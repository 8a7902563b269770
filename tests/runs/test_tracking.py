"""Trackers mirror a run, several at once; a failing one does not disturb it, and no secret leaves.
Also what `hub.push` uploads."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from commands import command
from conftest import TINY
from huggingface_hub import RepoUrl
from tiny_runs import metrics_of

from cera_train.common.errors import UserError
from cera_train.common.trust import redact
from cera_train.runs import card, tracking
from cera_train.training.train import launch, train


class Recording(GeneralTracker):
    """Records what a tracker of Accelerate's gets; `fails_at` is an update."""

    name = "recording"
    requires_logging_directory = False
    tracker = None
    run = SimpleNamespace(offline=False)

    def __init__(self, fails_at: int | None = None) -> None:
        super().__init__()
        self.fails_at = fails_at
        self.calls = []

    def start(self):
        self.calls.append("start")

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **kwargs):
        if step == self.fails_at:
            raise ConnectionError("the server is\ngone")
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finish")


def test_several_trackers_run_at_once_and_a_failing_one_is_dropped_once(
    tiny_config, monkeypatch, capsys
):
    other = Recording()
    wandb = Recording(fails_at=2)
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", lambda *_, **__: wandb)
    passed = []

    def make(project, **arguments):
        passed.append((project, arguments))
        return other

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "json", make)  # the name of a package that is here
    result = train(tiny_config("tracker.kinds={json: {space: mine}, wandb: null}"))
    assert passed == [("cera-train", {"space": "mine"})]
    mirrored = [(line["update"], line) for line in metrics_of(Path(result["folder"]))]
    assert other.calls == ["start", *mirrored, "finish"]
    assert other.config["adapter.r"] == 4
    assert wandb.calls == ["start", *mirrored[:2]]
    (error,) = capsys.readouterr().err.splitlines()
    assert "wandb failed and is left out: ConnectionError: the server is gone (" in error


def test_a_resumed_run_continues_under_the_same_id(compose, tmp_path):
    config = compose("tracker=wandb", "tracker.kinds.wandb={entity: ours, group: grid}").tracker
    first, second = (
        tracking.build_tracker("wandb", config, "run", tmp_path, 0).init_kwargs for _ in range(2)
    )
    assert first == second
    named = {"name": "run", "group": "grid", "entity": "ours", "resume": "allow"}
    assert named.items() <= first.items()


@pytest.mark.slow
def test_wandb_without_a_key_is_offline_with_metrics(tiny_folder, tmp_path, monkeypatch):
    """In a separate process: W&B starts a service that outlives a test."""
    monkeypatch.delenv("WANDB_MODE")
    words = [f"model.path={tiny_folder}", *TINY, "train.max_updates=2"]
    words.append("tracker.kinds={wandb: null, tensorboard: null}")
    done = command("cera-train", *words, cwd=tmp_path, HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "left out" not in done.stderr
    folder = tmp_path / done.stdout.split("to upload it: wandb sync ")[1].split()[0]
    recorded = b"".join(path.read_bytes() for path in folder.glob("*.wandb"))
    for name in (b"eval/perplexity", b"spectrum/effective_rank/mean", b"train.max_updates"):
        assert name in recorded
    # Beside an offline run of W&B, TensorBoard's events stay in the run's folder.
    assert [*tmp_path.glob("outputs/*/tensorboard/events*")]


def test_secrets_of_the_environment_are_redacted(monkeypatch):
    for name in ("HF_TOKEN", "OPENAI_APIKEY", "AWS_SECRET_ACCESS_KEY", "API_KEYS", "PGPASSWORD"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "hf_abcdefghijk")
            assert redact("token=hf_abcdefghijk short") == "token=*** short", name
    # A path in one of these may be model.path, which cera-eval reads from the run's config.
    for name in ("TOKENIZER_PATH", "KEYSTORE_DIR", "MONKEY_HOME"):
        monkeypatch.setenv(name, "outputs/tiny")
    monkeypatch.setenv("MY_API_KEY", "short")
    assert redact("path: outputs/tiny, short") == "path: outputs/tiny, short"
    assert (
        redact("see https://user:pass@host/x and https://host/y")
        == "see https://***@host/x and https://host/y"
    )


def test_no_secret_reaches_the_folder_or_the_terminal(tiny_config, monkeypatch, capfd):
    secret = "s3cr3t-value-of-a-key"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, secret)
    monkeypatch.setattr(sys, "argv", ["cera-train", f"tracker.project={secret}"])
    config = tiny_config(f"tracker.project={secret}", "tracker=tensorboard", "train.max_updates=2")
    folder = Path(train(config)["folder"])
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if secret.encode() in path.read_bytes()]
    captured = capfd.readouterr()
    assert secret not in captured.out + captured.err
    assert "project: '***'" in (folder / "config.yaml").read_text()


@pytest.fixture
def hub(monkeypatch):
    """A Hub whose `files` it was sent; with `refuses`, it rejects every user."""

    class Hub:
        def __init__(self):
            self.refuses = False
            self.private = None
            self.files = {}

        def create_repo(self, name, private, exist_ok):
            if self.refuses:
                raise ConnectionError("who are you?")
            self.private = private
            return RepoUrl(f"https://huggingface.co/{name}")

        def upload_folder(self, repo_id, folder_path, commit_message):
            assert repo_id == "me/mine"
            self.files = {file.name: file.read_bytes() for file in folder_path.iterdir()}

        def upload_file(self, repo_id, path_or_fileobj, path_in_repo, commit_message):
            self.files[path_in_repo] = path_or_fileobj

    server = Hub()
    monkeypatch.setattr(card, "HfApi", lambda: server)
    return server


def test_the_adapter_and_its_card_reach_the_hub_even_at_the_second_try(
    hub, tiny_config, tiny_folder, capsys, monkeypatch
):
    facts = (f"model.facts.of={tiny_folder}", "model.facts.hub_id=an/id")
    config = tiny_config("hub.push=me/mine", "train.max_updates=1", *facts)
    hub.refuses = True
    monkeypatch.setattr(sys, "argv", ["/here/cera_train/__main__.py", "hub.push=me/mine"])
    failure = r"failed \(.*to upload it: python -m cera_train hub.push=me/mine$"
    with pytest.raises(UserError, match=failure):
        launch(config)
    hub.refuses = False
    result = launch(config)
    assert result["updates"] == 1
    assert "/me/mine" in capsys.readouterr().out
    assert hub.private
    weights = Path(result["folder"]) / "adapter" / "adapter_model.safetensors"
    assert hub.files[weights.name] == weights.read_bytes()
    assert {"README.md", "tokenizer.json"} <= hub.files.keys()
    assert json.loads(hub.files["adapter_config.json"])["base_model_name_or_path"] == "an/id"
