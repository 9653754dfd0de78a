"""The forward pass, the cache and the checkpoints, on a random Qwen3-shaped model (transformers, where installed, as the judge)."""
import json

import pytest
import tokenizers
import torch

from model import ModelConfig, Tokenizer, Transformer, choose, completion_logprobs, generate, load_model, save_model

RAW = dict(
    model_type="qwen3", architectures=["Qwen3ForCausalLM"], vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, head_dim=16, rope_theta=10000.0, rms_norm_eps=1e-6, hidden_act="silu",
    tie_word_embeddings=False, max_position_embeddings=64,
)  # fmt: skip
PROMPTS = [[5, 9, 2], [7, 7, 3, 11, 30, 8], [1]]


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    model = Transformer(ModelConfig.from_json(RAW))
    for name, p in model.named_parameters():  # norms away from 1 and logits far apart, so that mistakes show
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


def test_greedy_decoding_with_the_cache_is_argmax_of_the_full_forward(tiny):
    for prompt, group in zip(PROMPTS, generate(tiny, PROMPTS, max_new_tokens=12, temperature=0)):
        tokens = list(prompt)
        for token in group[0].tokens:
            assert token == tiny(torch.tensor([tokens]))[0, -1].argmax().item()
            tokens.append(token)
        assert len(tokens) == len(prompt) + 12


def test_sampler_logprobs_are_the_trainers_and_those_of_the_plain_forward(tiny):
    groups = generate(tiny, PROMPTS, group_size=3, max_new_tokens=9, stop_ids=(4, 17, 23), seed=3)
    rows = [[c.tokens for c in group] for group in groups]
    logprobs, mask = completion_logprobs(tiny, PROMPTS, rows)
    assert len({len(row) for group in rows for row in group}) > 1  # some stopped early: the mask is really used
    flat = [(p, c) for p, group in zip(PROMPTS, groups) for c in group]
    for i, (prompt, completion) in enumerate(flat):
        n = len(completion.tokens)
        assert mask[i].tolist() == [True] * n + [False] * (mask.shape[1] - n)
        torch.testing.assert_close(logprobs[i, :n], torch.tensor(completion.logprobs), atol=1e-5, rtol=0)
        plain = tiny(torch.tensor([prompt + completion.tokens])).log_softmax(-1)[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(logprobs[i, :n], plain[range(n), completion.tokens], atol=1e-5, rtol=0)


def test_gradients_through_the_shared_prompt_are_those_of_the_plain_forward(tiny):
    rows = [[[3, 4], [8, 1, 6]], [[2], [9, 9]]]
    logprobs, mask = completion_logprobs(tiny, PROMPTS[:2], rows)
    shared = torch.autograd.grad(logprobs[mask].sum(), list(tiny.parameters()))
    total = 0.0
    for prompt, group in zip(PROMPTS, rows):
        for row in group:
            plain = tiny(torch.tensor([prompt + row])).log_softmax(-1)[0, len(prompt) - 1 : -1]
            total = total + plain[range(len(row)), row].sum()
    for ours, theirs in zip(shared, torch.autograd.grad(total, list(tiny.parameters()))):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_a_completion_does_not_depend_on_the_batch(tiny):
    together = generate(tiny, PROMPTS, group_size=2, max_new_tokens=8, seed=5)
    alone = generate(tiny, PROMPTS[1:2], group_size=2, max_new_tokens=8, seed=5)
    assert [c.tokens for c in together[1]] == [c.tokens for c in alone[0]]
    assert [c.tokens for c in generate(tiny, PROMPTS[1:2], 2, 8, seed=6)[0]] != [c.tokens for c in alone[0]]


def test_choose_follows_the_distribution():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4, 1)
    u = torch.tensor([0.49, 0.51, 0.81, 0.96], dtype=torch.double)
    assert choose(logits, u, 1.0, 1.0, 0).tolist() == [0, 1, 2, 3]
    assert choose(logits, u, 1.0, 1.0, 2).tolist() == [0, 0, 1, 1]  # renormalised over two: the edge is at 0.625
    assert choose(logits, u, 1.0, 0.9, 0).tolist() == [0, 0, 1, 2]  # over three: edges at 0.526 and 0.842
    assert choose(logits, u, 0.0, 1.0, 0).tolist() == [0, 0, 0, 0]


def test_saved_folder_loads_with_the_same_logits(tiny, tmp_path):
    save_model(tiny, tmp_path / "model")
    save_model(tiny, tmp_path / "model")  # replaces, and leaves nothing else behind
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    tokens = torch.tensor([PROMPTS[1]])
    assert torch.equal(load_model(tmp_path / "model")(tokens), tiny(tokens))


def test_transformers_computes_the_same_logits(tiny, tmp_path):
    transformers = pytest.importorskip("transformers")
    save_model(tiny, tmp_path / "model")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).eval()
    tokens = torch.tensor([PROMPTS[1]])
    torch.testing.assert_close(tiny(tokens), theirs(tokens).logits, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match="no such model folder"):
        load_model(tmp_path / "none")
    save_model(tiny, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    for change, message in [
        (dict(hidden_size=16), "has shape"),
        (dict(num_hidden_layers=4), "missing"),
        (dict(num_hidden_layers=2), "has no place"),
        (dict(hidden_size=None), "no positive whole number for hidden_size"),
        (dict(model_type="mamba"), "'mamba' is not supported"),
        (dict(use_sliding_window=True), "use_sliding_window"),
        (dict(rope_scaling={"rope_type": "yarn"}), "'yarn' is not supported"),
    ]:
        config.write_text(json.dumps(RAW | change))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path / "model")
    config.write_text(json.dumps(RAW))
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="not a safetensors file"):
        load_model(tmp_path / "model")
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        generate(tiny, [[1], []], max_new_tokens=4)
    with pytest.raises(ValueError, match="the model's context 64"):
        generate(tiny, [[1]], max_new_tokens=64)


TEMPLATE = (
    "{%- for m in messages %}{{ '<s>' + m.role + ': ' + m.content + '</s>' }}\n{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<s>assistant:' }}{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)


def tokenizer_folder(path, template=TEMPLATE, **generation):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(special_tokens=["<pad>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["user assistant"], trainer)
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    settings = {"eos_token": {"content": "</s>"}, "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_chat_renders_the_template_and_decode_drops_special_tokens(tmp_path):
    tokenizer = Tokenizer(tokenizer_folder(tmp_path, eos_token_id=[2, 7], max_new_tokens=33))
    messages = [{"role": "user", "content": "Hé 漢?"}]
    assert tokenizer.render(messages) == "<s>user: Hé 漢?</s>\n<s>assistant:<think>\n"
    assert tokenizer.render(messages, thinking=False) == "<s>user: Hé 漢?</s>\n<s>assistant:"
    assert tokenizer.decode(tokenizer.chat(messages)) == "user: Hé 漢?\nassistant:<think>\n"
    assert tokenizer.think_prefix() == "<think>" and tokenizer.think_prefix(thinking=False) == "" and tokenizer.stop_ids == (2, 7) and tokenizer.max_new_tokens == 33
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")  # a file of its own wins
    assert Tokenizer(tmp_path).render(messages) == "Hé 漢?" and Tokenizer(tmp_path).think_prefix() == ""


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('no system') }}", "chat template failed: no system"),
        ("{{ ''.__class__.__mro__ }}", "chat template failed"),  # the sandbox holds
        ("{% if %}", "chat template failed"),
        ("{{ 1/0 }}", "chat template failed"),
        (None, "no chat template"),
    ],
)
def test_templates_that_fail_say_so(tmp_path, template, message):
    tokenizer = Tokenizer(tokenizer_folder(tmp_path, template))
    with pytest.raises(ValueError, match=message):
        tokenizer.chat([{"role": "user", "content": "x"}])
    with pytest.raises(ValueError, match="tokenizer.json: no such file"):
        Tokenizer(tmp_path / "none")
