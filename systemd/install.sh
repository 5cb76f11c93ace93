#!/usr/bin/env bash
# Install mlx-supervisor as a user unit of systemd, or remove it. Running it again changes nothing that is in place.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
unit=mlx-supervisor.service
folder=${XDG_CONFIG_HOME:-$HOME/.config}/systemd/user
settings=$HOME/.config/mlx-supervisor/settings.toml

usage() {
    echo "usage: $0 [--program PATH] [--uninstall]"
    echo "  --program PATH   the mlx-supervisor to run; default: this checkout's .venv, then the one on PATH"
    echo "  --uninstall      stop the daemon (runs checkpoint first) and remove the unit; settings and runs stay"
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
[ -n "$program" ] || fail "mlx-supervisor not found: run \`make install\` first, or give --program PATH"
[ -f "$program" ] && [ -x "$program" ] || fail "not a program: $program"
program=$(cd "$(dirname "$program")" && pwd)/$(basename "$program")
case $program in
    *[\"\\\$]* | *$'\n'*) fail "systemd cannot run a path with \", \\ or \$ in it: $program" ;;
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
    echo "$folder/$unit is in place"
else
    mv "$new" "$folder/$unit"
    echo "wrote $folder/$unit"
fi

if [ -z "$reachable" ]; then
    echo "systemd's user manager cannot be reached from here. In a session of yours:"
    echo "  systemctl --user daemon-reload && systemctl --user enable --now $unit"
    exit 0
fi
manager daemon-reload
if [ -f "$settings" ]; then
    manager enable --now "$unit"  # a daemon that runs already is left alone
else
    manager enable "$unit"
    echo "write $settings, then: systemctl --user start $unit"
fi
echo "to run from the machine's start, without a login: loginctl enable-linger"
echo "after a new version: supervisorctl reload (runs checkpoint first, and go on)"
