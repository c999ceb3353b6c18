# One word a task. `make test` is what CI runs and what a change has to pass.
.PHONY: check test golden bench demo

check:            ## types only, the fastest answer
	cargo check --workspace --all-targets

test:             ## format, lints, tests, documentation
	cargo fmt --all --check
	cargo clippy --workspace --all-targets -- -D warnings
	cargo test --workspace
	RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps

golden:           ## write the golden files anew (Python with torch, transformers 5, Pillow, safetensors); then look at the diff
	python3 tests/golden/make.py
	python3 tests/golden/resize.py

bench:            ## what this machine does: kernels, then pictures
	cargo run --release -p foveate-kernels --example speed
	cargo run --release -- bench image assets/photos/test/peaks.jpg

demo:             ## the whole story, into runs/demo
	cargo run --release -- demo
