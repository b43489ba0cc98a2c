"""What a worker takes of the host's memory."""

from agents import Lab, disk_bytes, finish

ALLOWED_BYTES = 80 << 20
DECODED_BYTES = 16 << 20


def test_a_worker_takes_80_mib_beyond_its_cache_settings_at_most(lab: Lab) -> None:
    unit = disk_bytes(32 << 20)
    # Every chunk is another one, none is all zero.
    data = b"".join((index.to_bytes(8, "little") + unit[index * 65536 % len(unit) :])[:65536] for index in range(1024))
    source = lab.publish("debian-12", data)
    with lab.server() as (_, url):
        agent = lab.agent(url, decoded_bytes=DECODED_BYTES)
        cold = lab.child("cmp", agent.path("debian-12"), source)
        direct = [lab.reader(agent.path("debian-12"), source, seed, "direct") for seed in range(2)]
        finish([cold], deadline_s=90)
        finish(direct)
        status = agent.status()
    assert status["fetch"]["chunks_fetched"] >= 1000
    assert status["rss_bytes"] - DECODED_BYTES < ALLOWED_BYTES
