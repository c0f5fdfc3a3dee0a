#!/bin/sh
# Mutation score of stabletrain/core and of the rules: changes the code in many small ways and counts how many of the
# changes fail a test. mutmut takes its configuration from pyproject.toml; it needs one source folder, so it works on
# a copy.
#     sh tools/mutants.sh                     some 10 minutes; prints survivors and counts
#     cd build/mutants && mutmut show NAME    one of them as a diff
set -e
root=$(cd "$(dirname "$0")/.." && pwd)
copy=$root/build/mutants
rm -rf "$copy"
mkdir -p "$copy/src"
cp -r "$root/stabletrain" "$root/plugins/stabletrain_plugins" "$copy/src"
cp -r "$root/tests" "$root/pyproject.toml" "$copy"
cd "$copy"
OMP_NUM_THREADS=1 mutmut run --max-children "${MUTANTS_CHILDREN:-2}" >run.log
mutmut results
mutmut export-cicd-stats >run.log && cat mutants/mutmut-cicd-stats.json
