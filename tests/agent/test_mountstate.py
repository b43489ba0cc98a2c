"""What a worker leaves to its successor."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vmthunder.errors import CorruptFile
from vmthunder.ids import ImageId
from vmthunder.node.mountstate import MountState

IMAGES = [ImageId(bytes([n]) * 32) for n in range(3)]


def test_a_successor_knows_every_promise(tmp_path: Path) -> None:
    state = MountState(tmp_path / "mount.json", now_s=1000.0)
    on_demand = state.look_up(IMAGES[0], 5, "debian", materialized=False)
    local = state.look_up(IMAGES[0], 5, None, materialized=True)
    handle = state.open(local, backing_id=7)
    heir = MountState.load(tmp_path / "mount.json")
    assert heir.nodes() == [on_demand, local]
    assert heir.mounted_at == 1000.0
    node = heir.node(local.number)
    assert node is not None
    assert (node.backing_id, node.handles) == (7, {handle})
    assert heir.release(node, handle) == 7


def test_a_release_that_comes_twice_takes_nobody_else_s_handle(tmp_path: Path) -> None:
    state = MountState(tmp_path / "mount.json")
    node = state.look_up(IMAGES[0], 5, None, materialized=True)
    first, second = state.open(node, 7), state.open(node, 7)
    assert state.release(node, first) is None
    assert state.release(node, first) is None
    assert node.backing_id == 7
    assert state.release(node, second) == 7


def test_a_node_that_is_open_or_looked_up_is_not_forgotten(tmp_path: Path) -> None:
    state = MountState(tmp_path / "mount.json")
    node = state.look_up(IMAGES[0], 5, None, materialized=False)
    state.look_up(IMAGES[0], 5, None, materialized=False)
    handle = state.open(node, None)
    assert not state.forget(node, 1)
    assert not state.forget(node, 1)
    state.release(node, handle)
    assert state.forget(node, 0)
    assert state.node(node.number) is None


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"version": 2}', '{"version": 1, "next": 2, "mounted_at": 0, "nodes": [{}]}']
)
def test_a_damaged_file_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "mount.json").write_text(text)
    with pytest.raises(CorruptFile, match=r"mount\.json"):
        MountState.load(tmp_path / "mount.json")


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["lookup", "open", "release", "forget"]), st.integers(0, 2), st.booleans())))
def test_numbers_are_never_used_twice_and_every_state_can_be_taken_over(steps: list[tuple[str, int, bool]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "mount.json"
        state = MountState(path)
        given_out: set[int] = set()
        for step, which, materialized in steps:
            node = state.find(IMAGES[which], materialized=materialized)
            if step == "lookup":
                made = state.look_up(IMAGES[which], 5, None, materialized=materialized)
                assert node is made or made.number not in given_out
                given_out.add(made.number)
            elif node is not None and step == "open":
                handle = state.open(node, None)
                assert handle not in given_out
                given_out.add(handle)
            elif node is not None and step == "release":
                state.release(node, next(iter(node.handles), -1))
            elif node is not None:
                state.forget(node, 1)
            state.save()
            heir = MountState.load(path)
            assert heir.nodes() == state.nodes()
