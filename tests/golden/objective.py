"""Writes objective.json: advantages, losses and gradients by verl, to hold src/objective against.

    pip download --no-deps verl==0.9.1 && unzip verl-0.9.1-py3-none-any.whl -d verl-wheel
    python objective.py verl-wheel > objective.json        # needs torch and numpy only

verl's core_algos.py is loaded with its configuration and device modules replaced by empty ones: the functions used
here are plain tensor arithmetic. Everything is computed in f64 from inputs that f32 holds exactly.
"""

import importlib.util
import json
import sys
import types

import numpy as np
import torch

root = sys.argv[1]


class Anything:
    def __init__(self, *args, **kwargs):
        pass


def stub(name, **names):
    module = types.ModuleType(name)
    module.__path__ = []
    for key, value in names.items():
        setattr(module, key, value)
    sys.modules[name] = module
    return module


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, f"{root}/{path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class ActorConfig(dict):
    """The few settings the losses read, as attributes and by get."""

    clip_ratio = 0.2
    clip_ratio_low = 0.2
    clip_ratio_high = 0.28
    global_batch_info = {}

    def __init__(self, **settings):
        super().__init__(settings)
        self.__dict__.update(settings)


stub("omegaconf", DictConfig=dict)
stub("tensordict", TensorDict=dict)
if importlib.util.find_spec("transformers") is None:
    stub("transformers", PreTrainedTokenizer=Anything)
stub("verl")
stub("verl.utils", as_torch_index=None, group_mean_std=None)
stub("verl.utils.device", get_device_name=lambda: "cpu", get_torch_device=lambda: torch)
stub("verl.utils.import_utils", deprecated=lambda *args: lambda f: f)
stub("verl.trainer")
stub("verl.trainer.config", AlgoConfig=type("AlgoConfig", (), {}))
stub("verl.workers")
stub("verl.workers.config", ActorConfig=ActorConfig)
sys.modules["verl.utils"].torch_functional = load("verl.utils.torch_functional", "verl/utils/torch_functional.py")
core = load("core_algos", "verl/trainer/ppo/core_algos.py")

torch.manual_seed(5)
torch.set_default_dtype(torch.float64)
lengths = [5, 3, 4, 2, 5, 1]
groups = [0, 0, 0, 1, 1, 1]
rewards = [1.0, 0.0, 0.25, 0.5, 1.0, -0.5]
B, T = len(lengths), max(lengths)
mask = torch.tensor([[float(t < n) for t in range(T)] for n in lengths])


def near(x, scale):
    """x moved by noise and rounded to 1/64, which f32 holds exactly."""
    return ((x + scale * torch.randn(B, T)) * 64).round() / 64


old = -(near(torch.full((B, T), 1.5), 0.75).abs() + 0.25)
new = near(old, 0.35)
new[0] = old[0]  # as before the first update
new[1, 1] = old[1, 1] + 1.5  # above the dual clip where the advantage is negative
reference = near(old, 0.4)
sampler = near(old, 0.5)


def rows(x):
    return [x[i, :n].tolist() for i, n in enumerate(lengths)]


out = {
    "source": "verl 0.9.1, verl/trainer/ppo/core_algos.py",
    "groups": groups,
    "rewards": rewards,
    "new": rows(new),
    "old": rows(old),
    "reference": rows(reference),
    "sampler": rows(sampler),
    "advantages": {},
    "losses": {},
    "kl": {},
}

# Outcome rewards stand on the last token.
token_rewards = torch.zeros(B, T)
for i, n in enumerate(lengths):
    token_rewards[i, n - 1] = rewards[i]
index = np.array(groups)
penalised = token_rewards - 0.1 * core.kl_penalty(old, reference, "k1") * mask
gamma = types.SimpleNamespace(gamma=1.0)
group = core.compute_grpo_outcome_advantage
plus = core.compute_reinforce_plus_plus_outcome_advantage
baseline = core.compute_reinforce_plus_plus_baseline_outcome_advantage
for name, a in {
    "group_std": group(token_rewards, mask, index)[0],
    "group_mean": group(token_rewards, mask, index, norm_adv_by_std_in_grpo=False)[0],
    "rloo": core.compute_rloo_outcome_advantage(token_rewards, mask, index)[0],
    "batch_norm": plus(token_rewards, mask, config=gamma)[0],
    "batch_norm_after_group_mean": baseline(token_rewards, mask, index)[0],
    "group_std, kl in reward": group(penalised, mask, index)[0],
    "batch_norm, kl in reward": plus(penalised, mask, config=gamma)[0],
}.items():
    out["advantages"][name] = rows(a)

advantages = torch.tensor([[row[0]] * T for row in out["advantages"]["group_std"]])
weights = torch.exp(old - sampler).clamp(max=2.0)


def record(name, loss):
    x = new.clone().requires_grad_()
    value, metrics = loss(x)
    value.backward()
    out["losses"][name] = {"loss": value.item(), "gradient": rows(x.grad), **metrics}


vanilla, gspo, cispo = (core.POLICY_LOSS_REGISTRY[k] for k in ("vanilla", "gspo", "cispo"))
dual = ActorConfig(clip_ratio_c=3.0)
tight = ActorConfig(clip_ratio=0.1, clip_ratio_low=0.1, clip_ratio_high=0.15)
capped = ActorConfig(clip_ratio=1.0, clip_ratio_low=1.0, clip_ratio_high=0.25)
for mode in ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]:
    record(f"clip {mode}", lambda x: vanilla(old, x, advantages, mask, mode, dual))
record("clip truncated", lambda x: vanilla(old, x, advantages, mask, "token-mean", dual, weights))
record("gspo", lambda x: gspo(old, x, advantages, mask, "seq-mean-token-mean", tight))
record("cispo", lambda x: cispo(old, x, advantages, mask, "token-mean", capped))
for kind in ["k1", "k2", "k3", "k3+"]:
    x = new.clone().requires_grad_()
    value = core.agg_loss(core.kl_penalty(x, reference, kind), mask, "token-mean")
    value.backward()
    out["kl"][kind] = {"loss": value.item(), "gradient": rows(x.grad)}


def short(x):
    """Ten significant digits: beyond the f32 of the gradients they are held against."""
    if isinstance(x, float):
        return float(f"{x:.10g}")
    if isinstance(x, list):
        return [short(v) for v in x]
    return {k: short(v) for k, v in x.items()} if isinstance(x, dict) else x


lines = [f"{json.dumps(k)}: {json.dumps(short(v))}" for k, v in out.items()]
print("{\n" + ",\n".join(lines) + "\n}")
