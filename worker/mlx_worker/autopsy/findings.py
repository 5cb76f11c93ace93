"""From several censuses to findings: what grew every time, its size, and what refers to it."""

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_supervisor import wire
from mlx_worker.autopsy import object_size, referrers
from mlx_worker.autopsy.census import Census, chunks, length_method
from mlx_worker.autopsy.introspection import type_name
from mlx_worker.autopsy.lazy_graphs import MIB, ArrayKind, kind_of

SAMPLES = 8
"""Objects per finding whose holders are searched."""
PER_SECTION = 6
"""Findings of each kind, the largest first."""
FINDINGS_LIMIT = 24
TEXT_LIMIT_BYTES = 512
NOISE_BYTES = 1024
"""Per update. Python objects that grow by less are a list of losses, not a leak."""
MANY_OBJECTS = 20
"""Per update. More new objects are reported whatever their size."""
LEAST_UPDATES = 6
"""Assumed between the first and last census for both limits: after an early stop, all new objects seem to grow."""
LARGE_SHARE = 0.02
"""Of the process's memory: smaller kinds of arrays are not reported where growth is unknown."""
CONTAINERS_LIMIT = 10_000
"""The fastest-growing containers whose size is estimated."""
LARGE_GRAPH = 5000
"""Operations. A graph this large is reported even where its growth is unknown."""
GARBAGE_BYTES = 256 * 1024
NEED_LIMIT = 4
_OWN = ("mlx_worker.autopsy.",)
_COMPILED_FUNCTION = "mlx.core._gc_func"


@dataclass
class Suspect:
    """A possible finding, its samples in the common pool, and its growth in bytes. `container`: its address."""

    kind: Any
    what: str
    before: int
    now: int
    size_bytes: int
    grown_bytes: int
    samples: range = range(0)
    container: int | None = None


@dataclass
class Search:
    """`censuses`: at least one. `pool`: objects whose holders are searched. `grown`: addresses of grown containers."""

    censuses: Sequence[Census]
    until_s: float
    in_time: bool = True
    pool: list[Any] = field(default_factory=list)
    grown: set[int] = field(default_factory=set)
    suspects: list[Suspect] = field(default_factory=list)

    @property
    def first(self) -> Census:
        return self.censuses[0]

    @property
    def now(self) -> Census:
        return self.censuses[-1]

    @property
    def updates(self) -> int:
        """Between the first census and the last."""
        return self.now.step - self.first.step

    def is_noise(self, more_bytes: int, more: int = 0) -> bool:
        """Whether Python objects grew too little to report."""
        updates = max(self.updates, LEAST_UPDATES)
        return more_bytes < NOISE_BYTES * updates and more < MANY_OBJECTS * updates

    def chunks(self, objects: list[Any]) -> Iterator[list[Any]]:
        """The objects in chunks, as far as time allows."""
        for chunk in chunks(objects):
            if time.monotonic() > self.until_s:
                self.in_time = False
                return
            yield chunk

    def grew(self, counts: Sequence[int], censuses: Sequence[Census] = ()) -> bool:
        """Whether something grew from census to census, by about one every other update or more."""
        steps = [census.step for census in censuses or self.censuses]
        pairs = zip(steps, steps[1:], counts, counts[1:], strict=False)
        return all(b - a >= min(NEED_LIMIT, max(1, (t - s + 1) // 2)) for s, t, a, b in pairs)


def search(censuses: Sequence[Census], objects: list[Any], until_s: float) -> tuple[list[wire.Finding], bool]:
    """The findings, largest first, and whether there was time for all. `objects`, of the last census, is emptied."""
    found = Search(censuses, until_s)
    arrays = [each for chunk in found.chunks(objects) for each in chunk if type(each) is mx.array]
    counted = set.intersection(*(census.parts for census in censuses))
    if found.updates:
        if "objects" in counted:
            _containers(found, objects)
        if "arrays" in counted:
            _arrays(found, arrays)
        if "objects" in counted:
            _types(found, objects)
    else:
        _largest(found, arrays)
    _graphs(found, arrays)
    arrays.clear()  # both lists would be found as holders
    objects.clear()
    named, in_time = referrers.find(found.pool, until_s)
    findings = [*_reported(found, named), *_compiled(found)]
    notes = [wire.Finding(kind="note", what=cut(text)) for text in _notes(found, found_any=bool(findings))]
    return [*findings[: FINDINGS_LIMIT - len(notes)], *notes], in_time and found.in_time


def cut(text: str) -> str:
    """The text as the wire takes it: one line, printable, at most TEXT_LIMIT_BYTES."""
    plain = "".join(character if character.isprintable() else "?" for character in text)
    return plain.encode(errors="replace")[:TEXT_LIMIT_BYTES].decode(errors="ignore")


def _add(found: Search, suspect: Suspect, samples: Iterable[Any]) -> None:
    start = len(found.pool)
    found.pool.extend(samples)
    suspect.samples = range(start, len(found.pool))
    found.suspects.append(suspect)


def _arrays(found: Search, arrays: list[Any]) -> None:
    counts = {kind: [census.arrays[kind] for census in found.censuses] for kind in found.now.arrays}
    grown = [kind for kind, series in counts.items() if found.grew(series)]
    grown.sort(key=lambda kind: -(counts[kind][-1] - counts[kind][0]) * max(1, kind.size_bytes))
    of_kind: dict[ArrayKind, list[Any]] = {kind: [] for kind in grown[:PER_SECTION]}
    for each in arrays if grown else ():
        if (kind := kind_of(each)) in of_kind:
            of_kind[kind].append(each)
    stayed = _stayed(found.censuses)
    for kind, alike in of_kind.items():
        before, now = counts[kind][0], counts[kind][-1]
        suspect = Suspect("arrays", str(kind), before, now, now * kind.size_bytes, (now - before) * kind.size_bytes)
        _add(found, suspect, _spread([each for each in alike if id(each) in stayed] or alike[-SAMPLES:]))


def _stayed(censuses: Sequence[Census]) -> set[int]:
    """Addresses of arrays that are missing in the first census and present in every later one."""
    first, *later = [np.frombuffer(census.array_ids, np.uint64) for census in censuses]
    stayed = later[0]
    for ids in later[1:]:
        stayed = np.intersect1d(stayed, ids, assume_unique=True)
    return {int(number) for number in np.setdiff1d(stayed, first, assume_unique=True)}


def _spread(objects: list[Any]) -> list[Any]:
    return objects[:: max(1, -(-len(objects) // SAMPLES))][:SAMPLES]


def _graphs(found: Search, arrays: list[Any]) -> None:
    """Arrays whose unevaluated graph grows; if only the last census counted them, those with a large graph."""
    censuses = [census for census in found.censuses if census.graphs.operations is not None]
    if not censuses or censuses[-1] is not found.now:
        return
    reported = {suspect.what: suspect for suspect in found.suspects}
    unseen_bytes, before_bytes = found.now.unseen_bytes, censuses[0].unseen_bytes
    for kind, operations in sorted(found.now.graphs.by_kind.items(), key=lambda item: -item[1]):
        series = [census.graphs.by_kind.get(kind, 0) for census in censuses]
        if not (found.grew(series, censuses) if len(censuses) > 1 else operations >= LARGE_GRAPH):
            continue
        if str(kind) in reported and found.updates:
            reported[str(kind)].what += f", not evaluated: {operations} operations in their graphs"
            continue
        ends = found.now.graphs.ends
        waiting = [each for each in arrays if id(each) in ends and kind_of(each) == kind]
        what = f"{kind}, not evaluated: operations in its graph"
        suspect = Suspect("arrays", what, series[0], operations, unseen_bytes, max(1, unseen_bytes - before_bytes))
        _add(found, suspect, _spread(waiting))
        unseen_bytes = before_bytes = 0  # reported once


def _containers(found: Search, objects: list[Any]) -> None:
    """Lists, dictionaries, sets and deques that grew longer."""
    longer: dict[int, tuple[int, int]] = {}
    for address, series in _lengths(found.censuses):
        if found.grew(series):
            longer[address] = series[0], series[-1]
    found.grown.update(longer)
    weighed: list[tuple[Suspect, Any]] = []
    censuses = [each for each in objects if type(each) is Census] if longer else []
    own = {id(value) for each in censuses for value in vars(each).values()}
    grown = [each for chunk in found.chunks(objects if longer else []) for each in chunk if id(each) in longer]
    for each in grown:
        if length_method(type(each)) is None or id(each) in own:  # another object at that address, or a census
            continue
        before, now = longer[id(each)]
        newest = object_size.newest(each)
        each_bytes = object_size.weigh(newest)
        what = f"{type_name(type(each))} of {object_size.described(newest)}"
        size_bytes, grown_bytes = now * each_bytes, (now - before) * each_bytes
        weighed.append((Suspect("objects", what, before, now, size_bytes, grown_bytes, container=id(each)), each))
    weighed = [pair for pair in weighed if not found.is_noise(pair[0].grown_bytes)]
    for suspect, container in sorted(weighed, key=lambda pair: -pair[0].grown_bytes)[:PER_SECTION]:
        _add(found, suspect, [container])


def _lengths(censuses: Sequence[Census]) -> Iterable[tuple[int, list[int]]]:
    """Address and lengths of the containers that are in every census and longer in the last than in the first,
    fastest-growing first."""
    last = censuses[-1]
    common: Any = np.frombuffer(last.container_ids, np.uint64)[np.frombuffer(last.lengths, np.uint64) > 1]
    for census in censuses[:-1]:
        common = np.intersect1d(common, np.frombuffer(census.container_ids, np.uint64), assume_unique=True)
    columns = []
    for census in censuses:
        ids = np.frombuffer(census.container_ids, np.uint64)
        places = np.flatnonzero(np.isin(ids, common, assume_unique=True))
        columns.append(np.frombuffer(census.lengths, np.uint64)[places[np.argsort(ids[places])]])
    common.sort()
    longer = np.flatnonzero(columns[-1] > columns[0])
    by_growth = np.argsort((columns[0] - columns[-1])[longer].view(np.int64))
    for row in longer[by_growth[:CONTAINERS_LIMIT]]:
        yield int(common[row]), [int(column[row]) for column in columns]


def _types(found: Search, objects: list[Any]) -> None:
    counts = {name: [census.types[name] for census in found.censuses] for name in found.now.types}
    grown = {name: series for name, series in counts.items() if found.grew(series) and not name.startswith(_OWN)}
    alike: dict[str, list[Any]] = {name: [] for name in grown}
    names: dict[int, str] = {}
    for chunk in found.chunks(objects if grown else []):
        for each in chunk:
            name = names.get(id(type(each))) or names.setdefault(id(type(each)), type_name(type(each)))
            if name in alike:
                alike[name].append(each)
    suspects = []
    for name, series in grown.items():
        alike[name] = [*alike[name][: SAMPLES // 2], *alike[name][SAMPLES // 2 :][-SAMPLES // 2 :]]
        more, each_bytes = series[-1] - series[0], _typical_bytes(name, alike[name])
        suspect = Suspect("objects", name, series[0], series[-1], series[-1] * each_bytes, more * each_bytes)
        if name == _COMPILED_FUNCTION:
            suspect.kind, suspect.what = "compiled", "functions made by mx.compile"
            suspects.append(suspect)
        elif not found.is_noise(suspect.grown_bytes, more):
            suspects.append(suspect)
    for suspect in sorted(suspects, key=lambda suspect: -suspect.grown_bytes)[:PER_SECTION]:
        _add(found, suspect, alike[_COMPILED_FUNCTION if suspect.kind == "compiled" else suspect.what])


def _typical_bytes(name: str, alike: list[Any]) -> int:
    """The median size of the samples; 0 for built-in types, whose sizes vary too much."""
    weights = sorted(map(object_size.weigh, alike)) if "." in name else []
    return weights[len(weights) // 2] if weights else 0


def _largest(found: Search, arrays: list[Any]) -> None:
    """The largest kinds of arrays, for censuses without an update between them."""
    sizes = {kind: count * kind.size_bytes for kind, count in found.now.arrays.items()}
    least_bytes = LARGE_SHARE * (found.now.active_bytes + found.now.native_bytes)
    large = [kind for kind in sizes if sizes[kind] >= least_bytes]
    for kind in sorted(large, key=lambda kind: -sizes[kind])[:PER_SECTION]:
        alike = [each for each in arrays if kind_of(each) == kind]
        count, size_bytes = found.now.arrays[kind], sizes[kind]
        _add(found, Suspect("arrays", str(kind), count, count, size_bytes, size_bytes), _spread(alike))


def _reported(found: Search, named: list[list[referrers.Holder]]) -> list[wire.Finding]:
    """The suspects as findings; a container only if no other finding lies in it."""
    held: list[tuple[Suspect, str]] = []
    inside: set[int] = set()
    for suspect in found.suspects:
        itself = f"object {suspect.what} " if suspect.container is None else ""  # a chain is held by its end
        holder, through = referrers.best([named[index] for index in suspect.samples], found.grown, itself)
        held.append((suspect, holder))
        if suspect.container is None:
            inside |= through
    ordered = sorted(held, key=lambda pair: (pair[0].kind != "arrays", -pair[0].grown_bytes))
    return [
        wire.Finding(
            kind=suspect.kind, what=cut(suspect.what), count_before=suspect.before, count_now=suspect.now,
            size_bytes=suspect.size_bytes, holder=cut(holder),
        )
        for suspect, holder in ordered
        if suspect.container not in inside
    ]  # fmt: skip


def _compiled(found: Search) -> Iterable[wire.Finding]:
    series = [census.shapes for census in found.censuses]
    if found.updates and found.grew(series):
        what = "batch shapes that the training step was compiled for"
        yield wire.Finding(kind="compiled", what=what, count_before=series[0], count_now=series[-1])


def _notes(found: Search, *, found_any: bool) -> Iterable[str]:
    first, now = found.first, found.now
    freed_bytes = sum(census.garbage_bytes for census in found.censuses[1:])
    if found.updates and freed_bytes >= GARBAGE_BYTES * found.updates:
        garbage = sum(census.garbage for census in found.censuses[1:])
        yield f"reference cycles held {freed_bytes / MIB:.1f} MiB until collected ({garbage:,} objects)"
    if not found.updates:
        largest = "listing the largest arrays, growing or not" if found_any else "no large arrays found"
        yield f"no update completed between two censuses; {largest}"
    reasons = [census.reason for census in found.censuses if census.reason]
    if reasons:
        yield reasons[-1]
    elif not all(census.complete for census in found.censuses):
        yield "not enough time to count everything (raise memory.autopsy_limit_s)"
    elif found.updates and not found_any:
        yield f"nothing visible to Python grew in {found.updates} updates"
    if now.graphs.operations is None:
        yield f"unevaluated graphs were not counted: {now.graphs.reason}"
    if gc.get_freeze_count():
        yield f"{gc.get_freeze_count():,} objects are hidden by gc.freeze and were not counted"
    yield (
        f"steps {first.step} to {now.step}: {now.objects:,} objects, {sum(now.arrays.values()):,} arrays, "
        f"{now.graphs.operations or 0:,} unevaluated operations; compiled batch shapes: {now.shapes}; "
        f"MLX memory {first.active_bytes / MIB:,.1f} → {now.active_bytes / MIB:,.1f} MiB, "
        f"outside arrays {first.unseen_bytes / MIB:,.1f} → {now.unseen_bytes / MIB:,.1f} MiB; "
        f"other memory {first.native_bytes / MIB:,.0f} → {now.native_bytes / MIB:,.0f} MiB"
    )
