"""Where the boxes and lines of a drawing go: a layered layout, from left to right.

The usual four steps: break cycles (an order of nodes that few edges contradict), give each node a
layer to the right of those that call it, order each layer so that lines cross little (barycentres),
and place nodes near their neighbours. Lines over several layers get a point in each, so that they
run between the boxes. Where nearly everybody calls everybody that would be thousands of points, and
a picture as large as a wall: then the boxes stand in even columns and the lines run behind them.
Everything is deterministic: one policy gives one picture.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

COLUMN_GAP = 210.0
ROW_GAP = 26.0
BEND_GAP = 9.0
MAX_BENDS = 800
"""Beyond so many bends of all lines there are none."""
_SWEEPS = 12

Point = tuple[float, float]


class Box(NamedTuple):
    """Where a node is: its centre and its size."""

    x: float
    y: float
    width: float
    height: float


class Layout(NamedTuple):
    """The boxes by name, the points that each line passes, and the size of all."""

    boxes: dict[str, Box]
    lines: dict[tuple[str, str], list[Point]]
    width: float
    height: float


def arrange(sizes: Mapping[str, tuple[float, float]], edges: Sequence[tuple[str, str]]) -> Layout:
    """Place nodes of the given sizes (width, height) and the lines between them."""
    names = list(sizes)
    links = [(a, b) for a, b in edges if a != b]
    order = _ranked(names, links)
    layer = _layers(order, links)
    lengths = (abs(layer[source] - layer[target]) for source, target in links)
    crowded = sum(max(0, length - 1) for length in lengths) > MAX_BENDS
    if crowded:
        columns = math.isqrt(len(order))
        layer = {name: n * columns // len(order) for n, name in enumerate(order)}
    slots, chains = _with_bends(names, links, layer, bends=not crowded)
    _order(slots, chains)
    return _place(sizes, edges, layer, slots, chains)


def _ranked(names: list[str], links: list[tuple[str, str]]) -> list[str]:
    """Return the names in an order that few links contradict: who calls most comes first."""
    balance = dict.fromkeys(names, 0)
    for source, target in links:
        balance[source] += 1
        balance[target] -= 1
    return sorted(names, key=lambda name: -balance[name])


def _layers(order: list[str], links: list[tuple[str, str]]) -> dict[str, int]:
    rank = {name: number for number, name in enumerate(order)}
    before: dict[str, list[str]] = {name: [] for name in order}
    for source, target in links:
        if rank[source] < rank[target]:
            before[target].append(source)
    # Many layers make a long thin picture with long lines; a few more than the root are enough.
    most = max(2, round(1.4 * len(order) ** 0.5))
    layer: dict[str, int] = {}
    for name in order:
        layer[name] = min(most, max((layer[other] + 1 for other in before[name]), default=0))
    return layer


Slot = tuple[str, str, int] | str
"""A node, or the bend of a line (source, target) in a layer."""


def _with_bends(
    names: list[str], links: list[tuple[str, str]], layer: Mapping[str, int], *, bends: bool
) -> tuple[list[list[Slot]], dict[tuple[str, str], list[Slot]]]:
    slots: list[list[Slot]] = [[] for _ in range(max(layer.values(), default=0) + 1)]
    for name in names:
        slots[layer[name]].append(name)
    chains: dict[tuple[str, str], list[Slot]] = {}
    for source, target in links:
        chain: list[Slot] = [source]
        if bends and layer[source] != layer[target]:
            step = 1 if layer[target] > layer[source] else -1
            for number in range(layer[source] + step, layer[target], step):
                bend = (source, target, number)
                slots[number].append(bend)
                chain.append(bend)
        chains[source, target] = [*chain, target]
    return slots, chains


def _order(slots: list[list[Slot]], chains: Mapping[tuple[str, str], list[Slot]]) -> None:
    """Order each layer by the mean position of the neighbours in the layer before, to and fro."""
    where = {slot: number for number, layer in enumerate(slots) for slot in layer}
    near: dict[Slot, list[Slot]] = {slot: [] for slot in where}
    for chain in chains.values():
        for one, other in itertools.pairwise(chain):
            near[one].append(other)
            near[other].append(one)
    position = {slot: float(n) for layer in slots for n, slot in enumerate(layer)}
    for sweep in range(_SWEEPS):
        numbers = range(1, len(slots)) if sweep % 2 == 0 else range(len(slots) - 2, -1, -1)
        step = -1 if sweep % 2 == 0 else 1
        for number in numbers:
            layer = slots[number]
            middle = {}
            for slot in layer:
                places = [position[s] for s in near[slot] if where[s] == number + step]
                middle[slot] = sum(places) / len(places) if places else position[slot]
            layer.sort(key=lambda slot: middle[slot])
            for place, slot in enumerate(layer):
                position[slot] = float(place)


def _place(
    sizes: Mapping[str, tuple[float, float]],
    edges: Sequence[tuple[str, str]],
    layer: Mapping[str, int],
    slots: list[list[Slot]],
    chains: Mapping[tuple[str, str], list[Slot]],
) -> Layout:
    def room(slot: Slot) -> float:
        """Return the height that a slot takes, half of the gap above and below it included."""
        return sizes[slot][1] + ROW_GAP if isinstance(slot, str) else BEND_GAP

    y: dict[Slot, float] = {}
    for column in slots:
        at = 0.0
        for slot in column:
            y[slot] = at + room(slot) / 2
            at += room(slot)
        for slot in column:
            y[slot] -= at / 2
    near: dict[Slot, list[Slot]] = {slot: [] for slot in y}
    for chain in chains.values():
        for one, other in itertools.pairwise(chain):
            near[one].append(other)
            near[other].append(one)
    for _ in range(8):
        for column in slots:
            _relax(column, y, near, room)
    _close_gaps(y, room)
    top = min((y[s] - room(s) / 2 for s in y), default=0.0) - 27
    bottom = max((y[s] + room(s) / 2 for s in y), default=0.0) + 27
    x, right = _columns(sizes, slots)
    boxes = {name: Box(x[layer[name]], y[name] - top, *sizes[name]) for name in sizes}
    lines: dict[tuple[str, str], list[Point]] = {}
    for source, target in edges:
        bends = chains[source, target][1:-1] if source != target else []
        lines[source, target] = [
            (x[bend[2]], y[bend] - top) for bend in bends if not isinstance(bend, str)
        ]
    return Layout(boxes, lines, right, bottom - top)


def _relax(
    column: list[Slot],
    y: dict[Slot, float],
    near: Mapping[Slot, list[Slot]],
    room: Callable[[Slot], float],
) -> None:
    """Move the slots of a column towards their neighbours, keeping order and distance."""
    wish = {
        slot: sum(y[s] for s in near[slot]) / len(near[slot]) if near[slot] else 0.0
        for slot in column
    }
    for forward in (True, False):
        limit = None
        for slot in column if forward else reversed(column):
            half = room(slot) / 2
            at = (wish[slot] + y[slot]) / 2 if forward else y[slot]
            if limit is not None:
                at = max(at, limit + half) if forward else min(at, limit - half)
            y[slot] = at
            limit = at + half if forward else at - half


def _close_gaps(y: dict[Slot, float], room: Callable[[Slot], float]) -> None:
    """Move up whatever lies below a band that is empty in every column."""
    shift = 0.0  # how far up everything from here on moves
    bottom: float | None = None  # of all above, before moving
    for slot in sorted(y, key=lambda slot: y[slot] - room(slot) / 2):
        half = room(slot) / 2
        if bottom is not None and y[slot] - half > bottom:
            shift += y[slot] - half - bottom
        bottom = max(y[slot] + half, bottom if bottom is not None else y[slot] + half)
        y[slot] -= shift


def _columns(
    sizes: Mapping[str, tuple[float, float]], slots: list[list[Slot]]
) -> tuple[list[float], float]:
    x = []
    at = 40.0
    for column in slots:
        width = max((sizes[s][0] for s in column if isinstance(s, str)), default=20.0)
        x.append(at + width / 2)
        at += width + COLUMN_GAP
    return x, at - COLUMN_GAP + 120
