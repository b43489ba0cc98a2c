"""Which images a node uses."""

from vmthunder.ids import ImageId
from vmthunder.swarm.activity import LEAVE_IDLE_S, Activity

IMAGE, OTHER = ImageId(b"i" * 32), ImageId(b"o" * 32)


def test_an_image_that_was_not_read_for_a_while_is_left_and_one_that_is_read_is_not() -> None:
    activity = Activity()
    activity.use(IMAGE, 0)
    activity.use(OTHER, 0)
    activity.observe({IMAGE: 5, OTHER: 5}, 1)
    activity.observe({IMAGE: 5, OTHER: 6}, 10)
    assert activity.leave_idle([IMAGE, OTHER], LEAVE_IDLE_S) == []
    assert activity.leave_idle([IMAGE, OTHER], LEAVE_IDLE_S + 1) == [IMAGE]
    assert activity.leave_idle([OTHER], LEAVE_IDLE_S + 10) == [OTHER]


def test_counters_that_move_are_use_even_when_they_begin_anew() -> None:
    activity = Activity()
    assert activity.observe({IMAGE: 0}, 0) == []
    assert activity.observe({IMAGE: 7, OTHER: 0}, 1) == [IMAGE]
    assert activity.observe({IMAGE: 7, OTHER: 0}, 2) == []
    assert activity.observe({IMAGE: 3, OTHER: 0}, 3) == [IMAGE]  # closed, and opened again
    assert activity.observe({}, 4) == []
    assert activity.observe({IMAGE: 3}, 5) == [IMAGE]
