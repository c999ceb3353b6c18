# check: does it compile · test: all that CI runs before the demo · golden: make the reference files again (needs Python)
.PHONY: check test golden bench demo

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

bench:
	cargo run --release -p foveate-kernels --example speed

demo:
	cargo run --release -- demo
