"""A model in this process answers requests: greedy, or sampled with random numbers that depend
only on (seed, problem, sample).

Except for rounding, an answer depends neither on its batch nor on the order of problems, so a
resumed evaluation answers only what is missing.
"""

import functools
import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    Cache,
    DynamicCache,
    GenerationMixin,
    PreTrainedModel,
    StopStringCriteria,
    TextStreamer,
)
from transformers.cache_utils import DynamicLayer

from cera_train.cera import for_inference
from cera_train.common.errors import UserError
from cera_train.evaluation.requests import (
    Answer,
    Request,
    answer_of,
    generation_settings,
    request_seed,
)
from cera_train.model.folder import positions_of
from cera_train.model.language_model import LanguageModel
from cera_train.settings.evaluation import GenerationConfig

PROMPTS_AT_ONCE = 8  # few, so that prompts are padded little; enough to keep matrix products large
ROWS_AT_ONCE = 256  # more are no faster, and each row needs logits of the whole vocabulary


def cut_batches(
    requests: Sequence[Request], max_new_tokens: int, batch_tokens: int
) -> list[list[Request]]:
    """Cuts requests into batches of similar prompt length, longest first, each of at most
    `batch_tokens` tokens, padding and answers included."""
    batches: list[list[Request]] = []
    for request in sorted(requests, key=lambda request: -len(request.prompt_ids)):
        longest = len(batches[-1][0].prompt_ids) if batches else 0
        most = min(ROWS_AT_ONCE, batch_tokens // (longest + max_new_tokens))
        if not batches or len(batches[-1]) >= most:
            batches.append([])
        batches[-1].append(request)
    return batches


class TokenChoice:
    """Chooses the next token of every row: the likeliest; or, at a temperature, by inverting the
    distribution function, cut at top-p, at a uniform random number. A row's random numbers depend
    on (seed, problem, sample) alone."""

    def __init__(
        self, batch: Sequence[Request], max_new_tokens: int, config: GenerationConfig
    ) -> None:
        self.config = config
        self.step = 0
        self.uniform_BT = torch.empty(len(batch), 0)
        if config.temperature:
            rows = []
            for request in batch:
                generator = torch.Generator().manual_seed(request_seed(request, config))
                rows.append(torch.rand(max_new_tokens, generator=generator, dtype=torch.float64))
            self.uniform_BT = torch.stack(rows)

    def __call__(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor) -> torch.Tensor:
        """Makes a greedy `model.generate` take the chosen tokens, as its logits processor."""
        return torch.full_like(logits_BV, -torch.inf).scatter(
            -1, self.tokens(logits_BV)[:, None], 0.0
        )

    def tokens(self, logits_BV: torch.Tensor) -> torch.Tensor:
        """[B] tokens. Raises UserError where logits are not finite."""
        likeliest_B = logits_BV.argmax(-1)  # argmax returns the place of a NaN, if there is one
        if not logits_BV.gather(-1, likeliest_B[:, None]).isfinite().all():
            raise UserError(
                "the model's logits are not finite: its training diverged. Take an earlier "
                "adapter, such as RUN/best, or train with a lower optimizer.lr."
            )
        if not self.config.temperature:
            return likeliest_B
        probabilities = torch.softmax(logits_BV.double() / self.config.temperature, -1)
        if self.config.top_p < 1:  # sorting takes longer than everything else here
            ranked, order = probabilities.sort(descending=True)
            # also the token that brings the sum to top_p
            is_kept = ranked.cumsum(-1) - ranked < self.config.top_p
            probabilities *= torch.zeros_like(probabilities).scatter(-1, order, is_kept.double())
        # In the vocabulary's order: sorted by likelihood, rounding would swap tokens that are
        # nearly as likely.
        cumulative = probabilities.cumsum(-1)
        uniform = self.uniform_BT[:, self.step, None].to(logits_BV.device)
        self.step += 1
        return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)[:, 0]

    def keep(self, rows_B: torch.Tensor) -> None:
        """Reduces the batch to these rows."""
        self.uniform_BT = self.uniform_BT[rows_B.cpu()]


@dataclass
class LoadedModel:
    """A model that answers."""

    language_model: LanguageModel
    tokenizer: Any

    @property
    def model(self) -> nn.Module:
        """The base with its adapter."""
        return self.language_model.model

    @property
    def base(self) -> PreTrainedModel:
        """The transformers model in `model`; without an adapter the same."""
        return self.language_model.causal_lm

    @property
    def positions(self) -> int | None:
        return positions_of(self.base.config)

    def batches(
        self,
        requests: Sequence[Request],
        max_new_tokens: int,
        config: GenerationConfig,
        processes: int,
    ) -> list[list[Request]]:
        """The requests in batches for `answers`, the same in each of the `processes` processes that
        divide them."""
        longest = max((len(request.prompt_ids) for request in requests), default=0)
        share = math.ceil(len(requests) / processes) * (longest + max_new_tokens)
        return cut_batches(requests, max_new_tokens, min(share, config.batch_tokens))

    def answers(
        self,
        batches: Sequence[list[Request]],
        max_new_tokens: int,
        stop: list[str],
        config: GenerationConfig,
        streamer: TextStreamer | None = None,
    ) -> Iterator[list[Answer]]:
        """Yields answers as they end, in any order.

        Args:
            stop: texts that end an answer, beside the end tokens.
            streamer: gets the tokens of a single request as they come.
        """
        with for_inference(self.model):
            for batch in batches:
                with self.language_model.generating():
                    self.prepare(max_new_tokens, stop)
                    yield from self.generate(batch, config, streamer)

    def prepare(self, max_new_tokens: int, stop: list[str]) -> None:
        """Replaces the generation settings that came with the model, such as a penalty on
        repetition."""
        ends = self.base.generation_config.eos_token_id
        self.base.generation_config = generation_settings(
            self.tokenizer, ends, max_new_tokens, stop
        )

    @torch.no_grad()
    def generate(
        self,
        batch: Sequence[Request],
        config: GenerationConfig,
        streamer: TextStreamer | None = None,
    ) -> Iterator[list[Answer]]:
        """The answers of a batch, as they end, after `prepare` and inside `for_inference`."""
        settings = self.base.generation_config
        device = self.base.device
        prompts = [torch.tensor(request.prompt_ids, dtype=torch.long) for request in batch]
        masks = [torch.ones_like(prompt) for prompt in prompts]
        ids_BT = pad_sequence(prompts, True, settings.pad_token_id, "left").to(device)
        mask_BT = pad_sequence(masks, True, 0, "left").to(device)
        choice = TokenChoice(batch, settings.max_new_tokens, config)
        if self.can_decode:
            ended = self._decode(ids_BT, mask_BT, choice, streamer)
        else:
            output = self.model.generate(
                input_ids=ids_BT,
                attention_mask=mask_BT,
                logits_processor=[choice],
                tokenizer=self.tokenizer if settings.stop_strings else None,
                streamer=streamer,
            )
            ended = [enumerate(output[:, ids_BT.shape[1] :].tolist())]
        for answers in ended:
            yield [answer_of(batch[row], ids, self.tokenizer, settings) for row, ids in answers]

    @property
    def can_decode(self) -> bool:
        """Whether keys and values are all that the model keeps of earlier tokens, and its inputs
        are the usual ones. False for sliding windows and recurrent states."""
        base = self.base
        prepare = type(base).prepare_inputs_for_generation
        if prepare is not GenerationMixin.prepare_inputs_for_generation:
            return False
        arguments = inspect.signature(base.forward).parameters.keys()
        if not {"attention_mask", "position_ids", "logits_to_keep"} <= arguments:
            return False
        layers = DynamicCache(config=base.config).layers
        return all(type(layer) is DynamicLayer for layer in layers)

    @functools.cached_property
    def cache_argument(self) -> str:
        """transformers 5.24 renames the argument, and warns of the old name."""
        is_renamed = "cache" in inspect.signature(self.base.forward).parameters
        return "cache" if is_renamed else "past_key_values"

    def _decode(
        self,
        ids_BT: torch.Tensor,
        mask_BT: torch.Tensor,
        choice: TokenChoice,
        streamer: TextStreamer | None,
    ) -> Iterator[list[tuple[int, list[int]]]]:
        """Yields the rows that end at a step, each with its new tokens, the end token included. The
        answers are those of `model.generate`, but faster: prompts run beside others of similar
        length, and a finished row leaves the batch at once.

        Args:
            ids_BT: prompts, padded on the left.
            mask_BT: 0 where they are padded, else 1.
        """
        settings = self.base.generation_config
        prompt = ids_BT.shape[1]
        ends = torch.tensor(settings.eos_token_id, device=ids_BT.device)
        stops = None
        if settings.stop_strings:
            stops = StopStringCriteria(self.tokenizer, settings.stop_strings)
        if streamer is not None:
            streamer.put(ids_BT.cpu())
        cache, logits_BV = self._read_prompts(ids_BT, mask_BT)
        rows = [*range(len(ids_BT))]
        for step in range(1, settings.max_new_tokens + 1):
            tokens_B = choice.tokens(logits_BV)
            ids_BT = torch.cat([ids_BT, tokens_B[:, None]], 1)
            if streamer is not None:
                streamer.put(tokens_B.cpu())
            has_ended_B = torch.isin(tokens_B, ends)
            if stops is not None:
                has_ended_B |= stops(ids_BT[:, prompt:], None)
            has_ended = has_ended_B.tolist()
            if step == settings.max_new_tokens:
                has_ended = [True] * len(rows)
            if any(has_ended):
                yield [
                    (row, ids_BT[place, prompt:].tolist())
                    for place, row in enumerate(rows)
                    if has_ended[place]
                ]
                if all(has_ended):
                    break
                kept, gaps = gap_free(has_ended_B)
                rows = [rows[place] for place in kept.tolist()]
                ids_BT = ids_BT[kept]
                mask_BT = mask_BT[kept]
                choice.keep(kept)
                for layer in cache.layers:
                    layer.keep(kept, gaps)
            mask_BT = pad(mask_BT, (0, 1), value=1)
            logits_BV = self._next_logits(ids_BT[:, -1:], mask_BT, cache)
        if streamer is not None:
            streamer.end()

    def _read_prompts(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor
    ) -> tuple[Cache, torch.Tensor]:
        """Keys and values of prompts, and the logits after each. A prompt of several answers runs
        once. A few prompts run at a time, of similar length since `cut_batches` sorts them: padding
        costs as much as tokens do."""
        (mask_BT, ids_BT), prompt_B = torch.stack([mask_BT, ids_BT]).unique_consecutive(
            return_inverse=True, dim=1
        )
        caches = []
        logits = []
        for ids, mask in zip(
            ids_BT.split(PROMPTS_AT_ONCE), mask_BT.split(PROMPTS_AT_ONCE), strict=True
        ):
            longest = int(mask.sum(-1).max())
            caches.append(DynamicCache(config=self.base.config))
            logits.append(self._next_logits(ids[:, -longest:], mask[:, -longest:], caches[-1]))
        width = ids_BT.shape[1]
        room = self.base.generation_config.max_new_tokens
        layers = []
        for number in range(len(caches[0].layers)):
            parts = [cache.layers[number] for cache in caches]
            keys = _padded_rows([layer.keys for layer in parts], width)[prompt_B]
            values = _padded_rows([layer.values for layer in parts], width)[prompt_B]
            layers.append(RoomyLayer(keys, values, room))
            for cache in caches:  # else keys and values of all layers would be in memory twice
                cache.layers[number] = None
        return Cache(layers), torch.cat(logits)[prompt_B]

    def _next_logits(
        self, ids_BT: torch.Tensor, mask_BT: torch.Tensor, cache: Cache
    ) -> torch.Tensor:
        """[B, V] logits after the last of these tokens. The cache holds the earlier tokens, and
        gets these."""
        # An index, since torch multiplies each row of a slice by a copy of the head's weights where
        # they are frozen.
        last = torch.tensor([-1], device=ids_BT.device)
        output = self.model(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            position_ids=(mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -ids_BT.shape[1] :],
            use_cache=True,
            logits_to_keep=last,
            **{self.cache_argument: cache},
        )
        return output.logits[:, -1]


def _padded_rows(states: Sequence[torch.Tensor], width: int) -> torch.Tensor:
    """Keys or values of several batches as one batch of this width, padded on the left. What stands
    there does not matter: attention is masked."""
    return torch.cat([pad(each, (0, 0, width - each.shape[-2], 0)) for each in states])


class RoomyLayer(DynamicLayer):
    """Keys and values with room for more tokens. A DynamicLayer copies everything it holds for
    every new token, and again for rows that leave."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, room: int) -> None:
        super().__init__()
        self._room = [
            states.new_empty(*states.shape[:2], states.shape[2] + room, states.shape[3])
            for states in (keys, values)
        ]
        self.lazy_initialization(keys, values)
        self.update(keys, values)

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, *args: Any, **settings: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        start = self.get_seq_length()
        end = start + keys.shape[2]
        for room, states in zip(self._room, (keys, values), strict=True):
            room[: len(states), :, start:end] = states
        self.keys, self.values = (room[: len(keys), :, :end] for room in self._room)
        return self.keys, self.values

    def keep(self, rows_B: torch.Tensor, gaps: torch.Tensor) -> None:
        """Reduces the batch to these rows; only those that fill gaps are copied."""
        for states in (self.keys, self.values):
            states[gaps] = states[rows_B[gaps]]
        self.keys = self.keys[: len(rows_B)]
        self.values = self.values[: len(rows_B)]


def gap_free(has_ended_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The rows that have not ended, where the last ones fill the places of those that have; and
    these places."""
    going_on = (~has_ended_B).nonzero()[:, 0]
    rows = torch.arange(len(going_on), device=going_on.device)
    gaps = has_ended_B[: len(rows)].nonzero()[:, 0]
    rows[gaps] = going_on[len(rows) - len(gaps) :]
    return rows, gaps
