"""Who is asked beside a source that is late."""

from vmthunder.ids import NodeId
from vmthunder.swarm.rank import ENOUGH, Ranking
from vmthunder.swarm.search import GIVE_UP_S, Ask, Search

PARENT, GRANDPARENT = NodeId(b"p" * 16), NodeId(b"g" * 16)
CHUNK = 65536
LATE_S = 0.3


def healthy() -> Ranking:
    """Sources that are quick, and a full budget for hedges."""
    ranking = Ranking()
    for _ in range(20 * ENOUGH):
        ranking.delivered(PARENT, CHUNK, 0.01, 0)
    assert ranking.hedge_after_s(PARENT) < LATE_S < GIVE_UP_S
    return ranking


def test_another_node_is_asked_beside_a_late_one() -> None:
    search = Search(healthy(), [PARENT, GRANDPARENT], [PARENT, GRANDPARENT], 1)
    assert search.ask_next(1) == Ask(PARENT)
    assert search.late(1 + LATE_S, CHUNK) == Ask(GRANDPARENT)


def test_the_origin_is_not_asked_beside_a_late_node_but_instead_of_a_dead_one() -> None:
    ranking = healthy()
    search = Search(ranking, [PARENT], [PARENT], 1)
    assert search.ask_next(1) == Ask(PARENT)
    assert search.late(1 + LATE_S, CHUNK) is None
    patience_s = search.patience_s(1 + LATE_S)
    assert patience_s is not None
    dead_s = 1 + LATE_S + patience_s + 0.001
    assert dead_s < 1 + GIVE_UP_S + 0.01
    assert search.late(dead_s, CHUNK) == Ask(None)
    assert ranking.hedges == 0
