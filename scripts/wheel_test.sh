#!/usr/bin/env bash
# Install a wheel into an empty environment and use it:  scripts/wheel_test.sh WHEEL
#
# Nothing that it depends on is there: what vLLM imports in each of its processes, and
# the command's help, must do without.
set -euo pipefail
wheel=$(realpath "$1")
root=$(dirname "$(dirname "$(realpath "$0")")")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/env"
# Not from the repository, whose own scx would be imported.
unset PYTHONPATH PYTHONHOME
(cd "$root" && git ls-files scx | sort) > "$work/tracked"
cd "$work"
env/bin/python -m zipfile -l "$wheel" | grep -o '^scx/[^ ]*' | sort > shipped
diff tracked shipped
env/bin/python -m pip install --quiet --disable-pip-version-check --no-index --no-deps "$wheel"
env/bin/scx --help > script
env/bin/python -m scx --help > module
cmp script module
env/bin/python - <<'PYTHON'
from importlib.metadata import entry_points, version

import scx

(plugin,) = entry_points(group="vllm.general_plugins")
if (plugin.name, plugin.value) != ("scx", "scx:init_vllm_plugin"):
    raise SystemExit(f"not our entry point: {plugin}")
if scx.__version__ != version("scx-vllm"):
    raise SystemExit(f"scx {scx.__version__} is not scx-vllm {version('scx-vllm')}")
print(f"scx-vllm {scx.__version__} from {scx.__file__}: installed and imported")
PYTHON
