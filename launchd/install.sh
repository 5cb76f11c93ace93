#!/bin/bash
# Install mlx-supervisor as a launch agent, or remove it. Running it again changes only what differs.
# Must run with the bash of macOS (3.2).
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
label=io.github.mlx-supervisor
folder=$HOME/Library/LaunchAgents
target=$folder/$label.plist
settings=$HOME/.config/mlx-supervisor/settings.toml
domain=gui/$(id -u)

usage() {
    echo "usage: $0 [--program PATH] [--uninstall]"
    echo "  --program PATH   the mlx-supervisor program; default: the one in this checkout's .venv, else the one on PATH"
    echo "  --uninstall      stop the daemon (runs checkpoint first) and remove the agent; keeps settings and runs"
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

have_launchctl=''
if command -v launchctl >/dev/null; then have_launchctl=yes; fi

loaded() {
    launchctl print "$domain/$label" >/dev/null 2>&1
}

unload() { # bootout returns before the job has ended; loading it again too early fails
    loaded || return 0
    launchctl bootout "$domain/$label" 2>/dev/null || true
    for _ in $(seq 1 100); do
        loaded || return 0
        sleep 1
    done
    fail "$label is still loaded after 100 s: launchctl print $domain/$label"
}

if [ -n "$uninstall" ]; then
    if [ -n "$have_launchctl" ]; then unload; fi
    rm -f "$target"
    echo "removed $target"
    exit 0
fi

if [ -z "$program" ]; then
    program=$here/../.venv/bin/mlx-supervisor
    [ -x "$program" ] || program=$(command -v mlx-supervisor || true)
fi
[ -n "$program" ] || fail "mlx-supervisor not found; run \`make install\` first, or pass --program PATH"
if [ ! -f "$program" ] || [ ! -x "$program" ]; then fail "not an executable file: $program"; fi
program=$(cd "$(dirname "$program")" && pwd)/$(basename "$program")

escaped=$(printf '%s' "$program" | sed -e 's/&/\&amp;/g' -e 's/</\&lt;/g' -e 's/>/\&gt;/g')
mkdir -p "$folder"
new=$(mktemp "$folder/.$label.XXXXXX")
trap 'rm -f "$new"' EXIT
while IFS= read -r line; do
    case $line in
        *'<string>@PROGRAM@</string>'*) printf '\t\t<string>%s</string>\n' "$escaped" ;;
        *) printf '%s\n' "$line" ;;
    esac
done <"$here/$label.plist" >"$new"
chmod 0644 "$new"
if command -v plutil >/dev/null; then plutil -lint "$new" >/dev/null || fail "invalid property list: $new"; fi

changed=''
if cmp -s "$new" "$target"; then
    echo "$target is up to date"
else
    mv "$new" "$target"
    changed=yes
    echo "wrote $target"
fi

if [ -z "$have_launchctl" ]; then
    echo "launchctl not found. On the Mac, run: launchctl bootstrap $domain $target"
    exit 0
fi
if [ ! -f "$settings" ]; then
    echo "No settings yet. Write $settings, then run this script again; else the daemon starts at the next login."
    exit 0
fi
if [ -n "$changed" ]; then unload; fi
loaded || launchctl bootstrap "$domain" "$target" || fail "launchctl refused $target; run this in a login session on the screen, not over ssh alone"
echo "loaded; show its state with: launchctl print $domain/$label"
echo "after an upgrade, run: supervisorctl reload (runs checkpoint first, then resume)"
