#!/usr/bin/env bash
# Install mlx-supervisor as a user unit of systemd, or remove it. Running it again changes only what differs.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
unit=mlx-supervisor.service
folder=${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user
settings=$HOME/.config/mlx-supervisor/settings.toml

usage() {
    echo "usage: $0 [--program PATH] [--uninstall]"
    echo "  --program PATH   the mlx-supervisor program; default: the one in this checkout's .venv, else the one on PATH"
    echo "  --uninstall      stop the daemon (runs checkpoint first) and remove the unit; keeps settings and runs"
}

fail() {
    echo "$0: $1" >&2
    exit 1
}

program='' uninstall=''
while [ $# -gt 0 ]; do
    case $1 in
        --program) [ $# -ge 2 ] || { usage >&2; exit 2; }; program=$2; shift 2 ;;
        --uninstall) uninstall=yes; shift ;;
        -h | --help) usage; exit 0 ;;
        *) echo "$0: unknown argument: $1" >&2; usage >&2; exit 2 ;;
    esac
done

manager() {
    command -v systemctl >/dev/null && systemctl --user "$@"
}
reachable=''
if manager show-environment >/dev/null 2>&1; then reachable=yes; fi

if [ -n "$uninstall" ]; then
    if [ -n "$reachable" ]; then manager disable --now "$unit" 2>/dev/null || true; fi
    rm -f "$folder/$unit" "$folder/default.target.wants/$unit"
    if [ -n "$reachable" ]; then manager daemon-reload; fi
    echo "removed $folder/$unit"
    exit 0
fi

if [ -z "$program" ]; then
    program=$here/../.venv/bin/mlx-supervisor
    [ -x "$program" ] || program=$(command -v mlx-supervisor || true)
fi
[ -n "$program" ] || fail "mlx-supervisor not found; run \`make install\` first, or pass --program PATH"
if [ ! -f "$program" ] || [ ! -x "$program" ]; then fail "not an executable file: $program"; fi
program=$(cd "$(dirname "$program")" && pwd)/$(basename "$program")
case $program in
    *[\"\\\$]* | *$'\n'*) fail "systemd can't run a path with \", \\ or \$ in it: $program" ;;
esac

escaped=${program//%/%%}
mkdir -p "$folder"
new=$(mktemp "$folder/.$unit.XXXXXX")
trap 'rm -f "$new"' EXIT
while IFS= read -r line; do
    case $line in
        ExecStart=*) printf '%s\n' "ExecStart=\"$escaped\" serve" ;;
        *) printf '%s\n' "$line" ;;
    esac
done <"$here/$unit" >"$new"
chmod 0644 "$new"
if cmp -s "$new" "$folder/$unit"; then
    echo "$folder/$unit is up to date"
else
    mv "$new" "$folder/$unit"
    echo "wrote $folder/$unit"
fi

if [ -z "$reachable" ]; then
    echo "systemd's user manager can't be reached from here. In a login session, run:"
    echo "  systemctl --user daemon-reload && systemctl --user enable --now $unit"
    exit 0
fi
manager daemon-reload
if [ -f "$settings" ]; then
    manager enable --now "$unit"  # does not restart a running daemon
else
    manager enable "$unit"
    echo "No settings yet. Write $settings, then run: systemctl --user start $unit"
fi
echo "to start at boot, without a login, run: loginctl enable-linger"
echo "after an upgrade, run: supervisorctl reload (runs checkpoint first, then resume)"
