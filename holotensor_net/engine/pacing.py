"""How fast, and with how many connections at once. Pure: no threads and no clock; times are arguments.

The controller looks for the least number of connections that fills the path. On most paths the rate grows in proportion
to their number up to a knee and is flat above it; on some the bend is soft. So two numbers are compared by logarithms:
*p* times the connections pay if the rate grows by more than p^0.05, which is 3.5 % for twice as many.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..errors import ConfigurationError

__all__ = ["ConcurrencyController", "Interval", "RateBudget"]

_LEAST_SHARE = 0.05  # of the proportional gain, below which more connections do not pay
_EVIDENT_SHARE = 0.5  # believed at the first look
_RISING = 0.1  # of a logarithm, from one look to the next: connections that have just begun still grow faster
_LOOKS = 8  # at a rung of the climb before it is given up: new connections take some round trips to show
_DOUBT = 0.02  # of a logarithm: what short looks leave in doubt
_LONGEST_RUNG = 0.5  # seconds after which the climb goes on if the rate still rises
_SAMPLES = 8  # after which a trial at rest ends, clear or not
_ENOUGH_SAMPLES = 4  # at the base, before anything is compared with it
_MORE_EVERY = 8  # samples at rest
_FEWER_AFTER = 16  # samples at rest, doubled each time
_FEWER_AT_LEAST_EVERY = 256
_SHORT = 0.01  # seconds of a look, at least
_LONG = 0.1  # seconds of a sample at rest, at least
_BEGINNING = 0.5  # seconds in which many that begin at once may get in each other's way
_CHANGE = 0.2  # of a logarithm: a rate so different is another path
_PATIENCE = 20  # intervals in which a higher number may fail to come into use
_RETRY = 15.0  # seconds before a number that was refused is tried again
_LONGEST_RETRY = 300.0
_DEAF = 0.2  # seconds for which what was asked before a refusal is still being answered
_ENOUGH_BYTES = 128 * 1024  # of a sample
_ENOUGH_LUMPS = 8  # of a sample
_ENOUGH_SECONDS = 1.0


class RateBudget:
    """Bytes, or requests, that may be spent by now, at ``rate`` of them a second; None is without limit.

    Spending may go into debt, which is paid off before more may be spent: what was spent is exact in the long run,
    whatever the size of a read. What is not used is saved up to ``burst``, a twentieth of a second's by default.
    """

    def __init__(self, rate: float | None, *, burst: float | None = None) -> None:
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigurationError(f"rate must be a number above 0, or None, not {rate!r}")
        if burst is not None and not 0 <= burst < math.inf:
            raise ConfigurationError(f"burst must be a number, 0 or more, not {burst!r}")
        self._rate = math.inf if rate is None else rate
        self._burst = self._rate / 20 if burst is None else burst
        self._saved = 0.0
        self._at = -math.inf

    def delay(self, now: float, *, ahead: float = 0.0) -> float:
        """Seconds from ``now`` until more may be spent, once others have spent what is ``ahead``; 0 for at once."""
        return max(0.0, (ahead - self._balance(now)) / self._rate)

    def spend(self, size: int, now: float) -> None:
        """Count so much, before or after the fact."""
        if self._rate < math.inf:
            self._saved = self._balance(now) - size
            self._at = max(now, self._at)

    def _balance(self, now: float) -> float:
        if self._at == -math.inf:
            return 0.0
        return min(self._burst, self._saved + max(0.0, now - self._at) * self._rate)


@dataclass(frozen=True, slots=True)
class Interval:
    """What was measured since the limit was last revised.

    ``active``: connections in use, on average. ``saturated``: whether work was waiting, so that their number was what
    limited it. ``refusals``: answers that asked for less (429, 503), and timeouts. ``round_trip``: the least seconds
    from a question to its answer that were seen; 0 if none has been yet. ``lump``: bytes of a read, on average over
    the bytes. ``served``: the most connections that had answers at once under this limit; 0 if that is not known.
    """

    seconds: float
    bytes: int
    active: float
    saturated: bool
    refusals: int = 0
    round_trip: float = 0.0
    lump: float = 0.0
    served: int = 0


class ConcurrencyController:
    """The least number of connections that fills the path: ``limit``, from 1 to ``ceiling``.

    It learns in one way: it tries another number and compares the rates. The best number so far is the base::

        climb   twice as many, as long as that pays or the rate still rises: at the start, and when the path is another
        fewer   half as many; if those are too few, half way back; ever more rarely while nothing changes
        more    half as many again, every few seconds: what has become possible shows nowhere else
        rest    at the base, watching: a rate that is another twice running belongs to another path

    A climb takes short looks, and believes at once what is evident; it may go too far, which costs nothing but
    connections, and is taken back. At rest a trial takes samples until it is clear, eight at most; what stays unclear
    changes nothing. ``seconds`` is how long the next interval should be: looks last a round trip, samples two. What
    refusals do is told at ``_Refusals``. Not thread-safe: whoever measures has a lock.
    """

    def __init__(self, ceiling: int, *, initial: int = 4) -> None:
        if ceiling < 1 or initial < 1:
            raise ConfigurationError(f"ceiling and initial must be 1 or more, not {ceiling!r} and {initial!r}")
        self._refusals = _Refusals(ceiling)
        self._sampler = _Sampler()
        self._noise = _Noise()
        self._scatter = _Noise()  # of looks
        self._round_trip = 0.0
        self._base = min(initial, ceiling)
        self._base_rate = _Mean()
        self._trial: int | None = None
        self._trial_rate = _Mean()
        self._looks: list[tuple[float, float]] | None = []  # of a climb: the logarithm of the rate, and seconds
        self._debt = _Debt()
        self._too_few = 0  # the largest number that is known to be too few
        self._settling = 0.0
        self._unused = 0
        self._surprise = 0.0
        self._more_in = self._fewer_in = 0
        self._fewer_wait = _FEWER_AFTER

    def heir(self, ceiling: int, *, after: float) -> ConcurrencyController:
        """One for another transfer on the same path, so many seconds later: it begins with what this one found. A climb
        that had not come to its end, or came to its ceiling, goes on; so does one that refusals ended, once their
        number may be tried again."""
        heir = copy.deepcopy(self)
        is_found = self._looks is None and self._base < self._refusals.ceiling and self._base <= ceiling
        heir._refusals.outlive(after, ceiling)
        heir._base = min(self._base, ceiling)
        heir._rest()
        heir._sampler = _Sampler()
        heir._debt = _Debt()
        if not is_found or heir._refusals.is_forgiving:
            heir._forget()
            heir._looks = []
        else:
            heir._settling = max(_BEGINNING, 4 * self._round_trip)
            heir._more_in = _MORE_EVERY
            if self.limit < self._base:  # a trial that was cut short
                heir._fewer_in = 0
        return heir

    @property
    def has_learnt(self) -> bool:
        """Whether anything is known yet."""
        return self._base_rate.count > 0 or self._refusals.refused <= self._refusals.ceiling

    @property
    def limit(self) -> int:
        """Connections that may be used at once."""
        return self._base if self._trial is None else self._trial

    @property
    def is_climbing(self) -> bool:
        """Whether it still looks for the number that fills the path."""
        return self._looks is not None

    @property
    def may_climb(self) -> bool:
        """Whether it still looks for it, and there are higher ones to try."""
        return self._looks is not None and self._refusals.allow(self.limit, 2 * self.limit) > self.limit

    @property
    def most(self) -> int:
        """Connections that may be used for a moment: fewer than were refused."""
        return max(self.limit, self._refusals.most)

    @property
    def seconds(self) -> float:
        """How long the next interval should be."""
        if self._looks is not None:
            return max(_SHORT, self._round_trip)
        return self._settling if self._settling > 0 else max(_LONG, 2 * self._round_trip)

    def revise(self, interval: Interval) -> int:
        """Learn from an interval; gives the limit for the next."""
        self._round_trip = interval.round_trip
        if self._looks is not None:
            interval = replace(interval, bytes=interval.bytes - self._debt.paid(interval))
        if self._refusals.are_too_many(interval, self.limit, is_trial=self.limit > self._base):
            self._back_off(interval.served)
        elif self._refusals.is_deaf and not interval.refusals:
            self._keep_what_is_served(interval.served)
        elif interval.saturated and self._is_in_use(interval.active):
            if self._settling > 0:
                self._settling -= interval.seconds
            elif (rate := self._sampler.add(interval)) is not None:
                learn = self._climb if self._looks is not None else self._stay if self._trial is None else self._judge
                learn(math.log(rate))
        return self.limit

    def rouse(self) -> None:
        """All connections have had bytes, and for as long as some came none came any more: the path is not full, with
        no need of another look. A climb goes on."""
        if self._looks is not None:
            looks = [*self._looks, *self._sampler.rest()]
            self._debt = _Debt()
            self._climb_on(_together(looks) if looks else None)

    def _is_in_use(self, active: float) -> bool:
        """Whether as many are in use as the limit says. Pieces that began before it was lowered may still run: they
        spoil a trial, but hardly what is known of the base."""
        excess, tolerance = active - self.limit, max(0.5, 0.15 * self.limit)
        if abs(excess) <= tolerance or (self._trial is None and excess > 0):
            return True
        self._unused += 1
        if self.limit > self._base and self._unused > _PATIENCE:
            self._rest()
        return False

    # -- climbing

    def _climb(self, rate: float) -> None:
        """One look while climbing: go on, look again, or stop."""
        looks, is_first = self._looks, not self._base_rate.count
        assert looks is not None
        if looks and rate < looks[-1][0]:  # what rises is no scatter, but what falls is
            self._scatter.learn(rate - looks[-1][0])
        scatter = self._scatter.deviation
        is_rising = not looks or rate > max(before for before, _ in looks[-3:]) + max(_RISING, 3 * scatter)
        looks.append((rate, self._sampler.took))
        latest = _together(looks[-max(3, len(looks) // 2) :])
        proportional = math.log(self.limit / self._base)
        is_evident = not is_first and rate - self._base_rate.value > max(_EVIDENT_SHARE * proportional, 3 * scatter)
        if is_evident or (is_rising and len(looks) * self.seconds > _LONGEST_RUNG):
            self._debt = _Debt()  # a path that brings ever more holds nothing back: it may come in bursts
            self._climb_on(rate)
        elif not is_rising and len(looks) >= (2 if is_first else _LOOKS):
            error = scatter / math.sqrt(len(looks) / 2)
            if is_first or latest - self._base_rate.value > _LEAST_SHARE * proportional + max(_DOUBT, error):
                self._climb_on(latest)
            else:
                self._more_in = _MORE_EVERY  # more has just been tried
                self._base_rate = _Mean()  # what looks told does not compare with samples
                self._rest()
                self._settling = _LONG  # what was on the way for others still comes, perhaps at one go

    def _climb_on(self, rate: float | None) -> None:
        """Take the number that is tried for the base, and try twice as many, or as many as may be tried. What came
        beyond proportion was a burst. ``rate``: None if it is not known."""
        most = math.inf
        if self._trial is not None:
            if self._base_rate.count:
                most = self._base_rate.value + math.log(self.limit / self._base)
            self._grow()
        if self._looks is None:
            self._debt = _Debt()
        usual = self._debt.reckon(most)
        self._base_rate = _Mean()
        if rate is not None:
            self._base_rate.add(min(most, max(rate, usual)))
        self._rest()
        level = self._refusals.allow(self._base, 2 * self._base)
        if level > self._base:
            self._trial, self._looks = level, []

    def _grow(self) -> None:
        """Take a higher number for the base. It will be checked from the other side before long."""
        self._too_few, self._base = self._base, self.limit
        self._refusals.forgive(self._base)
        self._fewer_wait = _FEWER_AFTER
        self._fewer_in = min(self._fewer_in, _FEWER_AFTER // 2)

    # -- at rest

    def _stay(self, rate: float) -> None:
        base, before = self._base_rate, self._surprise
        surprise = base.deviation(rate)
        is_odd = abs(surprise) > max(_CHANGE, 3 * self._noise.deviation)
        if is_odd and surprise * before > 0:
            self._forget()
            self._climb_on(rate)
            return
        if before:  # it was noise after all
            self._noise.learn(before)
        self._surprise = surprise if is_odd else 0.0
        if not is_odd:
            if base.count:
                self._noise.learn(rate - base.last)
            base.add(rate)
            self._more_in -= 1
            self._fewer_in -= 1
            if base.count >= _ENOUGH_SAMPLES:
                self._probe(is_rising=surprise > 2 * self._noise.deviation)

    def _forget(self) -> None:
        """Nothing that is known of other numbers holds any more."""
        self._scatter = _Noise()
        self._base_rate = _Mean()
        self._too_few = 0
        self._more_in = self._fewer_in = 0
        self._fewer_wait = _FEWER_AFTER
        self._rest()

    def _probe(self, *, is_rising: bool) -> None:
        if self._more_in <= 0:
            level = self._refusals.allow(self._base, math.ceil(1.5 * self._base))
            self._more_in = _MORE_EVERY
            if level > self._base:
                self._change_to(level)
                self._settling = 2 * self._round_trip
        elif self._fewer_in <= 0 and not is_rising:
            self._too_few = 0
            self._fewer_wait = min(2 * self._fewer_wait, _FEWER_AT_LEAST_EVERY)
            self._fewer_in = self._fewer_wait
            self._try_fewer()

    def _rest(self) -> None:
        """End whatever is tried."""
        self._change_to(None)
        self._looks = None
        self._surprise = 0.0

    # -- trials at rest

    def _change_to(self, trial: int | None) -> None:
        self._trial = trial
        self._trial_rate = _Mean()
        self._settling = 0.0
        self._unused = 0
        self._sampler.clear()

    def _try_fewer(self) -> None:
        """Half as many, or half way between too few and enough."""
        level = max(self._base // 2, math.ceil(math.sqrt(self._base * self._too_few)) if self._too_few else 0)
        if 1 <= level <= 0.8 * self._base:
            self._change_to(level)
        else:
            self._rest()

    def _judge(self, rate: float) -> None:
        trial, base = self._trial_rate, self._base_rate
        is_more = self.limit > self._base
        is_rising = is_more and trial.count > 0 and rate - trial.last > 2 * self._noise.deviation
        if trial.count:
            self._noise.learn(rate - trial.last)
        trial.add(rate)
        proportional = math.log(self.limit / self._base)
        share = (trial.value - base.value) / proportional
        error = self._noise.error(trial, base) / abs(proportional)
        is_clear = abs(share - _LEAST_SHARE) > 2 * error
        if trial.count < 2:
            is_clear = share > _EVIDENT_SHARE + 2 * error
        elif share < _EVIDENT_SHARE:
            is_clear = is_clear and not is_rising
        if is_clear or trial.count >= _SAMPLES:
            if is_more:
                self._conclude_more(share, pays=share > _LEAST_SHARE + error)
            else:
                self._conclude_fewer(will_do=share < _LEAST_SHARE + error)

    def _conclude_more(self, share: float, *, pays: bool) -> None:
        if pays and share > _EVIDENT_SHARE:
            self._climb_on(self._trial_rate.value)
            return
        if pays:
            self._base_rate = self._trial_rate
            self._grow()
        self._rest()

    def _conclude_fewer(self, *, will_do: bool) -> None:
        if will_do:
            self._base, self._base_rate = self.limit, self._trial_rate
        else:
            self._too_few = self.limit
        self._try_fewer()

    def _back_off(self, served: int) -> None:
        """To what was served, if that is known; but no lower than half, as not all may have begun yet."""
        if self.limit <= self._base:
            fewer = self._base - 1 if self._refusals.was_told else self._base * 3 // 4
            self._base = max(1, min(self._base - 1, fewer))
        if served:
            self._base = max(1, min(self._base, max(served, self._base // 2)))
        self._keep_what_is_served(served)
        self._forget()
        self._fewer_in = _FEWER_AFTER

    def _keep_what_is_served(self, served: int) -> None:
        """Where some are refused, as many as are served are what may be had. Fewer than were accepted before prove
        nothing: they were not all at work."""
        if self._base <= served < self._refusals.refused:
            self._base = self._refusals.served = served


class _Refusals:
    """Which numbers of connections the server refused, and when to ask again.

    One refusal ends a trial of more connections. At rest one may be chance, and two within a second or so take a
    quarter of the connections away; where there are many, it takes one refusal for every twelve; but each takes one
    away where the number is one that was served while others were refused. As many as were served
    while others were refused are the most that there are; where that is not known, the search goes on below the number
    that was refused, half way each time. What was refused is tried again after 15 seconds, and the wait is doubled each
    time that it is refused again.
    """

    def __init__(self, ceiling: int) -> None:
        self.ceiling = ceiling
        self._refused: int | None = None
        self.served = 0  # at once, while others were refused; 0 if that is not known
        self.was_told = False  # how many are served, before the last refusal
        self._score = 0.0
        self._deaf = 0.0
        self._wait = 0.0
        self._next_wait = _RETRY

    @property
    def is_deaf(self) -> bool:
        """Whether what was asked before the limit was lowered is still being answered."""
        return self._deaf > 0

    @property
    def refused(self) -> int:
        """The least number that was refused; one too many, if none was."""
        return self.ceiling + 1 if self._refused is None else self._refused

    @property
    def most(self) -> int:
        """Numbers up to this one have not been refused."""
        return self.refused - 1

    @property
    def is_forgiving(self) -> bool:
        """Whether some were refused, so long ago that as many may be tried again."""
        return self._refused is not None and self._wait <= 0

    def outlive(self, seconds: float, ceiling: int) -> None:
        """So much time has passed, without a question; and another ceiling holds."""
        self.ceiling = ceiling
        self._wait -= seconds
        self._score = self._deaf = 0.0

    def are_too_many(self, interval: Interval, limit: int, *, is_trial: bool) -> bool:
        self._wait -= interval.seconds
        self._deaf -= interval.seconds
        if self._deaf > 0:  # refused before the limit was lowered
            return False
        self._score = self._score * math.exp(-interval.seconds) + interval.refusals
        self.was_told = self.served > 0
        if not interval.refusals or self._score < (1 if is_trial or self.was_told else max(1.5, limit / 12)):
            return False
        if self._refused is not None and limit >= self._refused:
            self._next_wait = min(2 * self._next_wait, _LONGEST_RETRY)
        self._refused, self._wait, self.served = limit, self._next_wait, 0
        self._score, self._deaf = 0.0, _DEAF
        return True

    def allow(self, base: int, wanted: int) -> int:
        """The number to try in place of ``wanted``; if it is not above ``base``, none may be tried."""
        wanted = min(self.ceiling, max(base + 1, wanted))
        if self._refused is None:
            return wanted
        if self._wait > 0:
            if self.served:
                return min(wanted, max(base, self.served))
            return min(wanted, self._refused - 1, (base + self._refused + 1) // 2)
        return min(wanted, max(base + 1, self._refused))

    def forgive(self, level: int) -> None:
        """This number was accepted."""
        if self._refused is not None and level >= self._refused:
            self._refused, self._next_wait = None, _RETRY


class _Sampler:
    """Rates of as many intervals together as it takes to hold enough reads."""

    def __init__(self) -> None:
        self._has_begun = False
        self.took = 0.0  # seconds, the last of them
        self.clear()

    def clear(self) -> None:
        self._seconds = 0.0
        self._bytes = 0
        self._squares = 0.0

    def rest(self) -> list[tuple[float, float]]:
        """What is not enough for a rate yet, all the same: its logarithm, and seconds; nothing if there is none."""
        is_any = self._bytes > 0 and self._seconds > 0
        return [(math.log(self._bytes / self._seconds), self._seconds)] if is_any else []

    def add(self, interval: Interval) -> float | None:
        if not interval.bytes and not self._has_begun:
            return None  # the first answer is still to come
        self._has_begun = True
        self._seconds += interval.seconds
        self._bytes += interval.bytes
        self._squares += interval.bytes * interval.lump
        is_even = self._bytes**2 >= _ENOUGH_LUMPS * self._squares
        is_enough = (self._bytes >= _ENOUGH_BYTES and is_even) or self._seconds >= _ENOUGH_SECONDS
        if not is_enough or self._bytes <= 0 or self._seconds <= 0:
            return None
        rate, self.took = self._bytes / self._seconds, self._seconds
        self.clear()
        return rate


class _Debt:
    """What a path owes: where a packet is lost, what follows it waits for it to come again, and then comes at one go.
    That is not the rate of the connections that there are by then.

    What is usual at a rung is what half of its time brought at least: the debt is what came less than that lately. A
    path that stands still for longer than it moved owes nothing, as it is not full.
    """

    def __init__(self) -> None:
        self._usual = 0.0  # bytes/s, at the rung before
        self._owed = 0.0  # bytes
        self._seen: list[tuple[float, float]] = []  # at this rung: bytes/s, without what was owed, and seconds

    def paid(self, interval: Interval) -> int:
        """Bytes of an interval that were owed."""
        if interval.seconds <= 0:
            return 0
        beyond = interval.bytes - self._usual * interval.seconds
        paid = max(0, int(min(self._owed, beyond)))
        self._owed = max(0.0, self._owed - beyond)
        self._seen.append(((interval.bytes - paid) / interval.seconds, interval.seconds))
        return paid

    def reckon(self, most: float) -> float:
        """Another rung begins; gives the logarithm of what was usual at this one, of ``most`` at most."""
        usual = min(most, _usual(self._seen))
        self._usual, self._owed = math.exp(usual), 0.0
        for rate, seconds in self._seen:
            self._owed = max(0.0, self._owed + (self._usual - rate) * seconds)
        self._seen.clear()
        return usual


def _usual(seen: Sequence[tuple[float, float]]) -> float:
    """The logarithm of the rate that half of the seconds bring at least."""
    half = sum(seconds for _, seconds in seen) / 2
    for rate, seconds in sorted(seen):
        half -= seconds
        if half <= 0:
            return math.log(rate) if rate > 0 else -math.inf
    return -math.inf


def _together(looks: Sequence[tuple[float, float]]) -> float:
    """The logarithm of the rate of looks together: bursts and the pauses after them count by their seconds."""
    return math.log(sum(math.exp(rate) * took for rate, took in looks) / sum(took for _, took in looks))


class _Mean:
    """The mean of the last values, eight or so."""

    def __init__(self) -> None:
        self.value = self.last = 0.0
        self.count = 0

    def add(self, value: float) -> None:
        self.count = min(self.count + 1, 8)
        self.value += (value - self.value) / self.count
        self.last = value

    def deviation(self, value: float) -> float:
        return value - self.value if self.count else 0.0


class _Noise:
    """How much the logarithm of the rate scatters while nothing changes. Supposed to be 5 % before it is known."""

    def __init__(self) -> None:
        self._variance = 0.05**2
        self._count = 3

    @property
    def deviation(self) -> float:
        return math.sqrt(self._variance)

    def learn(self, difference: float) -> None:
        """Count the difference of two samples; no larger one than 0.5, and never less noise than 1 %."""
        self._count = min(self._count + 1, 30)
        self._variance += (min(0.5, abs(difference)) ** 2 / 2 - self._variance) / self._count
        self._variance = max(1e-4, self._variance)

    def error(self, one: _Mean, other: _Mean) -> float:
        return self.deviation * math.sqrt(1 / one.count + 1 / max(1, other.count))
