#!/usr/bin/env bash
# Set up, then every check and test: bash launch/test.sh [--full] [options of pytest]
#
# Without --full there are few random trials; --full adds the long ones and the quality runs.
# After a check that fails the next ones still run. Exits 0 only if all of them passed.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

which=(-m "not full")
if [[ ${1:-} == --full ]]; then
    which=()
    shift
fi

failed=()
check() {
    local name=$1 start=$SECONDS
    shift
    echo "== $name"
    "$@" || failed+=("$name")
    echo "== $name: $((SECONDS - start)) s"
}

check setup bash launch/setup.sh test
if ((${#failed[@]})); then exit 1; fi
source launch/environment.sh
check lint ruff check .
check format ruff format --check .
check types pyrefly check
check layers lint-imports
if ((${#failed[@]})); then echo "== failed so far: ${failed[*]}"; fi

echo "== tests"
# Many tests wait for processes that they start, so three test files run at a time on two cores. They
# start in the order of their folders: the slow ones first, the short unit tests fill the end.
export OMP_NUM_THREADS=1
pytest -n 3 --dist loadfile --no-loadscope-reorder "${which[@]}" "$@" || failed+=(tests)
((${#failed[@]} == 0))
