"""generate and completion_logprobs: cached = uncached, shared = copied, padded = unpadded, packed = plain, in waves = at once."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import model as module
from model import (
    KVCache,
    Packed,
    Sampling,
    Transformer,
    choose,
    completion_logprobs,
    generate,
    inverse_cdf,
    parse_config,
    reordered_weights,
    waves,
)

RAW = dict(
    model_type="qwen3",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    tie_word_embeddings=False,
    max_position_embeddings=64,
)
SHAPES = {
    "qwen3, 2 queries a key": RAW,
    "qwen3, 4 queries a key, tied": RAW | dict(num_key_value_heads=1, tie_word_embeddings=True),
    "llama, 1 query a key": RAW | dict(model_type="llama", num_key_value_heads=4),
    "llama, 3 queries a key": RAW | dict(model_type="llama", num_attention_heads=6, head_dim=8),
}
PROMPTS = [[5, 9, 2], [7, 7, 3, 11, 30, 8], [1]]
STOPS = (4, 17, 23, 40)


def random_model(raw=RAW):
    torch.manual_seed(0)
    model = Transformer(parse_config(raw))
    for (
        name,
        p,
    ) in model.named_parameters():  # norms away from 1 and logits far apart, so that mistakes show
        torch.nn.init.normal_(p, mean=1.0 if "norm" in name else 0.0, std=0.3)
    return model


@pytest.fixture
def tiny():
    return random_model()


@pytest.fixture
def forwards(tiny, monkeypatch):
    """(rows, tokens, context) of every pass through the network."""
    seen, hidden = [], tiny.hidden

    def recorded(tokens, context):
        seen.append((*tokens.shape, context))
        return hidden(tokens, context)

    monkeypatch.setattr(tiny, "hidden", recorded)
    return seen


def tokens_of(groups):
    return [[c.tokens for c in group] for group in groups]


def plain_logprobs(model, prompt, completion):
    """Of one completion, by one uncached, unpadded forward."""
    logits = model(torch.tensor([prompt + completion]))
    return logits.log_softmax(-1)[0, len(prompt) - 1 : -1][range(len(completion)), completion]


# ------------------------------------------------------------------------------------------- the same numbers, however computed


@pytest.mark.parametrize("label", SHAPES)
def test_greedy_decoding_with_the_cache_is_argmax_of_the_full_forward(label):
    model = random_model(SHAPES[label])
    for prompt, group in zip(PROMPTS, generate(model, PROMPTS, max_new_tokens=12, temperature=0)):
        tokens = list(prompt)
        for token in group[0].tokens:
            assert token == model(torch.tensor([tokens]))[0, -1].argmax().item()
            tokens.append(token)
        assert len(tokens) == len(prompt) + 12 and not group[0].finished


@pytest.mark.parametrize("label", SHAPES)
def test_sampler_logprobs_are_the_trainers_and_those_of_the_plain_forward(label):
    model = random_model(SHAPES[label])
    groups = generate(model, PROMPTS, group_size=5, max_new_tokens=20, stop_ids=STOPS, seed=3)
    logprobs, mask = completion_logprobs(model, PROMPTS, tokens_of(groups))
    flat = [(p, c) for p, group in zip(PROMPTS, groups) for c in group]
    assert len({len(c.tokens) for _, c in flat}) > 3  # rows really left the batch on the way
    for i, (prompt, completion) in enumerate(flat):
        n = len(completion.tokens)
        assert mask[i].tolist() == [True] * n + [False] * (mask.shape[1] - n)
        assert completion.finished == (completion.tokens[-1] in STOPS) and not set(
            completion.tokens[:-1]
        ) & set(STOPS)
        torch.testing.assert_close(
            logprobs[i, :n], torch.tensor(completion.logprobs), atol=2e-5, rtol=0
        )
        torch.testing.assert_close(
            logprobs[i, :n], plain_logprobs(model, prompt, completion.tokens), atol=2e-5, rtol=0
        )


def test_log_probabilities_are_of_the_raw_logits_whatever_the_settings(tiny):
    for settings in (
        dict(temperature=0),
        dict(temperature=0.6),
        dict(top_p=0.7),
        dict(top_k=3),
        dict(temperature=1.5, top_p=0.9, top_k=9),
    ):
        completion = generate(tiny, PROMPTS[:1], max_new_tokens=6, **settings)[0][0]
        assert completion.logprobs == pytest.approx(
            plain_logprobs(tiny, PROMPTS[0], completion.tokens).tolist(), abs=2e-5
        )


def test_groups_may_differ_in_size_and_padding_is_zero(tiny):
    prompts, groups = PROMPTS, [[[3, 4], [9]], [], [[8, 8, 8], [], [1, 2]]]
    logprobs, mask = completion_logprobs(tiny, prompts, groups)
    owners = [0, 0, 2, 2, 2]
    assert mask.sum(dim=1).tolist() == [2, 1, 3, 0, 2] and (logprobs[~mask] == 0).all()
    for row, keep, p, completion in zip(logprobs, mask, owners, sum(groups, [])):
        if completion:
            torch.testing.assert_close(
                row[keep], plain_logprobs(tiny, prompts[p], completion), atol=1e-5, rtol=1e-5
            )
    nothing, mask = completion_logprobs(tiny, PROMPTS, [[], [], []])
    assert nothing.shape == mask.shape == (0, 0)
    for prompts, groups, message in (
        ([[]], [[[1]]], "prompt 0 is empty"),
        ([[1]], [], "is shorter than argument 1"),
        ([], [[[1]]], "is longer than argument 1"),
    ):
        with pytest.raises(ValueError, match=message):
            completion_logprobs(tiny, prompts, groups)


def test_gradients_through_the_shared_prompt_are_those_of_the_plain_forward(tiny):
    rows = [[[3, 4], [8, 1, 6]], [[2], [9, 9]]]
    logprobs, mask = completion_logprobs(tiny, PROMPTS[:2], rows)
    shared = torch.autograd.grad(logprobs[mask].sum(), list(tiny.parameters()))
    plain = sum(
        plain_logprobs(tiny, prompt, row).sum()
        for prompt, group in zip(PROMPTS, rows)
        for row in group
    )
    for ours, theirs in zip(shared, torch.autograd.grad(plain, list(tiny.parameters()))):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-4)


def test_bf16_sampler_and_trainer_agree_as_far_as_bf16_allows(tiny):
    exact = random_model()
    tiny.bfloat16()
    exact.load_state_dict(
        {name: p.float() for name, p in tiny.state_dict().items()}
    )  # the rounded weights, computed in fp32
    groups = generate(tiny, PROMPTS, group_size=3, max_new_tokens=9, stop_ids=STOPS)
    logprobs, mask = completion_logprobs(tiny, PROMPTS, tokens_of(groups))
    assert logprobs.dtype == torch.float32
    for values in (
        logprobs[mask],
        torch.tensor([x for group in groups for c in group for x in c.logprobs]),
    ):
        assert (
            values.bfloat16().float() != values
        ).float().mean() > 0.9  # the softmax is not rounded to bf16
    sampled = torch.tensor([x for group in groups for c in group for x in c.logprobs])
    judge = completion_logprobs(exact, PROMPTS, tokens_of(groups))[0][mask]
    spread = (logprobs[mask] - judge).abs().max()  # what rounding to bf16 does to one of them
    assert 0 < spread < 0.3
    assert (sampled - judge).abs().max() < 2 * spread


def test_reordered_weights_multiply_as_plain_ones_do(tiny, monkeypatch):
    tokens = torch.tensor([PROMPTS[1]])
    with torch.inference_mode():
        plain = tiny(tokens)
        with reordered_weights(tiny):
            swapped = [layer for layer in tiny.modules() if "forward" in vars(layer)]
            torch.testing.assert_close(tiny(tokens), plain, atol=1e-4, rtol=1e-5)
    if module.reordering_works():  # q, k, v, o, gate, up and down of three layers, and the head
        assert len(swapped) == 3 * 7 + 1
    sampled = tokens_of(generate(tiny, PROMPTS, 3, 9, stop_ids=STOPS))
    assert not any("forward" in vars(layer) for layer in tiny.modules())  # weights may change now
    monkeypatch.setattr(module, "reordering_works", lambda: False)
    assert tokens_of(generate(tiny, PROMPTS, 3, 9, stop_ids=STOPS)) == sampled


def test_sampling_leaves_torchs_random_numbers_alone(tiny):
    module.reordering_works.cache_clear()
    before = torch.random.get_rng_state()
    generate(tiny, PROMPTS, 2, 4)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_weights_are_reordered_anew_after_an_update(tiny):
    generate(tiny, PROMPTS, 2, 5)
    with torch.no_grad():
        tiny.layers[1].mlp.up_proj.weight += 0.2
    completion = generate(tiny, PROMPTS[:1], 1, 5)[0][0]
    assert completion.logprobs == pytest.approx(
        plain_logprobs(tiny, PROMPTS[0], completion.tokens).tolist(), abs=2e-5
    )


# --------------------------------------------------------------------------------------------------- what a completion depends on


def test_a_completion_depends_on_seed_prompt_place_and_position_only(tiny):
    groups = tokens_of(generate(tiny, PROMPTS, group_size=3, max_new_tokens=8, seed=5))
    for prompt, group in zip(PROMPTS, groups):
        assert tokens_of(generate(tiny, [prompt], 2, 8, seed=5)) == [
            group[:2]
        ]  # other prompts, a larger group
        assert tokens_of(generate(tiny, [prompt], 3, 5, seed=5)) == [
            [row[:5] for row in group]
        ]  # the length limit
        assert tokens_of(generate(tiny, [prompt], 3, 8, seed=6)) != [group]
    assert len({tuple(row) for group in groups for row in group}) == 9


def test_random_numbers_depend_on_the_whole_prompt_and_stay_what_they_are():
    drawn = [
        module.uniforms(0, prompt, 1, 3).tolist() for prompt in ([5, 9, 2], [9, 5, 2], [7, 2], [2])
    ]
    assert len(set(map(tuple, drawn))) == 4
    assert drawn[0] == [
        0.610470568184734,
        0.5921028112553963,
        0.7709636947976136,
    ]  # recorded: seeds of earlier runs keep their meaning


def test_a_common_start_of_the_prompts_changes_nothing(forwards, tiny, monkeypatch):
    """It is computed once; pieces of the prefill are of a few tokens here, and one prompt is nothing but the start and a token."""
    tiny.config = parse_config(RAW | dict(max_position_embeddings=512))
    monkeypatch.setattr(module, "prefill_tokens", lambda device: 29)
    start = [(7 * i) % 61 for i in range(40)]
    prompts = [start, start + [3], start + [5] * 20, [*start, 8, 9], start + [5, 5]]
    groups = generate(tiny, prompts, 2, 8, stop_ids=STOPS)
    prefills = [(rows, tokens) for rows, tokens, context in forwards if isinstance(context, Packed)]
    # five rests of 21, 3, 3, 2 and 1 tokens: 21 + 3 + 3 + 2 = 29 fit; the start stands before each piece
    assert prefills == [(1, 39 + 29), (1, 39 + 1)]
    for prompt, group in zip(prompts, groups):
        assert tokens_of([group]) == tokens_of(generate(tiny, [prompt], 2, 8, stop_ids=STOPS))
        for c in group:
            torch.testing.assert_close(
                torch.tensor(c.logprobs),
                plain_logprobs(tiny, prompt, c.tokens),
                atol=2e-5,
                rtol=1e-5,
            )


def test_each_distinct_prompt_is_computed_once_and_held_once(tiny, forwards):
    a, b, c = PROMPTS
    groups = generate(tiny, [a, b, a, c, a], group_size=4, max_new_tokens=3)
    assert [(rows, tokens) for rows, tokens, _ in forwards] == [(1, 3 + 6 + 1), (12, 1), (12, 1)]
    context = forwards[1][2]
    assert {keys_and_values.shape[1] for keys_and_values in context.prompt_cache} == {3}
    assert groups[0] == groups[2] == groups[4]


def test_finished_rows_and_prompts_leave_the_batch(tiny, forwards):
    groups = generate(tiny, PROMPTS, group_size=5, max_new_tokens=30, stop_ids=STOPS, seed=1)
    lengths = np.array([len(c.tokens) for group in groups for c in group])
    assert lengths.max() > 8
    assert [rows for rows, _, _ in forwards[1:]] == [
        (lengths > t).sum() for t in range(1, lengths.max())
    ]
    context = forwards[-1][2]
    still = {
        i for i, group in enumerate(groups) if max(len(c.tokens) for c in group) == lengths.max()
    }
    assert isinstance(context, KVCache) and len(context.prompt_cache[0][0]) == len(still) < 3


class Graph(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: it repeats operations on the memory that they had when they were recorded, and runs no Python."""

    def __init__(self, function, x):
        super().__init__()
        self.operations, self.given = [], x.clone()
        with self:
            self.result = function(self.given)

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.operations.append((operator, args, kwargs or {}, result))
        return result

    def __call__(self, x):
        self.given.copy_(x)
        for operator, args, kwargs, recorded in self.operations:
            result = operator(*args, **kwargs)
            for old, new in zip(tree_leaves(recorded), tree_leaves(result), strict=True):
                old.copy_(new)
        return self.result


@pytest.mark.parametrize("interval", [2, 7, 64])
def test_a_graph_of_the_forward_pass_changes_nothing(tiny, monkeypatch, interval):
    """As on a GPU, rows leave now and then, and in between the forward pass is repeated by a graph."""
    settings = dict(group_size=5, max_new_tokens=30, stop_ids=STOPS, seed=1)
    at_once = generate(tiny, PROMPTS, **settings)
    sizes = []

    def record(function, x):
        sizes.append(len(x))
        return Graph(function, x)

    monkeypatch.setattr(module, "tokens_per_graph", lambda device: interval)
    monkeypatch.setattr(module, "recorded", record)
    now_and_then = generate(tiny, PROMPTS, **settings)
    assert len(sizes) == -(-29 // interval) and (interval > 20) == (len(set(sizes)) == 1)
    for a, b in zip(itertools.chain(*at_once), itertools.chain(*now_and_then), strict=True):
        assert (a.tokens, a.finished) == (b.tokens, b.finished)
        assert b.logprobs == pytest.approx(a.logprobs, abs=1e-5)


def test_waves_give_what_one_batch_gives(tiny, forwards):
    prompts = [[i, *range(i % 4)] for i in range(1, 12)]
    at_once = generate(tiny, prompts, 3, 6, stop_ids=STOPS)
    assert len([1 for _, tokens, _ in forwards if tokens > 1]) == 1
    forwards.clear()
    in_waves = generate(tiny, prompts, 3, 6, stop_ids=STOPS, token_budget=93)
    prefills = [context for _, _, context in forwards if isinstance(context, Packed)]
    sizes = [[len(places) for places in packed.completions[0]] for packed in prefills]
    assert len(sizes) == 4 and all(
        len(wave) * (max(wave) + 3 * (6 + 3)) <= 93 for wave in sizes
    )  # 3: tables of logits
    assert tokens_of(in_waves) == tokens_of(at_once)


def test_waves_hold_as_many_prompts_as_the_budget_allows(monkeypatch):
    # with 2 x 3 new tokens each, two of width 4 take 2 * (4 + 6) = 20, three of width 2 would take 3 * (2 + 6) = 24
    prompts = [[5], [1, 2, 3, 4], [8], [6, 7, 8], [9, 9], [5]]
    monkeypatch.setattr(module, "logits_in_tokens", lambda config: 0)
    assert list(waves(None, prompts, Sampling(2, 3, token_budget=20))) == [
        [(1, 2, 3, 4), (6, 7, 8)],
        [(9, 9), (5,)],
        [(8,)],
    ]
    assert list(waves(None, prompts, Sampling(2, 3, token_budget=1))) == [
        [(1, 2, 3, 4)],
        [(6, 7, 8)],
        [(9, 9)],
        [(5,)],
        [(8,)],
    ]
    assert list(waves(None, [], Sampling(2, 3, token_budget=1))) == []


# ----------------------------------------------------------------------------------------------------------------- choosing a token


def test_the_tables_of_logits_count_in_the_budget(forwards, tiny):
    generate(tiny, [[i, 2, 3] for i in range(20)], 2, 2, token_budget=200)
    # a row: 2 tokens, and 12 * 61 // (2 * 3 layers * 2 heads * 16) = 3 for its tables; a prompt: 3 + 2 * 5 = 13 of the 200
    assert max(rows for rows, _, context in forwards if isinstance(context, KVCache)) == 2 * (
        200 // 13
    )


def test_settings_of_choose_combine():
    """By hand: probabilities .5 .25 .15 .1, squared and normalised at temperature 1/2: .7246 .1812 .0652 .0290."""
    log_probs = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()

    def chosen(uniform, **settings):
        return choose(
            log_probs,
            torch.tensor([uniform], dtype=torch.float64),
            Sampling(**settings),
        ).item()

    # top-k first: of the three best (.9 together) .5 and .25 reach .8 * .9, so the third is out; top-p first would keep it (.75 < .8)
    assert [chosen(u, top_k=3, top_p=0.8) for u in (0.66, 0.67, 0.999)] == [0, 1, 1]
    assert [chosen(u, top_p=0.8) for u in (0.999, 0.84, 0.55)] == [2, 2, 0]
    assert [chosen(u, temperature=0.5, top_p=0.9) for u in (0.79, 0.81, 0.999)] == [
        0,
        1,
        1,
    ]  # .7246 + .1812 reach .9; .5 + .25 would not
    assert [chosen(u, temperature=0.5, top_k=2) for u in (0.79, 0.81, 0.999)] == [0, 1, 1]


def test_choose_follows_the_distribution():
    log_probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4, 1)
    u = torch.tensor([0.49, 0.51, 0.81, 0.96], dtype=torch.double)
    assert choose(log_probs, u, Sampling(temperature=1.0, top_p=1.0, top_k=0)).tolist() == [
        0,
        1,
        2,
        3,
    ]
    assert choose(log_probs, u, Sampling(temperature=1.0, top_p=1.0, top_k=2)).tolist() == [
        0,
        0,
        1,
        1,
    ]  # renormalised over two: the edge is at 0.625
    assert choose(log_probs, u, Sampling(temperature=1.0, top_p=0.9, top_k=0)).tolist() == [
        0,
        0,
        1,
        2,
    ]  # over three: edges at 0.526 and 0.842
    assert choose(log_probs, u, Sampling(temperature=1.0, top_p=0.001, top_k=0)).tolist() == [
        0,
        0,
        0,
        0,
    ]  # the likeliest always stays
    assert choose(log_probs, u, Sampling(temperature=1.0, top_p=1.0, top_k=99)).tolist() == [
        0,
        1,
        2,
        3,
    ]  # more than there are
    assert choose(log_probs, u, Sampling(temperature=0.0, top_p=1.0, top_k=0)).tolist() == [
        0,
        0,
        0,
        0,
    ]


def test_temperature_two_takes_square_roots():
    log_probs = (
        torch.tensor([0.64, 0.16, 0.16, 0.04]).log().repeat(6, 1)
    )  # roots 0.8 0.4 0.4 0.2 over 1.8: edges at 4/9, 6/9, 8/9
    u = torch.tensor([0.44, 0.45, 0.66, 0.67, 0.88, 0.89], dtype=torch.double)
    assert choose(log_probs, u, Sampling(temperature=2.0, top_p=1.0, top_k=0)).tolist() == [
        0,
        1,
        1,
        2,
        2,
        3,
    ]


@pytest.mark.parametrize("vocabulary", [1, 61, 128, 129, 5000])
def test_inverse_cdf_is_the_textbooks(vocabulary):
    generator = np.random.default_rng(vocabulary)
    probs = generator.dirichlet(np.full(vocabulary, 0.3), size=400).astype(np.float32)
    probs[:, generator.random(vocabulary) < 0.3] = 0  # ids that a filter removed
    probs[:, -1] += 1e-3
    u = generator.random(400)
    edges = probs.astype(np.float64).cumsum(axis=1)
    expected = [np.searchsorted(row, x * row[-1], side="right") for row, x in zip(edges, u)]
    chosen = inverse_cdf(torch.from_numpy(probs), torch.from_numpy(u)).numpy()
    assert (chosen == expected).all()
    assert all(probs[range(400), chosen] > 0)


def test_draws_at_the_ends_never_take_an_id_without_probability():
    probs = torch.zeros(2, 300)
    probs[:, 130], probs[:, 140], probs[:, 200] = 0.25, 0.25, 0.5
    lowest, highest = 0.0, 1 - 2**-53  # the random numbers' range
    assert inverse_cdf(probs, torch.tensor([lowest, highest], dtype=torch.double)).tolist() == [
        130,
        200,
    ]
    rare = torch.tensor([1.0, 1e-12]).repeat(2, 1)  # lost in a cumulative sum in fp32
    assert inverse_cdf(rare, torch.tensor([0.5, 1 - 5e-13], dtype=torch.double)).tolist() == [0, 1]


# -------------------------------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    "prompts, settings, message",
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 61]], {}, "ids from 1 to 61, the vocabulary 61"),
        ([[-1]], {}, "ids from -1 to -1"),
        (
            [[1]],
            dict(max_new_tokens=64),
            r"prompt 0 takes 1 \+ 64 \(max_new_tokens\) positions, the context has 64",
        ),
        ([[1]], dict(group_size=0), "group_size = 0; expected"),
        ([[1]], dict(max_new_tokens=0), "max_new_tokens = 0; expected"),
        ([[1]], dict(temperature=-1.0), "temperature = -1.0; expected"),
        ([[1]], dict(temperature=float("nan")), "temperature = nan; expected"),
        ([[1]], dict(temperature=1e-30), "temperature = 1e-30; expected 0 .greedy., or"),
        ([[1]], dict(seed=2**63), "seed = 9223372036854775808; expected"),
        ([[1]], dict(top_p=0.0), "top_p = 0.0; expected"),
        ([[1]], dict(top_k=-1), "top_k = -1; expected"),
    ],
)
def test_requests_that_cannot_be_met_say_so(tiny, prompts, settings, message):
    with pytest.raises(ValueError, match=message) as error:
        generate(tiny, prompts, **dict(max_new_tokens=4) | settings)
    assert "\n" not in str(error.value)


def test_the_whole_context_can_be_used_and_nothing_gives_nothing(tiny):
    assert len(generate(tiny, [[1]], max_new_tokens=63)[0][0].tokens) == 63
    assert generate(tiny, [], max_new_tokens=3) == []
    first = generate(tiny, [[1]], max_new_tokens=9)[0][0].tokens[0]
    stopped = generate(tiny, [[1]], max_new_tokens=9, stop_ids=(first,))[0][0]
    assert stopped.tokens == [first] and stopped.finished


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("settings", [{}, dict(temperature=0), dict(top_p=0.5, top_k=3)])
def test_broken_weights_say_so(tiny, value, settings):
    with torch.no_grad():
        tiny.layers[0].mlp.down_proj.weight[3, 3] = value
    with pytest.raises(ValueError, match="logits are not finite"):
        generate(tiny, PROMPTS, 2, 4, **settings)


def test_ids_outside_the_vocabulary_and_nothing_at_all(tiny):
    for prompts, completions in (([[61]], [[[1]]]), ([[1]], [[[-1]]])):
        with pytest.raises(ValueError, match="is it the model's tokenizer"):
            completion_logprobs(tiny, prompts, completions)
    assert [x.shape for x in completion_logprobs(tiny, [], [])] == [(0, 0), (0, 0)]
    for settings in (dict(seed=1.5), dict(group_size=2.0), dict(top_k=2.5)):
        with pytest.raises(ValueError, match="expected a whole number"):
            generate(tiny, PROMPTS, **settings)
    with pytest.raises(ValueError, match="is it the model's tokenizer"):
        generate(tiny, [[1.7]])
