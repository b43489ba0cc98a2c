"""The search for a chunk: how long a reader waits for a source that says nothing."""

from vmthunder.ids import NodeId
from vmthunder.swarm.rank import COOL_S, ENOUGH, Ranking
from vmthunder.swarm.search import GIVE_UP_FORGOTTEN_S, GIVE_UP_S, GIVE_UP_TRIAL_S, Ask, Search

SILENT, OTHER = NodeId(b"s" * 16), NodeId(b"o" * 16)
CHUNK = 65536


def begun(ranking: Ranking, now: float) -> Search:
    search = Search(ranking, [SILENT], [SILENT, OTHER], now)
    assert search.ask_next(now) == Ask(SILENT)
    return search


def waited_s(search: Search, now: float) -> float:
    """Until another source is asked."""
    begin_s = now
    while True:
        patience_s = search.patience_s(now)
        assert patience_s is not None
        now += patience_s
        if search.late(now, CHUNK) is not None:
            return now - begin_s


def test_a_silent_source_is_waited_for_once_and_hardly_when_it_is_tried_again() -> None:
    ranking = Ranking()
    for _ in range(ENOUGH):
        ranking.delivered(OTHER, 1, 0.01, 0)  # allows next to no byte to be asked for twice
    assert abs(waited_s(begun(ranking, 10), 10) - GIVE_UP_S) < 1e-5
    again_s = 10 + GIVE_UP_S + COOL_S
    assert ranking.usable(SILENT, again_s)
    assert abs(waited_s(begun(ranking, again_s), again_s) - GIVE_UP_TRIAL_S) < 1e-5
    assert ranking.left_alone == {SILENT: 2}


def test_a_source_on_trial_that_delivers_after_all_is_believed() -> None:
    ranking = Ranking()
    ranking.failed(SILENT, 0)
    for number in range(ENOUGH):
        search = begun(ranking, COOL_S + number)
        search.delivered(SILENT, CHUNK, COOL_S + number + 0.01)
    assert not ranking.on_trial(SILENT)


def test_a_crowd_at_one_source_makes_it_neither_slow_nor_dead() -> None:
    ranking = Ranking()
    for _ in range(10 * ENOUGH):
        ranking.delivered(OTHER, 1, 0.01, 0)
    crowd = [begun(ranking, 10) for _ in range(64)]
    for number, search in enumerate(crowd):
        now = 10 + (number + 1) * 0.04  # the last one waits for more than three times GIVE_UP_S
        for waiting in crowd[number:]:
            assert waiting.patience_s(now) != 0 or waiting.late(now, CHUNK) is None
        search.delivered(SILENT, CHUNK, now)
    assert ranking.left_alone == {}


def test_a_source_that_forgot_a_question_is_not_waited_for_as_long_as_it_answers_others() -> None:
    ranking = Ranking()
    for _ in range(ENOUGH):
        ranking.delivered(OTHER, 1, 0.01, 0)
    forgotten, now, asked_again = begun(ranking, 10), 10.0, None
    while asked_again is None and now < 100:
        now += 0.1
        begun(ranking, now - 0.01).delivered(SILENT, 1, now)
        if forgotten.patience_s(now) == 0:
            asked_again = forgotten.late(now, CHUNK)
    assert asked_again == Ask(None)
    assert now - 10 <= GIVE_UP_FORGOTTEN_S + 0.2
