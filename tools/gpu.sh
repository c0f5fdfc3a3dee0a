#!/bin/sh
# Tests and benchmark of a GPU, with a Python that has torch, Lightning and pytest: called by `make gpu`.
#
#   PYTHON  the interpreter (python3)
#   WHEEL   a wheel of stabletrain, unpacked without its dependencies; empty: the checkout is used
#   SITE    a folder with further packages, such as bitsandbytes; may be empty
#   JOBS    processes of the tests, where pytest-xdist is installed (4)
#   ONLY    "tests" or "benchmark"; empty: both
#   REHEARSE  set: on the CPU, with tiny sizes, and no page is written
set -eu
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
if [ -n "${WHEEL:-}" ]; then
    "$python" -m zipfile -e "$WHEEL" "$folder/wheel"
    package=$folder/wheel
else
    # the plugins are found through an entry point, which a checkout that is not installed does not have
    info=$folder/entry/stabletrain-0.dist-info
    mkdir -p "$info"
    printf 'Metadata-Version: 2.1\nName: stabletrain\nVersion: 0\n' >"$info/METADATA"
    printf '[stabletrain.plugins]\nstabletrain = stabletrain_plugins\n' >"$info/entry_points.txt"
    package=$root:$root/plugins:$folder/entry
fi
export PYTHONPATH="$package${SITE:+:$SITE}${PYTHONPATH:+:$PYTHONPATH}"
export OMP_NUM_THREADS=1 CUBLAS_WORKSPACE_CONFIG=:4096:8 PYTHONDONTWRITEBYTECODE=1
cd "$folder"  # so that nothing of the checkout is imported by accident
echo "stabletrain is $("$python" -c 'import stabletrain; print(stabletrain.__file__)')"
status=0
if [ -z "${REHEARSE:-}" ] && ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    echo "no CUDA device here, so nothing would be tested: REHEARSE=1 does the same on the CPU" >&2
    exit 2
fi
if [ "${ONLY:-tests}" = tests ]; then
    jobs=
    if "$python" -c 'import xdist' 2>/dev/null; then jobs="-n ${JOBS:-4}"; fi
    # warnings of versions that the project's own tests do not use are shown, and are no errors
    "$python" -m pytest $jobs -c "$root/pyproject.toml" --rootdir "$root" -p no:cacheprovider -W default \
        -m "${REHEARSE:+not }gpu" -rs --durations=5 "$root/tests/gpu" || status=$?
fi
if [ "${ONLY:-benchmark}" = benchmark ]; then
    if [ -n "${REHEARSE:-}" ]; then
        "$python" "$root/benchmarks/gpu.py" --rehearse || status=$?
    else
        "$python" "$root/benchmarks/gpu.py" --write || status=$?
    fi
fi
exit $status
