"""The table of methods: every method that a client can call."""

from functools import partial

from mlx_supervisor.control.backend import FaultCode
from mlx_supervisor.control.dispatcher import Method, Param
from mlx_supervisor.control.handlers import configuration, logs, processes, supervisor, system, training

_CHANGES = FaultCode.SHUTDOWN_STATE
_STARTS = FaultCode.SPAWN_ERROR
_STOPS = FaultCode.FAILED
"""What a call is refused with while the daemon shuts down; the client of start, stop and signal knows these two."""

_NAME, _WAIT, _SIGNAL = Param("name", "string"), Param("wait", "boolean", default=True), Param("signal", "signal")
_PIECE = (Param("offset", "int"), Param("length", "int"))

_SUPERVISOR = (
    Method("supervisor.getAPIVersion", "string", "The version of this interface.", supervisor.get_api_version),
    Method("supervisor.getVersion", "string", "Old name of getAPIVersion.", supervisor.get_api_version),
    Method("supervisor.getSupervisorVersion", "string", "mlx-supervisor's version.", supervisor.get_version),
    Method("supervisor.getIdentification", "string", "Which daemon this is.", supervisor.get_identification),
    Method("supervisor.getState", "struct", "statecode and statename of the daemon.", supervisor.get_state),
    Method("supervisor.getPID", "int", "The daemon's process id.", supervisor.get_pid),
    Method("supervisor.shutdown", "boolean", "Stop every run, then the daemon.", supervisor.shutdown, (), _CHANGES),
    Method(
        "supervisor.restart", "boolean", "Stop every run and start the daemon anew.", supervisor.restart, (), _CHANGES
    ),
    Method(
        "supervisor.sendRemoteCommEvent",
        "boolean",
        "Accepted; there are no event listeners.",
        supervisor.send_event,
        (Param("type", "string"), Param("data", "string")),
    ),
)

_CONFIGURATION = (
    Method(
        "supervisor.reloadConfig",
        "array",
        "Read the settings: [[added, changed, removed]].",
        configuration.reload_config,
        (),
        _CHANGES,
    ),
    Method(
        "supervisor.addProcessGroup",
        "boolean",
        "Take a reread run into use.",
        configuration.add_group,
        (_NAME,),
        _CHANGES,
    ),
    Method(
        "supervisor.removeProcessGroup",
        "boolean",
        "Take a stopped run out of use.",
        configuration.remove_group,
        (_NAME,),
        _CHANGES,
    ),
    Method(
        "supervisor.getAllConfigInfo", "array", "The runs of the settings, in use or not.", configuration.config_info
    ),
)

_READ_MAIN = "A piece of the daemon's log, or with a negative offset its end."
_READ, _TAIL = "A piece of a run's log, or its end.", "[text, offset to go on from, whether something was left out]."
_OUT, _ERR = partial(logs.read, channel="stdout"), partial(logs.read, channel="stderr")
_TAIL_OUT, _TAIL_ERR = partial(logs.tail, channel="stdout"), partial(logs.tail, channel="stderr")
_LOGS = (
    Method("supervisor.readLog", "string", _READ_MAIN, logs.read_main, _PIECE),
    Method("supervisor.readMainLog", "string", "Old name of readLog.", logs.read_main, _PIECE),
    Method("supervisor.clearLog", "boolean", "Empty the daemon's log.", logs.clear_main, (), _CHANGES),
    Method("supervisor.readProcessStdoutLog", "string", _READ, _OUT, (_NAME, *_PIECE)),
    Method("supervisor.readProcessLog", "string", "Old name of readProcessStdoutLog.", _OUT, (_NAME, *_PIECE)),
    Method("supervisor.readProcessStderrLog", "string", _READ, _ERR, (_NAME, *_PIECE)),
    Method("supervisor.tailProcessStdoutLog", "array", _TAIL, _TAIL_OUT, (_NAME, *_PIECE)),
    Method("supervisor.tailProcessLog", "array", "Old name of tailProcessStdoutLog.", _TAIL_OUT, (_NAME, *_PIECE)),
    Method("supervisor.tailProcessStderrLog", "array", _TAIL, _TAIL_ERR, (_NAME, *_PIECE)),
    Method("supervisor.clearProcessLogs", "boolean", "Empty a run's logs.", logs.clear, (_NAME,), _CHANGES),
    Method("supervisor.clearProcessLog", "boolean", "Old name of clearProcessLogs.", logs.clear, (_NAME,), _CHANGES),
    Method("supervisor.clearAllProcessLogs", "array", "Empty all runs' logs.", logs.clear_all, (), _CHANGES),
)

_PROCESSES = (
    Method("supervisor.getProcessInfo", "struct", "One run.", processes.process_info, (_NAME,)),
    Method("supervisor.getAllProcessInfo", "array", "All runs.", processes.all_process_info),
    Method(
        "supervisor.startProcess",
        "boolean",
        "Start; by default wait until ready.",
        processes.start,
        (_NAME, _WAIT),
        _STARTS,
    ),
    Method(
        "supervisor.startProcessGroup",
        "array",
        "Start what is not running.",
        processes.start_group,
        (_NAME, _WAIT),
        _STARTS,
    ),
    Method(
        "supervisor.startAllProcesses", "array", "Start what is not running.", processes.start_all, (_WAIT,), _STARTS
    ),
    Method("supervisor.stopProcess", "boolean", "Checkpoint and stop.", processes.stop, (_NAME, _WAIT), _STOPS),
    Method("supervisor.stopProcessGroup", "array", "Stop what runs.", processes.stop_group, (_NAME, _WAIT), _STOPS),
    Method("supervisor.stopAllProcesses", "array", "Stop what runs.", processes.stop_all, (_WAIT,), _STOPS),
    Method("supervisor.signalProcess", "boolean", "Send a signal.", processes.signal, (_NAME, _SIGNAL), _STOPS),
    Method(
        "supervisor.signalProcessGroup", "array", "Send a signal.", processes.signal_group, (_NAME, _SIGNAL), _STOPS
    ),
    Method("supervisor.signalAllProcesses", "array", "Send a signal.", processes.signal_all, (_SIGNAL,), _STOPS),
    Method(
        "supervisor.sendProcessStdin",
        "boolean",
        "Refused: runs have no standard input.",
        processes.send_stdin,
        (_NAME, Param("chars", "string")),
        _CHANGES,
    ),
)

_TRAINING = (
    Method("training.getRunInfo", "struct", "Progress and memory of a run.", training.run_info, (_NAME,)),
    Method("training.getAllRunInfo", "array", "Progress and memory of all runs.", training.all_run_info),
    Method(
        "training.restartRun",
        "boolean",
        "Stop and start in one call; wait until ready.",
        training.restart_run,
        (_NAME,),
        _STARTS,
    ),
)

_SYSTEM = (
    Method("system.listMethods", "array", "The names of all methods.", system.list_methods),
    Method("system.methodHelp", "string", "What a method does.", system.method_help, (_NAME,)),
    Method("system.methodSignature", "array", "Types of result and parameters.", system.method_signature, (_NAME,)),
    Method(
        "system.multicall",
        "array",
        f"Up to {system.MULTICALL_LIMIT} calls, one after the other; a fault comes as a struct in its place.",
        system.multicall,
        (Param("calls", "array"),),
    ),
)

METHODS = (*_SUPERVISOR, *_CONFIGURATION, *_LOGS, *_PROCESSES, *_TRAINING, *_SYSTEM)
