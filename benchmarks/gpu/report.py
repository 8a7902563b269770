"""The Markdown block of `make gpu`: what ran where, the outcome of the tests, and a table for each measurement."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu.race import RACERS
from benchmarks.gpu.results import FAILED, PASSED, SKIPPED, Result
from benchmarks.gpu.runs import NEMO_TOKENS_PER_S

MODELS = {"llama3_1_8b": "Llama-3.1-8B", "llama3_2_1b": "Llama-3.2-1B"}


def block(results: Sequence[Result]) -> str:
    """The block of these results."""
    if not results:
        return "No piece has a result yet."
    parts = (_machine, _tests, _runs, _race, _decoding, _rest)
    sections = (part(results) for part in parts)
    return "\n\n".join(section for section in sections if section)


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column left, the others right; empty without rows."""
    rule = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, rule, *rows)) if rows else ""


def _machine(results: Sequence[Result]) -> str:
    """The machines and codes of all results: more than one where some are older."""
    lines = []
    for identity in {str(result.identity): result.identity for result in results}.values():
        here = identity["machine"]
        gpus = {name: here["gpus"].count(name) for name in here["gpus"]}
        memory = f" ({here['memory'][0] / 1e9:.0f} GB, sm_{here['capability'][0].replace('.', '')})" if gpus else ""
        named = ", ".join(f"{count} x {name}" for name, count in gpus.items()) or "no GPU"
        versions = ", ".join(f"{name} {version}" for name, version in here["packages"].items())
        driver = f"driver {here['driver']}, CUDA {here['cuda']}, " if gpus else ""
        size = "" if identity["size"] == "full" else f", size {identity['size']}"
        line = f"{named}{memory}, {driver}Python {here['python']}, {versions}; device {identity['device']}{size}"
        if line not in lines:
            lines.append(line)
    states = [result.found.state for result in results]
    counts = ", ".join(f"{states.count(state)} {state}" for state in (PASSED, FAILED, SKIPPED))
    minutes = sum(result.seconds for result in results) / 60
    codes = ", ".join(sorted({result.identity["code"] for result in results}))
    pieces = f"Pieces: {counts}; {minutes:.0f} minutes; code {codes}."
    return "\n".join([*(f"Machine: {line}." for line in lines), "", pieces])


def _tests(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        if result.piece.startswith("tests_"):
            figures = result.found.figures
            counts = [str(figures.get(state, "-")) for state in (PASSED, FAILED, SKIPPED)]
            rows.append([result.piece.removeprefix("tests_"), *counts, f"{result.seconds:.0f}"])
    return table(["tests", *(PASSED, FAILED, SKIPPED), "seconds"], rows)


def _runs(results: Sequence[Result]) -> str:
    """Recipes, and NeMo AutoModel's setting beside its published figure."""
    rows = []
    for result in results:
        figures = result.found.figures
        if "planned_memory_bytes" in figures:
            planned = figures["planned_update_seconds"]
            rows.append(
                [
                    _title(result.piece),
                    f"{figures['tokens_per_s']:,.0f}",
                    f"{figures['update_seconds']:.3g}",
                    "-" if planned is None else f"{planned:.3g}",
                    f"{figures['peak_memory_bytes'] / 1e9:.2f}",
                    f"{figures['planned_memory_bytes'] / 1e9:.2f}",
                    f"{figures['first_loss']:.2f} to {figures['last_loss']:.2f}",
                ]
            )
            if result.found.reason:
                rows[-1][0] += f" ({result.found.reason})"
    if any(result.piece.startswith("nemo_") for result in results):
        speed, seconds = f"{NEMO_TOKENS_PER_S:,}", f"{32 * 4096 / NEMO_TOKENS_PER_S:.3g}"
        rows.append(["NeMo AutoModel's LoRA on one H100, two at a time, as published", speed, seconds, *["-"] * 4])
    columns = ["run", "tokens/s", "s an update", "planned s", "peak GB", "planned GB", "loss"]
    return table(columns, rows)


def _title(piece: str) -> str:
    for model, title in MODELS.items():
        if piece.endswith(f"_{model}"):
            return f"{piece.removesuffix(f'_{model}')}, {title}'s shape"
    adapter = {"nemo_lora": "our LoRA", "nemo_cera": "CeRA"}[piece]
    return f"NeMo AutoModel's setting, one sequence at a time, {adapter}"


def _race(results: Sequence[Result]) -> str:
    rows = []
    for result in results:
        if result.piece.startswith("race_"):
            key, model, precision = _parts(result.piece)
            figures = result.found.figures
            measured = [result.found.state, *["-"] * 3]
            if figures:
                measured = [
                    f"{figures['tokens_per_s']:,.0f}",
                    f"{figures['update_seconds']:.3g}",
                    f"{figures['useful_flops'] / 1e12:,.1f}",
                    f"{figures['peak_memory_bytes'] / 1e9:.2f}",
                ]
            rows.append([f"{MODELS[model]}'s shape, {precision}: {RACERS[key]}", *measured])
    return table(["race", "tokens/s", "s an update", "useful TFLOP/s", "peak GB"], rows)


def _parts(piece: str) -> tuple[str, str, str]:
    """Contestant, model and precision of a piece of the race."""
    rest, _, precision = piece.removeprefix("race_").rpartition("_")
    model = next(model for model in MODELS if rest.endswith(f"_{model}"))
    return rest.removesuffix(f"_{model}"), model, precision


def _decoding(results: Sequence[Result]) -> str:
    rows, batches = [], []
    for result in results:
        if result.piece.startswith("decoding_") and result.found.figures:
            title = MODELS[result.piece.removeprefix("decoding_")]
            for name, speeds in result.found.figures["tokens_per_s"].items():
                batches = list(speeds)
                rows.append([f"{title}'s shape: {name}", *(f"{speed:,.0f}" for speed in speeds.values())])
    return table(["new tokens/s by rows in the batch", *batches], rows)


def _rest(results: Sequence[Result]) -> str:
    """What did not pass, and why."""
    return "\n".join(
        f"- {result.piece}: {result.found.state}: {result.found.reason}"
        for result in results
        if result.found.state != PASSED
    )
