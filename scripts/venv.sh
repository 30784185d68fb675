#!/usr/bin/env bash
# Make a virtual environment and install into it: scripts/venv.sh DIR PIP_INSTALL_ARGUMENT...
# Or ask whether one would be kept as it is, by the exit code: scripts/venv.sh DIR
#
# Picks Python 3.11 to 3.14, or the interpreter named by $PYTHON. An environment is kept while its interpreter runs, finds
# pip in it and is what $PYTHON names, if anything; else it is made again. pip's own chatter is cut down to the large
# downloads; its errors are shown whole.
set -euo pipefail

fail() {
    printf 'error: %s\n' "$1" >&2
    exit 1
}

# The constraints are checked on these versions; a newer Python has to be asked for by name.
suits() {
    "$1" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' >/dev/null 2>&1
}

find_python() {
    if [ -n "${PYTHON:-}" ]; then
        "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 ||
            fail "PYTHON=$PYTHON does not run or is older than Python 3.11"
        printf '%s\n' "$PYTHON"
        return
    fi
    local candidate
    for candidate in python3 python3.11 python3.12 python3.13 python3.14 python; do
        if suits "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    fail "no Python 3.11 to 3.14 found on PATH; install one, or name one: make PYTHON=/path/to/python3 ..."
}

kept() {
    local interpreter
    # No pip is found where the system's Python was replaced by another version.
    interpreter=$("$1/bin/python" -c 'import pip, sys; print(sys.version)' 2>/dev/null) || return 1
    [ -z "${PYTHON:-}" ] || [ "$interpreter" = "$("$PYTHON" -c 'import sys; print(sys.version)' 2>/dev/null)" ]
}

create() {
    local dir=$1 python
    python=$(find_python)
    echo "creating $dir with $("$python" --version)"
    "$python" -c 'import ensurepip, venv' >/dev/null 2>&1 ||
        fail "$python has no venv or ensurepip module (on Debian and Ubuntu: apt-get install python3-venv, or pythonX.Y-venv for another version)"
    rm -rf "$dir"
    "$python" -m venv "$dir"
}

# Keeps the lines worth seeing during a long install; "downloading" only from a megabyte on.
progress() {
    sed -u -n \
        -e 's/^ *Downloading \([^ ]*\) (\([0-9.]* [MG]B\)).*/  downloading \1, \2/p' \
        -e 's/^Installing collected packages: .*/  unpacking/p'
}

[ $# -ge 1 ] || fail "usage: scripts/venv.sh DIR [PIP_INSTALL_ARGUMENT...]"
dir=$1
shift
if [ $# -eq 0 ]; then
    kept "$dir"
    exit
fi
kept "$dir" || create "$dir"
echo "installing into $dir"
"$dir/bin/python" -m pip install --disable-pip-version-check --progress-bar off "$@" | progress
echo "installed"
