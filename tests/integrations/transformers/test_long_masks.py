"""32,768 tokens: masks must reach the kernels as structure, since a dense one is a gigabyte."""

import subprocess
import sys

import pytest

RUN = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from entropy_regularization import record_entropy

kind, n = sys.argv[1], 32768
sizes = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
sizes |= {"num_attention_heads": 1, "num_key_value_heads": 1, "max_position_embeddings": n}
model = MistralForCausalLM(MistralConfig(**sizes, sliding_window=64)) if kind == "sliding" else None
model = (model or LlamaForCausalLM(LlamaConfig(**sizes, use_cache=False))).train()
ids = torch.randint(0, 16, (1, n))
options = {}
if kind == "padded":
    options["attention_mask"] = torch.ones(1, n, dtype=torch.int64)
    options["attention_mask"][:, -100:] = 0
    options["attention_mask"][:, :30000] = 0
if kind == "packed":
    options["position_ids"] = (torch.arange(n) % 128)[None]

def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) // 1024

with record_entropy(model) as recording:
    model.model(ids[:, :256], use_cache=False)
before = resident("VmRSS")
with record_entropy(model) as recording:
    hidden = model.model(ids, use_cache=False, **options).last_hidden_state
(hidden.sum() + recording[0].entropy.sum()).backward()
print(resident("VmHWM") - before, recording[0].allowed_keys.max().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("kind", "most_keys"), [("sliding", 64), ("packed", 128), ("padded", 2668), ("causal", 32768)]
)
def test_no_dense_mask_is_made(kind: str, most_keys: int) -> None:
    found = subprocess.run(
        [sys.executable, "-c", RUN, kind], check=True, capture_output=True, text=True
    )
    megabytes, keys = map(int, found.stdout.split())
    assert keys == most_keys
    # A boolean [n, n] would take 1024 MB, an additive one 4096.
    assert megabytes < 300
