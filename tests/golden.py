"""Record what transformers computes, for tests that run without it: write tests/golden.json.

    python tests/golden.py [--smollm2 DIR]

This needs transformers, whose version is written into the file. Weights are not stored: `fill`
makes them from the name of each tensor, here and in the tests alike. With --smollm2, a folder that
holds the pretrained SmolLM2-135M-Instruct, its logits and one chat are recorded as well. The tests
look for that folder in the environment variable SOCIALR1_SMOLLM2.
"""

import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).with_name("golden.json")
SIZES = {
    "vocab_size": 50,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
QWEN = SIZES | {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
LLAMA = SIZES | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def config(base: dict, heads: tuple[int, int], tied: bool, **others) -> dict:
    """Return a config.json with so many heads of queries and of keys; `others` stand at its end."""
    queries, keys = heads
    counts = {"num_attention_heads": queries, "num_key_value_heads": keys}
    return base | counts | {"tie_word_embeddings": tied} | others


DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e6}
LLAMA32_ROPE = LLAMA3 | {"rope_theta": 5e5, "factor": 32.0}
CONFIGS = {
    "qwen3 tied, 4 heads of 16": config(
        QWEN, (4, 4), tied=True, head_dim=16, rope_theta=1e6, rope_scaling=None
    ),
    "qwen3 untied, 2 queries a key": config(
        QWEN, (4, 2), tied=False, head_dim=8, rope_parameters=DEFAULT_ROPE
    ),
    "qwen3 untied, 4 queries a key": config(
        QWEN, (8, 2), tied=False, head_dim=8, rope_theta=10000.0
    ),
    "qwen3 tied, 8 queries a key": config(QWEN, (8, 1), tied=True, head_dim=32, rope_theta=5e6),
    "llama untied, no head_dim": config(LLAMA, (6, 3), tied=False, rope_theta=10000.0),
    "llama 3.1, rope_scaling": config(
        LLAMA, (4, 2), tied=False, head_dim=16, rope_theta=5e5, rope_scaling=LLAMA3
    ),
    "llama 3.2, rope_parameters": config(
        LLAMA, (4, 1), tied=True, head_dim=16, rope_parameters=LLAMA32_ROPE
    ),
}
# More tokens than the original context of llama3 above, so that its scaling matters.
TOKENS = [(7 * i * i + 3 * i) % 50 for i in range(150)]
POSITIONS = [0, 70, 149]
CHAT = [
    {"role": "system", "content": "Think first."},
    {"role": "user", "content": "Où est la clé, 小红? <|im_end|>"},
]


def fill(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Make the weights of the tensor `name` of a checkpoint: norms around 1, others around 0."""
    key = zlib.crc32(name.encode())
    numbers = np.random.Generator(np.random.Philox(key=key)).random(shape)
    centre = 1 if "norm" in name else 0
    return torch.from_numpy(numbers - 0.5 + centre).float()


def rounded(numbers: torch.Tensor) -> list[float]:
    """Return the numbers with seven significant digits."""
    return [float(f"{number:.7g}") for number in numbers.tolist()]


@torch.no_grad()
def record_config(raw: dict) -> tuple[list[list[float]], float]:
    """Return a filled model's logits at POSITIONS, and bfloat16's largest error beside them."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**raw), dtype=torch.float32
    ).eval()
    for name, parameter in model.named_parameters():
        parameter.copy_(fill(name, tuple(parameter.shape)))
    tokens = torch.tensor([TOKENS])
    logits = model(tokens).logits[0]
    coarse = model.bfloat16()(tokens).logits[0].float()
    error = (coarse - logits).abs().max() / logits.abs().max()
    return [rounded(row) for row in logits[POSITIONS]], round(float(error), 5)


@torch.no_grad()
def record_smollm2(folder: Path) -> dict:
    """Return the ids of CHAT as a prompt, every 500th logit of the next token and the largest."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template(
        CHAT, tokenize=True, add_generation_prompt=True, return_dict=False
    )
    logits = model(torch.tensor([ids])).logits[0, -1]
    return {"ids": ids, "logits": rounded(logits[::500]), "largest": float(logits.abs().max())}


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M-Instruct")
    args = parser.parse_args()
    recorded = {
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "logits": {},
        "bf16_error": {},
    }
    for label, raw in CONFIGS.items():
        recorded["logits"][label], recorded["bf16_error"][label] = record_config(raw)
    if args.smollm2:
        recorded["smollm2"] = record_smollm2(args.smollm2)
    FILE.write_text(json.dumps(recorded) + "\n", encoding="utf-8")
    size = FILE.stat().st_size / 1000
    print(f"wrote {FILE}, {size:.0f} kB, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
