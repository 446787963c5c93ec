"""The order of the data: complete, in batches of one bucket, and a function of the seed and the step alone."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from sdlora.data.batches import BatchPlan, sample_seed, spread

BUCKETS = ["square"] * 7 + ["wide"] * 3 + ["square"] * 2 + [(64, 96)]
ONCE, TWICE = [1] * len(BUCKETS), [2] * len(BUCKETS)
MIXED = [10, 1, 1, 3, 10, 1, 2, 5, 1, 1, 1, 10, 7]


@pytest.mark.parametrize("repeats", [1, 2, 5])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 50])
def test_an_epoch_has_every_example_as_often_as_asked(repeats: int, batch_size: int) -> None:
    plan = BatchPlan(BUCKETS, [repeats] * len(BUCKETS), batch_size, seed=3)
    for epoch in range(3):
        batches = [plan.batch(epoch * plan.steps_per_epoch + position) for position in range(plan.steps_per_epoch)]
        assert Counter(index for batch in batches for index in batch) == dict.fromkeys(range(len(BUCKETS)), repeats)
        assert all(len({BUCKETS[index] for index in batch}) == 1 for batch in batches)
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        short = Counter(BUCKETS[batch[0]] for batch in batches if len(batch) < batch_size)
        assert all(count == 1 for count in short.values())  # one short batch a bucket at most


@pytest.mark.parametrize("batch_size", [1, 3, 4, 50])
def test_repeats_of_its_own_show_each_example_as_often_as_it_says(batch_size: int) -> None:
    plan = BatchPlan(BUCKETS, MIXED, batch_size, seed=3)
    for epoch in range(3):
        batches = [plan.batch(epoch * plan.steps_per_epoch + position) for position in range(plan.steps_per_epoch)]
        assert Counter(index for batch in batches for index in batch) == dict(enumerate(MIXED))
        assert all(len({BUCKETS[index] for index in batch}) == 1 for batch in batches)
        short = Counter(BUCKETS[batch[0]] for batch in batches if len(batch) < batch_size)
        assert all(count == 1 for count in short.values())


def test_passes_by_hand() -> None:
    # Two passes. Numbers 0 to 3 are shown once: they begin 0, 1/4, 2/4 and 3/4 of the way, and half a showing is added a pass.
    assert spread([0, 1, 2, 3, 4], [1, 1, 1, 1, 2]) == [[2, 3, 4], [0, 1, 4]]
    assert spread([4, 7, 5], [9, 9, 9, 9, 2, 2, 9, 2]) == [[4, 7, 5]] * 2  # equal repeats: every pass has them all


def test_what_is_shown_seldom_comes_evenly_and_no_set_ends_before_another() -> None:
    passes = spread(range(45), [4] * 5 + [1] * 40)  # a small set and a large one
    assert [len(shown) for shown in passes] == [15] * 4
    shown = [[index in members for members in spread(range(3), [8, 4, 2])] for index in range(3)]
    assert shown == [[True] * 8, [False, True] * 4, [False, False, False, True] * 2]


def test_what_holds_for_every_plan() -> None:
    for case in range(300):
        rng = random.Random(case)
        buckets = [rng.choice(["square", "wide", "tall", (8, 16)]) for _ in range(rng.randint(1, 60))]
        repeats, batch_size, seed = rng.randint(1, 4), rng.randint(1, 9), rng.getrandbits(40)
        plan, twin = (BatchPlan(buckets, [repeats] * len(buckets), batch_size, seed) for _ in range(2))
        steps = list(range(3 * plan.steps_per_epoch))
        rng.shuffle(steps)
        drawn = {step: plan.batch(step) for step in steps}
        for epoch in range(3):
            batches = [drawn[epoch * plan.steps_per_epoch + position] for position in range(plan.steps_per_epoch)]
            shown = Counter(index for batch in batches for index in batch)
            assert shown == dict.fromkeys(range(len(buckets)), repeats)  # exactly as often as asked, and none dropped
            assert all(len({buckets[index] for index in batch}) == 1 for batch in batches)
            assert {len(batch) for batch in batches} <= set(range(1, batch_size + 1))
        assert all(twin.batch(step) == drawn[step] for step in sorted(drawn))  # in another order, by another object


def test_steps_per_epoch_by_hand() -> None:
    # 9 square, 3 wide, 1 tall: ceil(9/4) + ceil(3/4) + ceil(1/4); with two repeats ceil(18/4) + ceil(6/4) + ceil(2/4).
    assert BatchPlan(BUCKETS, ONCE, 4, seed=0).steps_per_epoch == 5
    assert BatchPlan(BUCKETS, TWICE, 4, seed=0).steps_per_epoch == 8


def test_repeats_fill_batches_without_repeating_inside_one_pass() -> None:
    plan = BatchPlan(["square"] * 4, [3] * 4, batch_size=4, seed=1)
    assert [sorted(plan.batch(step)) for step in range(plan.steps_per_epoch)] == [[0, 1, 2, 3]] * 3


def test_any_step_can_be_asked_for_in_any_order() -> None:
    plan = BatchPlan(BUCKETS, TWICE, 4, seed=5)
    forward = [plan.batch(step) for step in range(40)]
    assert [BatchPlan(BUCKETS, TWICE, 4, seed=5).batch(step) for step in reversed(range(40))] == forward[::-1]
    assert [plan.batch(step) for step in reversed(range(40))] == forward[::-1]


def test_epochs_and_seeds_differ() -> None:
    plan = BatchPlan(["square"] * 50, [1] * 50, 5, seed=5)
    first, second = ([plan.batch(epoch * 10 + position) for position in range(10)] for epoch in range(2))
    other_seed = BatchPlan(["square"] * 50, [1] * 50, 5, seed=6)
    assert first != second
    assert first != [other_seed.batch(step) for step in range(10)]


def test_buckets_come_mixed() -> None:
    plan = BatchPlan(["square"] * 40 + ["wide"] * 40, [1] * 80, 4, seed=0)
    wide = [plan.batch(step)[0] >= 40 for step in range(20)]
    assert sum(before != after for before, after in pairwise(wide)) > 1  # sorted buckets would change once


def test_the_order_is_frozen() -> None:
    # Another order here would change every run that is resumed.
    plan = BatchPlan(BUCKETS, ONCE, 4, seed=0)
    assert [plan.batch(step) for step in range(5)] == [(11, 1, 10, 0), (6,), (12,), (8, 9, 7), (5, 2, 3, 4)]


def test_sample_seeds_are_distinct_positive_and_stable() -> None:
    seeds = {
        sample_seed(seed, step, position, purpose)
        for seed in (0, 1, 11)
        for step in range(12)
        for position in range(12)
        for purpose in ("noise", "timestep", "caption")
    }
    assert len(seeds) == 3 * 12 * 12 * 3
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 2**62  # the whole range is in use
    # printf 7/1000/3/noise | b2sum -l 64
    assert sample_seed(7, 1000, 3, "noise") == 0x2F7B861E3DDE50B8 >> 1
