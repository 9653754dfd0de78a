"""Logits and chats of the public reference, for tests that run without it: writes tests/golden.json.

    python tests/golden.py [--smollm2 DIR]        # needs transformers; the version goes into the file

Weights are not stored but made by `fill` from each tensor's name, here and in the tests alike. With --smollm2, a folder written by a
pretrained SmolLM2-135M-Instruct, its logits and one chat are recorded too (tests read that folder from SOCIALR1_SMOLLM2).
"""
import argparse
import json
import zlib
from pathlib import Path

import numpy as np
import torch

FILE = Path(__file__).with_name("golden.json")
SIZES = dict(vocab_size=50, hidden_size=48, intermediate_size=80, num_hidden_layers=2, max_position_embeddings=512, rms_norm_eps=1e-5, hidden_act="silu")
QWEN = SIZES | dict(model_type="qwen3", architectures=["Qwen3ForCausalLM"])
LLAMA = SIZES | dict(model_type="llama", architectures=["LlamaForCausalLM"])
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
CONFIGS = {
    "qwen3 tied, 4 heads of 16": QWEN | dict(num_attention_heads=4, num_key_value_heads=4, head_dim=16, tie_word_embeddings=True, rope_theta=1e6, rope_scaling=None),
    "qwen3 untied, 2 queries a key": QWEN | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, rope_parameters=dict(rope_type="default", rope_theta=1e6)),
    "qwen3 untied, 4 queries a key": QWEN | dict(num_attention_heads=8, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False, rope_theta=10000.0),
    "qwen3 tied, 8 queries a key": QWEN | dict(num_attention_heads=8, num_key_value_heads=1, head_dim=32, tie_word_embeddings=True, rope_theta=5e6),
    "llama untied, no head_dim": LLAMA | dict(num_attention_heads=6, num_key_value_heads=3, tie_word_embeddings=False, rope_theta=10000.0),
    "llama 3.1, rope_scaling": LLAMA | dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, tie_word_embeddings=False, rope_theta=5e5, rope_scaling=LLAMA3),
    "llama 3.2, rope_parameters": LLAMA | dict(num_attention_heads=4, num_key_value_heads=1, head_dim=16, tie_word_embeddings=True, rope_parameters=LLAMA3 | dict(rope_theta=5e5, factor=32.0)),
}  # fmt: skip
TOKENS = [(7 * i * i + 3 * i) % 50 for i in range(150)]  # more than llama3's original context above
POSITIONS = [0, 70, 149]
CHAT = [{"role": "system", "content": "Think first."}, {"role": "user", "content": "Où est la clé, 小红? <|im_end|>"}]


def fill(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Weights that depend on the tensor's name in a checkpoint only; norms around 1, the others around 0."""
    numbers = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode()))).random(shape)
    return torch.from_numpy(numbers - 0.5 + ("norm" in name)).float()


def main() -> None:
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path)
    args = parser.parse_args()
    out = {"transformers": transformers.__version__, "torch": torch.__version__, "logits": {}, "bf16_error": {}}
    tokens = torch.tensor([TOKENS])
    for label, raw in CONFIGS.items():
        model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**raw), dtype=torch.float32).eval()
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.copy_(fill(name, tuple(p.shape)))
            logits = model(tokens).logits[0]
            coarse = model.bfloat16()(tokens).logits[0].float()
        out["logits"][label] = [[float(f"{x:.7g}") for x in row] for row in logits[POSITIONS].tolist()]
        out["bf16_error"][label] = round(float((coarse - logits).abs().max() / logits.abs().max()), 5)
    if args.smollm2:
        model = transformers.AutoModelForCausalLM.from_pretrained(args.smollm2, dtype=torch.float32).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.smollm2)
        ids = tokenizer.apply_chat_template(CHAT, tokenize=True, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        out["smollm2"] = {"ids": ids, "logits": [float(f"{x:.7g}") for x in logits[::500].tolist()], "largest": float(logits.abs().max())}
    FILE.write_text(json.dumps(out) + "\n", encoding="utf-8")
    print(f"wrote {FILE}, {FILE.stat().st_size / 1000:.0f} kB, transformers {out['transformers']}")


if __name__ == "__main__":
    main()
