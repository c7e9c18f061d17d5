# Sourced by the recipes and run_tests.sh. Leaves in $here the project's folder, and in $PYTHON an
# interpreter that satisfies requirements.txt: the one PYTHON names, the active one, or that of .venv
# there, which is made on first use (5.5 GB with CUDA libraries, minutes). The array `requirements`,
# where it is set before, names more such files.

PYTHON_FLAGS=()
requirements=(requirements.txt ${requirements[@]+"${requirements[@]}"})
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    echo "environment.sh: error: $1" >&2
    exit 1
}

satisfied() {  # does this interpreter have everything, in versions that fit each other?
    "$1" - "${requirements[@]/#/$here/}" <<'CHECK' 2>/dev/null
import sys
from importlib.metadata import requires, version
from packaging.requirements import Requirement

wanted = []
for name in sys.argv[1:]:
    with open(name) as file:
        wanted += [line for line in (line.split("#")[0].strip() for line in file) if line]
wanted += requires("torchvision")  # it works with one torch release only
for requirement in map(Requirement, wanted):
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        assert requirement.specifier.contains(version(requirement.name), prereleases=True)
CHECK
}

# train.py, by way of the array PYTHON_FLAGS.
train() {
    exec "$PYTHON" ${PYTHON_FLAGS[@]+"${PYTHON_FLAGS[@]}"} "$here/train.py" "$@"
}

if [ -z "${PYTHON:-}" ]; then
    for PYTHON in python3 python "$here/.venv/bin/python"; do
        if satisfied "$PYTHON"; then break; fi
    done
fi
if ! satisfied "$PYTHON"; then
    if [ "$PYTHON" != "$here/.venv/bin/python" ]; then
        fail "$PYTHON does not satisfy ${requirements[*]}: install that there, or unset PYTHON"
    fi
    if ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
        fail "python3 is missing or older than 3.10: install Python 3.10 or newer"
    fi
    echo "First use: fetching torch and the rest of ${requirements[*]} into $here/.venv" \
        "(once; 5.5 GB with CUDA libraries, some minutes)" >&2
    quiet=(--quiet)
    if [ -t 2 ]; then quiet=(); fi  # on a terminal: what is fetched, its size, and a bar
    if ! { python3 -m venv "$here/.venv" &&
           "$PYTHON" -m pip install ${quiet[@]+"${quiet[@]}"} "${requirements[@]/#/-r$here/}"
         } >&2; then
        fail "could not install ${requirements[*]} into $here/.venv (see above)"
    fi
fi
