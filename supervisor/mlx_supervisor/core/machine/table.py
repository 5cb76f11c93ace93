"""The states of a run, which events mean anything in each, and where each event may lead.

The handlers are in `starts.py`, `machine.py`, `endings.py` and `after_life.py`. Whatever is not in the table is
ignored; a handler that goes where the table doesn't allow is our bug, and asserts.
"""

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine.states import S, State

Rule = tuple[str, tuple[State, ...]]
AFTER_EXIT = (S.STARTING, S.WAITING, S.BACKOFF, S.COMPLETED, S.FATAL)
_LOOK: dict[type[ev.Event], Rule] = {ev.MachineSample: ("_on_machine_sample", ())}
_OBSERVE: dict[type[ev.Event], Rule] = _LOOK | {
    ev.Spawned: ("_on_spawned", ()),
    ev.Bye: ("_on_bye", ()),
    ev.CheckpointReport: ("_on_checkpoint", ()),
    ev.PhaseChange: ("_on_phase", ()),
    ev.Autopsied: ("_on_autopsied", ()),
    ev.Exited: ("_on_exited", AFTER_EXIT),
}
_ENDING = _OBSERVE | {ev.Exited: ("_on_exited", (*AFTER_EXIT, S.STOPPED))}
_START: dict[type[ev.Event], Rule] = _LOOK | {
    ev.Command: ("_on_command_at_rest", (S.STARTING, S.WAITING, S.BACKOFF)),
    ev.Recovered: ("_on_recovered", (S.FATAL,)),
}

TABLE: dict[State, dict[type[ev.Event], Rule]] = {
    S.STOPPED: _START,
    S.COMPLETED: _START,
    S.FATAL: _START | {ev.Exited: ("_on_survivor_gone", ())},
    S.BACKOFF: _LOOK
    | {
        ev.Command: ("_on_command_in_backoff", (S.STARTING, S.STOPPED)),
        ev.Tick: ("_on_backoff_over", (S.STARTING, S.WAITING)),
    },
    S.WAITING: {
        ev.Command: ("_on_command_while_waiting", (S.STARTING, S.STOPPED)),
        ev.MachineSample: ("_on_memory_looked_at", (S.STARTING,)),
        ev.Tick: ("_on_wait_over", (S.STARTING,)),
    },
    S.STARTING: _OBSERVE
    | {
        ev.Ready: ("_on_ready", (S.RUNNING, S.KILLING)),
        ev.StepReport: ("_on_step_unready", (S.RUNNING, S.KILLING)),
        ev.Sample: ("_on_sample", (S.KILLING,)),
        ev.SampleMissing: ("_on_sample_missing", (S.TERMINATING,)),
        ev.Tick: ("_on_start_timeout", (S.TERMINATING,)),
        ev.Command: ("_on_command_before_ready", (S.TERMINATING, S.KILLING)),
        ev.ActionFailed: ("_on_spawn_failed", (S.STARTING, S.BACKOFF, S.FATAL)),
    },
    S.RUNNING: _OBSERVE
    | {
        ev.StepReport: ("_on_step", (S.RELIEVING, S.DRAINING)),
        ev.Sample: ("_on_sample", (S.KILLING,)),
        ev.SampleMissing: ("_on_sample_missing", (S.DRAINING,)),
        ev.Tick: ("_on_hang", (S.TERMINATING,)),
        ev.Command: ("_on_command_running", (S.DRAINING, S.KILLING)),
    },
    S.RELIEVING: _OBSERVE
    | {
        ev.Cleared: ("_on_cleared", ()),
        ev.StepReport: ("_on_step_recorded", ()),
        ev.Sample: ("_on_sample_relieving", (S.RUNNING, S.KILLING)),
        ev.Tick: ("_on_no_relief", (S.DRAINING,)),
        ev.ActionFailed: ("_on_request_failed", (S.TERMINATING,)),
        ev.Command: ("_on_command_running", (S.DRAINING, S.KILLING)),
    },
    S.DRAINING: _ENDING
    | {
        ev.StepReport: ("_on_step_recorded", ()),
        ev.Sample: ("_on_sample", (S.KILLING,)),
        ev.Tick: ("_on_drain_timeout", (S.TERMINATING,)),
        ev.ActionFailed: ("_on_request_failed", (S.TERMINATING,)),
        ev.Command: ("_on_command_ending", (S.KILLING,)),
    },
    S.TERMINATING: _ENDING
    | {
        ev.StepReport: ("_on_step_recorded", ()),
        ev.Sample: ("_on_sample", (S.KILLING,)),
        ev.Tick: ("_on_term_timeout", (S.KILLING,)),
        ev.Command: ("_on_command_ending", (S.KILLING,)),
    },
    S.KILLING: _ENDING
    | {
        ev.StepReport: ("_on_step_recorded", ()),
        ev.Tick: ("_on_kill_timeout", (S.FATAL,)),
        ev.Command: ("_on_command_ending", ()),
    },
}
