"""How profiles learn, and what a new version of an image takes over."""

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from made_images import boot, manifest
from vmthunder.profile.merge import CARRIED_BOOTS, carried, merged
from vmthunder.profile.profile import MAX_ENTRIES, WHOLE, Boot, Entry, Profile, Touch

IMAGE = manifest(range(3000))
USUAL = list(range(100, 1100, 5))


def learned(*boots: Boot) -> Profile:
    profile = None
    for each in boots:
        profile = merged(profile, each, IMAGE)
    assert profile is not None
    return profile


def expected(profile: Profile) -> list[int]:
    return [entry.index for entry in profile.expected()]


def usual(number: int) -> Boot:
    """A boot as most are: the same chunks but for a few, in nearly the same order, on a faster or slower host."""
    rng = random.Random(number)
    indices = [index for index in USUAL if rng.random() < 0.99]
    places = sorted(range(len(indices)), key=lambda place: place + rng.uniform(-3, 3))
    return boot(IMAGE, [indices[place] for place in places], ms_each=rng.uniform(2, 40))


ODD = {
    "ten times as large": boot(IMAGE, range(2999)),
    "a tenth": boot(IMAGE, USUAL[:20]),
    "in the reverse order": boot(IMAGE, reversed(USUAL)),
    "a hundred times as slow": boot(IMAGE, USUAL, ms_each=1000),
    "of other chunks only": boot(IMAGE, range(2000, 2400)),
    "of nothing": boot(IMAGE, []),
    "incomplete and large": boot(IMAGE, range(2999), complete=False),
}


def disorder(order: list[int]) -> float:
    """How far chunks are from their usual place on the average, in parts of the boot."""
    place = {index: number for number, index in enumerate(order)}
    moves = [abs(place[index] - number) for number, index in enumerate(USUAL) if index in place]
    return sum(moves) / len(moves) / len(USUAL)


@pytest.mark.parametrize("what", ODD)
@pytest.mark.parametrize("before", [2, 3, 8, 20])
def test_one_odd_boot_cannot_spoil_a_profile(what: str, before: int) -> None:
    profile = learned(*map(usual, range(before)), ODD[what])
    found = expected(profile)
    assert len(set(found) & set(USUAL)) >= 0.98 * len(USUAL)
    assert len(found) <= 1.02 * len(USUAL)
    assert disorder(found) < 0.06


def test_a_second_boot_is_not_believed_that_reads_much_more_than_the_first() -> None:
    assert len(expected(learned(usual(1), ODD["ten times as large"]))) <= len(USUAL)
    assert len(expected(learned(usual(1), *2 * [ODD["ten times as large"]]))) > 2900


def test_a_chunk_that_came_very_late_once_keeps_about_its_place() -> None:
    profile = learned(*[boot(IMAGE, USUAL)] * 3)
    late = boot(IMAGE, [*USUAL[:5], *USUAL[6:]])
    late = replace(late, touches=(*late.touches, Touch(USUAL[5], 60_000, True)), settled_ms=60_000)
    assert expected(merged(profile, late, IMAGE)).index(USUAL[5]) < len(USUAL) / 8


def test_what_a_slow_host_adds_is_put_between_what_it_lies_between() -> None:
    profile = learned(boot(IMAGE, USUAL, ms_each=10))
    slow = boot(IMAGE, [*USUAL[:100], 7, *USUAL[100:]], ms_each=300)
    assert abs(expected(merged(profile, slow, IMAGE)).index(7) - 100) <= 2


def test_after_an_odd_first_boot_two_usual_ones_are_enough() -> None:
    for what in ("ten times as large", "a tenth"):
        found = set(expected(learned(ODD[what], usual(1), usual(2))))
        assert len(found & set(USUAL)) >= 0.98 * len(USUAL)
        assert len(found - set(USUAL)) <= 0.02 * len(USUAL)


def test_a_chunk_that_boots_do_not_touch_any_more_is_not_expected_and_then_gone() -> None:
    profile = learned(*[boot(IMAGE, [1, 2, 3])] * 8)
    ended, gone = 0, 0
    for number in range(1, 30):
        profile = merged(profile, boot(IMAGE, [1, 3]), IMAGE)
        ended = ended or (2 not in expected(profile)) * number
        gone = gone or (2 not in [entry.index for entry in profile.entries]) * number
    assert (ended, gone) == (7, 18)
    assert expected(profile) == [1, 3]


def test_a_chunk_that_boots_touch_from_now_on_is_soon_expected() -> None:
    profile = learned(*[boot(IMAGE, [1, 3])] * 8)
    for _ in range(4):
        profile = merged(profile, boot(IMAGE, [1, 2, 3]), IMAGE)
    assert expected(profile) == [1, 2, 3]


def test_what_an_incomplete_boot_did_not_see_is_not_held_against_an_entry() -> None:
    profile = learned(*map(usual, range(5)))
    after = merged(profile, boot(IMAGE, [7], complete=False), IMAGE)
    assert [entry for entry in after.entries if entry.index != 7] == list(profile.entries)
    assert after.boots == profile.boots


def test_what_incomplete_boots_miss_again_and_again_is_learned() -> None:
    profile = learned(*map(usual, range(5)))
    for _ in range(16):
        profile = merged(profile, boot(IMAGE, [7], complete=False), IMAGE)
    assert 7 in expected(profile)


def test_chunks_that_one_boot_in_ten_touches_do_not_pile_up() -> None:
    profile = learned(*map(usual, range(8)))
    rng = random.Random(1)
    for number in range(400):
        rare = [index for index in range(2000, 2200) if rng.random() < 0.1]
        complete = number % 8 == 0
        profile = merged(profile, boot(IMAGE, [*(USUAL if complete else []), *rare], complete=complete), IMAGE)
    assert len([index for index in expected(profile) if index >= 2000]) < 10


def test_a_first_incomplete_boot_is_replaced_by_a_complete_one() -> None:
    assert expected(learned(boot(IMAGE, [1, 2], complete=False))) == [1, 2]
    assert expected(learned(boot(IMAGE, [1, 2], complete=False), boot(IMAGE, [3, 2]))) == [3, 2]


def test_holes_and_places_behind_the_image_are_left_out() -> None:
    image = manifest(["a", None, "b"])
    profile = merged(None, boot(image, [0, 1, 2, 9]), image)
    assert expected(profile) == [0, 2]


@given(st.lists(st.tuples(st.lists(st.integers(0, 40), unique=True, max_size=30), st.booleans()), max_size=12))
def test_whatever_is_merged_makes_a_profile(boots: list[tuple[list[int], bool]]) -> None:
    image = manifest(range(30))
    profile = None
    for indices, complete in boots:
        profile = merged(profile, boot(image, indices, complete=complete), image)
        assert Profile.decode(profile.encode(), image.image_id) == profile
        assert list(profile.entries) == sorted(profile.entries, key=lambda entry: (entry.at_ms, entry.index))


def test_a_profile_is_bounded() -> None:
    image = manifest(range(MAX_ENTRIES + 500))
    first = Boot(image.image_id, tuple(Touch(i, 0, True) for i in range(MAX_ENTRIES)), True, 0)
    other = Boot(image.image_id, tuple(Touch(i, 0, True) for i in range(500, MAX_ENTRIES + 500)), True, 0)
    profile = merged(merged(None, first, image), other, image)
    assert len(profile.entries) == MAX_ENTRIES
    assert sum(entry.share == WHOLE for entry in profile.entries) == MAX_ENTRIES - 500  # what both touched is kept


# Carrying over


def profile_of(image: object, *indices: int) -> Profile:
    return Profile(image.image_id, image.chunk_bytes, 9, tuple(Entry(i, n, WHOLE, True) for n, i in enumerate(indices)))  # type: ignore[attr-defined]  # a Manifest


def test_chunks_are_found_by_id_wherever_they_are_now() -> None:
    old, new = manifest("abcdef"), manifest(["x", "d", "y", "b"])
    assert expected(carried(profile_of(old, 3, 1), new, old)) == [1, 3]


def test_a_changed_chunk_is_found_between_its_neighbours() -> None:
    old, new = manifest("abcdefgh"), manifest(["N", "E", "W", *"abXYZfgh"])
    assert expected(carried(profile_of(old, 1, 2, 4, 6), new, old)) == [4, 5, 7, 9]


def test_of_equal_chunks_the_one_that_moved_as_its_neighbours_is_meant() -> None:
    old, new = manifest("azbzc"), manifest("azbzc")
    assert expected(carried(profile_of(old, 3, 1, 0), new, old)) == [3, 1, 0]
    assert expected(carried(profile_of(old, 0, 3), manifest("xzazbzc"), old)) == [2, 5]


def test_what_became_a_hole_or_fell_off_the_end_is_left_out() -> None:
    old, new = manifest("abcd"), manifest(["a", None, "c"])
    assert expected(carried(profile_of(old, 3, 1, 0), new, old)) == [0]


def test_an_image_with_chunks_of_another_size_takes_the_same_bytes() -> None:
    old, small, large = manifest("abcd"), manifest("01234567", 32768), manifest("01", 131072)
    assert expected(carried(profile_of(old, 2, 0), small, old)) == [4, 5, 0, 1]
    assert expected(carried(profile_of(old, 3, 0), large, old)) == [1, 0]


def test_the_own_boots_of_a_new_version_soon_count_more() -> None:
    old, new = manifest("abcdef"), manifest("abcdeF")
    profile = carried(profile_of(old, 0, 1, 2), new, old)
    assert profile.boots == CARRIED_BOOTS
    profile = merged(profile, boot(new, [4, 0]), new)
    assert set(expected(profile)) == {0, 1, 2, 4}
    profile = merged(profile, boot(new, [4, 0]), new)
    assert set(expected(profile)) == {0, 4}


@given(
    st.lists(st.one_of(st.none(), st.integers(0, 9)), min_size=1, max_size=30),
    st.lists(st.one_of(st.none(), st.integers(0, 9)), min_size=1, max_size=30),
    st.lists(st.integers(0, 40), unique=True, max_size=30),
)
def test_whatever_is_carried_over_is_in_the_new_image(
    old: list[int | None], new: list[int | None], indices: list[int]
) -> None:
    before, after = manifest(old), manifest(new)
    profile = carried(profile_of(before, *indices), after, before)
    assert Profile.decode(profile.encode(), after.image_id) == profile
    assert all(after.row(entry.index) is not None for entry in profile.entries)


@given(
    st.lists(st.one_of(st.none(), st.integers(0, 9)), min_size=1, max_size=30), st.integers(0, 20), st.integers(0, 20)
)
def test_an_image_that_grew_in_front_and_behind_keeps_its_profile(
    old: list[int | None], front: int, behind: int
) -> None:
    before = manifest([("unique", n) if c else None for n, c in enumerate(old)])  # type: ignore[misc]  # any text does
    after = manifest([*["new"] * front, *[("unique", n) if c else None for n, c in enumerate(old)], *["new"] * behind])  # type: ignore[misc]  # as above
    touched = [index for index in range(len(old)) if before.row(index)]
    assert expected(carried(profile_of(before, *touched), after, before)) == [index + front for index in touched]
