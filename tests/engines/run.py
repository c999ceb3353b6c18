"""Our engines against real servers that nobody here wrote, on a CPU.

    make engines                            environments (cached in target/engines), then all of it
    python tests/engines/run.py vllm served skyrl

skyrl   SkyRL's tinker server with its JAX engine: RL in words through the protocol, and rows with pictures refused
served  transformers serve with the bundled model: `engine.kind = "openai"` answers as the embedded engine does, token for token
vllm    vLLM: the same in token ids with log-probs, over chat as well, and RL of adapters that are loaded there version by version

Each prints what it saw and ends with an error where it is not what was promised. Versions and figures: LOG.md.
"""
import json, os, pathlib, shutil, subprocess, sys, time, urllib.request

ROOT = pathlib.Path(__file__).resolve().parents[2]
ENVS = ROOT / "target" / "engines"
WORK = ENVS / "work"
FOVEATE = ROOT / "target" / "release" / "foveate"
NANO = ROOT / "assets" / "nano"
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


class Server:
    """A program that answers at a port before anything is asked of it, and is gone afterwards."""

    def __init__(self, name, command, port, path, env):
        self.log = WORK / f"{name}.log"
        environment = {**os.environ, **OFFLINE, **env}
        self.process = subprocess.Popen([str(c) for c in command], cwd=WORK, env=environment, start_new_session=True,
                                        stdout=open(self.log, "w"), stderr=subprocess.STDOUT)
        url = f"http://127.0.0.1:{port}{path}"
        for _ in range(150):
            if self.process.poll() is not None:
                break
            try:
                urllib.request.urlopen(url, timeout=5).read()
                return
            except OSError as error:
                # An address that it does not know is an answer, too.
                if isinstance(error, urllib.error.HTTPError):
                    return
                time.sleep(2)
        self.stop()
        sys.exit(f"{name} did not come up; see {self.log}")

    def stop(self):
        subprocess.run(["pkill", "-TERM", "-s", str(self.process.pid)], check=False)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            subprocess.run(["pkill", "-KILL", "-s", str(self.process.pid)], check=False)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stop()


def foveate(*arguments, fails=False):
    run = subprocess.run([FOVEATE, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    if (run.returncode != 0) != fails:
        sys.exit(f"foveate {' '.join(map(str, arguments))}\nended with {run.returncode}:\n{run.stderr}")
    return run.stderr


def fresh(name):
    shutil.rmtree(WORK / name, ignore_errors=True)
    return WORK / name


def plates():
    if not (WORK / "plates").is_dir():
        foveate("data", "make", "plates", "--out", WORK / "plates", "--train", 200, "--test", 60)
    return WORK / "plates"


def evaluated(name, *engine):
    """Greedy answers to 60 questions under three protocols, by episode."""
    out = fresh(name)
    foveate("eval", "configs/eval_plates.toml", f"data.test={plates() / 'test.jsonl'}", "data.limit=60", f"eval.out={out}", *engine)
    found = {}
    for file in sorted((out / "episodes").glob("*.jsonl")):
        for i, line in enumerate(open(file)):
            found[file.name, i] = json.loads(line)
    return found


def same(name, ours, theirs):
    if ours.keys() != theirs.keys() or not ours:
        sys.exit(f"{name}: {len(theirs)} episodes for {len(ours)}")
    other = [key for key in ours if ours[key]["ids"] != theirs[key]["ids"]]
    answers = sum(turn["role"] == "assistant" for episode in ours.values() for turn in episode["turns"])
    print(f"{name}: {len(ours)} episodes with {answers} answers; {len(other)} episodes have other tokens than ours")
    if other:
        sys.exit(f"{name}: other tokens in {other[:5]}")


def metrics(out):
    return [json.loads(line) for line in open(out / "metrics.jsonl")]


def mean(rows, key):
    return sum(row[key] for row in rows) / len(rows)


def skyrl():
    env, port = ENVS / "skyrl", 8123
    text = WORK / "text"
    if not (text / "rows.jsonl").is_file():
        subprocess.run([env / "bin" / "python", ROOT / "tests" / "engines" / "text_model.py", text], check=True,
                       env={**os.environ, **OFFLINE}, stderr=subprocess.DEVNULL)
    backend = {"max_lora_adapters": 4, "max_lora_rank": 8, "train_micro_batch_size": 32, "sample_max_num_sequences": 128}
    kept = fresh("skyrl_server")
    kept.mkdir(parents=True)
    # The server starts its engine as it was itself started, and knows no other way than uv's.
    command = [env / "bin" / "uv", "run", "--no-project", "-m", "skyrl.tinker.api", "--base-model", text / "model",
               "--backend", "jax", "--backend-config", json.dumps(backend), "--checkpoints-base", kept / "checkpoints",
               "--database-url", f"sqlite:///{kept / 'tinker.db'}", "--host", "127.0.0.1", "--port", port]
    path = f"{env / 'bin'}:{os.environ['PATH']}"
    with Server("skyrl", command, port, "/api/v1/healthz", {"VIRTUAL_ENV": str(env), "PATH": path, "UV_OFFLINE": "1"}):
        at = [f"engine.url=http://127.0.0.1:{port}", f"engine.base_model={text / 'model'}"]
        out = fresh("skyrl_rl")
        foveate("rl", "tests/engines/skyrl.toml", f"data.train={text / 'rows.jsonl'}", f"train.out={out}", *at)
        rows = metrics(out)
        first, last = (mean(part, "reward/mean") for part in (rows[:5], rows[-5:]))
        apart = max(row["mismatch_logprob/max"] for row in rows)
        print(f"skyrl: {len(rows)} steps in words, reward {first:.2f} to {last:.2f}; sampler and trainer at most {apart:.1e} nats apart")
        if last < first + 0.2 or apart > 1e-3:
            sys.exit("skyrl: nothing was learnt")
        said = foveate("rl", "tests/engines/skyrl.toml", f"data.train={plates() / 'train.jsonl'}", "task.max_pixels=51744",
                       "task.min_pixels=28224", "rollout.max_tokens=384", f"train.out={fresh('skyrl_seen')}", *at, fails=True)
        print(f"skyrl, rows with pictures: {said.strip().splitlines()[-1]}")
        if "drops pictures" not in said:
            sys.exit("skyrl: a server that drops pictures was not found out")


def chat(port, model):
    return ["engine.kind=openai", f'engine.urls=["http://127.0.0.1:{port}/v1"]', f"engine.model={model}", "engine.max_in_flight=4"]


def served():
    port = 8124
    command = [ENVS / "served" / "bin" / "transformers", "serve", NANO, "--device", "cpu", "--dtype", "float32",
               "--host", "127.0.0.1", "--port", port]
    with Server("served", command, port, "/health", {}):
        same("transformers serve", evaluated("here"), evaluated("served", *chat(port, NANO)))


def vllm():
    env, port = ENVS / "vllm", 8125
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1",
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "OMP_NUM_THREADS": str(os.cpu_count())}
    # Without chunks of prompts: where there are any, its CPU sampler fails on requests that have a seed.
    command = [env / "bin" / "vllm", "serve", NANO, "--served-model-name", "nano", "--dtype", "float32", "--max-model-len", 2048,
               "--enable-scale-out", "--enforce-eager", "--max-num-seqs", 64, "--no-enable-chunked-prefill",
               "--max-num-batched-tokens", 8192, "--enable-lora", "--max-lora-rank", 16, "--max-loras", 2,
               "--host", "127.0.0.1", "--port", port]
    with Server("vllm", command, port, "/v1/models", settings):
        ours = evaluated("here")
        same("vLLM, chat", ours, evaluated("vllm_chat", *chat(port, "nano")))
        at = ["engine.kind=vllm", f'engine.urls=["http://127.0.0.1:{port}/v1"]', "engine.model=nano", "engine.max_in_flight=64"]
        theirs = evaluated("vllm", *at)
        same("vLLM, token ids", ours, theirs)
        apart = max(abs(a - b) for key in ours for a, b, sampled in
                    zip(ours[key]["logprobs"], theirs[key]["logprobs"], ours[key]["sampled"]) if sampled)
        print(f"vLLM, token ids: log-probs at most {apart:.1e} nats from ours")
        out = fresh("vllm_rl")
        foveate("rl", "configs/demo_mgpo.toml", f"data.train={plates() / 'train.jsonl'}", f"train.out={out}", "train.steps=6",
                "train.prompts=8", "model.lora.rank=8", "model.lora.alpha=16", "optim.lr=5e-3", "optim.warmup=0",
                f"engine.adapters={fresh('adapters')}", *at)
        rows = metrics(out)
        apart = max(row["mismatch_logprob/max"] for row in rows)
        print(f"vLLM, rl: {len(rows)} versions of the adapters; sampler and trainer at most {apart:.1e} nats apart, "
              f"{mean(rows, 'timing_s/gen'):.1f} s a step for samples, {mean(rows, 'timing_s/update_actor'):.1f} s for the update")
        if apart > 0.02:
            sys.exit("vllm: the servers did not sample from the adapters as they stood")


if __name__ == "__main__":
    WORK.mkdir(parents=True, exist_ok=True)
    for part in sys.argv[1:] or ["skyrl", "served", "vllm"]:
        {"skyrl": skyrl, "served": served, "vllm": vllm}[part]()
