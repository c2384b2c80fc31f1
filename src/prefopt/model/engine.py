"""Decoding many samples at once: prompts once, finished samples replaced by waiting ones.

Every step runs one token of each sample under way. What ends leaves at once; when an eighth of the
token budget has come free, waiting samples and prompts take its place. The bookkeeping is numpy on
the host; a step takes three small copies to the device and one back.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from prefopt.model.choose import Request, Sampled, choose, uniforms
from prefopt.model.decode import Prefill, Shelf, Step
from prefopt.model.head import head_of, logit_blocks

__all__ = ["Engine"]

_PREFILL_TOKENS = 8192  # of one forward pass over prompts, padding counted
_FIRST_TOKENS = 32  # places for a sample's own tokens to begin with; doubled when they are full


class Engine:
    """One request being drawn from a model whose attention is `prefopt_decode`.

    Prompts and samples under way stand in tables without gaps: row i of each array and place i of
    the shelf belong together. Prompts are taken longest first, so that neighbours are of similar
    length and the largest batch comes first.

    Attributes:
        steps: Forward passes over one token of each sample so far.
        row_steps: Samples that were under way in them, summed.
    """

    def __init__(self, model: PreTrainedModel, request: Request) -> None:
        self._backbone: torch.nn.Module = model.base_model
        self._head = head_of(model)
        self._device = next(model.parameters()).device
        self._request = request
        self._stops = np.array(sorted(request.stop_ids), dtype=np.int64)
        self._waiting = deque(sorted(range(len(request.prompts)), key=lambda i: -len(request.prompts[i])))
        self.prompts, self.own = Shelf(), Shelf()
        # Prompts in place: number, length, room, next sample to start; the state that predicts the first token.
        self._prompt = np.zeros((0, 4), dtype=np.int64)
        self._last_hidden: Tensor | None = None
        # Samples under way: place of the prompt, prompt's number, sample's number, tokens so far, room.
        self._row = np.zeros((0, 5), dtype=np.int64)
        widest = max(request.room)
        self._ids = np.zeros((0, widest), dtype=np.int64)
        self._logprobs = np.zeros((0, widest), dtype=np.float32)
        self._noise = np.zeros((0, widest), dtype=np.float32)
        self.steps = self.row_steps = 0

    def run(self) -> Iterator[Sampled]:
        """Every sample of the request, each when it ends."""
        while self._waiting or len(self._prompt):
            self._admit()
            yield from self._retire()
            if len(self._row):
                self._step()
                yield from self._retire()

    # --- who is under way -------------------------------------------------------------------------

    def _admit(self) -> None:
        """Start waiting samples while the budget lasts, if enough of it is free to be worth a pass over prompts."""
        budget, samples = self._request.batch_tokens, self._request.samples
        rows, known = len(self._row), len(self._prompt)
        if not self._waiting and (self._prompt[:, 3] == samples).all():
            return
        if rows and _cost(self._prompt, rows) > budget - budget // 8:
            return
        new: list[tuple[int, int, int]] = []
        place = 0
        while place < len(self._prompt) or self._waiting:
            if place == len(self._prompt):
                number = self._waiting[0]
                facts = [number, len(self._request.prompts[number]), self._request.room[number], 0]
                wider = np.vstack([self._prompt, np.array([facts])])
                if rows and _cost(wider, rows + 1) > budget:
                    break
                self._waiting.popleft()
                self._prompt = wider
            number, _, _, begun = (int(n) for n in self._prompt[place])
            fits = (budget - _cost(self._prompt, rows)) // int(self._prompt[:, 2].max())
            taken = min(samples - begun, max(fits, 0 if rows else 1))
            new += [(place, number, begun + k) for k in range(taken)]
            rows += taken
            self._prompt[place, 3] += taken
            if begun + taken < samples:
                break
            place += 1
        if len(self._prompt) > known:
            self._prefill(known)
        if new:
            self._begin(new)

    def _prefill(self, first: int) -> None:
        """Run the prompts at places `first` and above, a few at a time."""
        self.prompts.reserve(len(self._prompt), int(self._prompt[:, 1].max()))
        hidden = [] if self._last_hidden is None else [self._last_hidden]
        while first < len(self._prompt):
            longest = int(self._prompt[first, 1])  # longest first
            stop = min(len(self._prompt), first + max(1, _PREFILL_TOKENS // longest))
            ids = np.zeros((stop - first, longest), dtype=np.int64)
            for row, (number, length) in enumerate(self._prompt[first:stop, :2]):
                ids[row, :length] = self._request.prompts[number]
            places, lengths = self._tensor(np.stack([np.arange(first, stop), self._prompt[first:stop, 1]]))
            positions = torch.arange(longest, device=self._device).expand(len(ids), -1)
            states = self._forward(self._tensor(ids), positions, Prefill(self.prompts, places))
            hidden.append(states[torch.arange(len(ids), device=self._device), lengths - 1])
            first = stop
        self._last_hidden = torch.cat(hidden)

    def _begin(self, new: list[tuple[int, int, int]]) -> None:
        """Rows for samples (place, prompt, sample), with their first tokens."""
        first, widest = len(self._row), self._noise.shape[1]
        rows = np.array([(place, prompt, k, 0, self._request.room[prompt]) for place, prompt, k in new])
        noise = np.zeros((len(new), widest), dtype=np.float32)
        if self._request.temperature > 0:
            for drawn, (_, prompt, k, _, room) in zip(noise, rows.tolist(), strict=True):
                drawn[:room] = uniforms(self._request.seed, prompt, k, room)
        self._row = np.vstack([self._row, rows])
        self._noise = np.vstack([self._noise, noise])
        self._ids = np.vstack([self._ids, np.zeros((len(new), widest), dtype=np.int64)])
        self._logprobs = np.vstack([self._logprobs, np.zeros((len(new), widest), dtype=np.float32)])
        self._reserve(int(self._row[:, 3].max()))
        assert self._last_hidden is not None
        self._draw(self._last_hidden[self._tensor(rows[:, 0])], np.arange(first, len(self._row)))

    def _reserve(self, longest: int) -> None:
        """Room on the shelf for `longest` tokens of every row."""
        room = max(_FIRST_TOKENS, self.own.tokens)
        room = room if longest <= room else 2 * room
        self.own.reserve(len(self._row), min(room, int(self._row[:, 4].max())))

    def _retire(self) -> Iterator[Sampled]:
        """Hand out what has ended and close the gaps it leaves."""
        if not len(self._row):
            return
        age = self._row[:, 3]
        stopped = np.isin(self._ids[np.arange(len(age)), age - 1], self._stops)
        ended = stopped | (age == self._row[:, 4])
        if not ended.any():
            return
        for i in np.flatnonzero(ended):
            _, prompt, sample, tokens, _ = (int(n) for n in self._row[i])
            ids, logprobs = self._ids[i, :tokens].astype(np.int32), self._logprobs[i, :tokens].copy()
            yield Sampled(prompt, sample, ids, bool(stopped[i]), logprobs)
        kept = self._close(self.own, ~ended)
        self._row, self._ids = self._row[kept], self._ids[kept]
        self._logprobs, self._noise = self._logprobs[kept], self._noise[kept]
        needed = self._prompt[:, 3] < self._request.samples
        needed[self._row[:, 0]] = True
        if not needed.all():
            places = self._close(self.prompts, needed)
            now_at = np.zeros(len(self._prompt), dtype=np.int64)
            now_at[places] = np.arange(len(places))
            self._prompt, self._row[:, 0] = self._prompt[places], now_at[self._row[:, 0]]
            assert self._last_hidden is not None
            self._last_hidden = self._last_hidden[self._tensor(places)]

    def _close(self, shelf: Shelf, kept: Bool[np.ndarray, " places"]) -> Int[np.ndarray, " kept"]:
        """Fill the places not kept from the end of the shelf; returns where each place's content came from."""
        count = int(kept.sum())
        order = np.arange(count)
        gaps = np.flatnonzero(~kept[:count])
        order[gaps] = count + np.flatnonzero(kept[count:])
        if len(gaps):
            sources, targets = self._tensor(np.stack([order[gaps], gaps]))
            shelf.move(sources, targets)
        return order

    # --- what runs on the device ------------------------------------------------------------------

    def _step(self) -> None:
        """One more token for every row."""
        age, place = self._row[:, 3], self._row[:, 0]
        rows, longest = len(age), int(age.max())
        self._reserve(longest)
        lanes = _lanes(place)
        last = self._ids[np.arange(rows), age - 1]
        facts = self._tensor(np.stack([last, self._prompt[place, 1] + age - 1, place, lanes, age]))
        step = Step(
            prompts=self.prompts,
            own=self.own,
            places=facts[2],
            lanes=facts[3],
            ages=facts[4],
            prompt_lengths=self._tensor(self._prompt[:, 1]),
            longest=(int(self._prompt[:, 1].max()), longest),
            width=int(lanes.max()) + 1,
        )
        hidden = self._forward(facts[0][:, None], facts[1][:, None], step)
        self.steps, self.row_steps = self.steps + 1, self.row_steps + rows
        self._draw(hidden[:, 0], np.arange(rows))

    def _draw(self, hidden: Float[Tensor, "rows hidden"], rows: Int[np.ndarray, " rows"]) -> None:
        """Choose and keep the next token of each of `rows`."""
        age = self._row[rows, 3]
        noise = torch.from_numpy(self._noise[rows, age]).to(self._device)
        drawn = [
            torch.stack([tokens.double(), logprobs.double()])  # one copy back; a token's id is exact in it
            for tokens, logprobs in (
                choose(logits, noise[part], self._request.temperature, self._request.top_p)
                for part, logits in logit_blocks(self._head, hidden)
            )
        ]
        tokens, logprobs = torch.cat(drawn, dim=1).cpu().numpy()
        self._ids[rows, age], self._logprobs[rows, age] = tokens, logprobs
        self._row[rows, 3] += 1

    def _forward(
        self, ids: Int[Tensor, "rows tokens"], positions: Int[Tensor, "rows tokens"], decoding: Prefill | Step
    ) -> Float[Tensor, "rows tokens hidden"]:
        out = self._backbone(input_ids=ids, position_ids=positions, use_cache=False, decoding=decoding)
        states: Tensor = out.last_hidden_state
        return states

    def _tensor(self, numbers: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(numbers)).to(self._device)


def _cost(prompts: Int[np.ndarray, "prompts 4"], rows: int) -> int:
    """Tokens on the shelves with these prompts and so many rows, padding and room not used yet counted."""
    return int(len(prompts) * prompts[:, 1].max(initial=0) + rows * prompts[:, 2].max(initial=0))


def _lanes(places: Int[np.ndarray, " rows"]) -> Int[np.ndarray, " rows"]:
    """Which of its prompt's rows each row is, counted from 0."""
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    lanes = np.empty_like(order)
    lanes[order] = np.arange(len(places)) - np.searchsorted(ordered, ordered)
    return lanes
