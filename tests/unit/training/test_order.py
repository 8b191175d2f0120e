"""The order of images: a function of seed and position; buckets are never mixed and nothing is left out."""

from fractions import Fraction

import numpy as np
import pytest

from sana_kit.training.order import BucketOrder, MixedOrder, PermutationOrder, WeightedSets, epoch_of, make_order

BUCKETS = np.array([0] * 11 + [1] * 4 + [2] * 1 + [3] * 16)


@pytest.mark.parametrize("samples", [1, 4, 6])
def test_each_micro_step_is_of_one_bucket_and_each_epoch_shows_every_image(samples):
    order, epochs = BucketOrder(BUCKETS, samples, seed=3), 7
    seen = np.zeros(len(BUCKETS), dtype=int)
    for epoch in range(epochs):
        for number in range(order.micro_steps(epoch), order.micro_steps(epoch + 1)):
            images = [order(number * samples + offset) for offset in range(samples)]
            assert len({int(BUCKETS[image]) for image in images}) == 1
            np.add.at(seen, images, 1)
        assert seen.min() >= epoch + 1
        sizes = np.array([(BUCKETS[image] == BUCKETS).sum() for image in range(len(BUCKETS))])
        assert (seen <= epoch + 1 + np.ceil(samples / sizes)).all()


def test_an_image_at_a_position_depends_on_seed_and_position_alone():
    positions = [300, 7, 0, 64, 7]
    fresh = [BucketOrder(BUCKETS, 4, seed=1)(position) for position in positions]
    order = BucketOrder(BUCKETS, 4, seed=1)
    assert [order(position) for position in positions] == fresh
    other = [BucketOrder(BUCKETS, 4, seed=2)(position) for position in range(64)]
    assert [order(position) for position in range(64)] != other


def test_epochs_and_buckets_come_in_other_orders():
    order = BucketOrder(BUCKETS, 4, seed=1)
    epochs = [
        [int(BUCKETS[order(4 * number)]) for number in range(order.micro_steps(e), order.micro_steps(e + 1))]
        for e in range(4)
    ]
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_the_plain_order_is_a_permutation_an_epoch():
    order = PermutationOrder(5, seed=0)
    assert sorted(order(p) for p in range(5)) == sorted(order(p) for p in range(5, 10)) == list(range(5))


def test_one_size_is_the_plain_order_and_several_are_buckets():
    shapes = np.array([[8, 8]] * 5 + [[4, 16]])
    assert isinstance(make_order(shapes, 5, 2, seed=0), PermutationOrder)  # the sixth is a class image
    order = make_order(shapes, 6, 2, seed=0)
    assert isinstance(order, BucketOrder) and order.size == 6
    assert [order.first_position(seen) for seen in (0, 3, 4)] == [0, 4, 4]


def test_crops_of_an_image_stand_together_and_are_one_image_of_the_order():
    shapes = np.array([[8, 8]] * 6 + [[4, 16]] * 6)
    assert make_order(shapes, 6, 2, seed=0, crops=3).size == 2
    order = make_order(shapes, 12, 2, seed=0, crops=3)
    assert isinstance(order, BucketOrder) and order.size == 4


SETS = np.array([0] * 8 + [1] * 3 + [2] * 5)
WEIGHTS = [Fraction(1, 4), Fraction(2), Fraction(1)]


def test_an_epoch_of_weighted_sets_takes_their_weight_for_each_image():
    order = MixedOrder(WeightedSets(SETS, WEIGHTS), seed=3)
    assert [order.count(epochs) for epochs in (0, 1, 4)] == [0, 2 + 6 + 5, 52] and order.size == 16
    seen = np.zeros(len(SETS), dtype=int)
    for epoch in range(8):
        images = [order(position) for position in range(order.count(epoch), order.count(epoch + 1))]
        assert np.bincount(SETS[images]).tolist() == [2, 6, 5]
        np.add.at(seen, images, 1)
        if epoch == 3:  # a quarter an epoch: every image once
            assert seen.tolist() == [1] * 8 + [8] * 3 + [4] * 5
    orders = {tuple(SETS[[order(order.count(e) + k) for k in range(13)]]) for e in range(4)}
    assert len(orders) == 4


def test_weighted_sets_depend_on_seed_and_position_alone():
    positions = [300, 7, 0, 64, 7]
    fresh = [MixedOrder(WeightedSets(SETS, WEIGHTS), seed=1)(position) for position in positions]
    order = MixedOrder(WeightedSets(SETS, WEIGHTS), seed=1)
    assert [order(position) for position in positions] == fresh
    other = MixedOrder(WeightedSets(SETS, WEIGHTS), seed=2)
    assert [order(position) for position in range(52)] != [other(position) for position in range(52)]


def test_epochs_that_a_small_weight_leaves_empty_are_passed_over():
    order = MixedOrder(WeightedSets(np.zeros(1, int), [Fraction(1, 1000)]), seed=0)
    assert [order.count(epochs) for epochs in (999, 1000, 2000)] == [0, 1, 2] and [order(0), order(1)] == [0, 0]
    assert [epoch_of(place, order.count) for place in (0, 1)] == [999, 1999]


@pytest.mark.parametrize("samples", [1, 4])
def test_weights_hold_in_buckets(samples):
    sets = np.arange(len(BUCKETS)) % 2
    weighted = WeightedSets(sets, [Fraction(1, 2), Fraction(2)])
    order, epochs = BucketOrder(BUCKETS, samples, seed=3, sets=weighted), 12
    images = np.array([order(position) for position in range(order.count(epochs))])
    for number in range(0, len(images), samples):
        assert len(set(BUCKETS[images[number : number + samples]])) == 1
    seen = np.bincount(images, minlength=len(BUCKETS))
    assert (seen >= epochs * np.where(sets == 0, 0.5, 2)).all()
    sizes = np.array([(BUCKETS[image] == BUCKETS).sum() for image in range(len(BUCKETS))])
    assert (seen <= epochs * np.where(sets == 0, 0.5, 2) + 1 + np.ceil(2 * samples / sizes)).all()


def test_weights_are_per_image_not_per_crop():
    shapes, set_of = np.array([[8, 8]] * 12), np.repeat([0, 0, 1, 1], 3)
    order = make_order(shapes, 12, 2, seed=0, crops=3, sets=WeightedSets(set_of, [Fraction(1), Fraction(2)]))
    assert isinstance(order, MixedOrder) and order.size == 4 and order.count(1) == 6
    assert np.bincount([order(p) for p in range(6)]).tolist() == [1, 1, 2, 2]
