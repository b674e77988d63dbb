"""Random keys are the official ones, number for number."""

import numpy as np
import pytest

from workloads_smoke.randomness import PRNGKey, fold_in, split

# From `algoperf.random_utils` of mlcommons/algorithmic-efficiency v0.6 (its NumPy path): the key of a
# seed, the last of four keys split from it, and the key folded from that with 17.
OFFICIAL = {
    0: ([209652396, 398764591], [369176984, 744606817], [117968621, 17]),
    1: ([1791095845, 2135392491], [1643285996, 2072308595], [1784651174, 17]),
    -5: ([664996532, 1143594053], [1366692868, 2109709126], [437776506, 17]),
    2**40: ([460832195, 1807479713], [856870047, 1982445080], [1143327445, 17]),
    2**31 - 1: ([209652396, 398764591], [369176984, 744606817], [117968621, 17]),
}


@pytest.mark.parametrize("seed", OFFICIAL)
def test_keys_are_the_official_ones(seed: int) -> None:
    key, last_of_four, folded = OFFICIAL[seed]
    assert PRNGKey(seed).tolist() == key
    assert split(PRNGKey(seed), 4)[3].tolist() == last_of_four
    assert fold_in(split(PRNGKey(seed), 4)[3], 17) == folded


def test_keys_of_keys_in_any_form_are_equal() -> None:
    folded = fold_in(PRNGKey(3), 5)
    assert split(folded, 2).tolist() == split(np.array(folded), 2).tolist()
    assert split(folded, 2).dtype == np.int32


def test_keys_leave_numpys_own_generator_alone() -> None:
    np.random.seed(0)
    before = np.random.get_state()[1].copy()
    fold_in(split(PRNGKey(1))[0], 2)
    assert (np.random.get_state()[1] == before).all()
