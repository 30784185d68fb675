#!/usr/bin/env bash
# Resolve the newest versions that pyproject.toml allows and write constraints.txt and constraints-clients.txt.
#
# Run it with the oldest supported Python, so that every version chosen exists for it: PYTHON=python3.11 make constraints
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Our own distribution and pip are not constrained.
pins() {
    "$1/bin/python" -m pip --disable-pip-version-check freeze --all --exclude tidegate --exclude pip |
        grep -E '^[A-Za-z0-9._-]+==[^ ]+$'
}

version() {
    "$1/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])'
}

bash scripts/venv.sh "$work/main" '.[dev]'
bash scripts/venv.sh "$work/clients" -r requirements-clients.txt
"$work/main/bin/python" -m pip check
"$work/clients/bin/python" -m pip check

{
    echo "# Exact versions of everything that tidegate[dev] needs, resolved for Python $(version "$work/main")."
    echo "# Made by \`make constraints\`; use with: pip install -c constraints.txt '.[dev]'"
    pins "$work/main"
    # Where there is no GPU build: the CPU build of the same release.
    pins "$work/main" | sed -n 's/^onnxruntime-gpu==/onnxruntime==/p'
} >constraints.txt
{
    echo "# Exact versions of the public clients' environment, which needs protobuf below 7 and so lives apart."
    echo "# Made by \`make constraints\`; used with requirements-clients.txt"
    pins "$work/clients"
} >constraints-clients.txt
echo "wrote constraints.txt and constraints-clients.txt"
