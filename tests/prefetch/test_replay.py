"""What one boot read is here before the next one asks."""

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest

from agents import Agent, Lab, disk_bytes, eventually, finish, python, sha256
from vmthunder.ids import ImageId, image_name
from vmthunder.origin.origin import Origin
from vmthunder.profile import store
from vmthunder.profile.profile import WHOLE, Entry, Profile

CHUNK = 64 << 10
DATA = disk_bytes(16 << 20)
READ = """
import os, random
fd = os.open(sys.argv[1], os.O_RDONLY)
os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
source = os.open(sys.argv[2], os.O_RDONLY)
for index in map(int, sys.argv[3].split(",")):
    assert os.pread(fd, 4096, index * 65536) == os.pread(source, 4096, index * 65536), index
"""


def boot_set(seed: int = 1, count: int = 60) -> list[int]:
    """Chunks that a guest reads, in its order."""
    different = {DATA[at : at + CHUNK]: at // CHUNK for at in range(0, len(DATA), CHUNK)}
    different.pop(bytes(CHUNK), None)
    return random.Random(seed).sample(sorted(different.values()), count)


def read(agent: Agent, source: Path, indexes: list[int]) -> None:
    """Read the first page of each of these chunks, as a guest would, and compare."""
    python(READ, agent.path("debian"), source, ",".join(map(str, indexes)))


def image_of(lab: Lab) -> ImageId:
    return asyncio.run(Origin.open(str(lab.origin)).ref(image_name("debian"))).image_id


def save_profile(lab: Lab, indexes: list[int], *, boots: int = 5, image: ImageId | None = None) -> None:
    entries = tuple(Entry(index, at, WHOLE, True) for at, index in enumerate(indexes))
    profile = Profile(image or image_of(lab), CHUNK, boots, entries)
    asyncio.run(store.save(Origin.open(str(lab.origin)), profile))


def test_what_a_profile_names_is_here_before_it_is_read(lab: Lab) -> None:
    source = lab.publish("debian", DATA)
    indexes = boot_set()
    save_profile(lab, indexes)
    agent = lab.agent()
    with_open = lab.holder(agent.path("debian"))
    replayed(agent)
    before = agent.status()["fetch"]["chunks_fetched"]
    read(agent, source, indexes)
    status = agent.status()
    assert status["fetch"]["chunks_fetched"] == before == 60
    assert status["prefetch"]["misses"] == 0
    with_open.kill()


def replayed(agent: Agent, count: int = 60) -> None:
    eventually(lambda: agent.status()["prefetch"]["chunks"] >= count, "the profile is replayed")


def agent_number(lab: Lab, number: int, **settings: Any) -> Agent:
    base = lab.directory / str(number)
    places = {"mount": base / "images", "state_dir": base / "state", "run_dir": base / "run"}
    return lab.agent(**places, **settings)


def test_a_guest_that_overtakes_its_profile_waits_for_the_same_flights(lab: Lab) -> None:
    source = lab.publish("debian", DATA)
    indexes = boot_set(count=100)
    save_profile(lab, indexes)
    agent = lab.agent()
    read(agent, source, indexes[::-1])  # the other way round
    replayed(agent, 1)
    assert agent.status()["fetch"]["chunks_fetched"] == 100


def test_what_is_pushed_is_not_asked_of_us_any_more(lab: Lab) -> None:
    source = lab.publish("debian", DATA)
    indexes = boot_set()
    save_profile(lab, indexes)
    for number in range(6):  # some boots are left alone, to be learned from
        agent = agent_number(lab, number)
        child = lab.holder(agent.path("debian"))
        replayed(agent)
        if agent.status()["prefetch"]["pushed_bytes"]:
            break
        child.kill()
    eventually(lambda: agent.status()["pushed"]["bytes"] >= 60 * CHUNK, "the pusher is done")
    read(agent, source, indexes)
    status = agent.status()
    assert status["prefetch"]["pushed_bytes"] == 60 * CHUNK
    assert status["images"][0]["read_bytes"] == 0
    child.kill()


@pytest.mark.parametrize(("boots", "memory_bytes"), [(2, 256 << 20), (5, 0)])
def test_nothing_is_pushed_for_a_young_profile_or_without_memory(lab: Lab, boots: int, memory_bytes: int) -> None:
    lab.publish("debian", DATA)
    save_profile(lab, boot_set(), boots=boots)
    agent = lab.agent(prefetch_memory_bytes=memory_bytes)
    child = lab.holder(agent.path("debian"))
    replayed(agent)
    assert agent.status()["prefetch"]["pushed_bytes"] == 0
    child.kill()


def test_without_prefetch_only_what_is_read_is_fetched(lab: Lab) -> None:
    source = lab.publish("debian", DATA)
    indexes = boot_set()
    save_profile(lab, indexes)
    agent = lab.agent(prefetch=False)
    read(agent, source, indexes[:10])
    assert agent.status()["prefetch"] is None
    assert agent.status()["fetch"]["chunks_fetched"] == 10


def test_a_killed_worker_leaves_the_rest_to_the_next(lab: Lab) -> None:
    source = lab.publish("debian", DATA)
    save_profile(lab, boot_set(count=100))
    agent = lab.agent()
    child = lab.holder(agent.path("debian"))
    replayed(agent, 1)
    agent.kill_worker()
    assert finish([child]) == [sha256(source)]


def test_a_profile_of_another_image_is_ignored_with_a_line(lab: Lab) -> None:
    lab.publish("debian", DATA)
    save_profile(lab, [10**6])
    agent = lab.agent()
    child = lab.holder(agent.path("debian"))
    (line,) = eventually(lambda: agent.log_lines("profile_ignored"), "the profile is refused")
    assert image_of(lab).hex() in line
    child.kill()


def test_a_damaged_profile_is_ignored_with_a_line(lab: Lab) -> None:
    source = lab.publish("debian", DATA)
    save_profile(lab, boot_set())
    (path,) = (lab.origin / "profiles").iterdir()
    path.write_bytes(path.read_bytes()[:-5])
    agent = lab.agent()
    read(agent, source, boot_set())
    (line,) = eventually(lambda: agent.log_lines("no_profile"), "the profile is refused")
    assert "damaged" in line
