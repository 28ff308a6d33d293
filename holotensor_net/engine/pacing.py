"""How fast, and with how many connections at once. Pure: no threads and no clock; times are arguments.

The controller looks for the least number of connections that fills the path. On most paths the rate grows in proportion
to their number up to a knee and is flat above it; on some the bend is soft. So two numbers are compared by logarithms:
*p* times the connections pay if the rate grows by more than a tenth of what proportion would bring, p^0.1. One rule for
all pairs cannot creep: many small steps end where a large one does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import ConfigurationError

__all__ = ["ConcurrencyController", "Interval", "RateBudget"]

_LEAST_SHARE = 0.1  # of the proportional gain, below which more connections do not pay
_LARGEST_SHARE = 0.35  # the same where the rate scatters so much that less cannot be told from none
_EVIDENT_SHARE = 0.5  # believed at the first look
_LOOKS = 5  # samples after which a trial ends, clear or not
_PATIENCE = 20  # intervals in which a higher number may fail to come into use
_REST = 8  # samples between two trials
_MOST_RESTS = 8  # between two trials of fewer connections, which cost throughput
_CHANGE = 0.25  # of a logarithm: a rate so different is another path
_RETRY = 15.0  # seconds before a number that was refused is tried again
_LONGEST_RETRY = 300.0
_ENOUGH_BYTES = 256 * 1024  # of a sample; reads come in lumps
_ENOUGH_SECONDS = 1.0


class RateBudget:
    """Bytes that may be spent by now, at ``rate`` bytes/s; None is without limit.

    Spending may go into debt, which is paid off before more may be spent: what was spent is exact in the long run,
    whatever the size of a read. What is not used is saved up to ``burst`` bytes, a twentieth of a second's by default.
    """

    def __init__(self, rate: float | None, *, burst: float | None = None) -> None:
        if rate is not None and not 0 < rate < math.inf:
            raise ConfigurationError(f"rate must be a number of bytes/s above 0, or None, not {rate!r}")
        if burst is not None and not 0 <= burst < math.inf:
            raise ConfigurationError(f"burst must be a number of bytes, 0 or more, not {burst!r}")
        self._rate = math.inf if rate is None else rate
        self._burst = self._rate / 20 if burst is None else burst
        self._saved = 0.0
        self._at = -math.inf

    def delay(self, now: float) -> float:
        """Seconds from ``now`` until more may be spent; 0 for at once."""
        return max(0.0, -self._balance(now) / self._rate)

    def spend(self, size: int, now: float) -> None:
        """Count ``size`` bytes, before or after the fact."""
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
    limited it. ``refusals``: answers that asked for less (429, 503), and timeouts. Long enough to hold many reads.
    """

    seconds: float
    bytes: int
    active: float
    saturated: bool
    refusals: int = 0


class ConcurrencyController:
    """The least number of connections that fills the path: ``limit``, from 1 to ``ceiling``.

    It rests at one number, the base, and tries others one at a time until it is clear which of the two is better::

        search    more, by as much again as the last step brought, while that pays; then fewer: half as many, or
                  where a line from below the knee reaches the full rate; then rest
        at rest   half as many more, after every eight samples; a third fewer, ever more rarely while nothing
                  changes (steps are larger where the rate scatters); search anew when the rate is another

    That more pays is believed at first sight if it is evident; that fewer will do needs a second look, so that a lull
    costs no connections. What refusals do is told at ``_Refusals``. Not thread-safe: whoever measures has a lock.
    """

    def __init__(self, ceiling: int, *, initial: int = 4) -> None:
        if ceiling < 1 or initial < 1:
            raise ConfigurationError(f"ceiling and initial must be 1 or more, not {ceiling!r} and {initial!r}")
        self._refusals = _Refusals(ceiling)
        self._sampler = _Sampler()
        self._noise = _Noise()
        self._base = min(initial, ceiling)
        self._base_rate = _Mean()
        self._trial: int | None = None
        self._trial_rate = _Mean()
        self._too_few: tuple[int, float] | None = None  # a number below the knee, and its rate
        self._unused = 0
        self._surprise = 0.0
        self._rest_left = 1
        self._schedule(fewer_at=2)

    @property
    def limit(self) -> int:
        """Connections that may be used at once."""
        return self._base if self._trial is None else self._trial

    def revise(self, interval: Interval) -> int:
        """Learn from an interval; gives the limit for the next."""
        if self._refusals.are_too_many(interval, self.limit, is_trial=self.limit > self._base):
            self._back_off()
        elif interval.saturated and self._is_in_use(interval.active):
            rate = self._sampler.add(interval)
            if rate is not None:
                learn = self._stay if self._trial is None else self._judge
                learn(math.log(rate))
        return self.limit

    def _is_in_use(self, active: float) -> bool:
        """Whether as many are in use as the limit says: pieces that began before it was lowered may still run."""
        if abs(active - self.limit) <= max(0.5, 0.15 * self.limit):
            return True
        self._unused += 1
        if self.limit > self._base and self._unused > _PATIENCE:
            self._rest()
        return False

    # -- at rest

    def _stay(self, rate: float) -> None:
        base, before = self._base_rate, self._surprise
        surprise = base.deviation(rate)
        is_odd = abs(surprise) > max(_CHANGE, 3 * self._noise.deviation)
        if is_odd and surprise * before > 0:
            self._begin_anew()
            return
        if before:  # it was noise after all
            self._noise.learn(before)
        self._surprise = surprise if is_odd else 0.0
        if not is_odd:
            if base.count:
                self._noise.learn(rate - base.last)
            base.add(rate)
            self._rest_left -= 1
            if self._rest_left <= 0:
                self._probe()

    def _begin_anew(self) -> None:
        self._base_rate = _Mean()
        self._too_few = None
        self._rest()
        self._rest_left = 2
        self._schedule(fewer_at=2)

    def _probe(self) -> None:
        factor = max(1.5, min(2.0, math.exp(3.5 * self._noise.deviation)))
        self._rests += 1
        if self._rests < self._rests_until_fewer:
            self._try_more(2.0 if self._too_few is None else factor)
        else:
            self._schedule(fewer_at=min(2 * self._rests_until_fewer, _MOST_RESTS))
            self._too_few = None
            self._try_fewer(int(self._base / factor))

    def _rest(self) -> None:
        self._change_to(None)
        self._surprise = 0.0
        self._rest_left = _REST
        if self._base != self._rested_at:  # growth is checked from the other side before it goes on
            self._schedule(fewer_at=1 if self._base > self._rested_at else 2)

    def _schedule(self, *, fewer_at: int) -> None:
        self._rests = 0
        self._rests_until_fewer = fewer_at
        self._rested_at = self._base

    # -- trials

    def _change_to(self, trial: int | None) -> None:
        self._trial = trial
        self._trial_rate = _Mean()
        self._unused = 0
        self._sampler.clear()

    def _try_more(self, factor: float) -> None:
        level = self._refusals.allow(self._base, round(self._base * factor))
        if level > self._base:
            self._change_to(level)
        else:
            self._narrow()

    def _try_fewer(self, level: int) -> None:
        if 1 <= level <= 0.9 * self._base:
            self._change_to(level)
        else:
            self._rest()

    def _narrow(self) -> None:
        """Try the number at which a line from below the knee reaches the full rate; half as many, if none is known."""
        if self._too_few is None:
            self._try_fewer(self._base // 2)
            return
        low, low_rate = self._too_few
        knee = math.ceil(0.98 * low * _ratio(self._base_rate.value - low_rate))
        knee = max(knee, low + math.ceil((self._base - low) / 4))
        if math.log(self._base / knee) > 4 * self._noise.deviation:  # less could not be told apart
            self._try_fewer(knee)
        else:
            self._rest()

    def _judge(self, rate: float) -> None:
        trial, base = self._trial_rate, self._base_rate
        is_rising = self.limit > self._base and trial.count > 0 and rate - trial.last > 2 * self._noise.deviation
        trial.add(rate)
        step = math.log(self.limit / self._base)
        share = (trial.value - base.value) / step
        error = 2 * self._noise.error(trial, base) / abs(step)
        is_clear = abs(share - _LEAST_SHARE) > error
        if share < _EVIDENT_SHARE:
            is_clear = is_clear and trial.count >= 2 and not is_rising
        if is_clear or trial.count >= _LOOKS:
            self._conclude(share, more_pays=share > min(_LARGEST_SHARE, max(_LEAST_SHARE, error)))

    def _conclude(self, share: float, *, more_pays: bool) -> None:
        trial, trial_rate, is_more = self.limit, self._trial_rate, self.limit > self._base
        growth = _ratio(trial_rate.value - self._base_rate.value)
        if more_pays:
            fewer, rate = (self._base, self._base_rate) if is_more else (trial, trial_rate)
            self._too_few = fewer, rate.value
        if more_pays == is_more:
            self._base, self._base_rate = trial, trial_rate
            self._refusals.forgive(trial)
        if more_pays and is_more and share > _EVIDENT_SHARE:
            self._try_more(min(2.0, growth))
        else:
            self._narrow()

    def _back_off(self) -> None:
        if self.limit <= self._base:
            self._base = max(1, min(self._base - 1, self._base * 3 // 4))
        self._begin_anew()


class _Refusals:
    """Which numbers of connections the server refused, and when to ask again.

    One refusal ends a trial of more connections. At rest one may be chance, and two within a second or so take a
    quarter of the connections away; where there are many, it takes one refusal for every twelve. The search goes on
    below the number that was refused, half way each time. That number itself is tried again after 15 seconds, and the
    wait is doubled each time that it is refused again.
    """

    def __init__(self, ceiling: int) -> None:
        self._ceiling = ceiling
        self._refused: int | None = None
        self._score = 0.0
        self._deaf = 0.0
        self._wait = 0.0
        self._next_wait = _RETRY

    def are_too_many(self, interval: Interval, limit: int, *, is_trial: bool) -> bool:
        self._wait -= interval.seconds
        self._deaf -= interval.seconds
        if self._deaf > 0:  # refused before the limit was lowered
            return False
        self._score = self._score * math.exp(-interval.seconds) + interval.refusals
        if not interval.refusals or self._score < max(1 if is_trial else 2, limit / 12):
            return False
        if self._refused is not None and limit >= self._refused:
            self._next_wait = min(2 * self._next_wait, _LONGEST_RETRY)
        self._refused, self._wait = limit, self._next_wait
        self._score, self._deaf = 0.0, 0.5
        return True

    def allow(self, base: int, wanted: int) -> int:
        """The number to try in place of ``wanted``; if it is not above ``base``, none may be tried."""
        wanted = min(self._ceiling, max(base + 1, wanted))
        if self._refused is None:
            return wanted
        if self._wait > 0:
            return min(wanted, self._refused - 1, (base + self._refused + 1) // 2)
        return min(wanted, max(base + 1, self._refused))

    def forgive(self, level: int) -> None:
        """This number was accepted."""
        if self._refused is not None and level >= self._refused:
            self._refused, self._next_wait = None, _RETRY


class _Sampler:
    """Rates of as many intervals together as it takes to hold enough reads."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self._seconds = 0.0
        self._bytes = 0

    def add(self, interval: Interval) -> float | None:
        self._seconds += interval.seconds
        self._bytes += interval.bytes
        is_enough = self._bytes >= _ENOUGH_BYTES or self._seconds >= _ENOUGH_SECONDS
        if not is_enough or self._bytes <= 0 or self._seconds <= 0:
            return None
        rate = self._bytes / self._seconds
        self.clear()
        return rate


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


def _ratio(difference: float) -> float:
    """The ratio of two rates from the difference of their logarithms, kept within bounds."""
    return math.exp(max(-10.0, min(10.0, difference)))
