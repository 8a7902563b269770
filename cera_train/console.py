"""What a run says in the terminal: what it is about to do, how far it is, what came out."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from cera_train.config import AdapterKind, Config, Quantization
from cera_train.data import TokenizedData

PLAIN_LINES = 10
"""Progress lines of a run whose output is not a terminal."""


def say(label: str, text: str) -> None:
    """One aligned line."""
    print(f"{label:<11}{text}", flush=True)


def say_start(
    config: Config,
    path: Path,
    parameters: tuple[int, int],
    accelerator: Accelerator,
    is_flat: bool,
    updates: int,
    done: int,
) -> None:
    """The run in a few lines: folder, model, adapter, device."""
    trainable, total = parameters
    model, adapter = config.model, config.adapter
    quantization = "" if model.quantization == Quantization.none else f", {model.quantization}"
    gate = f", {adapter.activation}" if adapter.kind == AdapterKind.cera else ""
    targets = adapter.target_modules if isinstance(adapter.target_modules, str) else " ".join(adapter.target_modules)
    say("run", f"{path}, {updates:,} updates of {config.train.batch_size} sequences" + f", {done:,} done" * bool(done))
    say("model", f"{model.path}, {model.dtype}{quantization}, {total - trainable:,} parameters")
    say(
        "adapter",
        f"{adapter.kind} r={adapter.r}{gate}, dropout {adapter.dropout:g}, on {targets}: {trainable:,} trainable",
    )
    device = f"{accelerator.num_processes} x {accelerator.device.type}"
    precision = {"no": "no autocast"}.get(accelerator.mixed_precision, f"{accelerator.mixed_precision} autocast")
    layout = "flat" if is_flat else "padded"
    say("device", f"{device}, {precision}, {layout} micro-batches of up to {config.train.micro_batch_tokens:,} tokens")


def say_data(data: TokenizedData, tokenizer: Any) -> None:
    """Rows kept, dropped and truncated, the supervised share, shared prompts, and one rendered example."""
    for label, split in (("train", data.train), ("eval", data.evaluation)):
        counts = split.counts
        dropped = counts.empty + counts.answer_truncated
        say(
            label,
            f"{counts.kept:,} rows, {counts.tokens:,} tokens, {counts.supervised_tokens / counts.tokens:.0%} supervised"
            f"; {dropped:,} dropped ({counts.empty:,} empty, {counts.answer_truncated:,} beyond max_length)"
            f", {counts.truncated:,} truncated",
        )
    say("shared", f"{data.shared_prompts:,} evaluation prompts are also training prompts")
    row = data.train.rows[0]
    say("example", render_example(row["input_ids"], row["loss_mask"], tokenizer, color=sys.stdout.isatty()))


def render_example(input_ids: list[int], loss_mask: list[bool], tokenizer: Any, color: bool) -> str:
    """A row's text, its supervised parts green in a terminal and between [[ ]] elsewhere."""
    start, end = ("\033[32m", "\033[0m") if color else ("[[", "]]")
    text, position = "", 0
    while position < len(input_ids):
        stop = position
        while stop < len(input_ids) and loss_mask[stop] == loss_mask[position]:
            stop += 1
        part = tokenizer.decode(input_ids[position:stop])
        text += f"{start}{part}{end}" if loss_mask[position] else part
        position = stop
    return text.replace("\n", "\n" + " " * 11)


class ProgressBar:
    """A bar in a terminal; elsewhere a plain line now and then."""

    def __init__(self, total: int, done: int, visible: bool = True) -> None:
        self.total, self.done = total, done
        self.visible = visible
        self.every = max(1, total // PLAIN_LINES)
        self.bar = tqdm(
            total=total,
            initial=done,
            disable=not (visible and sys.stderr.isatty()),
            unit="update",
            dynamic_ncols=True,
            bar_format="{n}/{total} |{bar:24}| {desc}",
        )

    def step(self, metrics: dict[str, float], seconds_left: float) -> None:
        """Shows one more update."""
        self.done += 1
        shown = (
            f"loss {metrics['train/loss']:.3f}  perplexity {metrics['train/perplexity']:.2f}  "
            f"{metrics['train/tokens_per_s']:,.0f} tokens/s  {duration(seconds_left)} left"
        )
        self.bar.set_description_str(shown, refresh=False)
        self.bar.update()
        if self.visible and self.bar.disable and (self.done % self.every == 0 or self.done == self.total):
            print(f"update {self.done:>{len(str(self.total))}}/{self.total}  {shown}", flush=True)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self.visible:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()


class Clock:
    """How long the rest takes, evaluations and checkpoints included, if it goes on as since the start."""

    def __init__(self, done: int, total: int) -> None:
        self.first, self.total, self.started = done, total, time.perf_counter()

    def seconds_left(self, done: int) -> float:
        return (time.perf_counter() - self.started) / (done - self.first) * (self.total - done)


def duration(seconds: float) -> str:
    """h:mm:ss, or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def say_result(result: dict[str, Any]) -> None:
    """The table at the end."""
    rank = f"{result['spectrum/effective_rank/mean']:.1f} mean, {result['spectrum/effective_rank/max']:.1f} max"
    rows = {
        "perplexity": f"{result['perplexity_before']:.2f} before, {result['eval/perplexity']:.2f} after",
        "best": f"{result['best_perplexity']:.2f} at update {result['best_update']}",
        "effective rank": f"{rank} (of {result['adapter_r']})",
        "trainable": f"{result['trainable_parameters']:,} parameters, {result['trainable_share']:.2%} of the model",
        "speed": f"{result['tokens_per_s']:,.0f} tokens/s",
        "time": f"{duration(result['seconds'])} for {result['updates']:,} updates",
        "folder": result["folder"],
    }
    print()
    for name, value in rows.items():
        print(f"{name:<16}{value}")
