"""The table of methods: everything that may be called, and nothing else."""

from mlx_supervisor.control.backend import FaultCode
from mlx_supervisor.control.dispatcher import Method, Param
from mlx_supervisor.control.handlers import Interface

_CHANGES = FaultCode.SHUTDOWN_STATE
_STARTS = FaultCode.SPAWN_ERROR
_STOPS = FaultCode.FAILED
"""What a call is refused with while the daemon shuts down; the client of start, stop and signal knows these two."""


def method_table(interface: Interface) -> list[Method]:
    """Every method but `system.*`, which the dispatcher adds."""
    name, wait, wanted = Param("name", "string"), Param("wait", "boolean", default=True), Param("signal", "signal")
    piece = (name, Param("offset", "int"), Param("length", "int"))
    return [
        *_about_the_daemon(interface, name),
        *_about_logs(interface, name, piece),
        *_about_runs(interface, name, wait, wanted),
    ]


def _about_the_daemon(on: Interface, name: Param) -> list[Method]:
    piece = (Param("offset", "int"), Param("length", "int"))
    read_main = "A piece of the daemon's log, or with a negative offset its end."
    return [
        Method("supervisor.getAPIVersion", "string", "The version of this interface.", on.get_version),
        Method("supervisor.getVersion", "string", "Old name of getAPIVersion.", on.get_version),
        Method("supervisor.getSupervisorVersion", "string", "mlx-supervisor's version.", on.get_supervisor_version),
        Method("supervisor.getIdentification", "string", "Which daemon this is.", on.get_identification),
        Method("supervisor.getState", "struct", "statecode and statename of the daemon.", on.get_state),
        Method("supervisor.getPID", "int", "The daemon's process id.", on.get_pid),
        Method("supervisor.readLog", "string", read_main, on.read_log, piece),
        Method("supervisor.readMainLog", "string", "Old name of readLog.", on.read_log, piece),
        Method("supervisor.clearLog", "boolean", "Empty the daemon's log.", on.clear_log, (), _CHANGES),
        Method("supervisor.shutdown", "boolean", "Stop every run, then the daemon.", on.shutdown, (), _CHANGES),
        Method("supervisor.restart", "boolean", "Stop every run and start the daemon anew.", on.restart, (), _CHANGES),
        Method(
            "supervisor.reloadConfig",
            "array",
            "Read the settings: [[added, changed, removed]].",
            on.reload_config,
            (),
            _CHANGES,
        ),
        Method("supervisor.addProcessGroup", "boolean", "Take a reread run into use.", on.add_group, (name,), _CHANGES),
        Method(
            "supervisor.removeProcessGroup",
            "boolean",
            "Take a stopped run out of use.",
            on.remove_group,
            (name,),
            _CHANGES,
        ),
        Method("supervisor.getAllConfigInfo", "array", "The runs of the settings, in use or not.", on.config_info),
        Method(
            "supervisor.sendRemoteCommEvent",
            "boolean",
            "Accepted; there are no event listeners.",
            on.send_event,
            (Param("type", "string"), Param("data", "string")),
        ),
    ]


def _about_logs(on: Interface, name: Param, piece: tuple[Param, ...]) -> list[Method]:
    out, err = on.log_reader("stdout"), on.log_reader("stderr")
    tail_out, tail_err = on.log_tailer("stdout"), on.log_tailer("stderr")
    read, tail = "A piece of a run's log, or its end.", "[text, offset to go on from, whether something was left out]."
    clear = "Empty a run's logs."
    return [
        Method("supervisor.readProcessStdoutLog", "string", read, out, piece),
        Method("supervisor.readProcessLog", "string", "Old name of readProcessStdoutLog.", out, piece),
        Method("supervisor.readProcessStderrLog", "string", read, err, piece),
        Method("supervisor.tailProcessStdoutLog", "array", tail, tail_out, piece),
        Method("supervisor.tailProcessLog", "array", "Old name of tailProcessStdoutLog.", tail_out, piece),
        Method("supervisor.tailProcessStderrLog", "array", tail, tail_err, piece),
        Method("supervisor.clearProcessLogs", "boolean", clear, on.clear_process_logs, (name,), _CHANGES),
        Method(
            "supervisor.clearProcessLog",
            "boolean",
            "Old name of clearProcessLogs.",
            on.clear_process_logs,
            (name,),
            _CHANGES,
        ),
        Method(
            "supervisor.clearAllProcessLogs", "array", "Empty all runs' logs.", on.clear_all_process_logs, (), _CHANGES
        ),
    ]


def _about_runs(on: Interface, name: Param, wait: Param, wanted: Param) -> list[Method]:
    stdin = (name, Param("chars", "string"))
    return [
        Method("supervisor.getProcessInfo", "struct", "One run.", on.process_info, (name,)),
        Method("supervisor.getAllProcessInfo", "array", "All runs.", on.all_process_info),
        Method(
            "supervisor.startProcess", "boolean", "Start; by default wait until ready.", on.start, (name, wait), _STARTS
        ),
        Method(
            "supervisor.startProcessGroup", "array", "Start what is not running.", on.start_group, (name, wait), _STARTS
        ),
        Method("supervisor.startAllProcesses", "array", "Start what is not running.", on.start_all, (wait,), _STARTS),
        Method("supervisor.stopProcess", "boolean", "Checkpoint and stop.", on.stop, (name, wait), _STOPS),
        Method("supervisor.stopProcessGroup", "array", "Stop what runs.", on.stop_group, (name, wait), _STOPS),
        Method("supervisor.stopAllProcesses", "array", "Stop what runs.", on.stop_all, (wait,), _STOPS),
        Method("supervisor.signalProcess", "boolean", "Send a signal.", on.signal, (name, wanted), _STOPS),
        Method("supervisor.signalProcessGroup", "array", "Send a signal.", on.signal_group, (name, wanted), _STOPS),
        Method("supervisor.signalAllProcesses", "array", "Send a signal.", on.signal_all, (wanted,), _STOPS),
        Method(
            "supervisor.sendProcessStdin",
            "boolean",
            "Refused: runs have no standard input.",
            on.send_stdin,
            stdin,
            _CHANGES,
        ),
        Method("training.getRunInfo", "struct", "What Supervisord's info cannot say of a run.", on.run_info, (name,)),
        Method("training.getAllRunInfo", "array", "The same of all runs.", on.all_run_info),
        Method(
            "training.restartRun",
            "boolean",
            "Stop and start in one call; wait until ready.",
            on.restart_run,
            (name,),
            _STARTS,
        ),
    ]
