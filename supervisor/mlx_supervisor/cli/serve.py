"""`mlx-supervisor serve`: the daemon in the foreground."""

from mlx_supervisor.cli import lean_imports  # isort: skip  # noqa: F401 - must come before the imports it blocks

import argparse
import asyncio
import os
import sys
from pathlib import Path

import structlog

from mlx_supervisor.cli.signals import handle_signals
from mlx_supervisor.daemon.service import Service
from mlx_supervisor.logs import daemon_log
from mlx_supervisor.settings.paths import DEFAULT_FILE
from mlx_supervisor.settings.reader import read_settings
from mlx_supervisor.settings.schema import Settings, SettingsError
from mlx_supervisor.state_dir import StateDir, StateDirError

log = structlog.get_logger()


def serve(arguments: list[str]) -> int:
    """Run until SIGTERM, SIGINT or `supervisorctl shutdown`; workers checkpoint, and runs resume at the next start."""
    parser = argparse.ArgumentParser(prog="mlx-supervisor serve", description="Run the daemon in the foreground.")
    file_help = f"settings file (TOML); default: {DEFAULT_FILE}"
    parser.add_argument(
        "-c", "--configuration", type=Path, default=DEFAULT_FILE.expanduser(), metavar="FILE", help=file_help
    )
    parser.add_argument("--state-dir", type=Path, metavar="DIR", help="state folder; overrides state_dir")
    parser.add_argument("--log-level", choices=["debug", "info", "warning", "error"], default="info")
    options = parser.parse_args(arguments)
    try:
        settings = read_settings(options.configuration, options.state_dir)
        state = StateDir(settings.state_dir)
    except (SettingsError, StateDirError) as error:
        print(error, file=sys.stderr)
        if options.configuration == DEFAULT_FILE.expanduser() and not options.configuration.exists():
            hint = "`mlx-supervisor serve -c FILE` serves another file; to write one: `mlx-supervisor init -o"
            print(f"{hint} {DEFAULT_FILE}`", file=sys.stderr)
        return 2
    daemon_log.configure(state.log, console=True, level=options.log_level)
    try:
        restart = asyncio.run(_serve(settings, state))
    except Exception as error:
        log.error("start_failed", error=f"{type(error).__name__}: {error}")
        return 2 if isinstance(error, (SettingsError, StateDirError)) else 1
    finally:
        state.close()
    if restart:
        os.execv(sys.executable, [sys.executable, "-m", "mlx_supervisor", "serve", *arguments])  # noqa: S606 - no shell needed
    return 0


async def _serve(settings: Settings, state: StateDir) -> bool:
    service = Service(settings, state)

    def stop(name: str) -> None:
        log.info("shutting_down", reason=name)
        service.daemon.shutdown_requested.set()

    def kill(reason: str) -> None:
        log.warning("killing_workers", reason=reason)
        service.daemon.kill_all(reason)

    handle_signals(stop, kill)
    await service.open()
    log.info("serving", socket=str(state.control_socket), runs=", ".join(service.daemon.runs))
    try:
        await service.serve()
    finally:
        await service.close()
    log.info("ended")
    return service.daemon.restart_requested
