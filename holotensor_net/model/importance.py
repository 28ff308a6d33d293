"""What matters first in a model, read from the names of its tensors.

**Reading a name.** It is split at dots and slashes into segments, and these at underscores, digits and capitals into
words. Only whole words count, the nearest to the end first: ``SelfAttention`` speaks of *attention*, and
``diffusion_model`` of no *ff*. The first ``layers.7``, ``h.7``, ``blk.7`` or ``mid_block`` … is its block, and all up
to the number its stack. The three flights of a U-Net (down, middle, up) are one stack, which begins and ends at its
outermost blocks. Its first and last block are the *ends* of a stack.

**Ranking it.** A level, and an importance that orders within the level::

    CRITICAL  1           embeddings; the time embedding; the first convolution
              0.95        norms, wherever they are
              0.9         biases and other small tensors of the ends
              0.8 … 0.4   whatever else is in the ends
              0.3         heads; the last convolution
    HIGH      1 … 0.95    biases and other small tensors elsewhere: they cost nothing
              0.95        what joins two towers, and other layers outside all stacks
              0.9 … 0.1   attention, expert routers, time and position in the other blocks
    NORMAL    0.95        what is outside all stacks and says nothing of itself
              0.9 … 0.1   feed-forward, experts, convolutions and all else in the other blocks
    LOW       0           what inference does without: averaged copies, optimizer state, heads that guess further
                          tokens, attention masks, indices, frequencies that are computed anyway

A range falls from the block that runs first to the block that runs last, over all stacks together.

**A caller's opinion** overrides this for the tensors that it knows: a ``Priority``, which keeps the importance above;
a ``(Priority, importance)``; or one number from 0 to 1, from which the level follows too, so that the caller's numbers
alone decide the order: CRITICAL from 0.75, HIGH above 0.5, NORMAL from 0.25, LOW below.
"""

from __future__ import annotations

import enum
import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from numbers import Real
from typing import Any, NamedTuple, TypeAlias, TypeGuard

from ..errors import ConfigurationError
from ..values import Priority

__all__ = ["Opinion", "Rank", "layer_order", "rank_names"]

Opinion: TypeAlias = float | Priority | tuple[Priority, float] | None
"""What a caller thinks of a tensor; None leaves it to the default."""


@dataclass(frozen=True, slots=True)
class Rank:
    """How urgent a tensor is: ``importance`` in [0, 1] orders within ``priority``.

    ``layer`` is the number of its block, None outside all blocks and in the middle of a U-Net. ``part`` is one of
    "embedding", "norm", "attention", "router", "feed_forward", "convolution", "time" (the time step and what it
    modulates), "projection", "head", "unused", "other".
    """

    priority: Priority
    importance: float
    layer: int | None
    part: str


def rank_names(
    names: Iterable[str] | Mapping[str, int],
    importance: Callable[[str], Opinion] | Mapping[str, Opinion] | None = None,
) -> dict[str, Rank]:
    """The rank of every tensor, most urgent first; equal ranks in order of execution.

    ``names`` are all tensors of a model, or a mapping to their sizes in bytes, which tells more small tensors. The
    order in which they are given does not matter. ``importance`` is asked first: a function, or a mapping whose keys
    are names or glob patterns (a name wins over patterns, an earlier pattern over later ones).

    Raises ConfigurationError, naming tensor and value, for anything else than an opinion.
    """
    survey = _Survey(names)
    sizes: Mapping[str, int] = names if isinstance(names, Mapping) else {}
    ask = _asker(importance)
    ranks = {}
    for name, default in survey.ranks(sizes).items():
        opinion = ask(name)
        ranks[name] = default if opinion is None else _overridden(default, name, opinion)
    return dict(sorted(ranks.items(), key=lambda item: (item[1].priority, -item[1].importance)))


def layer_order(names: Iterable[str]) -> list[str]:
    """The names in the order in which a model runs them: 10 after 9, encoders first, heads last.

    What inference does without stays in its block, or comes after all the rest.
    """
    return _Survey(names).in_order()


# --- the caller's opinion ---


def _asker(importance: Callable[[str], Opinion] | Mapping[str, Opinion] | None) -> Callable[[str], Opinion]:
    if importance is None:
        return lambda name: None
    if not isinstance(importance, Mapping):
        return importance
    globs = [
        (re.compile(fnmatch.translate(key)).match, opinion)
        for key, opinion in importance.items()
        if any(sign in key for sign in "*?[")
    ]

    def look_up(name: str) -> Opinion:
        if name in importance:
            return importance[name]
        return next((opinion for matches, opinion in globs if matches(name)), None)

    return look_up


def _overridden(default: Rank, name: str, opinion: Opinion) -> Rank:
    if isinstance(opinion, Priority):
        return replace(default, priority=opinion)
    priority, number = opinion if isinstance(opinion, tuple) and len(opinion) == 2 else (None, opinion)
    if _is_number(number) and 0.0 <= number <= 1.0 and (priority is None or isinstance(priority, Priority)):
        level = _level_of(number) if priority is None else priority
        return replace(default, priority=level, importance=float(number))
    raise ConfigurationError(
        f"the importance of {name!r} must be a number from 0 to 1, a Priority, or both as a pair, not {opinion!r}"
    )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, Priority)


def _level_of(number: float) -> Priority:
    if number >= 0.75:
        return Priority.CRITICAL
    if number > 0.5:
        return Priority.HIGH
    return Priority.NORMAL if number >= 0.25 else Priority.LOW


# --- the model ---


class _Stack(NamedTuple):
    """Blocks that run one after the other. ``turn``: when, as a key to sort by."""

    name: str
    turn: tuple[Any, ...]
    is_unused: bool


class _Place(NamedTuple):
    """A block of a stack, or where a tensor outside all stacks stands."""

    turn: tuple[Any, ...]
    stack: _Stack | None = None
    position: tuple[int, int] = (0, 0)
    layer: int | None = None


class _Kind(NamedTuple):
    """What a name says of the tensor itself. ``turn``: when it runs within its place."""

    part: str
    is_small: bool
    is_last: bool = False
    turn: tuple[Any, ...] = ()


class _Survey:
    """All names of a model, read together: only so is it known which blocks come last.

    Stacks, and the blocks of one, are alike: each beginning and each end of a name is read once.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._places: dict[str, _Place] = {}
        self._kinds: dict[tuple[str, str], _Kind] = {}
        self._stack_of = cache(_read_stack)
        self._outside = cache(_read_outside)
        self._keys = {name: self._read(name) for name in names}
        places = sorted(self._places, key=lambda key: (self._places[key].turn, key))
        kinds = sorted(self._kinds, key=lambda key: (self._kinds[key].turn, key))
        self._place_turn = {place: number for number, place in enumerate(places)}
        self._kind_turn = {kind: number for number, kind in enumerate(kinds)}

    def _read(self, name: str) -> tuple[str, tuple[str, str]]:
        """The keys of its place and its kind."""
        block = _BLOCK.search(name)
        if block is None or block[0] == "input_blocks.0":  # in the original Stable Diffusion, the first convolution
            pattern = _LONG_NUMBER.sub("10", name)  # numbers count up, and only small ones mean anything
            turn, self._kinds["outside", pattern] = self._outside(pattern)
            self._places[name] = _Place((*turn, _natural(name)))
            return name, ("outside", pattern)
        place, rest = name[: block.end()], name[block.end() :]
        if place not in self._places:
            self._places[place] = self._read_block(block)
        if ("inside", rest) not in self._kinds:
            self._kinds["inside", rest] = _read_inside(rest)
        return place, ("inside", rest)

    def _read_block(self, block: re.Match[str]) -> _Place:
        before, number = block.string[: block.start()], None if block["number"] is None else int(block["number"])
        flight = next((flight for flight in _FLIGHTS if block[flight]), None)
        stack = self._stack_of(before, block.string[block.start() : block.start("number")] if flight is None else "")
        # the original decoder calls its outermost block up.0, diffusers its innermost up_blocks.0
        step = -(number or 0) if block["up"] == "up" else number or 0
        position = (0 if flight is None else _FLIGHTS.index(flight), step)
        return _Place((*stack.turn, position), stack, position, number)

    def in_order(self) -> list[str]:
        keys, place_turn, kind_turn = self._keys, self._place_turn, self._kind_turn
        return sorted(keys, key=lambda name: (place_turn[keys[name][0]], kind_turn[keys[name][1]]))

    def ranks(self, sizes: Mapping[str, int]) -> dict[str, Rank]:
        """The default rank of every tensor, in order of execution."""
        ends, small = self._ends(), self._small(sizes)
        blocks = [key for key in self._place_turn if self._places[key].stack is not None]
        progress = {block: number / len(blocks) for number, block in enumerate(blocks)}
        ranks = {}
        for name in self.in_order():
            place_key, kind_key = self._keys[name]
            place, kind = self._places[place_key], self._kinds[kind_key]
            if place.stack is None:
                priority, importance = _urgency_outside(kind.part, kind.is_last, name in small)
                ranks[name] = Rank(priority, importance, None, kind.part)
            else:
                part = "unused" if place.stack.is_unused else kind.part
                priority, importance = _urgency_inside(part, progress[place_key], place_key in ends, name in small)
                ranks[name] = Rank(priority, importance, place.layer, part)
        return ranks

    def _ends(self) -> set[str]:
        """The blocks that begin or end their stack."""
        stacks: dict[str, list[str]] = {}
        for block in self._place_turn:
            stack = self._places[block].stack
            if stack is not None:
                stacks.setdefault(stack.name, []).append(block)
        return {end for blocks in stacks.values() for end in (blocks[0], blocks[-1])}

    def _small(self, sizes: Mapping[str, int]) -> set[str]:
        """Tensors that cost nothing beside the largest of their block, by name or by size."""
        largest: dict[str, int] = {}
        for name, size in sizes.items():
            block = self._block_of(name)
            largest[block] = max(size, largest.get(block, 0))
        small = {name for name, (_, kind) in self._keys.items() if self._kinds[kind].is_small}
        return small | {
            name
            for name, size in sizes.items()
            if size <= min(_SMALL_BYTES, largest[self._block_of(name)] // _SMALL_SHARE)
        }

    def _block_of(self, name: str) -> str:
        place = self._keys[name][0]
        return "" if self._places[place].stack is None else place


# Rows of the table in the module's docstring, one function for each kind of place.


def _urgency_outside(part: str, is_last: bool, is_small: bool) -> tuple[Priority, float]:
    match part:
        case "unused":
            return Priority.LOW, 0.0
        case "norm":
            return Priority.CRITICAL, 0.95
        case "embedding" | "time":
            return Priority.CRITICAL, 1.0
        case "head" | "convolution":
            return Priority.CRITICAL, 0.3 if is_last else 1.0
        case "other":
            return (Priority.HIGH, 1.0) if is_small else (Priority.NORMAL, 0.95)
    return Priority.HIGH, 0.95


def _urgency_inside(part: str, progress: float, is_end: bool, is_small: bool) -> tuple[Priority, float]:
    if part == "unused":
        return Priority.LOW, 0.0
    if part == "norm":
        return Priority.CRITICAL, 0.95
    if is_end:
        return Priority.CRITICAL, 0.9 if is_small else 0.8 - 0.4 * progress
    if is_small:
        return Priority.HIGH, 1.0 - 0.05 * progress
    early = part in ("attention", "router", "time", "embedding")
    return Priority.HIGH if early else Priority.NORMAL, 0.9 - 0.8 * progress


# --- where a name stands ---

# A word that holds numbered blocks, and the number. ``(?<![^…])``: at the start, or after one of these.
_BLOCK = re.compile(
    r"(?<![^./_])(?:(?P<middle>mid|mid_block|middle|middle_block)(?![^./])|(?:"
    r"(?P<down>down|down_blocks|downsamples|input_blocks)|(?P<up>up|up_blocks|upsamples|output_blocks)"
    r"|layers?|blocks?|resblocks|stages?|transformer|blk|h)[./_]?(?P<number>[0-9]{1,9})(?![^./]))"
)
_FLIGHTS = ("down", "middle", "up")
_NUMBER = re.compile(r"([0-9]+)")
_LONG_NUMBER = re.compile(r"[0-9]{2,}")


class _Phase(enum.IntEnum):
    """When a tower runs in a model of several."""

    SENSES = 0
    BRIDGE = 1
    MAIN = 2
    DECODER = 3
    LATENT_ENCODER = 4
    LATENT_DECODER = 5
    HEADS = 6
    NEVER = 7


class _Stage(enum.IntEnum):
    """When a part runs in its tower."""

    ENTRY = 0
    BLOCKS = 1
    AFTER = 2
    EXIT = 3


def _read_stack(before: str, container: str) -> _Stack:
    is_unused = _UNUSED.search(before) is not None
    phase, tower = _tower(_segments(before))
    name = before + container
    turn = (_Phase.NEVER if is_unused else phase, tower, _Stage.BLOCKS, "single" in _words(before), _natural(name))
    return _Stack(name, turn, is_unused)


def _read_inside(rest: str) -> _Kind:
    part = "unused" if _UNUSED.search(rest) else _part_of(_segments(rest), inside=True)
    step = _STEP.match(rest)
    within = (1, 0, 0) if step is None else (0, int(step["number"]), step["kind"] in ("attentions", "attn"))
    return _Kind(part, _SMALL.search(rest) is not None, turn=(within, _RUNS.get(part, 9), _natural(rest)))


def _read_outside(name: str) -> tuple[tuple[Any, ...], _Kind]:
    segments = _segments(name)
    part = "unused" if _UNUSED.search(name) else _part_of(segments, inside=False)
    phase, tower = _tower(segments)
    if part == "unused":
        phase = _Phase.NEVER
    elif part == "head" and phase != _Phase.SENSES:
        phase = _Phase.HEADS
    stage = _stage_of(part, phase, _all_words(segments))
    return (phase, tower, stage), _Kind(part, _SMALL.search(name) is not None, is_last=stage == _Stage.EXIT)


def _stage_of(part: str, phase: _Phase, words: frozenset[str]) -> _Stage:
    if phase == _Phase.BRIDGE:
        return _Stage.AFTER
    if part == "convolution" and "quant" in words:  # one of the two around the latent image
        return _Stage.ENTRY if "post" in words else _Stage.EXIT
    if part == "head" or (part == "convolution" and "out" in words):
        return _Stage.EXIT
    if part == "norm" or (part == "time" and words & _LAST_TIMES):
        return _Stage.ENTRY if words & _FIRST_NORMS else _Stage.AFTER
    return _Stage.ENTRY


def _tower(segments: list[_Segment]) -> tuple[_Phase, tuple[Any, ...]]:
    """Which phase of the model a path belongs to; for what looks, listens and reads also which tower."""
    words = _all_words(segments)
    if words & _BRIDGE:
        return _Phase.BRIDGE, ()
    senses = [at for at, (_, seen) in enumerate(segments) if seen & _SENSES_OF or seen >= {"text", "encoder"}]
    if senses:
        path = [text for text, _ in segments[: senses[-1] + 2]]
        return _Phase.SENSES, _natural(".".join(path if path[-1].isdigit() else path[: senses[-1] + 1]))
    is_decoder = "decoder" in words or words >= {"post", "quant"}
    if "vae" in words or words >= {"first", "stage"}:
        return (_Phase.LATENT_DECODER if is_decoder else _Phase.LATENT_ENCODER), ()
    return (_Phase.DECODER if is_decoder else _Phase.MAIN), ()


def _natural(text: str) -> tuple[Any, ...]:
    """A key that sorts 10 after 9: numbers by length and then by digit, so that none is too long."""
    runs: list[Any] = _NUMBER.split(text)
    runs[1::2] = [(len(digits), digits) for digits in (run.lstrip("0") for run in runs[1::2])]
    return tuple(runs)


# --- what the words mean ---

_SEPARATOR = re.compile(r"[./]")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")


_Segment: TypeAlias = tuple[str, frozenset[str]]


def _words(text: str) -> frozenset[str]:
    return frozenset(map(str.lower, _WORD.findall(text)))


def _segments(path: str) -> list[_Segment]:
    return [(segment, _words(segment)) for segment in _SEPARATOR.split(path)]


def _all_words(segments: list[_Segment]) -> frozenset[str]:
    return frozenset().union(*(words for _, words in segments))


_NORM = _words("norm norms layernorm layrnorm rmsnorm groupnorm batchnorm ln bn enorm hnorm")  # layrnorm: sic, in CLIP
_EMBEDDING = _words("embed embeds embedding embeddings embedder emb embd wte wpe token tokens")
_TIME = _words("time timestep timesteps")
_OF_TIME = _EMBEDDING | _words("in proj projection")
_MODULATION = _words("temb mod modulation cumprod betas sigmas posterior")
_ATTENTION = _words("attn attention attentions att crossattention mixer ssm qkv wqkv")
_FEED_FORWARD = _words("mlp ff ffn feedforward expert experts moe relu intermediate fc")
_HEAD = _words("head heads classifier logits pooler score predictions")
_MATRIX = _words("linear lin proj")

# Words that tell towers apart, norms that come first, and modulation that comes last.
_BRIDGE = _words("projector merger resampler connector aligner")
_SENSES_OF = _words("vision visual image audio speech vpm apm cond conditioner encoders embedders")
_FIRST_NORMS = _EMBEDDING | {"pre"}
_LAST_TIMES = _NORM | {"final"}

# What a word says only if no other says more; the last two only outside all blocks.
_VAGUE_CONVOLUTION = _words("conv convs convolution shortcut skip op downsample upsample")
_VAGUE_ATTENTION = _words("q k v o kv wq wk wv query key value")
_VAGUE_FEED_FORWARD = _words("output dense linear lin w wi wo")
_VAGUE_PROJECTION = _BRIDGE | {"projection"}
_VAGUE_HEADS = ("output", "output_layer", "proj_out")

# Whole segments that mean something else than their words.
_SEGMENTS = {
    **dict.fromkeys(("lm_head", "embed_out", "text_projection", "visual_projection"), "head"),
    **dict.fromkeys(("t_embedder", "guidance_in"), "time"),
    **dict.fromkeys(("router", "shared_expert_gate", "ffn_gate_inp"), "router"),
    **dict.fromkeys(("up_proj", "down_proj", "gate_proj", "gate_up_proj", "feed_forward", "c_fc"), "feed_forward"),
    **dict.fromkeys(("dense_h_to_4h", "dense_4h_to_h"), "feed_forward"),
}
_SEGMENTS_OUTSIDE = {
    **dict.fromkeys(("cls", "fc", "ff_out", "final_layer", "qa_outputs", "vocab_projector", "vocab_transform"), "head"),
    **dict.fromkeys(("shared", "img_in", "txt_in", "vector_in", "conv_stem"), "embedding"),
}

# The original Stable Diffusion numbers the layers of a sequence instead of naming them.
_NUMBERED = {
    ("input_blocks", "0"): "convolution",
    **dict.fromkeys((("in_layers", "0"), ("out_layers", "0"), ("out", "0")), "norm"),
    **dict.fromkeys((("in_layers", "2"), ("out_layers", "3"), ("out", "2")), "convolution"),
    ("emb_layers", "1"): "time",
}

_SMALL_BYTES = 64 << 10
_SMALL_SHARE = 32  # so many times smaller than the largest of its block
_SMALL = re.compile(r"(?<![^./_])(?:bias|gamma|beta|sinks|A_log|D|logit_scale)$")
_UNUSED = re.compile(
    r"^(?:\w+_)?ema(?:_\w+)?[./]"
    r"|(?<![^./])(?:optimizer\w*|lr_scheduler|exp_avg|exp_avg_sq|momentum_buffer|global_step|_extra_state|mtp"
    r"|inv_freq|freqs_cis|rope[./]freqs|position_ids|relative_position_index|num_batches_tracked|masked_bias"
    r"|(?:attn|attention)[./]bias$)"  # the causal mask of GPT-2 and GPT-NeoX; a true bias belongs to a projection
    r"(?![^./])"
)

# The order within a block: by a numbered layer, as in T5 and U-Nets, then by part.
_STEP = re.compile(r"[./](?:(?P<kind>layer|block|resnets|attentions|attn)[./_])?(?P<number>[0-9]{1,9})[./]")
_RUNS = {"norm": 0, "time": 1, "attention": 2, "convolution": 3, "router": 4, "feed_forward": 5}


def _part_of(segments: list[_Segment], *, inside: bool) -> str:
    return _clear_part(segments, inside) or _vague_part(segments, inside) or "other"


def _clear_part(segments: list[_Segment], inside: bool) -> str | None:
    below: frozenset[str] = frozenset()
    child, has_gate = "", False
    for segment, words in reversed(segments):
        part = _NUMBERED.get((segment, child)) or _SEGMENTS.get(segment)
        part = part or (None if inside else _SEGMENTS_OUTSIDE.get(segment)) or _meaning(words, below, inside)
        if part is not None:
            return "router" if has_gate and part == "feed_forward" else part
        below |= words
        child, has_gate = segment, has_gate or segment == "gate"
    return None


def _meaning(words: frozenset[str], below: frozenset[str], inside: bool) -> str | None:
    if words & _MODULATION or (words & _TIME and words & _OF_TIME):
        return "time"
    if words & _NORM:  # an adaptive norm is a matrix, and not small
        return "time" if below & _MATRIX else "norm"
    if words & _HEAD and not inside:
        return "head"
    if words & _ATTENTION:
        return "attention"
    if words & _EMBEDDING:
        return "embedding"
    return "feed_forward" if words & _FEED_FORWARD else None


def _vague_part(segments: list[_Segment], inside: bool) -> str | None:
    for segment, words in reversed(segments):
        if words & _VAGUE_CONVOLUTION:
            return "convolution"
        if inside and (words & _VAGUE_ATTENTION or segment in ("proj_in", "proj_out")):
            return "attention"
        if inside and words & _VAGUE_FEED_FORWARD:
            return "feed_forward"
        if not inside and segment in _VAGUE_HEADS:
            return "head"
        if not inside and words & _VAGUE_PROJECTION:
            return "projection"
    return None
