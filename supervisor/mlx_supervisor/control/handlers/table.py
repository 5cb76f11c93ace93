"""The table of methods: every method that a client can call."""

from mlx_supervisor.control.backend import FaultCode
from mlx_supervisor.control.dispatcher import Method, Param
from mlx_supervisor.control.handlers import configuration, logs, processes, supervisor, system, training

_CHANGES = FaultCode.SHUTDOWN_STATE
_STARTS = FaultCode.SPAWN_ERROR
_STOPS = FaultCode.FAILED
"""The fault of a call while the daemon shuts down. Supervisord's client knows only the last two from these methods."""

_NAME, _WAIT, _SIGNAL = Param("name", "string"), Param("wait", "boolean", default=True), Param("signal", "signal")
_PIECE = (Param("offset", "int"), Param("length", "int"))
_EVENT = (Param("type", "string"), Param("data", "string"))

METHODS = (
    Method("supervisor.getAPIVersion", "string", supervisor.get_api_version),
    Method("supervisor.getVersion", "string", supervisor.get_api_version),
    Method("supervisor.getSupervisorVersion", "string", supervisor.get_version),
    Method("supervisor.getIdentification", "string", supervisor.get_identification),
    Method("supervisor.getState", "struct", supervisor.get_state),
    Method("supervisor.getPID", "int", supervisor.get_pid),
    Method("supervisor.shutdown", "boolean", supervisor.shutdown, (), _CHANGES),
    Method("supervisor.restart", "boolean", supervisor.restart, (), _CHANGES),
    Method("supervisor.sendRemoteCommEvent", "boolean", supervisor.send_event, _EVENT),
    # the settings
    Method("supervisor.reloadConfig", "array", configuration.reload_config, (), _CHANGES),
    Method("supervisor.addProcessGroup", "boolean", configuration.add_group, (_NAME,), _CHANGES),
    Method("supervisor.removeProcessGroup", "boolean", configuration.remove_group, (_NAME,), _CHANGES),
    Method("supervisor.getAllConfigInfo", "array", configuration.config_info),
    # logs, with Supervisord's older names
    Method("supervisor.readLog", "string", logs.read_main, _PIECE),
    Method("supervisor.readMainLog", "string", logs.read_main, _PIECE),
    Method("supervisor.clearLog", "boolean", logs.clear_main, (), _CHANGES),
    Method("supervisor.readProcessStdoutLog", "string", logs.read_stdout, (_NAME, *_PIECE)),
    Method("supervisor.readProcessLog", "string", logs.read_stdout, (_NAME, *_PIECE)),
    Method("supervisor.readProcessStderrLog", "string", logs.read_stderr, (_NAME, *_PIECE)),
    Method("supervisor.tailProcessStdoutLog", "array", logs.tail_stdout, (_NAME, *_PIECE)),
    Method("supervisor.tailProcessLog", "array", logs.tail_stdout, (_NAME, *_PIECE)),
    Method("supervisor.tailProcessStderrLog", "array", logs.tail_stderr, (_NAME, *_PIECE)),
    Method("supervisor.clearProcessLogs", "boolean", logs.clear, (_NAME,), _CHANGES),
    Method("supervisor.clearProcessLog", "boolean", logs.clear, (_NAME,), _CHANGES),
    Method("supervisor.clearAllProcessLogs", "array", logs.clear_all, (), _CHANGES),
    # runs
    Method("supervisor.getProcessInfo", "struct", processes.process_info, (_NAME,)),
    Method("supervisor.getAllProcessInfo", "array", processes.all_process_info),
    Method("supervisor.startProcess", "boolean", processes.start, (_NAME, _WAIT), _STARTS),
    Method("supervisor.startProcessGroup", "array", processes.start_group, (_NAME, _WAIT), _STARTS),
    Method("supervisor.startAllProcesses", "array", processes.start_all, (_WAIT,), _STARTS),
    Method("supervisor.stopProcess", "boolean", processes.stop, (_NAME, _WAIT), _STOPS),
    Method("supervisor.stopProcessGroup", "array", processes.stop_group, (_NAME, _WAIT), _STOPS),
    Method("supervisor.stopAllProcesses", "array", processes.stop_all, (_WAIT,), _STOPS),
    Method("supervisor.signalProcess", "boolean", processes.signal, (_NAME, _SIGNAL), _STOPS),
    Method("supervisor.signalProcessGroup", "array", processes.signal_group, (_NAME, _SIGNAL), _STOPS),
    Method("supervisor.signalAllProcesses", "array", processes.signal_all, (_SIGNAL,), _STOPS),
    Method("supervisor.sendProcessStdin", "boolean", processes.send_stdin, (_NAME, Param("chars", "string")), _CHANGES),
    Method("training.getRunInfo", "struct", training.run_info, (_NAME,)),
    Method("training.getAllRunInfo", "array", training.all_run_info),
    Method("training.restartRun", "boolean", training.restart_run, (_NAME,), _STARTS),
    # methods
    Method("system.listMethods", "array", system.list_methods),
    Method("system.methodHelp", "string", system.method_help, (_NAME,)),
    Method("system.methodSignature", "array", system.method_signature, (_NAME,)),
    Method("system.multicall", "array", system.multicall, (Param("calls", "array"),)),
)
