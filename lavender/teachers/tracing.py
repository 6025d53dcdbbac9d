"""From which position of a text encoder's output each text column comes, by comparing values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

Source = tuple[int, int, int]
"""A call's number, and a row and a position of its ids."""

_KEY_CHANNELS = 8
"""Channels that are looked up; whoever is found is compared in all of them."""

_UNEXPLAINED = 2e-5
"""The largest share of a column's variance over its channels that a scaled hidden state may leave: a correlation of 1 - 1e-5.
Rounding to bfloat16 leaves about 3e-6 of it, and the states of two tokens differ by far more."""

_CONTRIBUTES = 0.02
"""The least share of a column's norm that counts as a contribution."""

_FREE_CHANNELS = 4
"""How many channels more than states there must be, at the least, for a sum of them to be no accident."""

_INDEPENDENT = 1e-6
"""The least eigenvalue, relative to the largest, of states that float32 can tell from sums of the others."""


@dataclass(eq=False)
class Call:
    """One forward of a text encoder.

    Attributes:
        encoder: the pipeline's attribute.
        ids: int64 [B, L], the tokens that it received.
        states: what it gave of them, layer by layer, each [B, L, C].
    """

    encoder: str
    ids: torch.Tensor
    states: list[torch.Tensor] = field(default_factory=list)
    _places: dict[tuple[int, torch.dtype], tuple[torch.Tensor, dict[bytes, list[int]]]] = field(default_factory=dict)

    def add(self, state: torch.Tensor) -> None:
        """Keeps a hidden state [B, L, C], or [L, B, C] as ChatGLM gives it."""
        batch, length = self.ids.shape
        if tuple(state.shape[:2]) != (batch, length):
            state = state.transpose(0, 1)
        if tuple(state.shape[:2]) == (batch, length) and not any(_is_same(state, known) for known in self.states):
            self.states.append(state.detach())

    @cached_property
    def tokens(self) -> list[list[int]]:
        """The ids of every row."""
        tokens: list[list[int]] = self.ids.tolist()
        return tokens

    def id_at(self, row: int, position: int) -> int:
        """The token at a place."""
        return self.tokens[row][position]

    def places(self, layer: int, dtype: torch.dtype) -> dict[bytes, list[int]]:
        """Where in a state, in some precision, each key stands: as row * L + position. Built anew where the state was changed."""
        channels = self.states[layer][..., :_KEY_CHANNELS].to(dtype)
        known = self._places.get((layer, dtype))
        if known is None or not torch.equal(known[0], channels):
            places: dict[bytes, list[int]] = {}
            for place, key in enumerate(_keys(channels)):
                places.setdefault(key, []).append(place)
            known = self._places[layer, dtype] = channels.clone(), places
        return known[1]


def _is_same(state: torch.Tensor, other: torch.Tensor) -> bool:
    return state.data_ptr() == other.data_ptr() and state.stride() == other.stride() and state.shape == other.shape


@dataclass(eq=False)
class _Column:
    """The best explanation of one column so far: by the longest run of columns that come from neighbors too."""

    run: int = 0
    source: Source | None = None
    state: torch.Tensor | None = None
    is_unique: bool = True


def trace(embedding: torch.Tensor, calls: Sequence[Call], special: Mapping[str, frozenset[int]]) -> dict[str, list[Source | None]]:
    """Where the columns of an embedding [N, C] come from: per encoder that has any, one source or None per column.

    An encoder has none where a column follows another one, and what follows in the encoder's tokens is not there: causal encoders
    give equal states of what prompts begin with alike.

    A column is a hidden state, bit for bit, in some channels: pipelines lay encoders and layers side by side. Where no state
    equals it, it may be a scaled state with a constant, or a sum of states of one position and of the end, as weighted
    prompts have it. Where several positions are equally good, the longest run of neighbors decides; None where that is a tie.

    Args:
        embedding: [N, C].
        calls: of the text encoders.
        special: per encoder the ids of tokens that stand for no text.
    """
    sources: dict[str, list[Source | None]] = {}
    unclear: dict[str, set[int]] = {}
    nonzero = (embedding != 0).any(dim=1).cpu().numpy()
    unexplained = nonzero.copy()
    offsets = _offsets({state.shape[2] for call in calls for state in call.states}, embedding.shape[1])
    for offset in offsets:
        for column, source, is_unique in _equal(embedding, calls, offset):
            _put(sources, unclear, calls, len(embedding), column, source, is_unique)
            unexplained[column] = False
    if unexplained.any():
        columns = np.flatnonzero(unexplained)
        for encoder in dict.fromkeys(call.encoder for call in calls):
            for column, source in _weighted(embedding, columns, calls, encoder, offsets, special.get(encoder, frozenset())):
                _put(sources, unclear, calls, len(embedding), column, source, True)
    return {
        encoder: known for encoder, known in sources.items() if not _is_broken(known, calls, nonzero, unclear.get(encoder, set()))
    }


def _put(
    sources: dict[str, list[Source | None]],
    unclear: dict[str, set[int]],
    calls: Sequence[Call],
    count: int,
    column: int,
    source: Source,
    is_unique: bool,
) -> None:
    encoder = calls[source[0]].encoder
    known = sources.setdefault(encoder, [None] * count)
    if is_unique:
        known[column] = known[column] or source
    else:
        unclear.setdefault(encoder, set()).add(column)


def _is_broken(sources: Sequence[Source | None], calls: Sequence[Call], nonzero: NDArray[np.bool_], unclear: set[int]) -> bool:
    """Whether an unknown column stands beside one whose neighbor in the encoder's tokens has no column."""
    present = {source for source in sources if source is not None}
    for column, source in enumerate(sources):
        if source is None:
            continue
        number, row, position = source
        for step in (-1, 1):
            beside = column + step
            if 0 <= beside < len(sources) and sources[beside] is None and nonzero[beside] and beside not in unclear:
                expected = (number, row, position + step)
                if 0 <= position + step < len(calls[number].tokens[row]) and expected not in present:
                    return True
    return False


def _offsets(widths: Iterable[int], channels: int) -> list[int]:
    """The channels at which a hidden state may begin: the sums of widths."""
    sums = {0}
    for start in (reached := [0]):
        more = {start + width for width in widths if start + width < channels} - sums
        sums |= more
        reached.extend(more)
    return sorted(sums)


def _keys(states: torch.Tensor) -> list[bytes]:
    """The first channels of each state [..., C], flattened, as bytes."""
    keys = states[..., :_KEY_CHANNELS].reshape(-1, min(_KEY_CHANNELS, states.shape[-1])).contiguous().cpu()
    return [row.tobytes() for row in keys.view(torch.uint8).numpy()]


def _equal(embedding: torch.Tensor, calls: Sequence[Call], offset: int) -> Iterator[tuple[int, Source, bool]]:
    """The columns that equal a hidden state from the channel `offset` on, and whether no other one does as well."""
    found = [
        (number, state, matches)
        for number, call in enumerate(calls)
        for layer, state in enumerate(call.states)
        if offset + state.shape[2] <= embedding.shape[1]
        for matches in [_Matches.of(_keys(embedding[:, offset : offset + state.shape[2]]), call, layer, embedding.dtype)]
        if matches is not None
    ]
    # No run is longer than its row has columns: a batch's other rows, which begin alike, need no look.
    longest = np.max([matches.longest for _, _, matches in found], axis=0, initial=0) if found else np.zeros(len(embedding))
    columns = [_Column() for _ in embedding]
    for number, state, matches in found:
        for row in np.flatnonzero((matches.present & (matches.counts[:, None] >= longest)).any(axis=1)).tolist():
            _compete(columns, matches.of_row(row), calls, number, row, state)
    winners: dict[int, tuple[torch.Tensor, list[int]]] = {}
    for column, best in enumerate(columns):
        if best.state is not None:
            winners.setdefault(id(best.state), (best.state, []))[1].append(column)
    for state, won in winners.values():
        sources = [source for column in won if (source := columns[column].source) is not None]
        values = state[[row for _, row, _ in sources], [position for _, _, position in sources]].to(embedding)
        is_equal = (values == embedding[won, offset : offset + state.shape[2]]).all(dim=1) & (values != 0).any(dim=1)
        for column, source, equal in zip(won, sources, is_equal.tolist(), strict=True):
            if equal:
                yield column, source, columns[column].is_unique


@dataclass(eq=False)
class _Matches:
    """The places [R, L] of a state whose keys are those of the columns of an embedding.

    Attributes:
        present: bool [R, N], the columns that match somewhere in each row.
        counts: int64 [R], how many these are.
        longest: int32 [N], the run of each column in the row that has most.
    """

    columns: NDArray[np.int64]
    rows: NDArray[np.int64]
    positions: NDArray[np.int64]
    length: int
    present: NDArray[np.bool_]

    @classmethod
    def of(cls, keys: Sequence[bytes], call: Call, layer: int, dtype: torch.dtype) -> _Matches | None:
        """Those of the columns' keys; None if there are none."""
        places = call.places(layer, dtype)
        pairs = [(column, place) for column, key in enumerate(keys) for place in places.get(key, ())]
        if not pairs:
            return None
        num_rows, length = call.ids.shape
        columns, flat = np.array(pairs).T
        present = np.zeros((num_rows, len(keys)), dtype=bool)
        present[flat // length, columns] = True
        return cls(columns, flat // length, flat % length, length, present)

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        counts: NDArray[np.int64] = self.present.sum(axis=1)
        return counts

    @cached_property
    def longest(self) -> NDArray[np.int32]:
        longest: NDArray[np.int32] = _runs(self.of_row(int(self.counts.argmax()))).max(axis=1)
        return longest

    def of_row(self, row: int) -> NDArray[np.bool_]:
        """Those of one row, [N, L]."""
        matches = np.zeros((self.present.shape[1], self.length), dtype=bool)
        own = self.rows == row
        matches[self.columns[own], self.positions[own]] = True
        return matches


def _compete(
    columns: Sequence[_Column], matches: NDArray[np.bool_], calls: Sequence[Call], number: int, row: int, state: torch.Tensor
) -> None:
    """Puts the matches [N, L] of one row in place of shorter runs."""
    call, runs = calls[number], _runs(matches)
    for column in np.flatnonzero(matches.any(axis=1)).tolist():
        best, longest = columns[column], int(runs[column].max())
        if longest < best.run:
            continue
        positions = np.flatnonzero(runs[column] == longest)
        source = (number, row, int(positions[0]))
        if longest > best.run:
            best.run, best.source, best.state, best.is_unique = longest, source, state, len(positions) == 1
        elif best.source is not None and calls[best.source[0]].encoder == call.encoder:
            other, other_row, other_position = best.source
            is_same = calls[other].id_at(other_row, other_position) == call.id_at(row, source[2])
            best.is_unique &= is_same and len(positions) == 1 and other_position == source[2]


def _runs(matches: NDArray[np.bool_]) -> NDArray[np.int32]:
    """How long the run along the diagonal is that each match [N, L] belongs to."""
    before, after = matches.astype(np.int32), matches.astype(np.int32)
    for column in range(1, len(matches)):
        before[column, 1:] += before[column - 1, :-1] * matches[column, 1:]
        after[-1 - column, :-1] += after[-column, 1:] * matches[-1 - column, :-1]
    return np.where(matches, before + after - 1, 0).astype(np.int32)


def _weighted(
    embedding: torch.Tensor,
    columns: NDArray[np.intp],
    calls: Sequence[Call],
    encoder: str,
    offsets: Sequence[int],
    special: frozenset[int],
) -> Iterator[tuple[int, Source]]:
    """Of some columns those that are sums of an encoder's states of one position and of the end, with a constant."""
    samples = columns[np.linspace(0, len(columns) - 1, min(8, len(columns))).round().astype(int)]
    best: tuple[int, _States, int] | None = None
    for states in _layers(calls, encoder):
        if best is not None and best[0] == len(samples):
            break
        for offset in offsets:
            if offset + states.width <= embedding.shape[1]:
                explained = int(states.matches(embedding[samples, offset : offset + states.width]).any(axis=1).sum())
                if explained and (best is None or explained > best[0]):
                    best = explained, states, offset
    if best is None:
        return
    _, states, offset = best
    window = embedding[columns, offset : offset + states.width]
    matches = np.zeros((len(embedding), states.length), dtype=bool)
    matches[columns] = states.matches(window)
    runs = _runs(matches)
    for index, column in enumerate(columns):
        positions = np.flatnonzero(runs[column] == max(1, runs[column].max()))
        if len(positions) != 1:
            continue
        position = int(positions[0])
        named: dict[int, Source] = {}
        for source in states.contributors(window[index], position):
            named.setdefault(calls[source[0]].id_at(*source[1:]), source)
        of_text = [source for token, source in named.items() if token not in special]
        if len(of_text) == 1 or (not of_text and named):
            yield int(column), (of_text or list(named.values()))[0]


class _States:
    """One layer's states of all rows of an encoder that have one length, without their constant, of norm one."""

    def __init__(self, rows: Sequence[tuple[int, int]], states: torch.Tensor) -> None:
        """`rows` are the calls and rows that `states` [R, L, C] are of."""
        self.length, self.width = states.shape[1:]
        # Some weigh a token between its own state and that of the row's end.
        states = torch.cat([states, states[:, -1:].expand(-1, self.length, -1)])
        self._rows = [*rows, *rows]
        states = states.float() - states.float().mean(dim=2, keepdim=True)
        self._states = torch.nn.functional.normalize(states, dim=2)
        values, self._vectors = torch.linalg.eigh(torch.einsum("rlc,slc->lrs", self._states, self._states))
        kept = values > _INDEPENDENT * values[:, -1:]
        self._inverse = torch.where(kept, 1 / values.clamp_min(1e-30), 0)

    def matches(self, columns: torch.Tensor) -> NDArray[np.bool_]:
        """Which columns [n, C] are sums of the states of which positions: [n, L]."""
        columns = columns.float() - columns.float().mean(dim=1, keepdim=True)
        products = torch.einsum("nc,rlc->lnr", columns, self._states) @ self._vectors
        explained = (products.square() * self._inverse[:, None]).sum(dim=2)
        norms = columns.square().sum(dim=1)
        matches: NDArray[np.bool_] = ((explained >= (1 - _UNEXPLAINED) * norms) & (norms > 0)).T.cpu().numpy()
        return matches

    def contributors(self, column: torch.Tensor, position: int) -> list[Source]:
        """The states of a position, and of the rows' ends, that a column is the sum of."""
        column = column.float() - column.float().mean()
        vectors = self._vectors[position]
        shares = vectors @ (self._inverse[position] * (vectors.T @ (self._states[:, position] @ column)))
        found = (shares.abs() > _CONTRIBUTES * column.norm()).nonzero().flatten().tolist()
        return [(*self._rows[row], position if row < len(self._rows) // 2 else self.length - 1) for row in found]


def _layers(calls: Sequence[Call], encoder: str) -> Iterator[_States]:
    """An encoder's states, layer by layer from the last, of all rows of one length together."""
    groups: dict[tuple[int, int, int], list[tuple[int, torch.Tensor]]] = {}
    for number, call in enumerate(calls):
        for layer, state in enumerate(call.states if call.encoder == encoder else ()):
            groups.setdefault((layer, *state.shape[1:]), []).append((number, state))
    for layer, _, width in sorted(groups, reverse=True):
        rows: dict[tuple[int, int], torch.Tensor] = {}
        for number, state in groups[layer, _, width]:
            for row, states in enumerate(state):
                if not any(torch.equal(states, known) for known in rows.values()):
                    rows[number, row] = states
        # Of as many states as channels every column would be a sum.
        if 2 * len(rows) <= width - _FREE_CHANNELS:
            yield _States(list(rows), torch.stack(list(rows.values())))
