"""The Python side of `foveate bench train` and `foveate bench speak`: a plain decoder of random weights in PyTorch.

  python peer_words.py train                 one training step, transformers' model
  python peer_words.py speak --how generate  sampling with transformers' generate
  python peer_words.py speak --how loop      sampling with a hand-written loop over a static cache
Prints one JSON object with the fields of foveate's. Needs: torch, transformers.
"""
import argparse, json, os, resource, statistics, time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

ap = argparse.ArgumentParser()
ap.add_argument("what", choices=["train", "speak"])
ap.add_argument("--how", default="generate", choices=["generate", "loop"])
for name, value in dict(layers=8, hidden=256, heads=4, kv_heads=4, mlp=768, vocab=4096, batch=8, steps=3, warmup=1,
                        tokens=512, prompt=128, new_tokens=64, threads=os.cpu_count()).items():
    ap.add_argument("--" + name.replace("_", "-"), type=int, default=value)
ap.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="bfloat16: autocast")
a = ap.parse_args()
torch.manual_seed(0)
torch.set_num_threads(a.threads)
config = Qwen2Config(vocab_size=a.vocab, hidden_size=a.hidden, intermediate_size=a.mlp, num_hidden_layers=a.layers,
                     num_attention_heads=a.heads, num_key_value_heads=a.kv_heads, tie_word_embeddings=True,
                     eos_token_id=None, bos_token_id=None, pad_token_id=0)
model = Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa")
cast = torch.autocast("cpu", dtype=torch.bfloat16, enabled=a.dtype == "bfloat16")


def train():
    opt = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
    ids = torch.randint(0, a.vocab - 16, (a.batch, a.tokens))
    model.train()

    def step():
        with cast:
            logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].reshape(-1, a.vocab).float(), ids[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()
        return loss.item()
    return step, dict(tokens=a.tokens)


def rotate(x):
    low, high = x.chunk(2, -1)
    return torch.cat((-high, low), -1)


def loop(ids):
    """Every layer by hand on the model's own weights, one cache for all, written in place."""
    b, n = ids.shape
    k = a.hidden // a.heads
    total = n + a.new_tokens
    inv = 1.0 / (config.rope_parameters["rope_theta"] ** (torch.arange(0, k, 2).float() / k))
    angle = torch.outer(torch.arange(total).float(), inv)
    cos, sin = torch.cat((angle, angle), -1).cos(), torch.cat((angle, angle), -1).sin()
    cache = [(torch.empty(b, a.kv_heads, total, k), torch.empty(b, a.kv_heads, total, k)) for _ in range(a.layers)]
    new, at = ids, 0
    for _ in range(a.new_tokens):
        t = new.shape[1]
        x = model.model.embed_tokens(new)
        c, s = cos[at:at + t], sin[at:at + t]
        for layer, (keys, values) in zip(model.model.layers, cache):
            att = layer.self_attn
            h = layer.input_layernorm(x)
            q = att.q_proj(h).view(b, t, a.heads, k).transpose(1, 2)
            key = att.k_proj(h).view(b, t, a.kv_heads, k).transpose(1, 2)
            value = att.v_proj(h).view(b, t, a.kv_heads, k).transpose(1, 2)
            q, key = q * c + rotate(q) * s, key * c + rotate(key) * s
            keys[:, :, at:at + t], values[:, :, at:at + t] = key, value
            o = F.scaled_dot_product_attention(q, keys[:, :, :at + t], values[:, :, :at + t], is_causal=t > 1,
                                               enable_gqa=a.heads != a.kv_heads)
            x = x + att.o_proj(o.transpose(1, 2).reshape(b, t, a.hidden))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        at += t
        logits = model.lm_head(model.model.norm(x[:, -1]))
        new = torch.multinomial(logits.softmax(-1), 1)


def speak():
    ids = torch.randint(0, a.vocab - 16, (a.batch, a.prompt))
    mask = torch.ones_like(ids)
    model.eval()

    def step():
        with torch.no_grad(), cast:
            if a.how == "loop":
                loop(ids)
            else:
                model.generate(input_ids=ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
                               min_new_tokens=a.new_tokens, max_new_tokens=a.new_tokens)
    return step, dict(prompt=a.prompt, new_tokens=a.new_tokens)


step, fields = train() if a.what == "train" else speak()
times, loss = [], None
for i in range(a.warmup + a.steps):
    t0 = time.perf_counter()
    loss = step()
    if i >= a.warmup:
        times.append(time.perf_counter() - t0)
print(json.dumps({"impl": f"torch {a.how}" if a.what == "speak" else "torch", "dtype": a.dtype, "threads": a.threads,
                  "params": sum(p.numel() for p in model.parameters()), "batch": a.batch, **fields, "loss": loss,
                  "seconds": round(statistics.median(times), 4),
                  "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}))
