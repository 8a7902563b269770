"""What a run says in the terminal: what it is about to do, how far it is, what came out."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from cera_train.attention import BY_SEQUENCE, VARLEN
from cera_train.config import AdapterKind, BatchLayout, Config, Quantization
from cera_train.data import TokenizedData
from cera_train.loss import SupervisedLoss
from cera_train.words import clean, duration, say, targets

tqdm.set_lock(threading.RLock())  # its own is shared by processes, and would be missed when one of them is killed

PLAIN_LINES = 10
"""Progress lines of a run whose output is not a terminal."""


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
    say("run", f"{path}, {updates:,} updates of {config.train.batch_size} sequences" + f", {done:,} done" * bool(done))
    say("model", f"{model.path}, {model.dtype}{quantization}, {total - trainable:,} parameters")
    say(
        "adapter",
        f"{adapter.kind} r={adapter.r}{gate}, dropout {adapter.dropout:g}, on {targets(adapter.target_modules)}: "
        f"{trainable:,} trainable",
    )
    device = f"{accelerator.num_processes} x {accelerator.device.type}" + ", FSDP2" * accelerator.is_fsdp2
    precision = {"no": "no autocast"}.get(accelerator.mixed_precision, f"{accelerator.mixed_precision} autocast")
    layout = "flat" if is_flat else "padded"
    say("device", f"{device}, {precision}, {layout} micro-batches of up to {config.train.micro_batch_tokens:,} tokens")


def describe_speed(wanted: BatchLayout, loss: SupervisedLoss, is_flat: bool, kernels: str) -> str:
    """What makes this run fast, and why it does without the rest.

    Args:
        wanted: the layout that was asked for; `is_flat` is what came of it.
        kernels: `choose_kernels`'s answer, empty without CeRA.
    """
    if is_flat:
        batches = {
            VARLEN: "attention by sequence in one kernel, no padding",
            BY_SEQUENCE: "attention by sequence, no padding",
            None: "no padding, no attention by sequence (this model's own is not plain causal sdpa)",
        }[loss.attention]
    elif not loss.flattens:
        batches = "padding (this model mixes sequences that share a row)"
    elif wanted == BatchLayout.padded:
        batches = "padding (train.batch_layout=padded)"
    else:
        batches = "padding (costs less here than a mask over one long row)"
    compiled = "compiled layers" if loss.is_compiled else "not compiled (train.compile=false)"
    return "; ".join(filter(None, (batches, compiled, kernels)))


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
    [row] = data.train.rows.slice(0, 1).to_pylist()
    # Not by `say`, which would take the colour out.
    example = render_example(row["input_ids"], row["loss_mask"], tokenizer, color=sys.stdout.isatty())
    print(f"{'example':<11}{example}", flush=True)


def render_example(input_ids: list[int], loss_mask: list[bool], tokenizer: Any, color: bool) -> str:
    """A row's text, its supervised parts green in a terminal and between [[ ]] elsewhere."""
    start, end = ("\033[32m", "\033[0m") if color else ("[[", "]]")
    text, position = "", 0
    while position < len(input_ids):
        stop = position
        while stop < len(input_ids) and loss_mask[stop] == loss_mask[position]:
            stop += 1
        part = clean(tokenizer.decode(input_ids[position:stop]))
        text += f"{start}{part}{end}" if loss_mask[position] else part
        position = stop
    return text.replace("\n", "\n" + " " * 11)


class ProgressBar:
    """A bar in a terminal; elsewhere a plain line now and then."""

    def __init__(self, unit: str, total: int, done: int, visible: bool = True) -> None:
        self.unit, self.total, self.done = unit, total, done
        self.visible = visible
        self.every = max(1, total // PLAIN_LINES)
        self.bar = tqdm(
            total=total,
            initial=done,
            disable=not (visible and sys.stderr.isatty()),
            unit=unit,
            dynamic_ncols=True,
            bar_format="{n}/{total} |{bar:24}| {desc}",
        )

    def step(self, shown: str, count: int = 1) -> None:
        """Shows what has been done since the last call, and a text about it."""
        tenths = self.done // self.every
        self.done += count
        self.bar.set_description_str(shown, refresh=False)
        self.bar.update(count)
        if self.visible and self.bar.disable and (self.done // self.every > tenths or self.done == self.total):
            print(f"{self.unit} {self.done:>{len(str(self.total))}}/{self.total}  {shown}", flush=True)

    def note(self, text: str) -> None:
        """A line above the bar."""
        if self.visible:
            self.bar.write(text, file=sys.stdout)
            sys.stdout.flush()

    def close(self) -> None:
        self.bar.close()


def describe_update(metrics: dict[str, float], seconds_left: float) -> str:
    return (
        f"loss {metrics['train/loss']:.3f}  perplexity {metrics['train/perplexity']:.2f}  "
        f"{metrics['train/tokens_per_s']:,.0f} tokens/s  {duration(seconds_left)} left"
    )


class Clock:
    """How long the rest takes, evaluations and checkpoints included, if it goes on as since the start."""

    def __init__(self, done: int, total: int) -> None:
        self.first, self.total, self.started = done, total, time.perf_counter()

    def seconds_left(self, done: int) -> float:
        return (time.perf_counter() - self.started) / (done - self.first) * (self.total - done)


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
        print(clean(f"{name:<16}{value}"))


class EvaluationProgress:
    """Answers done, how many are right so far by the exact rule, and the time left.

    Args:
        total: answers of this process.
        processes: that share the answers; the others are as fast as this one.
    """

    def __init__(self, total: int, visible: bool, processes: int) -> None:
        self.total, self.others = total, processes - 1
        self.answered, self.correct, self.started = 0, 0, time.perf_counter()
        self.bar = ProgressBar("answer", total, 0, visible)

    def step(self, correct: Sequence[bool]) -> None:
        """A batch of answers."""
        self.answered += len(correct)
        self.correct += sum(correct)
        seconds_left = (time.perf_counter() - self.started) / self.answered * (self.total - self.answered)
        sharing = f" of this process's, {self.others} more at work" if self.others else ""
        self.bar.step(f"exact {self.correct / self.answered:.1%}{sharing}  {duration(seconds_left)} left", len(correct))

    def close(self) -> None:
        self.bar.close()


def say_evaluation(result: dict[str, Any], folder: Path) -> None:
    """The table at the end of an evaluation."""
    rows = _perplexity_rows(result) if result["kind"] == "perplexity" else _accuracy_rows(result)
    print()
    for name, value in (rows | {"folder": str(folder)}).items():
        print(clean(f"{name:<16}{value}"))
    if case := result.get("paper_case"):
        print("\nr = 3.5, x0 = 0.4")
        print("step    truth   answer")
        for step, (true, answer) in enumerate(zip(case["truth"], case["answer"], strict=True), start=1):
            print(clean(f"x{step:<4}{true:>8}{answer or '-':>9}"))


def _accuracy_rows(result: dict[str, Any]) -> dict[str, str]:
    answers = result["problems"] * result["samples"] - result["missing"]
    rows = {"problems": f"{result['problems']:,}, {result['samples']:,} answers each"}
    if result["samples"] == 1:
        rows["problems"] = f"{result['problems']:,}"
    for name, value in result.items():
        if "/pass@" in name and not name.endswith("/interval"):
            lower, upper = result[f"{name}/interval"]
            label = name.replace("/", " ") if result["samples"] > 1 else name.split("/")[0]
            # Resampling problems that came out alike gives a point, which is not how sure the figure is.
            interval = f"95 % interval {lower:.1%} to {upper:.1%}" if lower < upper else "all alike: no interval"
            rows[label] = f"{value:.1%}  ({interval})"
    if "step_accuracy" in result:
        rows["by step"] = "  ".join(f"{value:.0%}" for value in result["step_accuracy"])
        for growth, own in result["by_growth"].items():
            error = "none given" if own["absolute_error/mean"] is None else f"{own['absolute_error/mean']:.4f}"
            rows[f"r = {growth}"] = (
                f"steps right {own['step_accuracy/mean']:.1%}, absolute error {error}, "
                f"state collapse {own['state_collapse']:.1%}"
            )
    rows["truncated"] = f"{result['truncated']:,} of {answers:,} answers"
    rows["no answer"] = f"{result['no_answer']:,}"
    rows["grader failed"] = f"{result['grader_failures']:,}"
    if result.get("tokens_per_s"):
        rows["speed"] = f"{result['tokens_per_s']:,.0f} tokens/s"
    return rows


def _perplexity_rows(result: dict[str, Any]) -> dict[str, str]:
    rows = {"perplexity": f"{result['perplexity']:.3f}"}
    if "perplexity_base" in result:
        rows["without adapter"] = f"{result['perplexity_base']:.3f}"
    if "spectrum/effective_rank/mean" in result:
        rows["effective rank"] = (
            f"{result['spectrum/effective_rank/mean']:.1f} mean, {result['spectrum/effective_rank/max']:.1f} max"
        )
    return rows | {
        "tokens": f"{result['tokens']:,} predicted, in {result['rows']:,} rows",
        "time": duration(result["seconds"]),
    }
