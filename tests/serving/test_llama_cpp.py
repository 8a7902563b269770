"""`cera-export to=gguf`: what llama.cpp itself computes is the run, or it is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
from conftest import CHAT_TEMPLATE, make_tiny_llama
from evaluated_runs import checker_of, export
from tokenizers import Tokenizer, decoders, models, normalizers, trainers
from transformers import PreTrainedTokenizerFast

from cera_train.common.errors import DiffersError, UserError
from cera_train.serving import llama_cpp
from cera_train.serving.export import export_run
from cera_train.serving.verify import Certificate
from cera_train.training.train import train

pytest_plugins = ("evaluated_runs",)

WORDS = "Question: what is the next value?\nAnswer: it is 0.84"


@pytest.fixture(scope="module")
def tokenizer_of_pieces() -> PreTrainedTokenizerFast:
    """As Llama 2's: the converter knows other BPEs by the tokens of one text, so none of a test."""
    pieces = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    pieces.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    pieces.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, show_progress=False)
    pieces.train_from_iterator([WORDS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=pieces,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        extra_special_tokens=["<|im_end|>"],
    )


@pytest.fixture(scope="module")
def run(tiny_config_in, tokenizer_of_pieces, tmp_path_factory) -> Path:
    for package in llama_cpp.PACKAGES:
        pytest.importorskip(package)
    output = tmp_path_factory.mktemp("for_llama_cpp")
    words = len(tokenizer_of_pieces)
    model = make_tiny_llama(words, bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(output / "base")
    tokenizer_of_pieces.save_pretrained(output / "base")
    changes = ["adapter=lora", "adapter.target_modules=all-linear"]
    config = tiny_config_in(output, f"model.path={output / 'base'}", *changes)
    return Path(train(config)["folder"])


@pytest.fixture(scope="module")
def certificate(run) -> Certificate:
    return export(run, "to=gguf", "rows=4")


@pytest.fixture(scope="module")
def file(run, certificate) -> Path:
    return run / "export_gguf" / "model.gguf"


@pytest.fixture(scope="module")
def check_of(run, compose):
    return checker_of(compose(f"run={run}", "rows=4", command="export"))


@pytest.mark.slow
def test_an_export_is_the_run_in_llama_cpp(certificate, file):
    assert certificate.form == "a GGUF in llama.cpp, ALL_F32"
    assert certificate.holds
    assert certificate.kl_upper < 1e-6
    assert {path.name for path in file.parent.iterdir()} == {
        "model.gguf",
        "certificate.json",
    }


def scale_weights(reader: gguf.GGUFReader) -> None:
    [weights] = [each for each in reader.tensors if each.name == "blk.0.attn_q.weight"]
    weights.data[:] *= 1.5


def field(name: str, before: object, after: object) -> Callable:
    """A fault: another value of metadata, as long."""

    def plant(reader: gguf.GGUFReader) -> None:
        found = reader.fields[name]
        value = found.parts[found.data[0]]
        if isinstance(before, bytes):
            value[:] = list(bytes(value).replace(before, after))
        else:
            assert value[0] == before
            value[0] = after

    return plant


FAULTS = {
    "weights scaled": (scale_weights, "its KL divergence from the run may be"),
    "another template": (
        field("tokenizer.chat_template", b"<|im_start|>", b"<|im_begin|>"),
        "chat template or end token is not",
    ),
    "another end": (field("tokenizer.ggml.eos_token_id", 2, 5), r"stop at the tokens \[2, 5\]"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_refused(name, file, check_of, tmp_path):
    plant, line = FAULTS[name]
    faulty = Path(shutil.copy(file, tmp_path))
    plant(gguf.GGUFReader(faulty, "r+"))
    with pytest.raises(DiffersError, match=line):
        check_of(faulty)


@pytest.mark.slow
def test_a_damaged_file_is_refused(file, check_of, tmp_path):
    damaged = tmp_path / "model.gguf"
    damaged.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(UserError, match="it cannot be loaded"):
        check_of(damaged)


def test_missing_packages_are_named(compose, monkeypatch):
    monkeypatch.setattr(llama_cpp, "PACKAGES", ("no_such_package",))
    with pytest.raises(UserError, match=r"to=gguf needs llama.cpp: pip install -e '.\[gguf\]'"):
        export_run(compose("run=any", "to=gguf", command="export"))
