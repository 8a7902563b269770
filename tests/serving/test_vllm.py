"""A real vLLM serves CeRA, and the LoRA of `cera-export` without the plugin: every answer is that
of transformers and PEFT. Run by `make test-serving`, whose tests share one server; those that start
others are nightly."""

import copy
import itertools
import os
import shutil
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import TINY
from made_files import change_json

pytest.importorskip("vllm")
pytestmark = pytest.mark.serving

import httpx  # noqa: E402
import openai  # noqa: E402
from evaluated_runs import contents, evaluate, export, keep_adapter  # noqa: E402
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from tiny_runs import metrics_of, wait_until  # noqa: E402
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM  # noqa: E402

import cera_train.evaluation.server as server_module  # noqa: E402
from cera_train.cera import CeraConfig  # noqa: E402
from cera_train.common.errors import UserError  # noqa: E402
from cera_train.settings.model import ModelConfig  # noqa: E402
from cera_train.training.train import train  # noqa: E402

BASE = "base"
PROMPTS = [[5, 9, 23, 41], [7, 7, 7], [100, 3, 50, 60, 70, 80], [11, 2]]
TOKENS = 8
SETTINGS = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
}
"""vLLM's environment."""

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QV = ["q_proj", "v_proj"]
ADAPTERS = {
    "silu": CeraConfig(r=8, target_modules=QV),
    "silu_all": CeraConfig(
        r=4,
        alpha=8,
        target_modules=LINEARS,
        rank_pattern={"v_proj": 2},
        alpha_pattern={"q_proj": 4},
    ),
    "relu": CeraConfig(r=8, target_modules=QV, activation="relu"),
    "gelu": CeraConfig(r=8, target_modules=LINEARS, activation="gelu"),
    "identity": CeraConfig(r=8, target_modules=QV, activation="identity"),
    "lora": LoraConfig(r=8, lora_alpha=8, target_modules=QV),
}


def generate(model, prompt: list[int], tokens: int):
    """The library's greedy answer, with its scores."""
    ids = torch.tensor([prompt])
    return model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        output_scores=True,
        return_dict_in_generate=True,
    )


def greedy(model) -> list[tuple[list[int], list[float]]]:
    """Tokens and log-probabilities of the answers to PROMPTS."""
    answers = []
    for prompt in PROMPTS:
        output = generate(model, prompt, TOKENS)
        tokens = output.sequences[0, len(prompt) :].tolist()
        scores = [
            score[0].log_softmax(-1)[token].item()
            for score, token in zip(output.scores, tokens, strict=True)
        ]
        answers.append((tokens, scores))
    return answers


def load_base(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / BASE, dtype=torch.float32).eval()


def drawn(config, base, seed: int):
    """A model with an adapter whose branches matter."""
    torch.manual_seed(seed)
    model = get_peft_model(base, config).eval()
    for name, weight in model.named_parameters():
        if any(part in name for part in ("_A.", "_B.")):
            torch.nn.init.normal_(weight, std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer) -> Path:
    """A random base model whose answers depend on its adapters, in `folder / BASE`."""
    folder = tmp_path_factory.mktemp("serving")
    torch.manual_seed(0)
    # The CPU kernels of vLLM take heads of 64.
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=None,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config)
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.15)
    model.save_pretrained(folder / BASE)
    tokenizer.save_pretrained(folder / BASE)
    return folder


@pytest.fixture(scope="module")
def wanted(folder) -> dict[str, list]:
    """What transformers and PEFT answer."""
    answers = {BASE: greedy(load_base(folder))}
    for seed, (name, config) in enumerate(ADAPTERS.items()):
        model = drawn(config, load_base(folder), seed)
        model.save_pretrained(folder / name)
        answers[name] = greedy(model)
    return answers


@contextmanager
def started(folder: Path, log: Path, *options: object, port: int = 0, **environment: str):
    """A vLLM of the base: its address and its process, in a session of its own."""
    if not port:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        folder / BASE,
        "--served-model-name",
        BASE,
        "--dtype",
        "float32",
        "--host",
        "127.0.0.1",
        "--port",
        port,
        "--max-model-len",
        128,
        "--enforce-eager",
        "--gpu-memory-utilization",
        0.1,
        "--max-num-seqs",
        32,
        *options,
    ]
    with log.open("w") as output:
        process = subprocess.Popen(
            [*map(str, command)],
            stdout=output,
            stderr=output,
            env=os.environ | SETTINGS | environment,
            start_new_session=True,
        )
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: process.poll() is not None or is_healthy(url), seconds=900, every=1)
        assert process.poll() is None, log.read_text()[-4000:]
        yield url, process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


LORA = ("--enable-lora", "--max-loras", 2, "--max-cpu-loras", 8, "--max-lora-rank", 8)


@pytest.fixture(scope="module")
def server(folder, wanted, tmp_path_factory):
    """The address of a vLLM with two slots for six adapters."""
    modules = ("--lora-modules", *(f"{name}={folder / name}" for name in ADAPTERS))
    options = (*LORA, *modules, "--max-logprobs=-1")
    with started(folder, tmp_path_factory.mktemp("log") / "server.log", *options) as (url, _):
        yield url


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=1).is_success
    except httpx.HTTPError:
        return False


def ask(url: str, model: str, prompt: list[int]) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities, as the OpenAI client gets them."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=300)
    completion = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        logprobs=1,
        extra_body={"return_tokens_as_token_ids": True, "ignore_eos": True},
    )
    answer = completion.choices[0].logprobs
    return [int(token.removeprefix("token_id:")) for token in answer.tokens], answer.token_logprobs


def post(url: str, path: str, **body) -> httpx.Response:
    return httpx.post(f"{url}/v1/{path}", json=body, timeout=300)


def assert_equal(answer, wanted) -> None:
    assert answer[0] == wanted[0]
    assert answer[1] == pytest.approx(wanted[1], abs=1e-3)


def assert_answers(url: str, model: str, wanted) -> None:
    for prompt, answer in zip(PROMPTS, wanted, strict=True):
        assert_equal(ask(url, model, prompt), answer)


def test_200_requests_of_8_clients_over_6_adapters_and_the_base_each_get_their_own_answer(
    server, wanted
):
    assert len({str([tokens for tokens, _ in answer]) for answer in wanted.values()}) == len(wanted)
    asked = [(name, place) for name in wanted for place in range(len(PROMPTS))]
    requests = [asked[number * 11 % len(asked)] for number in range(200)]
    with ThreadPoolExecutor(8) as clients:
        answers = list(
            clients.map(lambda request: ask(server, request[0], PROMPTS[request[1]]), requests)
        )
    for (name, place), answer in zip(requests, answers, strict=True):
        assert_equal(answer, wanted[name][place])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "mish"}, "activation=mish is not served"),
        ({"mix": "learned"}, "mix=learned is not served: cera-export makes a LoRA of it"),
        ({"r": 64}, "LoRA rank 64 is greater than max_lora_rank 8"),
    ],
    ids=["gate", "mix", "rank"],
)
def test_what_cannot_be_served_is_refused_and_the_server_lives(
    server, folder, wanted, tmp_path, changes, message
):
    broken = Path(shutil.copytree(folder / "silu", tmp_path / "broken"))
    change_json(broken / "adapter_config.json", changes)
    response = post(server, "load_lora_adapter", lora_name="broken", lora_path=str(broken))
    assert response.status_code >= 400
    assert message in response.text
    assert_equal(ask(server, "silu", PROMPTS[3]), wanted["silu"][3])


@pytest.mark.nightly
@pytest.mark.parametrize("sharded", [True, False])
def test_tensor_parallel_gates_the_sum_or_refuses(folder, wanted, tmp_path, sharded):
    """A projection whose input is split has a part of x A^T in each process: the gate needs the
    sum."""
    options = ("--tensor-parallel-size", 2, *["--fully-sharded-loras"] * sharded)
    with started(folder, tmp_path / "log", *LORA, *options) as (url, _):
        # The refused one comes last: of a call that fails in two processes, vLLM leaves one answer
        # for the next call.
        names = ["silu", "lora", "silu_all"]
        if sharded:
            names.insert(1, "gelu")
        for name in names:
            response = post(url, "load_lora_adapter", lora_name=name, lora_path=str(folder / name))
            if not sharded and name == "silu_all":
                assert "start vLLM with --fully-sharded-loras" in response.text
            else:
                assert_answers(url, name, wanted[name])


@pytest.fixture(scope="module")
def sums(folder, wanted, tokenizer) -> list[dict[str, str]]:
    """64 problems whose greedy answers have no tie, which rounding would decide."""
    model = PeftModel.from_pretrained(load_base(folder), folder / "silu_all").eval()
    rows = []
    for a, b in itertools.product(range(9), range(9)):
        output = generate(model, tokenizer(f"Question: {a} and {b}\nAnswer:").input_ids, 48)
        first, second = torch.stack(output.scores).topk(2).values.unbind(-1)
        if (first - second).min() > 1e-4:
            rows.append({"question": f"{a} and {b}", "answer": f"#### {a + b}"})
    assert len(rows) > 64
    return rows[:64]


@pytest.fixture
def evaluation(compose, folder, sums, write_jsonl):
    """evaluation(name, ...): runs 64 short problems, greedy and in float32, and returns what it
    leaves."""
    file = write_jsonl("sums.jsonl", sums)

    def evaluation(name: str, *settings: str) -> dict[str, bytes]:
        base = ("model=smollm2_135m", f"model.path={folder / BASE}", "model.dtype=float32")
        run = folder / "silu_all"
        task = ("task=gsm8k", f"task.files=[{file}]", "task.max_new_tokens=48")
        evaluate(compose(f"run={run}", *base, *task, f"name={name}", *settings, command="eval"))
        return contents(run / "eval" / name)

    return evaluation


def test_an_evaluation_by_vllm_is_that_of_transformers(server, evaluation):
    assert evaluation("served", f"server={server}") == evaluation("here")
    evaluation("sampled", f"server={server}", "generation=sample", "generation.samples=2")


def models_of(server: str) -> set[str]:
    return {model["id"] for model in httpx.get(f"{server}/v1/models").json()["data"]}


@pytest.fixture
def grpo(compose, folder, write_jsonl, tmp_path, monkeypatch):
    """grpo(server, ...): the config of a run that is rewarded for long answers."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "rewards_of_a_test.py").write_text(
        "def length(prompt, answer, right):\n    return len(answer)\n"
    )
    rows = write_jsonl(
        "rows.jsonl", [{"prompt": f"Say {n}:", "completion": f" {n}"} for n in range(8)]
    )
    return lambda server, *settings: compose(
        f"model.path={folder / BASE}",
        "model.dtype=float32",
        "data.max_length=64",
        f"train.server={server}",
        "adapter.r=8",
        "optimizer.lr=2e-2",
        f"output_dir={tmp_path}",
        "data=jsonl",
        f"data.train_files=[{rows}]",
        "data.eval_rows=2",
        "train.batch_size=3",
        "train.max_updates=2",
        "train.objective=grpo",
        "grpo.max_new_tokens=16",
        "grpo.rewards=[rewards_of_a_test.length]",
        *settings,
    )


def test_updates_by_rewards_are_sampled_by_vllm(server, grpo):
    config = grpo(server, "adapter.target_modules=[q_proj,v_proj]")
    before = models_of(server)
    train(config)
    updates = [line for line in metrics_of(config) if "train/reward" in line]
    assert len(updates) == 2
    assert all(line["train/grad_norm"] > 0 for line in updates)
    assert max(line["train/sampling/log_p_difference"] for line in updates) < 1e-3
    assert len(models_of(server) - before) == 1  # each adapter took the place of the one before


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("options", "environment", "fix"),
    [
        (LORA, {"VLLM_PLUGINS": ""}, "Install cera-train where vLLM runs"),
        ([], {}, "Start vLLM with --enable-lora."),
        ([*LORA[:-1], 1], {}, "Start vLLM with a higher --max-lora-rank."),
        (
            LORA,
            {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0"},
            "Start vLLM with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1",
        ),
    ],
    ids=["no plugin", "no LoRA", "rank", "no loading"],
)
def test_an_evaluation_by_a_vllm_that_lacks_something_is_refused_with_the_fix(
    folder, evaluation, tmp_path, options, environment, fix
):
    with started(folder, tmp_path / "log", *options, **environment) as (url, _):
        with pytest.raises(UserError) as caught:
            evaluation("refused", f"server={url}")
        print(caught.value)
    assert fix in str(caught.value)


@pytest.fixture(scope="module")
def exported(compose, folder) -> Path:
    """The LoRA of a short run, whose branches were made to matter."""
    config = compose(
        f"model.path={folder / BASE}",
        *TINY,
        "adapter.r=8",
        "adapter.target_modules=all-linear",
        "train.max_updates=1",
        "name=run",
        f"output_dir={folder}",
    )
    run = Path(train(config)["folder"])
    weights = run / "adapter" / "adapter_model.safetensors"
    save_file(
        {name: torch.randn_like(tensor) * 0.3 for name, tensor in load_file(weights).items()},
        weights,
    )
    keep_adapter(run)
    export(run, "at_most=100")
    return run / "export_lora"


def test_what_vllm_computes_is_the_run(server, exported):
    run = exported.parent
    served = export(run, f"check={run / 'adapter'}", "rows=2", f"server={server}")
    assert served.form.startswith("PEFT's CERA, on its base, in vllm ")
    assert served.kl_upper < 1e-6


def test_another_template_and_another_end_are_seen_in_vllm(server, folder, tokenizer):
    engine = server_module.Server(server, ModelConfig(path=str(folder / BASE)), tokenizer)
    assert engine.has_template_of(tokenizer)
    other = copy.deepcopy(tokenizer)
    other.chat_template = other.chat_template.replace("<|im_start|>", "### ")
    assert not engine.has_template_of(other)
    assert engine.ends_at(tokenizer.eos_token_id)
    assert not engine.ends_at(5)


@pytest.mark.nightly
def test_vllm_serves_the_export_without_the_plugin(folder, exported, tmp_path):
    modules = ("--lora-modules", f"lora={exported}")
    with started(folder, tmp_path / "log", *LORA, *modules, VLLM_PLUGINS="") as (url, _):
        assert_answers(url, BASE, greedy(load_base(folder)))
        assert_answers(
            url, "lora", greedy(PeftModel.from_pretrained(load_base(folder), exported).eval())
        )
