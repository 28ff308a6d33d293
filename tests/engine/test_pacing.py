import itertools
import math
import random
from dataclasses import dataclass, field, replace
from statistics import mean

import pytest
from hypothesis import given
from hypothesis import strategies as st
from links import Link as SimulatedLink
from links import best_fixed, run_controlled, stepped

from holotensor_net.engine.pacing import ConcurrencyController, Interval, RateBudget

MB = 1e6
MBIT = 1e6 / 8

# -- the rate budget


def spend_for(budget, seconds, lump, *, begin=0.0, workers=1):
    """Spend as fast as the budget allows; gives the bytes spent. Each of the workers looks before any has spent."""
    now, spent = begin, 0
    while True:
        now += budget.delay(now)
        if now >= begin + seconds:
            return spent
        for _ in range(workers):
            budget.spend(lump, now)
            spent += lump


def test_the_first_byte_need_not_wait():
    assert RateBudget(1000.0).delay(123.0) == 0


def test_a_debt_is_paid_before_more_is_spent():
    budget = RateBudget(1000.0)
    budget.spend(500, 10.0)
    assert budget.delay(10.0) == pytest.approx(0.5)
    assert budget.delay(10.2) == pytest.approx(0.3)
    assert budget.delay(11.0) == 0


def test_without_a_rate_nothing_ever_waits():
    budget = RateBudget(None)
    for now in (0.0, 1.0):
        budget.spend(10**15, now)
        assert budget.delay(now) == 0


@pytest.mark.parametrize(("burst", "saved"), [(None, 50), (0.0, 0), (300.0, 300)])
def test_what_is_not_used_is_saved_up_to_the_burst(burst, saved):
    budget = RateBudget(1000.0, burst=burst)
    budget.spend(1, 0.0)
    budget.spend(saved, 100.0)
    assert budget.delay(100.0) == 0
    budget.spend(100, 100.0)
    assert budget.delay(100.0) == pytest.approx(0.1)


def test_a_clock_that_steps_back_earns_and_costs_nothing():
    budget = RateBudget(1000.0)
    budget.spend(500, 10.0)
    budget.spend(500, 9.0)
    assert budget.delay(10.0) == pytest.approx(1.0)


@given(
    rate=st.floats(1e5, 1e10),
    share=st.floats(2e-3, 1e-2),
    workers=st.integers(1, 4),
    begin=st.floats(0, 1e6),
    idle=st.sampled_from([0.0, 0.01, 100.0]),
)
def test_the_rate_holds_within_three_percent_over_five_seconds(rate, share, workers, begin, idle):
    budget = RateBudget(rate)
    lump = max(1, int(rate * share))
    for start in (begin, begin + 6.0 + idle):
        spent = spend_for(budget, 5.0, lump, begin=start, workers=workers)
        assert spent == pytest.approx(5.0 * rate, rel=0.03)


@pytest.mark.parametrize("rate", [0, -1.0, math.inf, math.nan])
def test_a_rate_is_a_finite_number_above_nothing(rate):
    with pytest.raises(ValueError, match="rate"):
        RateBudget(rate)


@pytest.mark.parametrize("burst", [-1.0, math.inf, math.nan])
def test_a_burst_is_a_finite_number_of_bytes(burst):
    with pytest.raises(ValueError, match="burst"):
        RateBudget(1.0, burst=burst)


# -- the number of connections, on a link that is simulated


@dataclass
class Link:
    """Bytes/s in all and of one connection; noise of the logarithm; connections that it accepts; reads of 16 KiB."""

    rate: float
    each: float = math.inf
    noise: float = 0.0
    accepts: float = math.inf
    seed: int = 0
    seconds: float = 0.25
    _unread: float = 0.0
    _random: random.Random = field(init=False)

    def __post_init__(self):
        self._random = random.Random(f"{self.rate} {self.each} {self.noise} {self.seed}")

    def rate_of(self, connections):
        return min(self.rate, self.each * min(connections, self.accepts))

    def best(self, ceiling):
        return self.rate_of(ceiling)

    def least(self, ceiling):
        return next(n for n in range(1, ceiling + 1) if self.rate_of(n) >= 0.97 * self.best(ceiling))

    def interval(self, limit):
        active = limit
        scatter = math.exp(self._random.gauss(0, self.noise)) if self.noise else 1.0
        came = self._unread + self.rate_of(active) * scatter * self.seconds
        self._unread = came % 16384
        refusals = math.ceil(max(0, active - self.accepts))
        return Interval(self.seconds, int(came - self._unread), float(active), True, refusals)


@dataclass
class Run:
    limits: list
    rates: list
    refusals: int

    def __getitem__(self, steps):
        return Run(self.limits[steps], self.rates[steps], self.refusals)

    @property
    def rate(self):
        return mean(self.rates)

    @property
    def connections(self):
        return mean(self.limits)


def run(link, steps=480, *, ceiling=64, controller=None, initial=4):
    controller = controller or ConcurrencyController(ceiling, initial=initial)
    done = Run([], [], 0)
    for _ in range(steps):
        done.limits.append(controller.limit)
        done.rates.append(link.rate_of(controller.limit))
        interval = link.interval(controller.limit)
        done.refusals += interval.refusals
        assert controller.revise(interval) == controller.limit
        assert 1 <= controller.limit <= ceiling
    return done


RATES = [1 * MBIT, 10 * MBIT, 100 * MBIT, 1000 * MBIT, 10_000 * MBIT]
CAPS = [0.1 * MBIT, 1 * MBIT, 10 * MBIT, 100 * MBIT, 1000 * MBIT, math.inf]

# What a scheduler can see of real links: round trips, slow start, stalls, pieces that have to end. Five seconds are for
# finding out.
GRID = list(itertools.product([1, 10, 100, 1000, 10_000], [0.001, 0.01, 0.05, 0.3], [1, 10, 100, math.inf], [0.0, 0.2]))
STEPS = [{"rate": 8.0}, {"rate": 1 / 8}, {"cap": 4.0}, {"cap": 1 / 4}, {"rate": 2.0}, {"rate": 1 / 2}]
STEPPED = list(itertools.product([10, 100, 1000], [0.001, 0.01, 0.05, 0.3], [5, 50, math.inf], [0.0, 0.2], STEPS))


def simulated(rate, round_trip, cap, stalls, noise=0.05):
    return SimulatedLink(rate * MBIT, round_trip, cap * MBIT, stalls, noise)


def by_round_trip(cells):
    """Cells in groups that can be simulated together."""
    return [list(group) for _, group in itertools.groupby(sorted(cells, key=lambda c: c[1]), key=lambda c: c[1])]


def filled(cells, *, end, seed):
    """Of each cell, the rate as a share of that of the best fixed number of connections, and the connections in use as
    a multiple of the least that would do."""
    shares, multiples = [], []
    for group in by_round_trip(cells):
        links = [simulated(*cell) for cell in group]
        best, least = best_fixed(links, 5, end, seed=seed)
        found = run_controlled(links, end, seed=seed + 1)
        shares.extend(found.rate(5, end) / best)
        multiples.extend(found.connections(5, end) / least)
    return shares, multiples


def followed(cells, *, seed):
    """The same from 5 seconds after a step on."""
    shares = []
    for group in by_round_trip(cells):
        before = [simulated(*cell[:4]) for cell in group]
        after = [stepped([link], **cell[4])[0] for link, cell in zip(before, group, strict=True)]
        best, _ = best_fixed(after, 5, 15, seed=seed)
        shares.extend(run_controlled(before, 23, changes=[(8, after)], seed=seed + 1).rate(13, 23) / best)
    return shares


def most(shares):
    return sum(share >= 0.9 for share in shares) / len(shares)


def test_the_path_is_filled_with_few_connections_on_a_sample_of_links():
    sample = random.Random(5).sample([cell for cell in GRID if cell[1] > 0.001], 24)
    shares, multiples = filled(sample, end=15, seed=0)
    assert most(shares) >= 0.95
    assert mean(multiples) <= 2.0


def test_a_step_is_followed_within_five_seconds_on_a_sample_of_links():
    sample = random.Random(5).sample([cell for cell in STEPPED if cell[1] > 0.01], 16)
    assert most(followed(sample, seed=0)) >= 0.9


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("seed", [0, 7])
def test_the_path_is_filled_with_few_connections_over_the_grid_of_links(seed):
    shares, multiples = filled(GRID, end=25, seed=seed)
    assert most(shares) >= 0.95
    assert mean(multiples) <= 2.0


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_step_is_followed_within_five_seconds_over_the_grid_of_links():
    assert most(followed(STEPPED, seed=0)) >= 0.9


def test_without_noise_never_more_than_twice_the_least_once_it_is_found():
    for rate, cap in itertools.product(RATES, CAPS):
        link = Link(rate, cap)
        assert max(run(link)[120:].limits) <= 2 * link.least(64)


def test_start_up_doubles_while_that_brings_in_proportion():
    assert run(Link(1e12, 20 * MB), 6).limits == [4, 4, 8, 16, 32, 64]


def test_a_knee_between_two_numbers_is_approached_from_above():
    steady = run(Link(200 * MB, 20 * MB), 200)[60:]
    assert steady.rate >= 0.99 * 200 * MB
    assert 10 <= steady.connections <= 17


def test_one_connection_is_enough_where_one_fills_the_path():
    steady = run(Link(50 * MBIT), 200)[40:]
    assert steady.connections < 1.5
    assert max(steady.limits) <= 2


def test_a_soft_bend_is_followed_to_where_more_hardly_brings_more():
    class Soft(Link):
        def rate_of(self, connections):
            return self.rate * (1 - math.exp(-connections / 12))

    steady = run(Soft(900 * MB), 300)[60:]
    assert steady.rate >= 0.9 * 900 * MB
    assert 20 <= steady.connections <= 64


@pytest.mark.parametrize("noise", [0.0, 0.03])
@pytest.mark.parametrize(
    ("before", "after", "cap"),
    [
        (400, 50, math.inf),
        (50, 400, math.inf),
        (400, 50, 40),
        (50, 400, 40),
        (400, 800, 40),
        (800, 400, 40),
    ],
)
def test_a_step_of_the_link_is_followed(before, after, cap, noise):
    link = Link(before * MBIT, cap * MBIT, noise)
    controller = ConcurrencyController(64)
    run(link, 80, controller=controller)
    link.rate = after * MBIT
    found = run(link, 120, controller=controller)
    assert found[20:].rate >= 0.97 * link.rate
    assert found[60:].connections <= 2 * link.least(64)


def test_connections_that_become_slower_are_made_up_for_within_two_seconds():
    link = Link(50 * MB, 10 * MB, 0.03)
    controller = ConcurrencyController(64)
    run(link, 80, controller=controller)
    link.each = 2 * MB
    found = run(link, 40, controller=controller)
    assert mean(found.rates[8:16]) >= 0.9 * 50 * MB


def test_a_rate_that_swings_from_one_sample_to_the_next_is_noise_and_no_change():
    controller = ConcurrencyController(64)
    run(Link(50 * MB), 60, controller=controller)
    swinging = [Interval(0.25, size, 1.0, True) for size in (9_000_000, 17_000_000)]
    limits = [controller.revise(interval) for interval in swinging * 4]
    assert limits == [1] * 8
    assert run(Link(50 * MB), 200, controller=controller)[60:].connections <= 1.5


def test_a_short_outage_costs_no_connections():
    link = Link(50 * MB, 5 * MB, 0.03)
    controller = ConcurrencyController(64)
    run(link, 80, controller=controller)
    before = controller.limit
    link.rate = 0.0
    run(link, 8, controller=controller)
    link.rate = 50 * MB
    assert controller.limit >= before
    assert run(link, 60, controller=controller)[4:].rate >= 0.95 * 50 * MB


# -- refusals


@pytest.mark.parametrize("noise", [0.0, 0.03, 0.1])
@pytest.mark.parametrize("accepts", [1, 2, 3, 4, 6, 8, 12, 16, 24, 40, 60])
def test_a_server_that_refuses_is_used_as_far_as_it_goes(accepts, noise):
    link = Link(1e12, 20 * MB, noise, accepts=accepts)
    found = run(link, 200)
    assert found[20:].rate >= 0.9 * accepts * 20 * MB
    assert found.refusals <= 0.02 * 200 * link.seconds * accepts * 5 + 10  # 4 MiB pieces: five a second each


def test_a_trial_that_is_refused_falls_back_to_where_it_came_from():
    controller = ConcurrencyController(64)
    limits = run(Link(1e12, 20 * MB, accepts=10), 6, controller=controller).limits
    assert limits[:5] == [4, 4, 8, 16, 8]


def test_what_was_refused_is_tried_again_later_and_found_open():
    link = Link(1e12, 20 * MB, 0.03, accepts=8)
    controller = ConcurrencyController(64)
    run(link, 100, controller=controller)
    assert controller.limit <= 9
    link.accepts = 32
    found = run(link, 240, controller=controller)
    assert found[200:].rate >= 0.9 * 32 * 20 * MB


def test_a_server_that_accepts_fewer_than_before_is_obeyed():
    link = Link(1e12, 20 * MB, 0.03, accepts=32)
    controller = ConcurrencyController(64)
    run(link, 100, controller=controller)
    link.accepts = 6
    found = run(link, 100, controller=controller)
    assert max(found[40:].limits) <= 9
    assert found[40:].rate >= 0.9 * 6 * 20 * MB


def test_a_refusal_by_chance_now_and_then_costs_next_to_nothing():
    link, chance = Link(500 * MB, 20 * MB, 0.03), random.Random(1)
    controller, rates = ConcurrencyController(64), []
    for _ in range(800):
        rates.append(link.rate_of(controller.limit))
        seen = link.interval(controller.limit)
        controller.revise(Interval(seen.seconds, seen.bytes, seen.active, True, int(chance.random() < 0.05)))
    assert mean(rates[40:]) >= 0.9 * 500 * MB


def test_two_refusals_at_the_start_are_believed():
    controller = ConcurrencyController(64)
    refused = Interval(0.005, 10_000, 4.0, True, refusals=1, served=2)
    assert [controller.revise(refused) for _ in range(2)] == [4, 2]


def test_refusals_on_the_way_from_before_the_last_step_down_are_not_counted_again():
    controller = ConcurrencyController(64, initial=16)
    storm = Interval(0.01, 0, 16.0, True, refusals=4)
    assert controller.revise(storm) == 12
    assert [controller.revise(storm) for _ in range(10)] == [12] * 10


@pytest.mark.parametrize(("served", "limit"), [(0, 8), (6, 6), (1, 4), (8, 8), (12, 12), (20, 8)])
def test_what_was_served_is_what_remains_of_a_trial_that_is_refused(served, limit):
    controller = ConcurrencyController(64)
    while controller.limit < 16:
        controller.revise(Link(1e12, 20 * MB).interval(controller.limit))
    assert controller.revise(Interval(0.1, 10**6, 16.0, True, refusals=3, served=served)) == limit


def test_what_turns_out_to_be_served_after_a_refusal_is_the_limit_for_a_while():
    controller, link = ConcurrencyController(64), Link(1e12, 20 * MB)
    while controller.limit < 16:
        controller.revise(link.interval(controller.limit))
    assert controller.revise(Interval(0.01, 10**6, 16.0, True, refusals=1, served=9)) == 9
    assert controller.revise(Interval(0.1, 10**6, 14.0, True, served=11)) == 11
    limits = [controller.revise(replace(link.interval(controller.limit), served=11)) for _ in range(48)]
    assert max(limits) == 11  # for twelve seconds
    link.accepts = 32
    run(link, 120, controller=controller)
    assert controller.limit >= 16


def test_refusals_take_the_last_connection_but_one():
    controller = ConcurrencyController(64)
    for _ in range(50):
        controller.revise(Interval(1.0, 0, float(controller.limit), True, refusals=10))
    assert controller.limit == 1


# -- what says nothing


@pytest.mark.parametrize(
    "interval",
    [
        Interval(0.25, 10**7, 4.0, saturated=False),
        Interval(0.25, 0, 4.0, saturated=True),
        Interval(0.0, 10**7, 4.0, saturated=True),
        Interval(0.25, 10**7, 1.0, saturated=True),
        Interval(0.0, 0, 0.0, saturated=True),
    ],
    ids=["idle", "empty", "no time", "unused", "nothing"],
)
def test_an_interval_that_says_nothing_changes_nothing(interval):
    controller = ConcurrencyController(64)
    assert {controller.revise(interval) for _ in range(100)} == {4}


def test_a_higher_number_that_never_comes_into_use_is_given_up():
    controller = ConcurrencyController(64)
    limits = [controller.revise(Interval(0.25, 10**7, 4.0, True)) for _ in range(23)]
    assert limits == [4, *[8] * 21, 4]


def test_a_lower_number_is_not_judged_while_pieces_from_before_still_run():
    link = Link(50 * MB)
    controller = ConcurrencyController(64)
    while controller.limit >= 4:
        controller.revise(link.interval(controller.limit))
    lower = controller.limit
    for _ in range(100):
        assert controller.revise(Interval(0.25, 12_500_000, 4.0, True)) == lower


def test_slow_intervals_are_put_together_until_they_hold_enough_reads():
    controller = ConcurrencyController(64)
    limits = [controller.revise(Interval(0.25, 16384, 4.0, True)) for _ in range(8)]
    assert limits == [4, 4, 4, 4, 4, 4, 4, 8]


def test_a_burst_is_no_rate():
    controller = ConcurrencyController(64)
    while controller.limit < 8:
        controller.revise(Interval(0.01, 200_000, 4.0, True, lump=10_000))
    assert controller.revise(Interval(0.01, 600_000, 8.0, True, lump=500_000)) == 8
    limits = [controller.revise(Interval(0.01, 200_000, 8.0, True, lump=10_000)) for _ in range(24)]
    assert max(limits) == 8
    assert limits[-1] < 8


def test_what_comes_beyond_proportion_does_not_end_a_climb():
    controller = ConcurrencyController(64)
    while controller.limit < 8:
        controller.revise(Interval(0.1, 1_000_000, 4.0, True))
    assert controller.revise(Interval(0.1, 20_000_000, 8.0, True)) == 16  # ten times as much as is likely
    assert controller.revise(Interval(0.1, 4_000_000, 16.0, True)) == 32
    assert controller.revise(Interval(0.1, 8_000_000, 32.0, True)) == 64


def looked(controller, size, seconds=0.02):
    return controller.revise(Interval(seconds, size, float(controller.limit), True))


def behind_a_hole():
    """A controller that has begun to try eight, of a path of 10 MB/s that stood still for a moment just before."""
    controller = ConcurrencyController(64)
    for size, seconds in ((600_000, 0.06), (20_000, 0.02), (120_000, 0.02)):
        looked(controller, size, seconds)
    assert controller.limit == 8
    return controller


def test_what_comes_at_one_go_after_a_hole_is_no_gain():
    controller = behind_a_hole()
    assert looked(controller, 400_000) == 8  # of which 200 000 are what the hole held back
    assert looked(controller, 260_000) == 8
    limits = [looked(controller, 200_000) for _ in range(8)]
    assert max(limits) == 8
    assert limits[-1] == 4  # eight bring what four did, but for the hole


def test_a_gain_that_lasts_longer_than_what_a_hole_held_back_is_believed():
    controller = behind_a_hole()
    assert [looked(controller, 400_000) for _ in range(3)] == [8, 8, 16]


def test_a_path_that_stood_still_for_longer_than_it_moved_owes_nothing():
    controller = ConcurrencyController(64)
    for size, seconds in ((600_000, 0.03), (20_000, 0.05), (120_000, 0.02)):
        looked(controller, size, seconds)
    assert controller.limit == 8
    assert looked(controller, 400_000) == 16


def test_a_lull_before_more_has_brought_evidently_more_is_no_debt():
    controller = ConcurrencyController(64)
    looked(controller, 200_000)
    controller.rouse()
    controller.revise(Interval(0.06, 1_200_000, 6.0, True))  # they are still being begun
    looked(controller, 20_000)
    assert looked(controller, 560_000) == 16
    assert looked(controller, 580_000) == 32


# -- bounds


@pytest.mark.parametrize("ceiling", [1, 2, 3, 5])
def test_a_low_ceiling_is_kept(ceiling):
    assert max(run(Link(1e12, 20 * MB), 100, ceiling=ceiling).limits) == ceiling


@pytest.mark.parametrize(("ceiling", "initial"), [(0, 4), (-1, 4), (4, 0)])
def test_there_is_one_connection_at_least(ceiling, initial):
    with pytest.raises(ValueError, match="1 or more"):
        ConcurrencyController(ceiling, initial=initial)


@given(
    ceiling=st.integers(1, 100),
    initial=st.integers(1, 100),
    intervals=st.lists(
        st.builds(
            Interval,
            st.floats(0, 100),
            st.integers(0, 10**12),
            st.floats(0, 100) | st.just(-1.0),
            st.booleans(),
            st.sampled_from([0, 0, 0, 1, 5, 1000]),
        ),
        max_size=60,
    ),
)
def test_whatever_is_measured_the_limit_stays_within_its_bounds(ceiling, initial, intervals):
    controller = ConcurrencyController(ceiling, initial=initial)
    assert controller.limit == min(ceiling, initial)
    for interval in intervals:
        active = float(controller.limit) if interval.active < 0 else interval.active
        controller.revise(Interval(interval.seconds, interval.bytes, active, interval.saturated, interval.refusals))
        assert 1 <= controller.limit <= ceiling


def test_short_looks_that_scatter_make_the_climb_go_less_far():
    def connections(seed):
        """On average over the first three seconds, of a path that one connection fills, and that comes in bursts."""
        scatter, controller, now, total = random.Random(seed), ConcurrencyController(64), 0.0, 0.0
        while now < 3.0:
            seconds = controller.seconds
            noise = math.exp(scatter.gauss(0, 0.7 * math.sqrt(0.01 / seconds)))
            now, total = now + seconds, total + seconds * controller.limit
            got = int(50e6 * seconds * noise)
            controller.revise(Interval(seconds, got, float(controller.limit), True, round_trip=0.003, lump=1e4))
        return total / now

    assert mean(connections(seed) for seed in range(100)) <= 13  # 16 if looks are taken at their word
