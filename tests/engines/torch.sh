#!/bin/sh
# The engine `torch` beside the embedded one, on the CPU. LibTorch is that of PyTorch 2.11, in target/engines/torch (4.7 GB with its CUDA libraries).
# `tests/engines/torch.sh COMMAND...` runs a command with it, for instance: cargo build --release --features torch
set -e
cd "$(dirname "$0")/../.."
here=$PWD/target/engines/torch
if [ ! -e "$here/done" ]; then
    rm -rf "$here"
    mkdir -p target/engines
    ${PYTHON:-python3} -m venv "$here"
    "$here/bin/pip" install -q torch==2.11.0 numpy
    touch "$here/done"
fi
# A folder of its own, so that neither build undoes the other.
export CARGO_TARGET_DIR=target/torch LIBTORCH_USE_PYTORCH=1 PATH="$here/bin:$PATH"
LD_LIBRARY_PATH=$(echo "$here"/lib/python3.*/site-packages/torch/lib)
export LD_LIBRARY_PATH
if [ $# -gt 0 ]; then
    exec "$@"
fi
cargo test --features torch --test it torch::
