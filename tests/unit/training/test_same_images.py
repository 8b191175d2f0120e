"""Machines whose data sets differ are told so, on every rank."""

import pytest

from sana_kit.errors import UserError
from sana_kit.training.state import check_same_images


class Images:
    def __init__(self, digest, count):
        self._digest, self._count = digest, count

    def digest(self):
        return self._digest

    def __len__(self):
        return self._count


class TwoRanks:
    """What rank 0 sees of two ranks, the other of which found `other`."""

    def __init__(self, other):
        self.other = other

    def gather(self, value):
        return [value, self.other]


def test_a_missing_file_on_one_machine_is_an_error_everywhere():
    check_same_images(Images("a", 6), TwoRanks(("a", 6, "second")))
    told = r"ranks \[1\] found other images.*6 samples on rank 0.*5 on rank 1 \(second\)"
    with pytest.raises(UserError, match=told):
        check_same_images(Images("a", 6), TwoRanks(("b", 5, "second")))
