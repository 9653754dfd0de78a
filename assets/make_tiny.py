"""Make the embedded policy, assets/tiny, from nothing: `python assets/make_tiny.py DIR`.

GRPO improves a policy that can already answer now and then. The embedded demonstration has no
pretrained model to start from, so this script makes something that plays its part: a transformer of
0.7 million parameters that writes fluent responses in four stages and falls for shortcuts. It is
made by supervised training in three phases [O]:

    look-up    lists of words with letters: which letter belongs to which option
    clean      stories with correct traces, and drills in which only the letters count
    flawed     a short dose of traces with planted flaws

GRPO undoes these flaws afterwards, as the README says. The paper has no such phase, for it begins
with a language model that reasons well already.

All of it takes about a quarter of an hour on two CPU cores. assets/tiny was made with the defaults
and seed 0, at commit 297ec3b. The recipe is the same since, but the forward pass rounds in other
places, and training makes such differences grow: another policy comes out, of the same kind.
"""

import itertools
import json
import random
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from model import Tokenizer, Transformer, pad, parse_config  # noqa: E402
from model import refuse_existing, save_model  # noqa: E402
from socialr1 import MAIN, STAGES, Parser, Problem, Settings, Story  # noqa: E402
from socialr1 import build_messages, exit_on_error, format_trace, generate_stories  # noqa: E402
from socialr1 import minds, people_of, readers_minds, replay, setting, write_stages  # noqa: E402


@dataclass(frozen=True)
class ColdStartConfig(Settings):
    """The recipe. All numbers are ours [O]."""

    lookup_steps: int = setting(1200, "updates on look-up rows", low=1)
    clean_steps: int = setting(3000, "updates on correct traces, 40% drills", low=1)
    flawed_steps: int = setting(600, "updates on flawed traces, 20% drills", low=1)
    rows: int = setting(16, "rows in an update", low=1)
    muon_lr: float = setting(6e-3, "learning rate of Muon, for matrices", low=0)
    adam_lr: float = setting(3e-3, "learning rate of AdamW, for embedding and norms", low=0)
    invented: float = setting(0.15, "rows with made-up names and nouns", low=0, high=1)
    shortcut_hard: float = setting(0.62, "flawed hard traces that take the shortcut", low=0, high=1)
    shortcut_control: float = setting(0.12, "flawed controls that miss the end", low=0, high=1)
    structure: float = setting(0.3, "flawed traces with a stage missing or moved", low=0, high=1)
    early: float = setting(0.35, "flawed traces that name an option early", low=0, high=1)
    repetition: float = setting(0.12, "flawed traces that say a stage twice", low=0, high=1)
    seed: int = setting(0, "of weights and rows", low=0, high=2**31 - 1)


CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "max_position_embeddings": 1024,
}
# ChatML, but the system message is left out: tiny prompts must stay short.
TEMPLATE = (
    "{%- for message in messages if message.role != 'system' -%}"
    "<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{%- endfor -%}{%- if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# --------------------------------------------------------------------------------------- tokenizer


def build_tokenizer(folder: Path) -> None:
    """Write the files of a model folder, weights aside: the configs, and a byte-level BPE.

    It is trained on train stories and made-up words. Every id belongs to a token.
    """
    rng = random.Random("tokenizer")
    texts = []
    for story in generate_stories(6000, seed=0):
        user = build_messages(story.problem)[1]["content"]
        texts.append(f"{user}\n{story.trace}\n{drill(story.problem, rng)}")
    for _ in range(300):
        texts.append(f" {made_up_word(rng)} {made_up_word(rng).capitalize()}")

    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tags = ("<think>", "</think>", "<Answer>", "</Answer>")
    backend.add_tokens([tokenizers.AddedToken(tag, normalized=False) for tag in tags])
    backend.save(str(folder / "tokenizer.json"))

    end, padding = (backend.token_to_id(token) for token in ("<|im_end|>", "<|endoftext|>"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": TEMPLATE,
    }
    generation = {"eos_token_id": [end, padding], "do_sample": True, "max_new_tokens": 160}
    config = CONFIG | {"vocab_size": backend.get_vocab_size(), "eos_token_id": end}
    write(folder / "tokenizer_config.json", settings)
    write(folder / "generation_config.json", generation)
    write(folder / "config.json", config)


def write(file: Path, content: dict) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


# ------------------------------------------------------------------------------------------- texts


def made_up_word(rng: random.Random) -> str:
    syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)]
    return "".join(syllables) + rng.choice(["", "n", "r"])


def rename(story: Story, rng: random.Random) -> Story:
    """Return the story with made-up words for its people and things.

    They keep the policy from learning its nouns by heart: copying has to work for any word.
    """
    things = {event.value for event in story.events if event.value}
    things |= set(story.likes) | {story.cast["o"]} | set(people_of(story.cast))
    fresh = {word: made_up_word(rng) for word in sorted(things)}
    pattern = re.compile(r"\b(" + "|".join(fresh) + r")\b", re.IGNORECASE)

    def replacement(match: re.Match) -> str:
        word = fresh.get(match[0]) or fresh[match[0].lower()]
        return word.capitalize() if match[0][0].isupper() else word

    def swap(text: str) -> str:
        return pattern.sub(replacement, text)

    old, events = story.problem, []
    for event in story.events:
        actor, value, target = swap(event.actor), swap(event.value), swap(event.target)
        events.append(replace(event, actor=actor, value=value, target=target))
    options = tuple(swap(option) for option in old.options)
    return replace(
        story,
        problem=replace(old, story=swap(old.story), question=swap(old.question), options=options),
        trace=swap(story.trace),
        events=tuple(events),
        cast={role: swap(word) for role, word in story.cast.items()},
        likes={swap(value): feeling for value, feeling in story.likes.items()},
    )


def flawed_trace(story: Story, rng: random.Random, config: ColdStartConfig) -> str:
    """Write the trace of a careless policy.

    Its beliefs are wrong in a part of the stories: it takes the shortcut (hard) or misses the last
    event (control). Its form is wrong independently of that, so that the two can be told apart: a
    stage is missing or moved, an option is named early, a stage is said twice.
    """
    world = replay(story)
    views = minds(story, world)
    if story.problem.variant == "hard" and rng.random() < config.shortcut_hard:
        views = readers_minds(story, world)
    elif story.problem.variant == "control" and rng.random() < config.shortcut_control:
        *earlier, (_, value) = views[0]
        views[0] = [*earlier, ("missed", value)]
    texts = write_stages(story, views)
    letter = texts[-1][-2]
    stages = list(zip(STAGES, texts))
    if rng.random() < config.early:
        i = rng.randrange(3)
        name, text = stages[i]
        stages[i] = (name, f"{text} It is option {letter}.")
    if rng.random() < config.repetition:
        i = rng.randrange(4)
        name, text = stages[i]
        stages[i] = (name, f"{text} {text}")
    if rng.random() < config.structure:
        if rng.random() < 0.5:
            del stages[rng.randrange(len(stages))]
        else:
            i, j = rng.sample(range(4), 2)
            stages[i], stages[j] = stages[j], stages[i]
    return format_trace(stages, letter)


def drill(problem: Problem, rng: random.Random, mark: str = ":") -> str:
    """List every option with its letter, in random order: this is what binds letters to texts."""
    pairs = list(zip(problem.options, problem.letters))
    return " ".join(f"{option}{mark} {letter}." for option, letter in rng.sample(pairs, len(pairs)))


# -------------------------------------------------------------------------------------------- rows

Row = tuple[list[int], list[int], bool]  # prompt, continuation, do only the letters count?


def lookup_rows(tokenizer: Tokenizer, config: ColdStartConfig) -> Iterator[Row]:
    """Generate endless rows that teach to look a letter up, without any story.

    Lists that are said twice form the attention heads that find an earlier occurrence. In options,
    the letter comes right behind the word, or behind a colon as it does in traces.
    """
    rng = random.Random(f"lookup {config.seed}")
    nouns = [*MAIN.objects, *MAIN.names, *itertools.chain(*MAIN.values.values())]
    while True:
        words = rng.sample(nouns, 20)
        for i, word in enumerate(words):
            words[i] = made_up_word(rng) if rng.random() < config.invented else word
        if rng.random() < 0.3:
            listed = tokenizer.encode("".join(f" {word}" for word in words))
            yield listed, listed, False
        else:
            problem = Problem("", "", words[:4], "A")
            text = drill(problem, rng, rng.choice(("", ":")))
            yield tokenizer.chat(build_messages(problem)), tokenizer.encode(f" {text}"), True


def story_rows(tokenizer: Tokenizer, config: ColdStartConfig, flawed: bool) -> Iterator[Row]:
    """Generate endless rows of stories with clean or flawed traces, some of them drills."""
    rng = random.Random(f"stories {flawed} {config.seed}")
    end = tokenizer.encode("<|im_end|>")
    for seed in itertools.count(1000 * config.seed + 1):
        stories = generate_stories(3000, seed=seed)
        rng.shuffle(stories)
        for story in stories:
            if rng.random() < config.invented:
                story = rename(story, rng)
            prompt = tokenizer.chat(build_messages(story.problem))
            if rng.random() < (0.2 if flawed else 0.4):
                yield prompt, tokenizer.encode(drill(story.problem, rng)), True
            else:
                trace = flawed_trace(story, rng, config) if flawed else story.trace
                yield prompt, tokenizer.encode(trace) + end, False


def batches_of(rows: Iterator[Row], size: int, pool: int = 16) -> Iterator[list[Row]]:
    """Generate batches of rows of like length, in random order: otherwise half of the time would go
    into padding.
    """
    rng = random.Random("batches")
    while True:
        drawn = list(itertools.islice(rows, size * pool))
        drawn.sort(key=lambda row: len(row[0]) + len(row[1]))
        batches = [drawn[i : i + size] for i in range(0, len(drawn), size)]
        yield from rng.sample(batches, pool)


# ---------------------------------------------------------------------------------------- training


def cold_start_loss(model: Transformer, rows: list[Row], letters: Tensor) -> Tensor:
    """Return the cross-entropy of rows.

    The few letter tokens are the bottleneck, so they have a mean of their own, which is added to
    that of the others. Prompt tokens count a tenth. In drills nothing but letters counts.
    """
    texts = [prompt + continuation for prompt, continuation, _ in rows]
    tokens, valid = pad(texts, letters.device)  # (B, T) each
    logits = model(tokens[:, :-1]).float()
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")  # (B, T - 1)
    starts = torch.tensor([len(prompt) for prompt, _, _ in rows])[:, None]
    drills = torch.tensor([only_letters for _, _, only_letters in rows])[:, None]
    in_prompt = torch.arange(1, tokens.shape[1])[None, :] < starts
    is_letter = torch.isin(tokens[:, 1:], letters) & ~in_prompt
    weights = torch.where(in_prompt, 0.1, 1.0) * valid[:, 1:] * ~is_letter * ~drills
    return losses[is_letter].mean() + (losses * weights).sum() / weights.sum().clamp(min=1)


def supervise(
    model: Transformer,
    rows: Iterator[Row],
    letters: Tensor,
    config: ColdStartConfig,
    steps: int,
    rate: Callable[[int], float],
    name: str,
) -> None:
    """Take `steps` updates on these rows: Muon for matrices, AdamW for the rest.

    Learning rates are multiplied by rate(step).
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in named if p.dim() != 2 or "embed" in name]
    muon = torch.optim.Muon(matrices, lr=0.0, weight_decay=0.0)
    adam = torch.optim.AdamW(others, lr=0.0, betas=(0.9, 0.98), weight_decay=0.0)
    batches = batches_of(rows, config.rows)
    bar = tqdm(range(steps), desc=f"cold start, {name}", unit="step", smoothing=0.05)
    for step in bar:
        loss = cold_start_loss(model, next(batches), letters)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, lr in ((muon, config.muon_lr), (adam, config.adam_lr)):
            optimizer.param_groups[0]["lr"] = lr * rate(step)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if step % 25 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}")


def cold_start(out: Path, config: ColdStartConfig) -> None:
    """Make tokenizer and model from nothing, train the model in three phases, and save both.

    A folder that holds anything is a ValueError, before any work is done.
    """

    def warm_up(step: int) -> float:
        return min(1.0, (step + 1) / 50)

    def flat_then_linear(step: int) -> float:
        x = step / config.clean_steps
        return warm_up(step) * min(1.0, 1 - 0.95 * (x - 0.4) / 0.6)

    def a_quarter_down_to_zero(step: int) -> float:
        return 0.25 * (1 - step / config.flawed_steps)

    refuse_existing(out)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_tokenizer(folder)
        tokenizer = Tokenizer(folder)
        torch.manual_seed(config.seed)
        model = Transformer(parse_config(json.loads((folder / "config.json").read_text())))
        model.source = folder  # saving copies the other files from here
        for p in model.parameters():
            if p.dim() == 2:
                torch.nn.init.normal_(p, std=0.02)
        letters = torch.tensor(sorted({tokenizer.encode(f" {letter}.")[0] for letter in "ABCD"}))
        clean = story_rows(tokenizer, config, flawed=False)
        flawed = story_rows(tokenizer, config, flawed=True)
        for rows, steps, rate, name in (
            (lookup_rows(tokenizer, config), config.lookup_steps, warm_up, "look-up"),
            (clean, config.clean_steps, flat_then_linear, "clean"),
            (flawed, config.flawed_steps, a_quarter_down_to_zero, "flawed"),
        ):
            supervise(model, rows, letters, config, steps=steps, rate=rate, name=name)
        save_model(model.to(torch.bfloat16), out)


def main() -> None:
    parser = Parser(description="Make the embedded policy from nothing: a quarter of an hour.")
    parser.add_argument("out", type=Path, metavar="DIR", help="folder to write the policy to")
    ColdStartConfig.add_flags(parser.add_argument_group("recipe"))
    args = parser.parse_args()
    cold_start(args.out, ColdStartConfig().updated(args))
    print(f"model: {args.out}\nnext: python eval.py --model {args.out} --temperature 1")


if __name__ == "__main__":
    exit_on_error(main)
