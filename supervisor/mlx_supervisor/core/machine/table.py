"""The states of a run, the events that each state handles, and the states that each event may lead to.

Events not in the table are ignored. A handler that enters another state than the table allows is a bug, and asserts.
"""

from collections.abc import Callable
from typing import Any

from mlx_supervisor.core import events as ev
from mlx_supervisor.core.machine import pause, running, starting, stopping
from mlx_supervisor.core.machine.run_state import Run
from mlx_supervisor.core.machine.states import S, State

Handler = Callable[[Run, Any], None]
Rule = tuple[Handler, tuple[State, ...]]
AFTER_EXIT = (S.STARTING, S.WAITING, S.BACKOFF, S.COMPLETED, S.FATAL)
_POLL: dict[type[ev.Event], Rule] = {ev.MachineSample: (starting.on_machine_sample, ())}
_OBSERVE: dict[type[ev.Event], Rule] = _POLL | {
    ev.Paused: (pause.on_paused, ()),
    ev.Spawned: (starting.on_spawned, ()),
    ev.DeviceFound: (running.on_device_found, ()),
    ev.Bye: (running.on_bye, ()),
    ev.CheckpointReport: (running.on_checkpoint, ()),
    ev.PhaseChange: (running.on_phase, ()),
    ev.ValidationReport: (running.on_validation, ()),
    ev.Tested: (running.on_tested, ()),
    ev.Autopsied: (running.on_autopsied, ()),
    ev.Exited: (stopping.on_exited, AFTER_EXIT),
}
_ENDING = _OBSERVE | {ev.Exited: (stopping.on_exited, (*AFTER_EXIT, S.STOPPED))}
_START: dict[type[ev.Event], Rule] = _POLL | {
    ev.Command: (starting.on_command_at_rest, (S.STARTING, S.WAITING, S.BACKOFF)),
    ev.Recovered: (starting.on_recovered, (S.FATAL,)),
}

TABLE: dict[State, dict[type[ev.Event], Rule]] = {
    S.STOPPED: _START,
    S.COMPLETED: _START,
    S.FATAL: _START | {ev.Exited: (starting.on_survivor_exited, ())},
    S.BACKOFF: _POLL
    | {
        ev.Command: (starting.on_command_in_backoff, (S.STARTING, S.STOPPED)),
        ev.Tick: (starting.on_backoff_over, (S.STARTING, S.WAITING)),
    },
    S.WAITING: {
        ev.Command: (starting.on_command_while_waiting, (S.STARTING, S.STOPPED)),
        ev.MachineSample: (starting.on_memory_polled, (S.STARTING,)),
        ev.Tick: (starting.on_wait_over, (S.STARTING,)),
    },
    S.STARTING: _OBSERVE
    | {
        ev.StartBlocked: (starting.on_start_blocked, ()),
        ev.Ready: (starting.on_ready, (S.RUNNING, S.KILLING)),
        ev.StepReport: (running.on_step_before_ready, (S.RUNNING, S.KILLING)),
        ev.Sample: (running.on_sample, (S.KILLING,)),
        ev.DeviceSample: (running.on_device_sample, (S.KILLING,)),
        ev.SampleMissing: (running.on_sample_missing, (S.TERMINATING,)),
        ev.Tick: (running.on_start_timeout, (S.TERMINATING,)),
        ev.Command: (running.on_command_before_ready, (S.TERMINATING, S.KILLING)),
        ev.ActionFailed: (running.on_spawn_failed, (S.STARTING, S.BACKOFF, S.FATAL)),
    },
    S.RUNNING: _OBSERVE
    | {
        ev.StepReport: (running.on_step, (S.RELIEVING, S.DRAINING)),
        ev.Sample: (running.on_sample, (S.KILLING,)),
        ev.DeviceSample: (running.on_device_sample, (S.KILLING,)),
        ev.SampleMissing: (running.on_sample_missing, (S.DRAINING,)),
        ev.Tick: (stopping.on_hang, (S.TERMINATING,)),
        ev.Command: (running.on_command_running, (S.DRAINING, S.KILLING)),
    },
    S.RELIEVING: _OBSERVE
    | {
        ev.Cleared: (running.on_cleared, ()),
        ev.StepReport: (running.on_step_recorded, ()),
        ev.Sample: (running.on_sample_relieving, (S.RUNNING, S.KILLING)),
        ev.DeviceSample: (running.on_device_sample, (S.KILLING,)),
        ev.Tick: (running.on_relief_timeout, (S.DRAINING,)),
        ev.ActionFailed: (stopping.on_request_failed, (S.TERMINATING,)),
        ev.Command: (running.on_command_running, (S.DRAINING, S.KILLING)),
    },
    S.DRAINING: _ENDING
    | {
        ev.StepReport: (running.on_step_recorded, ()),
        ev.Sample: (running.on_sample, (S.KILLING,)),
        ev.DeviceSample: (running.on_device_sample, (S.KILLING,)),
        ev.Tick: (stopping.on_drain_timeout, (S.TERMINATING,)),
        ev.ActionFailed: (stopping.on_request_failed, (S.TERMINATING,)),
        ev.Command: (running.on_command_ending, (S.KILLING,)),
    },
    S.TERMINATING: _ENDING
    | {
        ev.StepReport: (running.on_step_recorded, ()),
        ev.Sample: (running.on_sample, (S.KILLING,)),
        ev.DeviceSample: (running.on_device_sample, (S.KILLING,)),
        ev.Tick: (stopping.on_term_timeout, (S.KILLING,)),
        ev.Command: (running.on_command_ending, (S.KILLING,)),
    },
    S.KILLING: _ENDING
    | {
        ev.StepReport: (running.on_step_recorded, ()),
        ev.Tick: (stopping.on_kill_timeout, (S.FATAL,)),
        ev.Command: (running.on_command_ending, ()),
    },
}
