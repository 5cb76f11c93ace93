"""The leak's autopsy: it names what grew and its holder, reports nothing else, and leaves the run unchanged."""

import gc
import sys
import threading
import types
import weakref
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from tests.training import leaky_tasks

from mlx_supervisor import wire
from mlx_worker.autopsy import census, findings, handler
from mlx_worker.supervision.stop import StopFlag
from mlx_worker.task import Update

ENDLESS = {"steps": 100_000}


def line_of(function, text):
    """The first line with this text at or after a function of the tasks' file."""
    lines = Path(leaky_tasks.__file__).read_text().splitlines()
    start = next((number for number, line in enumerate(lines) if f"def {function}(" in line), 0)
    return next(number for number, line in enumerate(lines[start:], start + 1) if text in line)


class Patient:
    """An autopsy with no worker around it; `update` is called at every step."""

    def __init__(self, update=lambda step: None, *, left_bytes=None):
        self.update, self.step, self.reports, self.frames = update, 0, [], []
        self.stop = StopFlag()
        self.autopsy = handler.AutopsyHandler(self, self.stop, types.SimpleNamespace(left_bytes=left_bytes))

    def send(self, kind, **fields):
        self.frames.append(wire.encode(kind(run="r", generation=1, seq=0, **fields)))
        self.reports.append(wire.decode_worker(self.frames[-1]))

    def train(self, updates):
        for _ in range(updates):
            self.step += 1
            self.update(self.step)
            self.autopsy.after_update(self.step)

    def ask(self, **fields):
        self.autopsy.request(wire.Autopsy(run="r", generation=1, seq=0, **fields))

    def examine(self, limit_s=60.0):
        """The report of one request after two updates."""
        self.train(2)
        self.ask(limit_s=limit_s)
        self.train(7)
        return self.reports[-1]


def of_task(task):
    """The task's `after_update`, as the worker's loop calls it."""
    return Patient(lambda step: task.after_update(Update(step, 0.5, 0.1, 8, 8 * step, 0.01)))


def accusations(report):
    return [finding for finding in report.findings if finding.kind != "note"]


def notes(report):
    return " | ".join(finding.what for finding in report.findings if finding.kind == "note")


def ask(worker, **fields):
    """The report of one request, when the run is warm."""
    worker.until(wire.Step, lambda message: message.step >= 3)
    worker.send(wire.Autopsy, **fields)
    report = worker.until(wire.AutopsyReport)
    worker.send(wire.Stop)
    assert worker.wait() == wire.EXIT_STOPPED, worker.stderr
    return report


@pytest.mark.parametrize(
    ("name", "function", "what", "holder"),
    [
        ("kept_logits", "loss", "float32 [8, 37]", "list `kept`"),
        ("growing_dict", "after_update", "float32 [3, 50]", "list in dict `cache`"),
        ("unevaluated_metric", "after_update", "float32 [5], not evaluated: operations in its graph", "`total`"),
    ],
)
def test_shape_holder_and_line_of_a_leak_are_named(supervisor, name, function, what, holder):
    worker = supervisor.start(
        supervisor.job(entry=f"leaky_tasks:{name}", **ENDLESS), compiled=name == "unevaluated_metric"
    )
    report = ask(worker)
    (finding,) = accusations(report)
    place = f"{name}.<locals>.{function} (leaky_tasks.py:{line_of(name, f'def {function}(')})"
    assert finding.kind == "arrays"
    assert finding.what.startswith(what)
    assert finding.holder == f"{holder}, closure variable of function {place}"
    assert report.complete
    a_step = (finding.count_now - finding.count_before) / 6
    assert a_step == 3 if name == "unevaluated_metric" else a_step == 1  # full is two operations, the sum one


def test_a_healthy_run_gets_no_finding_and_computes_the_same(supervisor):
    """Dropout, and numbers drawn from all generators: each loss and the weights equal those of an unexamined run."""
    workers = []
    for requested in (False, True):
        worker = supervisor.start(supervisor.job(entry="leaky_tasks:drawing", steps=40), compiled=True)
        if requested:
            worker.until(wire.Hello)  # after Ready, 40 updates could be over before the request arrives
            worker.send(wire.Autopsy)
        assert worker.wait() == wire.EXIT_COMPLETED, worker.stderr
        workers.append(worker)
    alone, examined = workers
    assert not alone.of(wire.AutopsyReport)
    (report,) = examined.of(wire.AutopsyReport)
    assert report.complete
    assert accusations(report) == []
    assert "nothing visible to Python grew" in notes(report)
    assert [step.loss for step in examined.steps] == [step.loss for step in alone.steps]
    assert examined.bye.weights_sha256 == alone.bye.weights_sha256


def test_objects_that_forbid_inspection_are_skipped(supervisor):
    """The task itself checks that none of their code ran."""
    report = ask(supervisor.start(supervisor.job(entry="leaky_tasks:hostile", **ENDLESS)))
    assert any(finding.holder.startswith("list `kept`, closure variable") for finding in accusations(report))
    assert any(finding.what.startswith("float32 [2, 2]") for finding in accusations(report))
    assert "failed" not in notes(report)


def test_shapes_that_the_step_is_compiled_for_are_counted(supervisor):
    report = ask(supervisor.start(supervisor.job(entry="leaky_tasks:shapes", **ENDLESS), compiled=True))
    (finding,) = accusations(report)
    assert finding.kind == "compiled"
    assert finding.count_now == finding.count_before + 6


def test_the_report_is_sent_before_the_bye_of_a_stop(supervisor):
    """Requested together with a stop: no further update comes, and the report says so instead of calling all growth."""
    worker = supervisor.start(supervisor.job(drill={"leak_mib_per_step": 1.0}, **ENDLESS))
    worker.until(wire.Step, lambda message: message.step >= 40)
    worker.send(wire.Autopsy)
    worker.send(wire.Stop)
    assert worker.wait() == wire.EXIT_STOPPED, worker.stderr
    (report,) = worker.of(wire.AutopsyReport)
    assert report.seq < worker.bye.seq
    assert report.step == worker.bye.step
    (finding,) = accusations(report)  # weights are too small here to be reported
    assert finding.what == "uint8 [1048576]"
    assert finding.count_before == finding.count_now == report.step
    assert finding.holder.startswith("list `_kept`, attribute of object mlx_worker.training.drills.Drills")
    assert "no update completed between" in notes(report)


def test_a_stop_for_memory_saves_before_counting(supervisor):
    """Counting takes memory, too: if it causes a kill, no update may be lost."""
    worker = supervisor.start(
        supervisor.job(entry="leaky_tasks:kept_logits", checkpoint={"every_seconds": 0}, **ENDLESS)
    )
    worker.until(wire.Step, lambda message: message.step >= 20)
    worker.send(wire.Autopsy)
    worker.send(wire.Stop)
    assert worker.wait() == wire.EXIT_STOPPED, worker.stderr
    (saved,), (report,) = worker.of(wire.Checkpoint), worker.of(wire.AutopsyReport)
    assert saved.ok
    assert saved.step == report.step == worker.bye.step
    assert saved.seq < report.seq


def test_a_run_that_ends_during_an_autopsy_still_answers(supervisor):
    worker = supervisor.start(supervisor.job(args={"pause_s": 0.1}, steps=5))
    worker.until(wire.Hello)
    worker.send(wire.Autopsy)
    assert worker.wait() == wire.EXIT_COMPLETED, worker.stderr
    (report,) = worker.of(wire.AutopsyReport)
    assert report.seq < worker.bye.seq
    assert report.step == 5


@pytest.mark.parametrize(
    ("way", "what", "holder", "place"),
    [
        ("global", "float32 [7, 11]", "list `GLOBAL_LOGITS`, global of module {module}", "GLOBAL_LOGITS = []"),
        ("attribute", "float32 [7, 11]", "tuple in list `history`, {object}.Recorder", "class Recorder"),
        ("slot", "float32 [7, 11]", "`value`, {object}.Slotted", "class Slotted"),
        ("slot", "{module}.Slotted", "`chain`, {closure}", "def after_update"),
        ("default", "float32 [7, 11]", "list `seen`, default of function {way}.remember", "def remember"),
        ("weights", "float32 [37, 16]", "list `copies`, {closure}", "def after_update"),
        ("numpy", "list of numpy.ndarray float64 [64, 100]", "`copies`, {closure}", "def after_update"),
    ],
)  # fmt: skip
def test_other_holders(way, what, holder, place):
    leaky_tasks.GLOBAL_LOGITS.clear()
    names = {
        "module": leaky_tasks.__name__, "way": "many_ways.<locals>",
        "closure": "closure variable of function many_ways.<locals>.after_update",
        "object": f"attribute of object {leaky_tasks.__name__}",
    }  # fmt: skip
    line = line_of("many_ways" if place.startswith("def") else "", place)
    report = of_task(leaky_tasks.many_ways(0, way)).examine()
    finding = next(finding for finding in accusations(report) if finding.what == what.format(**names))
    assert finding.holder == f"{holder.format(**names)} (tests/training/leaky_tasks.py:{line})"
    assert finding.count_now == finding.count_before + 6


def test_of_two_holders_the_one_that_grows_is_named():
    bounded, kept = [None] * 100, []

    def update(step):
        kept.append(mx.full((3, 87), step))
        bounded[step % 100] = kept[-1]

    (finding,) = accusations(Patient(update).examine())
    assert finding.holder.startswith("list `kept`, closure variable of")


@pytest.fixture
def collector_off():
    gc.disable()
    yield
    gc.enable()


def test_arrays_in_reference_cycles_are_reported_as_a_note(collector_off):
    report = of_task(leaky_tasks.many_ways(0, "cycle")).examine()
    assert accusations(report) == []
    assert "reference cycles held 22.9 MiB until collected" in notes(report)  # 6 of 4,000,000 bytes
    assert not gc.isenabled(), "the user's own setting stays"


def test_the_collector_stays_on():
    Patient().examine()
    assert gc.isenabled()


def test_examined_objects_are_not_kept():
    """After the report the worker refers to no user object, and nothing grows from request to request."""
    kept = []
    patient = Patient(lambda step: kept.append({"step": step, "value": mx.full((64, 64), step)}))
    report = patient.examine()
    assert accusations(report)
    watched = weakref.ref(kept[0]["value"])
    kept.clear()
    assert watched() is None, "freed at once, without the collector's help"
    counts = []
    for _ in range(3):
        patient.examine()
        kept.clear()
        gc.collect()
        counts.append(len(gc.get_objects()))
    assert counts[2] - counts[1] < 20, counts


def test_repeatedly_compiled_functions_are_reported():
    kept = []
    report = Patient(lambda step: kept.append(mx.compile(lambda x: x + step))).examine()
    (finding,) = [finding for finding in accusations(report) if finding.kind == "compiled"]
    assert finding.what == "functions made by mx.compile"
    assert finding.count_now == finding.count_before + 6
    assert finding.holder.startswith("list `kept`, closure variable of function test_repeatedly_compiled_functions")


def test_a_burst_is_not_growth():
    kept = []

    def update(step):
        if step == 4:
            kept.extend(mx.full((3, 77), index) for index in range(50))

    assert accusations(Patient(update).examine()) == []


def test_a_second_request_cut_short_by_a_stop_uses_the_first_as_baseline():
    kept = []
    patient = Patient(lambda step: kept.append(mx.full((3, 79), step)))
    first = patient.examine()
    patient.train(30)
    patient.ask()
    patient.stop.request("leak")
    patient.autopsy.finish(patient.step)
    report = patient.reports[-1]
    assert len(patient.reports) == 2
    assert report.step == patient.step
    finding = next(finding for finding in accusations(report) if finding.what.startswith("int32 [3, 79]"))
    assert (finding.count_before, finding.count_now) == (first.step, patient.step)
    assert finding.holder.startswith("list `kept`, closure variable of")


def test_a_stop_between_the_censuses_ends_the_search():
    kept = []
    patient = Patient(lambda step: kept.append(mx.full((3, 81), step)))
    patient.ask()
    patient.train(2)
    assert not patient.reports
    patient.stop.request("leak")
    patient.train(1)
    (report,) = patient.reports
    assert report.step == 3
    (finding,) = accusations(report)  # and no objects of the censuses
    assert finding.what.startswith("int32 [3, 81]")


def test_a_stop_right_after_the_second_census():
    """The second and the last census see the same state: a census's own memory does not count as growth."""
    kept = []
    patient = Patient(lambda step: kept.append(mx.full((3, 82), step)))
    patient.ask()
    patient.train(4)
    patient.stop.request("leak")
    patient.autopsy.finish(4)
    (report,) = patient.reports
    assert report.step == 4
    (finding,) = accusations(report)
    assert finding.what.startswith("int32 [3, 82]")


def test_a_million_objects_and_the_time_limit():
    crowd, kept = [[index] for index in range(1_000_000)], []
    patient = Patient(lambda step: kept.append(mx.full((3, 83), step)))
    patient.ask(limit_s=5.0)
    patient.train(7)
    (report,) = patient.reports
    assert report.seconds < 10, "the limit of 5 s, plus uninterruptible calls on a busy machine"
    patient.ask(limit_s=0.05)
    patient.train(7)
    hurried = patient.reports[-1]
    assert not hurried.complete
    assert hurried.seconds < 5
    assert accusations(hurried) == [], "half a count must not pass for growth"
    assert "not enough time" in notes(hurried)
    del crowd
    if report.complete:
        assert any(finding.what.startswith("int32 [3, 83]") for finding in accusations(report))


def test_near_the_limit_only_what_fits_is_counted():
    """A census must not pass the limit itself: near it only arrays, the cheapest, are counted; nearer, nothing."""
    kept = []

    def update(step):
        kept.append(mx.full((3, 89), step))
        mx.eval(kept)

    # What else this process holds decides: strings and numbers are blocks, but no objects of the collector's. The crowd
    # makes sure that those are not so few that nothing lies between the two cases.
    gc.collect()
    crowd = [[] for _ in range(sys.getallocatedblocks() // 4)]
    list_bytes = sys.getallocatedblocks() * census.ENTRY_BYTES
    count_bytes = len(gc.get_objects()) * census.OBJECT_BYTES
    assert list_bytes < 0.8 * count_bytes
    report = Patient(update, left_bytes=int((list_bytes + count_bytes) / 2 / handler.ROOM_SHARE)).examine()
    assert [finding.what for finding in accusations(report)] == ["int32 [3, 89]"]
    assert "not enough memory below the limit to count more than arrays" in notes(report)
    assert not report.complete
    report = Patient(update, left_bytes=int(list_bytes / 2 / handler.ROOM_SHARE)).examine()
    del crowd
    assert accusations(report) == []
    assert "not enough memory below the limit to count" in notes(report)
    assert not report.complete


def test_of_very_many_growing_containers_the_fastest_growing_are_reported(monkeypatch):
    monkeypatch.setattr(findings, "CONTAINERS_LIMIT", 20)
    many, large = [[0] for _ in range(2000)], []

    def update(step):
        for each in many:
            each.append(step)
        large.extend("x" * 100 for _ in range(200))

    report = Patient(update).examine()
    assert "`large`" in accusations(report)[0].holder


def test_a_failure_of_the_search_is_a_note(monkeypatch):
    patient = Patient()
    patient.ask()
    patient.train(1)
    monkeypatch.setattr(census, "take", lambda *arguments: [][0])
    patient.train(5)
    (report,) = patient.reports
    assert not report.complete
    assert "the search failed: IndexError" in notes(report)
    monkeypatch.undo()
    patient.ask()
    patient.train(7)
    assert patient.reports[-1].complete, "the next request is served"


def test_any_text_fits_the_frame(monkeypatch):
    """More leaks than findings, names of many bytes, and ones that cannot be sent."""
    name = "😀" * 600 + "\n\ud800"
    holder = type("Holder", (), {})
    holder.__qualname__ = name
    holders, kept = [], []
    for index in range(40):
        one = holder()
        vars(one)[name + str(index)] = []
        holders.append(one)

    def update(step):
        for index, one in enumerate(holders):
            (values,) = vars(one).values()
            values.append(mx.full((index + 1, 85), step) if index % 2 else np.full(3000, step))
        kept.append(holder())
        kept[-1].numbers = np.zeros(5000)

    monkeypatch.setattr(findings, "PER_SECTION", 20)
    patient = Patient(update)
    report = patient.examine()
    assert len(report.findings) == 24
    assert notes(report)
    assert len(patient.frames[-1]) < wire.FRAME_LIMIT_BYTES
    assert any(finding.holder.startswith("list `😀") for finding in report.findings)


def test_graphs_are_not_walked_beside_another_thread():
    """The thread may be evaluating them: nothing is counted, and the report says why."""
    total = {"sum": mx.zeros((5,))}

    def update(step):
        total["sum"] = total["sum"] + 1

    ready = threading.Event()
    loader = threading.Thread(target=ready.wait, name="loader")
    loader.start()
    try:
        report = Patient(update).examine()
    finally:
        ready.set()
        loader.join()
    assert accusations(report) == []
    assert "thread 'loader' may be evaluating" in notes(report)
    assert any("not evaluated" in finding.what for finding in accusations(Patient(update).examine()))
