"""What a run needs, from its config and its model's architecture alone: tokens, bytes, floating-point operations.

A micro-batch of n tokens keeps for the backward pass what autograd saves of it in the real Llama layer; frozen weights
get no gradient, so their inputs are not saved, but everything between two of them is.
"""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import dataclass, replace
from typing import Any

from cera_train.adapters.config import Activation, AdapterKind
from cera_train.common.errors import UserError
from cera_train.config import Config
from cera_train.data.config import BatchLayout, DataConfig, Layout, LogisticMapConfig, LossOn
from cera_train.model.config import Dtype, ModelFacts, Quantization
from cera_train.model.loss import chunk_tokens
from cera_train.planning.architecture import Linear, adapted_linears, adapter_tensors, frozen_parameters, linears
from cera_train.training.config import OptimizerKind

CHARACTERS_PER_TOKEN = 3.5
"""Of local rows, which are not tokenised here. SmolLM2's tokenizer makes a token of 2.8 characters of GSM8K, which is
full of digits, and of 4.2 of OpenOrca."""

SAMPLE_ROWS = 1000
"""Local rows whose characters are counted."""

ROW_SPREAD = 0.4
"""Standard deviation of the tokens in a row over their mean: 0.36 on GSM8K, 0.43 on OpenOrca. The largest of many
updates is taken to be three standard deviations above the mean."""

NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
"""Of a weight: 4 bits, an 8-bit scale for 64 weights, and a 32-bit scale for 256 of those (double quantisation)."""

PROCESS_BYTES = 610_000_000
"""Resident memory of Python, torch, transformers, peft and pandas, a tokenizer loaded and no model (on Linux)."""

HEAP_SHARE = 0.4
"""On a CPU, freed blocks below 32 MB stay with the C library's heap, and its gaps add so much to the activations it
once held: 0.38 to 0.47 in runs of SmolLM2-135M; none where MALLOC_MMAP_THRESHOLD_ keeps it from holding blocks."""


# --- data ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DataSize:
    """How much there is to train and to evaluate on."""

    train_rows: int
    eval_rows: int
    tokens_per_row: float
    supervised: float
    """Share of the tokens whose prediction counts in the loss."""
    source: str
    """Where the tokens are known from, in words."""
    is_even: bool = False
    """All rows have the same length."""


def is_known(config: DataConfig) -> bool:
    """Whether the rows are described, local or computed, so that nobody has to say how many there are."""
    has_facts = config.facts is not None and config.facts.of == config.path
    return has_facts or bool(config.train_files) or config.layout == Layout.logistic_map


def data_size(config: DataConfig, tokens_per_row: float | None = None) -> DataSize:
    """The rows and tokens of a data set, by its facts, or by counting local files.

    Args:
        tokens_per_row: known better; None: take what is found.

    Raises:
        ValueError: nothing is known about `data.path`, or local files cannot be read.
    """
    if config.layout == Layout.logistic_map:
        size = _logistic_map_size(config)
    elif config.train_files:
        size = _size_of_files(config)
    elif is_known(config):
        facts = config.facts
        size = DataSize(
            _sliced(config.train_split, facts.train_rows),
            _sliced(config.eval_split, facts.eval_rows),
            facts.tokens_per_row,
            facts.supervised,
            "an estimate" if facts.estimated else "by SmolLM2's tokenizer",
        )
    elif None not in (config.train_rows, config.eval_rows, tokens_per_row):
        size = DataSize(config.train_rows, config.eval_rows, tokens_per_row, 1.0, "")
    else:
        raise UserError(
            f"cera-plan does not know how large data.path={config.path!r} is: set data.train_rows, data.eval_rows and "
            "plan.tokens_per_row, or write data.facts for it in a file of conf/data."
        )
    if tokens_per_row is not None:
        size = replace(size, tokens_per_row=tokens_per_row, source="as plan.tokens_per_row says")
    return replace(
        size,
        train_rows=min(size.train_rows, config.train_rows or size.train_rows),
        eval_rows=min(size.eval_rows, config.eval_rows or size.eval_rows),
        tokens_per_row=min(size.tokens_per_row, config.max_length),
        supervised=1.0 if config.loss_on == LossOn.all else size.supervised,
    )


def _sliced(split: str, rows: int) -> int:
    """Rows of a split in the notation of `datasets`, such as train[:100000] or test[:10%].

    Raises:
        ValueError: it is more than one slice of one split.
    """
    match = re.fullmatch(r"\w+(?:\[(-?\d+%?)?:(-?\d+%?)?\])?", split)
    if match is None:
        raise UserError(f"cera-plan reads splits such as train or train[:1000], not {split!r}.")
    start, end = (
        None if bound is None else round(rows * int(bound[:-1]) / 100) if bound.endswith("%") else int(bound)
        for bound in match.groups()
    )
    return len(range(rows)[start:end])


def _logistic_map_size(config: DataConfig) -> DataSize:
    from cera_train.data import logistic_map

    train, evaluation = logistic_map.problems(config.logistic_map, config.eval_rows)
    characters = sum(map(len, train[0].values()))
    if config.facts is None:
        tokens, supervised, source = characters / CHARACTERS_PER_TOKEN, 0.5, "by their characters"
    else:
        usual = sum(map(len, logistic_map.problem(0.5, LogisticMapConfig()).values()))
        is_usual = characters == usual
        tokens, supervised = config.facts.tokens_per_row * characters / usual, config.facts.supervised
        source = "by SmolLM2's tokenizer" if is_usual else "by their characters"
    return DataSize(len(train), len(evaluation), tokens, supervised, source, is_even=True)


def _size_of_files(config: DataConfig) -> DataSize:
    """Counts rows, and characters of the first ones."""
    from cera_train.data.format import segmenter
    from cera_train.data.sources import from_files

    to_segments = _chat_segments if config.layout == Layout.messages else segmenter(config, None)
    tokens = supervised = used = 0.0
    rows = from_files(config.train_files).read()
    for number, row in enumerate(itertools.islice(rows, SAMPLE_ROWS)):
        try:
            segments = to_segments(row)
        except ValueError as error:
            raise UserError(f"training row {number}: {error}") from error
        if segments:
            own = sum(len(segment.text) for segment in segments) / CHARACTERS_PER_TOKEN
            answers = sum(len(segment.text) for segment in segments if segment.supervised) / CHARACTERS_PER_TOKEN
            kept = min(own, config.max_length)
            tokens, used = tokens + kept, used + 1
            supervised += max(0.0, kept - (own - answers))
    if not used:
        raise UserError(f"no training rows with an answer in {', '.join(config.train_files)}.")
    train_rows, eval_rows = _count_rows(config.train_files), _count_rows(config.eval_files)
    if not config.eval_files:
        eval_rows = config.eval_rows
        if eval_rows >= train_rows:
            raise UserError(
                f"data.eval_rows={eval_rows} leaves nothing to train on: data.train_files has {train_rows} rows."
            )
        train_rows -= eval_rows
    source = f"an estimate: {CHARACTERS_PER_TOKEN} characters a token"
    return DataSize(train_rows, eval_rows, tokens / used, supervised / tokens, source)


def _chat_segments(row: dict[str, Any]) -> list[Any]:
    """Turns without the marks that a tokenizer's chat template adds."""
    from cera_train.data.format import Segment, list_of, text_of

    messages = list_of(row, "messages")
    return [Segment(text_of(message, "content"), text_of(message, "role") == "assistant") for message in messages]


def _count_rows(names: list[str]) -> int:
    from cera_train.data.sources import from_files

    rows = 0
    for name in names:
        if name.endswith(".jsonl"):
            with open(name, "rb") as file:
                rows += sum(bool(line.strip()) for line in file)
        else:
            rows += sum(1 for _ in from_files([name]).read())
    return rows


# --- work ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Work:
    """How much of the data a run goes through."""

    updates: int
    rows: int
    """Training rows, as often as they are seen."""
    tokens: float
    supervised_tokens: float
    evaluations: int
    eval_tokens: float
    """Of all evaluations, and of the probes on which spectra are taken."""


def work_of(config: Config, size: DataSize) -> Work:
    """Updates and tokens of a whole run, without an early stop by `train.patience`."""
    train = config.train
    updates_per_epoch = math.ceil(size.train_rows / train.batch_size)
    updates = train.max_updates or train.epochs * updates_per_epoch
    epochs, rest = divmod(updates, updates_per_epoch)
    rows = epochs * size.train_rows + min(rest * train.batch_size, size.train_rows)
    evaluations = 2  # before the first update and after the last
    if train.eval_every is not None:
        evaluations += (updates - 1) // train.eval_every
    eval_tokens = size.eval_rows * size.tokens_per_row
    probe_tokens = min(train.probe_tokens, eval_tokens)
    return Work(
        updates=updates,
        rows=rows,
        tokens=rows * size.tokens_per_row,
        supervised_tokens=rows * size.tokens_per_row * size.supervised,
        evaluations=evaluations,
        eval_tokens=evaluations * eval_tokens + (evaluations + 1) * probe_tokens,
    )


@dataclass(frozen=True)
class Setting:
    """One process's share of a run: what its largest micro-batch holds and in which precision it computes."""

    on_gpu: bool
    processes: int
    tokens: float
    """Of the largest micro-batch in training."""
    usual_tokens: float
    """Of a full one in an update of average rows."""
    eval_tokens: float
    row_tokens: float
    """Of the row that the largest micro-batch's attention runs over."""
    is_flat: bool
    by_sequence: bool
    """Attention runs over each sequence of a flat row by itself."""
    has_mask: bool
    """Attention gets a mask instead of running its causal path."""
    base_bytes: int
    """Of a number where the base computes."""
    adapter_bytes: int
    """Of a number where the adapter computes."""
    shares_inputs: bool
    """The adapter reads what the base reads, without a cast."""

    @property
    def autocast(self) -> bool:
        return self.adapter_bytes == 2


def setting_of(config: Config, size: DataSize, on_gpu: bool, processes: int) -> Setting:
    """How a run is cut into micro-batches, and its precision (as runtime.py and loss.py choose them)."""
    train, model = config.train, config.model
    is_16bit = model.dtype != Dtype.float32
    autocast = is_16bit if train.autocast is None else train.autocast
    autocast = autocast and (on_gpu or model.dtype != Dtype.float16)
    wanted = train.batch_layout
    is_sdpa = model.attn_implementation == "sdpa"
    is_flat = on_gpu or is_sdpa if wanted == BatchLayout.auto else wanted == BatchLayout.flat

    rows = math.ceil(train.batch_size / processes)
    spread = 0 if size.is_even else 3 * ROW_SPREAD / math.sqrt(rows)
    update_tokens = rows * min(size.tokens_per_row * (1 + spread), config.data.max_length)
    tokens = min(train.micro_batch_tokens, update_tokens)
    longest = size.tokens_per_row if size.is_even else config.data.max_length
    return Setting(
        on_gpu=on_gpu,
        processes=processes,
        tokens=tokens,
        usual_tokens=min(train.micro_batch_tokens, rows * size.tokens_per_row),
        eval_tokens=min(train.micro_batch_tokens, size.eval_rows / processes * size.tokens_per_row),
        row_tokens=tokens if is_flat else longest,
        is_flat=is_flat,
        by_sequence=is_flat and is_sdpa,
        has_mask=not model.attn_implementation.startswith("flash") and not (is_sdpa if is_flat else size.is_even),
        base_bytes=2 if autocast or is_16bit else 4,
        adapter_bytes=2 if autocast else 4,
        shares_inputs=autocast == is_16bit,
    )


# --- memory ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes by part, of one process, at its two peaks: where an update's backward pass begins, and in an evaluation."""

    training: dict[str, float]
    evaluation: dict[str, float]

    @property
    def peak(self) -> float:
        return max(sum(self.training.values()), sum(self.evaluation.values()))


def memory_of(config: Config, facts: ModelFacts, size: DataSize, setting: Setting) -> Memory:
    """The memory of a run's largest micro-batch: on a GPU what torch allocates, on a CPU what is resident."""
    adapted = adapted_linears(facts, config.adapter)
    tensors = [count for linear in adapted for count in adapter_tensors(linear, config.adapter.kind, config.adapter.r)]
    trainable = sum(tensors)
    has_adapted_head = any(linear.layer is None for linear in adapted)
    activations = activation_bytes(config, facts, setting)
    always = {
        "weights": weight_bytes(config, facts),
        "adapter": 4 * trainable,
        "optimizer": sum(_optimizer_bytes(count, config.optimizer.kind) for count in tensors),
    }
    if not setting.on_gpu:
        always |= {"libraries": PROCESS_BYTES, "heap's gaps": HEAP_SHARE * activations}
    logits, eval_logits = (
        facts.vocab_size * min(chunk_tokens(setting.on_gpu), tokens * size.supervised)
        for tokens in (setting.tokens, setting.eval_tokens)
    )
    training = {
        # DDP holds gradients a second time, in the buckets it sends.
        "gradients": 4 * trainable * (2 if setting.processes > 1 else 1),
        "activations": activations,
        # Frozen head: the logits, their log-softmax in float32, which becomes its gradient, and that as the logits are.
        # Adapted: the log-softmax that was saved, its gradient, and that of the logits, in float32.
        "logits": (12 if has_adapted_head else 8) * logits,
    }
    # float32 logits and their log-softmax. A CPU's heap has not given back what training took.
    evaluation = {"logits": 8 * eval_logits} | ({} if setting.on_gpu else {"activations": activations})
    return Memory(always | training, always | evaluation)


def weight_bytes(config: Config, facts: ModelFacts) -> float:
    """The frozen weights at their precision. bitsandbytes quantises the linears of the layers, not the head."""
    width = 4 if config.model.dtype == Dtype.float32 else 2
    in_layers = [linear for linear in linears(facts) if linear.layer is not None]
    quantised = sum(linear.weights for linear in in_layers)
    rest = sum(frozen_parameters(facts).values()) - quantised
    if config.model.quantization == Quantization.nf4:
        return quantised * NF4_BITS / 8 + rest * width
    if config.model.quantization == Quantization.int8:
        return quantised + 4 * sum(linear.d_out for linear in in_layers) + rest * width
    return (quantised + rest) * width


def _optimizer_bytes(count: int, kind: OptimizerKind) -> float:
    """Two moments of float32; or of 8 bits with a float32 scale for 256, which small tensors do not get."""
    return 8 * count if kind == OptimizerKind.adamw or count < 4096 else 2 * (1 + 4 / 256) * count


def activation_bytes(config: Config, facts: ModelFacts, setting: Setting) -> float:
    """What autograd saves in a forward pass of the largest micro-batch, frozen weights not counted."""
    adapted = adapted_linears(facts, config.adapter)
    first = first_layer(adapted, facts)
    layers = facts.num_hidden_layers - first  # those before the first adapter need no gradient
    last_norm = 4 * (facts.hidden_size + 1)
    in_head = [linear for linear in adapted if linear.layer is None]
    if not layers:
        return setting.tokens * last_norm + _adapter_saves(config, in_head, setting)
    in_layers = [linear for linear in adapted if linear.layer is not None]
    per_layer = setting.tokens * _layer_bytes(config, facts, setting)
    everything = layers * per_layer + _adapter_saves(config, in_layers, setting)
    if setting.autocast and config.model.dtype == Dtype.float32:  # 16-bit copies of the float32 weights
        weights = sum(linear.weights for linear in linears(facts) if linear.layer is not None)
        everything += 2 * weights * layers / facts.num_hidden_layers
    if config.model.gradient_checkpointing:  # the input of every layer, and one layer whole
        width = 4 if config.model.dtype == Dtype.float32 else 2
        everything = layers * setting.tokens * facts.hidden_size * width + everything / layers
    return everything + setting.tokens * last_norm + _adapter_saves(config, in_head, setting)


def first_layer(adapted: list[Linear], facts: ModelFacts) -> int:
    """The layer at which the backward pass ends."""
    return min((linear.layer for linear in adapted if linear.layer is not None), default=facts.num_hidden_layers)


def _layer_bytes(config: Config, facts: ModelFacts, setting: Setting) -> float:
    """What one token leaves in one layer of the base."""
    width, heads = setting.base_bytes, facts.num_attention_heads
    # With a mask, keys and values are repeated for every head; the mask itself is saved as numbers.
    key_heads = heads if setting.has_mask else facts.num_key_value_heads
    attention = width * facts.head_dim * (2 * heads + 2 * key_heads) + 4 * heads
    if setting.by_sequence and not setting.on_gpu and width == 2:  # in 16 bits on a CPU, the output is not kept
        attention = width * facts.head_dim * (heads + 2 * key_heads)
    mask = width * setting.row_tokens * setting.has_mask
    mlp = 3 * width * facts.intermediate_size  # gate, silu(gate), up
    norms = 2 * 4 * (facts.hidden_size + 1)  # input and inverse root mean square, in float32
    if facts.model_type == "qwen3":
        norms += 4 * (facts.head_dim + 1) * (heads + facts.num_key_value_heads)
    inputs = 0
    if config.model.quantization == Quantization.int8:  # bitsandbytes saves what an 8-bit linear reads
        inputs = width * (2 * facts.hidden_size + facts.intermediate_size)  # o_proj's is what attention saved
    return attention + mask + mlp + norms + inputs


def _adapter_saves(config: Config, adapted: list[Linear], setting: Setting) -> float:
    """What the adapters add to it."""
    adapter, width, tokens = config.adapter, setting.adapter_bytes, setting.tokens
    is_cera, drops = adapter.kind == AdapterKind.cera, adapter.dropout > 0
    # PEFT casts x to the adapter's float32 and drops it for every projection anew.
    shares = setting.shares_inputs and (is_cera or not (setting.autocast or drops))
    is_int8 = config.model.quantization == Quantization.int8
    is_in_place = is_cera and setting.shares_inputs
    total, saved = 0.0, set()
    for linear in adapted:
        if setting.autocast:  # 16-bit copies of A and B
            total += 2 * sum(adapter_tensors(linear, AdapterKind.lora, adapter.r))
        place = (linear.layer, linear.reads)
        is_attention_output = linear.reads == "attention output" and not setting.by_sequence
        is_saved = shares and (place in saved or is_int8 or is_attention_output)
        saved.add(place)
        total += 0 if is_saved else tokens * width * linear.d_in
        # A GPU keeps a dropout's mask in bytes, a CPU as numbers of what it drops.
        if is_in_place:
            total += tokens * adapter.r * width  # what the gate reads; the rest is made again
        elif is_cera:
            hidden = 1 + (adapter.activation != Activation.identity)  # what the gate reads, what B reads
            total += tokens * adapter.r * (width * hidden + drops * (1 if setting.on_gpu else width))
        else:
            total += tokens * (width * adapter.r + drops * (1 if setting.on_gpu else 4) * linear.d_in)
        if adapter.kind == AdapterKind.dora:  # two outputs to scale; with dropout, the base once more by a cast W0
            total += 2 * width * tokens * linear.d_out
            total += width * linear.weights * (drops and (setting.autocast or not setting.shares_inputs))
    return total


# --- floating-point operations ---------------------------------------------------------------------------------------


def flops_of(config: Config, facts: ModelFacts, size: DataSize, work: Work, setting: Setting) -> dict[str, float]:
    """Floating-point operations of a whole run by part, two for a multiply and add. Frozen weights cost four a token
    (forward, and backward for what they read), trained ones six. A causal token attends to half of its sequence on
    average; under a mask, attention is computed over the whole row all the same, for a flat row over all its sequences.
    """
    adapted = adapted_linears(facts, config.adapter)
    in_layers = [linear for linear in linears(facts) if linear.layer is not None]
    backward_share = 1 - first_layer(adapted, facts) / facts.num_hidden_layers
    frozen = sum(linear.weights for linear in in_layers)
    head = facts.vocab_size * facts.hidden_size
    trained = sum(sum(adapter_tensors(linear, AdapterKind.lora, config.adapter.r)) for linear in adapted)
    queries = facts.num_attention_heads * facts.head_dim
    attention = 2 * facts.num_hidden_layers * queries * size.tokens_per_row  # forward, a token

    def masked(flat_row: float) -> float:
        """What attention computes and the mask takes out, forward, a token."""
        width = flat_row if setting.is_flat else size.tokens_per_row  # rows of near-equal length stand together
        return setting.has_mask * (4 * facts.num_hidden_layers * queries * width - attention)

    flops = {
        "frozen linears": 2 * frozen * (1 + backward_share) * work.tokens,
        "adapter": 6 * trained * work.tokens,
        "attention": attention * (1 + 2 * backward_share) * work.tokens,
        "attention, masked": masked(setting.usual_tokens) * (1 + 2 * backward_share) * work.tokens,
        "head": 4 * head * work.supervised_tokens,
    }
    if not setting.has_mask:
        del flops["attention, masked"]
    if config.adapter.kind == AdapterKind.dora:
        weights = sum(linear.weights for linear in adapted)
        # A norm of W0 + s B A for every micro-batch; with dropout, the base once more on the dropped input.
        norms = sum(2 * config.adapter.r * linear.d_in * (linear.d_in + linear.d_out) for linear in adapted)
        flops["DoRA's norm"] = norms * work.tokens / setting.tokens
        if config.adapter.dropout:
            flops["adapter"] += 4 * weights * work.tokens
    if config.model.gradient_checkpointing:
        flops["recomputed"] = (2 * frozen + 2 * trained + attention + masked(setting.usual_tokens)) * work.tokens
    is_adapted = any(linear.layer is None for linear in adapted)
    if is_adapted and setting.tokens * size.supervised > chunk_tokens(
        setting.on_gpu
    ):  # backward makes each chunk's logits again
        flops["recomputed"] = flops.get("recomputed", 0) + 2 * head * work.supervised_tokens
    forward = 2 * frozen + 2 * trained + attention + masked(setting.eval_tokens) + 2 * head * size.supervised
    return flops | {"evaluations": forward * work.eval_tokens}
