# check: does it compile · test: all that CI runs before the demo · golden: make the reference files again (needs Python) · engines: against real servers (needs Python 3.12, 13 GB) · torch: the engine on LibTorch (needs Python, 5 GB)
.PHONY: check test golden engines torch bench demo

check:
	cargo check --workspace --all-targets

test:
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo test --workspace
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

# In a virtual environment with torch, transformers, pillow, safetensors (versions: tests/golden/README.md).
golden:
	python tests/golden/resize.py
	python tests/golden/make.py

# SkyRL, transformers serve and vLLM on this machine's CPU; environments are made once, in target/engines.
engines:
	cargo build --release
	tests/engines/environments.sh
	python3 tests/engines/run.py

# LibTorch on this machine's CPU beside our own kernels.
torch:
	tests/engines/torch.sh

bench:
	cargo run --release -p foveate-kernels --example speed

demo:
	cargo run --release -- demo
