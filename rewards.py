"""The reward of one trajectory, term by term (METHOD.md section 3) [P: the form; O: the verifiable stand-ins]:

    R = R_fmt * ( w_out * R_out + tau(t) * ( w_struct * R_struct + w_content * R_content ) ) * R_len

Each term maps a problem and a parsed response to a float in [0, 1]; the total comes with its parts, so that each is logged.
Model output is hostile input: any text has a defined reward, found in linear time, without an exception.
"""
import math
import re
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

from socialr1 import STAGES, Problem, Response


def setting(default, help: str):
    """A config field that knows its meaning; the command line takes its help from here."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class RewardConfig:
    """Weights and constants of the reward. A weight of 0 removes its term: that is how the ablations run."""

    w_out: float = setting(1.0, "weight of R_out, the right letter [O]")
    w_struct: float = setting(0.5, "weight of R_struct, the four stages in order [O]")
    w_content: float = setting(0.5, "weight of R_content, grounding in the story [O]; no model for it yet: left out")
    min_length: int = setting(32, "tokens; the length window is 0.5 here ... [O]")
    max_length: int = setting(1024, "... and here [O]")
    sharpness: float = setting(50.0, "steepness k of the length window [P]")
    tau_start: float = setting(0.2, "curriculum, outcome first [P: the idea; O: the numbers]: weight of the process terms at first")
    tau_from: float = setting(0.0, "share of the run until which it stays there")
    tau_to: float = setting(0.6, "share of the run from which it is 1")

    def __post_init__(self):
        if not 0 < self.min_length < self.max_length:
            raise ValueError(f"--min-length {self.min_length} --max-length {self.max_length}: expected 0 < min < max")
        if not 0 <= self.tau_from <= self.tau_to <= 1 or not 0 <= self.tau_start <= 1:
            raise ValueError("--tau-start, --tau-from and --tau-to are shares in [0, 1], and --tau-from comes before --tau-to")
        weights = (self.w_out, self.w_struct, self.w_content)
        if not all(0 <= weight < math.inf for weight in weights) or not 0 < self.sharpness < math.inf:
            raise ValueError("--w-out, --w-struct and --w-content must be finite and 0 or more, --sharpness finite and above 0")


@dataclass(frozen=True)
class Reward:
    total: float
    parts: dict[str, float | None]  # fmt, out, struct, content (None when not computed), len, tau


def format_reward(response: Response, problem: Problem) -> float:
    """R_fmt in {0, 1}: one think block with text, then one answer block with one existing letter, nothing else."""
    return float(response.well_formed)


def outcome_reward(response: Response, problem: Problem) -> float:
    """R_out in {0, 1}: the letter is right."""
    return float(response.answer == problem.answer)


# ------------------------------------------------------------------------------------------------------------- structure

_CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W_{_CJK}]+")


def words(text: str) -> list[str]:
    """Case-folded words; a CJK character counts as a word."""
    return _WORD.findall(text.casefold())


_NAMED_LETTER = re.compile(
    r"(?i:\b(?:option|choice|answer)s?\b|选项|答案)(?i:[ \t]{0,3}(?:is\b|是))?[ \t:：*\"'“‘(\[]{0,4}([A-Z])" + rf"(?![^\W{_CJK}])"
    r"|[(（]([A-Z])[)）]"
    r"|^[ \t]{0,8}([A-Z])[.)]",
    re.MULTILINE,
)


def names_option(text: str, problem: Problem) -> bool:
    """Does the text name an option: by its letter, or by quoting one of four words or more (METHOD.md section 3)?"""
    if any(match[match.lastindex] in problem.letters for match in _NAMED_LETTER.finditer(text)):
        return True
    quoted, known = (f" {' '.join(words(t))} " for t in (text, f"{problem.story}\n{problem.question}"))
    runs = [words(option) for option in problem.options]
    return any(len(run) >= 4 and (needle := f" {' '.join(run)} ") in quoted and needle not in known for run in runs)


def stage_order(response: Response) -> float:
    """Longest increasing subsequence of the present stages / stages present; 0 when none is present."""
    tails: list[int] = []  # tails[i]: smallest last stage of an increasing run of length i + 1
    for name, _ in response.stages:
        index = STAGES.index(name)
        tails[bisect_left(tails, index) : bisect_left(tails, index) + 1] = [index]
    return len(tails) / len(response.stages) if response.stages else 0.0


def early_options(response: Response, problem: Problem) -> list[bool]:
    """For each passage before the answer stage (other stages, wherever they stand, and any preamble): does it name an option?"""
    passages = [text for name, text in response.stages if name != STAGES[-1]]
    passages += [response.preamble] if response.preamble else []
    return [names_option(text, problem) for text in passages]


def structure_reward(response: Response, problem: Problem) -> float:
    """R_struct in [0, 1] = coverage x order x independence [O]; 0 when no stage is present."""
    if not response.stages:
        return 0.0
    early = early_options(response, problem)
    independence = 1 - sum(early) / len(early) if early else 1.0
    return len(response.stages) / len(STAGES) * stage_order(response) * independence


# ---------------------------------------------------------------------------------------------------- length, curriculum


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def length_reward(
    response: Response, length: int, min_length: int = 32, max_length: int = 1024, sharpness: float = 50.0
) -> float:
    """R_len in [0, 1]: a soft window over `length` (sampled tokens, EOS included) x distinct / all 4-grams of the think text."""
    if min_length >= max_length:
        raise ValueError(f"min_length {min_length} must be below max_length {max_length}")
    scale = sharpness / (max_length - min_length)
    window = _logistic(scale * (length - min_length)) * _logistic(-scale * (length - max_length))
    text = words(response.think)
    grams = list(zip(text, text[1:], text[2:], text[3:]))
    return window * (len(set(grams)) / len(grams) if grams else 1.0)


def curriculum(step: int, steps: int, config: RewardConfig) -> float:
    """tau in [0, 1] at `step` (0-based) of `steps`: tau_start until x = tau_from, then linear to 1 at x = tau_to."""
    x = step / (steps - 1) if steps > 1 else 1.0
    if x >= config.tau_to:
        return 1.0
    if x <= config.tau_from:
        return config.tau_start
    return config.tau_start + (1 - config.tau_start) * (x - config.tau_from) / (config.tau_to - config.tau_from)


def total_reward(
    response: Response,
    problem: Problem,
    length: int,
    tau: float = 1.0,
    content: Callable[[Response, Problem], float] | None = None,
    config: RewardConfig = RewardConfig(),
) -> Reward:
    """R and its parts. Without a content scorer R_content is None and left out of the sum; the other weights stay."""
    parts: dict[str, float | None] = {
        "fmt": format_reward(response, problem),
        "out": outcome_reward(response, problem),
        "struct": structure_reward(response, problem),
        "content": content(response, problem) if content is not None and config.w_content else None,
        "len": length_reward(response, length, config.min_length, config.max_length, config.sharpness),
        "tau": tau,
    }
    process = config.w_struct * parts["struct"] + config.w_content * (parts["content"] or 0.0)
    return Reward(parts["fmt"] * (config.w_out * parts["out"] + tau * process) * parts["len"], parts)


if __name__ == "__main__":
    raise SystemExit("error: training the content model (R_content) is not written yet; nothing was done")
