"""The forward pass, checkpoints, tokenizer and chat, against values that transformers computed (golden.json, made by golden.py)."""

import importlib.util
import json
import os
import shutil
from pathlib import Path

import golden
import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file

import model as module
from model import Tokenizer, Transformer, load_model, parse_config, rotary_frequencies, save_model

RECORDED = json.loads(golden.FILE.read_text(encoding="utf-8"))
RAW = golden.CONFIGS["qwen3 untied, 2 queries a key"]
TIED = golden.CONFIGS["qwen3 tied, 4 heads of 16"]


def stored(name):
    return name if name == "lm_head.weight" else f"model.{name}"


def filled(raw):
    model = Transformer(parse_config(raw))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(golden.fill(stored(name), tuple(p.shape)))
    return model


def relative_error(ours, theirs):
    return float(((ours.float() - theirs).abs().max() / theirs.abs().max()).detach())


# --------------------------------------------------------------------------------------------------------------------------- parity


@pytest.mark.parametrize("label", golden.CONFIGS)
def test_logits_are_those_of_transformers(label):
    logits = filled(golden.CONFIGS[label])(torch.tensor([golden.TOKENS]))[0, golden.POSITIONS]
    assert relative_error(logits, torch.tensor(RECORDED["logits"][label])) < 1e-4


@pytest.mark.parametrize("label", golden.CONFIGS)
def test_bf16_is_no_further_off_than_in_transformers(label):
    logits = filled(golden.CONFIGS[label]).bfloat16()(torch.tensor([golden.TOKENS]))[
        0, golden.POSITIONS
    ]
    assert logits.dtype == torch.bfloat16
    assert (
        relative_error(logits, torch.tensor(RECORDED["logits"][label]))
        < 1.5 * RECORDED["bf16_error"][label]
    )


def test_norms_and_rotation_tables_are_computed_in_fp32():
    model = filled(RAW).bfloat16()
    assert (
        torch.equal(model.frequencies, rotary_frequencies(model.config))
        and model.frequencies.dtype == torch.float32
    )
    x = (torch.arange(48) - 20.3).bfloat16()
    exact = x.double() / (x.double().square().mean() + 1e-5).sqrt() * model.norm.weight.double()
    assert torch.equal(model.norm(x), exact.bfloat16())  # rounded once, at the end


def test_llama3_scaling_of_frequencies_by_hand():
    # theta 10000, head_dim 4: frequencies 1 and 0.01. Original context 64 * pi: 32 turns of the first (kept), 0.32 of the second (/ 8)
    scaling = golden.LLAMA3 | dict(original_max_position_embeddings=201)
    raw = golden.LLAMA | dict(num_attention_heads=4, head_dim=4, rope_scaling=scaling)
    torch.testing.assert_close(rotary_frequencies(parse_config(raw)), torch.tensor([1.0, 0.01 / 8]))
    # original context 1600: 1600 * 0.01 / 2 pi = 2.546 turns, (2.546 - 1) / (4 - 1) = 0.5155 of it kept, the rest / 8
    raw["rope_scaling"] = scaling | dict(original_max_position_embeddings=1600)
    torch.testing.assert_close(
        rotary_frequencies(parse_config(raw)),
        torch.tensor([1.0, 0.005155 + 0.004845 / 8]),
        atol=1e-6,
        rtol=0,
    )


SMOLLM2 = os.environ.get("SOCIALR1_SMOLLM2")


@pytest.mark.skipif(
    not SMOLLM2, reason="SOCIALR1_SMOLLM2 names no folder with SmolLM2-135M-Instruct"
)
def test_smollm2_has_the_logits_and_the_chat_of_transformers():
    recorded = RECORDED["smollm2"]
    assert Tokenizer(SMOLLM2).chat(golden.CHAT) == recorded["ids"]
    with torch.no_grad():
        logits = load_model(SMOLLM2)(torch.tensor([recorded["ids"]]))[0, -1, ::500]
    assert (
        float((logits - torch.tensor(recorded["logits"])).abs().max()) < 1e-4 * recorded["largest"]
    )


@pytest.mark.parametrize("label", golden.CONFIGS)
def test_checkpoints_go_to_transformers_and_back(label, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokens = torch.tensor([golden.TOKENS])
    ours = filled(golden.CONFIGS[label])
    save_model(ours, tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        assert relative_error(ours(tokens), theirs(tokens).logits) < 1e-4
        theirs.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
        assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
        assert torch.equal(load_model(tmp_path / "theirs")(tokens), ours(tokens))


# --------------------------------------------------------------------------------------------------------------------------- config


def test_config_is_read_as_transformers_does_where_it_is_silent():
    short = dict(
        vocab_size=9,
        hidden_size=64,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=32,
    )
    qwen = parse_config(short | dict(model_type="qwen3"))
    assert (
        qwen.head_dim,
        qwen.num_key_value_heads,
        qwen.max_position_embeddings,
        qwen.rope_theta,
        qwen.rms_norm_eps,
        qwen.tie_word_embeddings,
    ) == (128, 32, 32768, 1e4, 1e-6, False)
    llama = parse_config(short | dict(model_type="llama"))
    assert (
        llama.head_dim,
        llama.num_key_value_heads,
        llama.max_position_embeddings,
        llama.rope_theta,
        llama.rms_norm_eps,
        llama.tie_word_embeddings,
    ) == (2, 32, 2048, 1e4, 1e-6, False)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            dict(model_type="qwen3_moe"),
            r"model_type = 'qwen3_moe', not supported; expected \('qwen3', 'llama'\)",
        ),
        (dict(model_type=None), "model_type = None, not supported"),
        (dict(model_type=["qwen3"]), "not supported"),
        (dict(tie_word_embeddings="no"), "tie_word_embeddings = 'no'"),
        (
            dict(layer_types="sliding_attention"),
            "layer_types = .*'sliding_attention'.*, not supported",
        ),
        (
            dict(rope_parameters={"full_attention": {"rope_theta": 1e4}}),
            "expected one object for all layers",
        ),
        (
            dict(rope_parameters={"rope_theta": 10**400}),
            "rope_theta = 10{400}; expected float above 0",
        ),
        (dict(vocab_size=10**30), "vocab_size = 10{30}; expected"),
        (
            dict(rope_scaling=golden.LLAMA3 | dict(low_freq_factor=4.0)),
            "expected high_freq_factor above low_freq_factor",
        ),
        (dict(use_sliding_window=True), "use_sliding_window = True"),
        (
            dict(layer_types=["full_attention", "sliding_attention"]),
            "layer_types = .*'sliding_attention'.*, not supported",
        ),
        (dict(attention_bias=True), "attention_bias = True"),
        (dict(mlp_bias=True), "mlp_bias = True"),
        (dict(hidden_act="gelu"), "hidden_act = 'gelu'"),
        (dict(hidden_act=None), "hidden_act = None, not supported"),
        (dict(is_causal=False), "is_causal = False, not supported"),
        (dict(num_experts=8), "num_experts = 8"),
        (dict(quantization_config={"bits": 4}), "quantization_config = {'bits': 4}"),
        (dict(partial_rotary_factor=0.5), "partial_rotary_factor = 0.5"),
        (
            dict(rope_scaling={"rope_type": "yarn", "factor": 4.0}),
            "rope_type = 'yarn', not supported",
        ),
        (
            dict(rope_scaling={"type": "linear", "factor": 4.0}),
            "rope_type = 'linear', not supported",
        ),
        (dict(rope_scaling={"rope_type": "llama3", "factor": 8.0}), "low_freq_factor = None"),
        (dict(rope_scaling="yarn"), "rope settings 'yarn'"),
        (dict(rope_parameters={"rope_theta": "much"}), "rope_theta = 'much'"),
        (dict(rms_norm_eps=None), "rms_norm_eps = None"),
        (dict(hidden_size=None), "hidden_size = None; expected int above 0"),
        (dict(num_hidden_layers=2.5), "num_hidden_layers = 2.5"),
        (dict(vocab_size=True), "vocab_size = True"),
        (dict(intermediate_size=0), "intermediate_size = 0; expected int above 0"),
        (dict(num_attention_heads=0, head_dim=None), "num_attention_heads = 0; expected int"),
        (dict(rms_norm_eps=float("nan")), "rms_norm_eps = nan; expected float above 0"),
        (dict(num_attention_heads=5), "5 heads of size 8 for 2 key heads"),
        (dict(head_dim=7), "heads of size 7"),
    ],
)
def test_what_cannot_be_run_exactly_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        parse_config(RAW | change)


# ---------------------------------------------------------------------------------------------------------------------- checkpoints


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors")


def shard(folder):
    """The folder's one weights file as two, with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), start=1):
        save_file(
            {name: weights[name] for name in part}, folder / f"model-0000{i}-of-00002.safetensors"
        )
        weight_map |= {name: f"model-0000{i}-of-00002.safetensors" for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


@pytest.mark.parametrize("raw", [RAW, TIED])
def test_single_and_sharded_files_load_with_the_same_logits(raw, tmp_path):
    model, tokens = filled(raw), torch.tensor([golden.TOKENS])
    save_model(model, tmp_path / "model")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert torch.equal(load_model(tmp_path / "model")(tokens), model(tokens))
    shard(tmp_path / "model")
    sharded = load_model(tmp_path / "model")
    assert torch.equal(sharded(tokens), model(tokens))
    save_model(sharded, tmp_path / "again")  # one file, and no index of shards that are not there
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    assert torch.equal(load_model(tmp_path / "again")(tokens), model(tokens))


def test_tied_heads_may_be_stored_or_not_and_stay_tied(tmp_path):
    model, tokens = filled(TIED), torch.tensor([golden.TOKENS])
    save_model(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")

    def add(weights):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
        weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(
            8
        )  # as older checkpoints have it

    change_weights(tmp_path, add)
    loaded = load_model(tmp_path)
    assert (
        torch.equal(loaded(tokens), model(tokens))
        and loaded.lm_head.weight is loaded.embed_tokens.weight
    )
    assert sum(p.numel() for p in loaded.parameters()) == sum(p.numel() for p in model.parameters())


def test_weights_load_into_the_wanted_dtype(tmp_path):
    model = filled(RAW)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, dtype=torch.bfloat16)
    for ours, theirs in zip(loaded.parameters(), model.parameters()):
        assert (
            ours.dtype == torch.bfloat16
            and torch.equal(ours, theirs.bfloat16())
            and ours.requires_grad
        )
    save_model(loaded, tmp_path / "coarse")
    assert json.loads((tmp_path / "coarse" / "config.json").read_text()) == RAW | {
        "dtype": "bfloat16"
    }
    assert (
        load_file(tmp_path / "coarse" / "model.safetensors")["model.norm.weight"].dtype
        == torch.bfloat16
    )


NORM = "model.layers.1.self_attn.q_norm.weight"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda w: w.pop(NORM), "1 missing: layers.1.self_attn.q_norm.weight"),
        (
            lambda w: w.update({NORM: torch.ones(9)}),
            r"1.self_attn.q_norm.weight' is F32 of \(9,\), expected F64, F32, F16 or BF16 of \(8,\)",
        ),
        (
            lambda w: w.update({NORM.replace("1", "2"): torch.ones(8)}),
            "no place for 'model.layers.2.self_attn.q_norm.weight', or it is there twice",
        ),
        (
            lambda w: w.update({NORM.replace("weight", "bias"): torch.ones(8)}),
            "no place for 'model.layers.1.self_attn.q_norm.bias'",
        ),
        (lambda w: w.pop("lm_head.weight"), "1 missing: lm_head.weight"),
        (
            lambda w: w.update({NORM: torch.ones(8, dtype=torch.int8)}),
            r"q_norm.weight' is I8 of \(8,\), expected F64, F32, F16 or BF16",
        ),
        (
            lambda w: w.update({NORM: torch.ones(8).to(torch.float8_e4m3fn)}),
            "is F8_E4M3 of .*, expected F64",
        ),
        (
            lambda w: w.update({NORM.removeprefix("model."): torch.ones(8)}),
            "layers.1.self_attn.q_norm.weight', or it is there twice",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(change, message, tmp_path):
    save_model(filled(RAW), tmp_path)
    change_weights(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_bad_folders_and_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="none: no such model folder"):
        load_model(tmp_path / "none")
    with pytest.raises(ValueError, match="config.json: not readable as JSON: .*No such file"):
        load_model(tmp_path)
    save_model(filled(RAW), tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    for broken in (b"no weights", weights[: len(weights) // 2], b""):
        (tmp_path / "model.safetensors").write_bytes(broken)
        with pytest.raises(ValueError, match="model.safetensors: not a readable safetensors file"):
            load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(weights)
    (tmp_path / "model.safetensors.index.json").write_text(
        "never read: one file goes before an index"
    )
    load_model(tmp_path)
    names = shard(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    for entry, message in [
        ("../model.safetensors", "is no name of a safetensors file in this folder"),
        ("/etc/passwd", "is no name of a safetensors file in this folder"),
        ("..", "is no name of a safetensors file in this folder"),
        (7, "is no name of a safetensors file in this folder"),
        ("x" * 300 + ".safetensors", "xxx.safetensors: not a readable safetensors file"),
        (
            "model-00009-of-00002.safetensors",
            "model-00009-of-00002.safetensors: not a readable safetensors file: No such file",
        ),
    ]:
        index.write_text(json.dumps({"weight_map": names | {NORM: entry}}))
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)
    index.write_text(json.dumps({"weight_map": names}))
    (tmp_path / names[NORM]).write_bytes(
        (tmp_path / "model-00001-of-00002.safetensors").read_bytes()
    )
    with pytest.raises(
        ValueError,
        match="00002-of-00002.safetensors: no place for .*, or it is there twice",
    ):
        load_model(tmp_path)
    for text, message in [
        ("{}", "None is no name of a safetensors file"),
        ("[1]", "expected a JSON object"),
        ("{", "not readable as JSON"),
        ("[" * 100_000, "not readable as JSON"),
    ]:
        index.write_text(text)
        with pytest.raises(ValueError, match=message):
            load_model(tmp_path)


def test_saving_overwrites_nothing(tmp_path, monkeypatch):
    model = filled(RAW)
    (tmp_path / "project" / "src").mkdir(parents=True)
    (tmp_path / "file").write_text("text")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    save_model(model, tmp_path / "here")
    for target in ("project", "file", "here"):
        with pytest.raises(ValueError, match="exists already, and nothing is overwritten"):
            save_model(model, tmp_path / target)
    save_model(model, tmp_path / "link")  # writes where it points to
    assert (tmp_path / "link").is_symlink() and (tmp_path / "empty" / "config.json").exists()
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["empty", "file", "here", "link", "project"]


def test_an_interrupted_checkpoint_is_not_there_and_a_torn_one_makes_way(tmp_path, monkeypatch):
    def interrupted(path):
        raise KeyboardInterrupt

    torn = tmp_path / "checkpoint-000001"
    torn.mkdir()
    (torn / "torn").write_text("")
    with monkeypatch.context() as patched:
        patched.setattr(module, "flush", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_model(filled(RAW), tmp_path / "model")
    with module.new_folder(torn) as folder:
        (folder / "whole").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == [torn.name]
    assert [path.name for path in torn.iterdir()] == ["whole"]


def test_saved_folders_carry_tokenizer_template_and_generation_config_unchanged(tmp_path):
    source = tokenizer_folder(tmp_path / "source", eos_token_id=[2, 7])
    save_model(filled(RAW), source.parent / "weights")
    for name in ("model.safetensors", "config.json"):
        (source / name).write_bytes((tmp_path / "weights" / name).read_bytes())
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}\n", newline="")
    for name in set(module.CARRIED) - {path.name for path in source.iterdir()}:
        (source / name).write_text("{}")
    for name in ("pytorch_model.bin", "state.json"):
        (source / name).write_text("never loaded, never copied")
    save_model(load_model(source), tmp_path / "copy")
    carried = sorted(module.CARRIED)
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == sorted(
        [*carried, "config.json", "model.safetensors"]
    )
    for name in carried:
        assert (tmp_path / "copy" / name).read_bytes() == (source / name).read_bytes()
    loaded = load_model(source)
    shutil.rmtree(source)
    with pytest.raises(ValueError, match="no such folder any more"):
        save_model(loaded, tmp_path / "late")
    assert not (tmp_path / "late").exists()


# --------------------------------------------------------------------------------------------------------------- tokenizer and chat

TEMPLATE = (
    "{%- for m in messages %}{{ '<s>' + m.role + ': ' + m.content + '</s>' }}\n{% endfor %}"
    "{%- if add_generation_prompt %}{{ '<s>assistant:' }}{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)
# Written for this test, with what the templates of Qwen3 and Llama 3 use: macros, namespaces, loop controls, filters, methods of strings
BUSY_TEMPLATE = """\
{%- macro header(role) %}[{{ role | upper }}]{% endmacro %}
{%- if tools is defined and tools %}{{ raise_exception("no tools here") }}{% endif %}
{%- set found = namespace(last=-1) %}
{%- for m in messages[::-1] %}
    {%- if m.role == "user" and m.content is string and not m.content.startswith("<") %}
        {%- set found.last = (messages | length - 1) - loop.index0 %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{{- bos_token }}
{% for m in messages %}
    {% if m.role == "system" %}
        {% continue %}
    {% endif %}
{{ header(m.role) }} {{ m.content.split("</think>")[-1].lstrip("\\n") | trim }}{{ " *" if loop.index0 == found.last else "" }}
{% endfor %}
{%- generation %}{{- {"é": [1, none], "a": "<b>"} | tojson }}{% endgeneration %}
{{- ["é"] | tojson(true) }}{{ {"b": 1, "a": tools} | tojson(sort_keys=true, indent=1) }}{{ documents is defined }}
{%- if date is not defined %}{% set date = strftime_now("%Y")[:2] %}{% endif %}
{{- date }}
{%- if enable_thinking is defined and enable_thinking is false %}!{% endif %}"""
BUSY_CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "first"},
    {"role": "assistant", "content": "<think>hm</think>\n\nyes "},
    {"role": "user", "content": "second\n"},
    {"role": "user", "content": "<third>"},
]


def tokenizer_folder(path, template=TEMPLATE, **generation):
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        special_tokens=["<pad>", "<s>", "</s>", "<|im_end|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(["user assistant"], trainer)
    path.mkdir(exist_ok=True)
    backend.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text(json.dumps(generation))
    return path


def test_chat_renders_the_template_and_decode_drops_special_tokens(tmp_path):
    tokenizer = Tokenizer(tokenizer_folder(tmp_path, max_new_tokens=33))
    messages = [{"role": "user", "content": "Hé 漢?"}]
    assert tokenizer.render(messages) == "<s>user: Hé 漢?</s>\n<s>assistant:<think>\n"
    assert tokenizer.render(messages, thinking=False) == "<s>user: Hé 漢?</s>\n<s>assistant:"
    assert tokenizer.decode(tokenizer.chat(messages)) == "user: Hé 漢?\nassistant:<think>\n"
    assert tokenizer.max_new_tokens == 33
    # a file of its own goes before tokenizer_config.json
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert Tokenizer(tmp_path).render(messages) == "Hé 漢?"


def test_completion_ids_are_what_completion_text_reads(tmp_path):
    messages = [{"role": "user", "content": "x"}]
    text = "<think>\nwhy\n</think>\n<Answer> B </Answer>"
    tokenizer = Tokenizer(tokenizer_folder(tmp_path))  # its template opens <think>, and a line
    prompt = tokenizer.chat(messages)
    ids = tokenizer.completion_ids(prompt, text)
    assert tokenizer.backend.id_to_token(ids[-1]) == "</s>"
    assert tokenizer.decode(prompt + ids, special=True).endswith(f"assistant:{text}</s>")
    assert tokenizer.completion_text(prompt, ids) == text.replace("<think>\n", "<think>")
    assert tokenizer.completion_ids(prompt, text.replace("<think>", "<Think> ")) == ids
    prompt = tokenizer.chat(messages, thinking=False)
    ids = tokenizer.completion_ids(prompt, text)
    assert tokenizer.completion_text(prompt, ids) == text


def test_a_template_draws_no_random_numbers(tmp_path):
    messages = [{"role": "user", "content": "x"}]
    for template in ("{{ [1, 2, 3] | random }}", "{{ lipsum() }}"):
        with pytest.raises(ValueError, match="chat template failed"):
            Tokenizer(tokenizer_folder(tmp_path, template)).render(messages)
    tokenizer = Tokenizer(tokenizer_folder(tmp_path, '{{ strftime_now("%d %b %Y %H:%M") }}'))
    tokenizer.moment = 951_782_399  # by `date -u -d @951782399`
    assert tokenizer.render(messages) == "28 Feb 2000 23:59"


def test_a_completion_is_read_with_its_special_tokens_and_the_tag_that_its_prompt_opens(tmp_path):
    tokenizer = Tokenizer(tokenizer_folder(tmp_path))
    opened, plain = (tokenizer.chat([{"role": "user", "content": "?"}], on) for on in (True, False))
    pad, end, turn = (tokenizer.backend.token_to_id(t) for t in ("<pad>", "</s>", "<|im_end|>"))
    x = tokenizer.encode("x")
    assert (
        tokenizer.completion_text(opened, [*x, end]) == "<think>x"
    )  # the prompt ends with <think>\n
    assert tokenizer.completion_text(plain, [*x, turn]) == "x"
    assert tokenizer.completion_text(plain, [pad, *x, turn, *x]) == "<pad>x<|im_end|>x"
    assert tokenizer.completion_text(plain, [end, end]) == "</s>"  # only the closing one goes
    assert tokenizer.completion_text(plain, []) == ""
    (tmp_path / "chat_template.jinja").write_text("<Think>")  # the tag counts in any case
    loud = Tokenizer(tmp_path)
    assert loud.completion_text(loud.chat([]), [*x, end]) == "<think>x"


def test_templates_may_use_what_real_ones_use(tmp_path):
    tokenizer = Tokenizer(tokenizer_folder(tmp_path, BUSY_TEMPLATE))
    expected = '<s>\n[USER] first\n[ASSISTANT] yes\n[USER] second *\n[USER] <third>\n{"é": [1, null], "a": "<b>"}["\\u00e9"]{\n "a": null,\n "b": 1\n}True20'
    assert tokenizer.render(BUSY_CHAT) == expected
    assert tokenizer.render(BUSY_CHAT, thinking=False) == expected + "!"


def real_templates():
    """Chat templates of public models, where a library that carries them is installed."""
    spec = importlib.util.find_spec("trl")
    folder = Path(spec.submodule_search_locations[0] if spec else "none", "chat_templates")
    return [
        folder / f"{name}.jinja"
        for name in ("qwen3", "qwen3_instruct_2507", "llama3_1", "llama3_2")
    ]


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    "template",
    [BUSY_TEMPLATE, TEMPLATE, *real_templates()],
    ids=lambda t: getattr(t, "name", "ours"),
)
def test_chat_is_that_of_transformers(template, thinking, tmp_path):
    transformers = pytest.importorskip("transformers")
    if isinstance(template, Path):
        if not template.exists():
            pytest.skip("no trl here, which carries the templates of public models")
        template = template.read_text(encoding="utf-8")
    tokenizer_folder(tmp_path, template)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(
            {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
        )
    )
    (tmp_path / "chat_template.jinja").write_text(template, encoding="utf-8", newline="")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for chat in (golden.CHAT, golden.CHAT[1:], BUSY_CHAT):
        expected = theirs.apply_chat_template(
            chat, add_generation_prompt=True, tokenize=False, enable_thinking=thinking
        )
        assert Tokenizer(tmp_path).render(chat, thinking) == expected
        ids = theirs.apply_chat_template(
            chat,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            enable_thinking=thinking,
        )
        assert Tokenizer(tmp_path).chat(chat, thinking) == ids


@pytest.mark.parametrize(
    "generation, config, expected",
    [
        ({}, {}, (2, 3)),  # eos_token and the end of turn
        (dict(eos_token_id=7), {}, (2, 3, 7)),
        (dict(eos_token_id=[7, 9]), dict(eos_token_id=11), (2, 3, 7, 9, 11)),
        (dict(eos_token_id=None), dict(eos_token_id=[2]), (2, 3)),
    ],
)
def test_stop_ids_come_from_all_the_places_where_they_stand(generation, config, expected, tmp_path):
    tokenizer_folder(tmp_path, **generation)
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert Tokenizer(tmp_path).stop_ids == expected


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('no system') }}", "chat template failed: no system"),
        ("{{ ''.__class__.__mro__ }}", "chat template failed"),  # the sandbox holds
        ("{{ messages.append(1) }}", "chat template failed"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "chat template failed"),
        ("{% if %}", "chat template failed"),
        ("{{ 1/0 }}", "chat template failed"),
        (7, "chat template failed"),
        ([{"name": "default", "template": 7}], "chat template failed"),
        (None, "no chat template"),
    ],
)
def test_templates_that_fail_say_so(tmp_path, template, message):
    tokenizer = Tokenizer(tokenizer_folder(tmp_path, template))
    with pytest.raises(ValueError, match=message):
        tokenizer.chat([{"role": "user", "content": "x"}])


def test_failures_of_templates_take_one_line(tmp_path):
    tokenizer = Tokenizer(tokenizer_folder(tmp_path, "{{ raise_exception('two\\nlines') }}"))
    with pytest.raises(ValueError, match="chat template failed: two lines"):
        tokenizer.chat([])


def test_older_folders_keep_special_tokens_in_a_file_of_their_own(tmp_path):
    tokenizer_folder(tmp_path, "{{ bos_token }}|{{ eos_token }}|{{ unk_token }}")
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"bos_token": "<old>", "unk_token": {"content": "<pad>"}})
    )
    assert Tokenizer(tmp_path).render([]) == "<s>|</s>|<pad>"  # tokenizer_config.json goes first
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<pad>"}))
    assert Tokenizer(tmp_path).stop_ids == (0, 3)


@pytest.mark.parametrize(
    "file, content, message",
    [
        (
            "generation_config.json",
            {"eos_token_id": [[2]]},
            r"generation_config.json: eos_token_id is \[\[2\]\]; expected token ids",
        ),
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id is '2'; expected"),
        ("config.json", {"eos_token_id": True}, "config.json: eos_token_id is True; expected"),
        ("config.json", {"eos_token_id": -1}, "eos_token_id is -1; expected"),
        ("tokenizer_config.json", [], "tokenizer_config.json: expected a JSON object, got list"),
    ],
)
def test_settings_of_the_wrong_kind_are_named(file, content, message, tmp_path):
    tokenizer_folder(tmp_path)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message):
        Tokenizer(tmp_path)


def test_settings_that_mean_nothing_are_passed_over(tmp_path):
    tokenizer_folder(tmp_path)
    odd = {
        "bos_token": None,
        "pad_token": {"content": 5},
        "eos_token": {},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(odd))
    tokenizer = Tokenizer(tmp_path)
    assert (
        tokenizer.special_tokens == {} and tokenizer.template is None and tokenizer.stop_ids == (3,)
    )


def test_texts_that_no_tokenizer_can_take_say_so(tmp_path):
    tokenizer = Tokenizer(tokenizer_folder(tmp_path))
    with pytest.raises(ValueError, match="surrogates not allowed"):
        tokenizer.encode("half a pair: \ud83d")


def test_bad_tokenizer_files_are_named(tmp_path):
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer file: No such file"):
        Tokenizer(tmp_path / "none")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer.json: not a tokenizer file"):
        Tokenizer(tmp_path)
    tokenizer_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="chat_template.jinja: not readable as UTF-8 text"):
        Tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(ValueError, match="chat_template.jinja: not readable as UTF-8 text"):
        Tokenizer(tmp_path)
