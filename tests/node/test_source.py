import pytest

from node.images import CHUNK_BYTES, Packs, random_image
from vmthunder.ids import ChunkId, PackId
from vmthunder.image.manifest import ChunkRow
from vmthunder.node.source import MAX_RUN_BYTES, OriginSource, runs
from vmthunder.node.turns import Errand


def test_chunks_back_to_back_in_a_pack_are_one_run() -> None:
    image = random_image(8)
    assert runs(image.rows(0, 8)) == [image.rows(0, 8)]


def test_a_gap_or_another_pack_begins_a_new_run() -> None:
    image = random_image(8, pack_chunks=4)
    rows = image.rows(0, 2) + image.rows(3, 3)
    assert sorted(map(len, runs(reversed(rows)))) == [1, 2, 2]


def test_places_that_fit_together_in_two_packs_do_not_make_a_run() -> None:
    one, other = (PackId(bytes([number]) * 32) for number in range(2))
    rows = [ChunkRow(0, ChunkId(bytes(32)), 10, one, 0), ChunkRow(1, ChunkId(bytes(32)), 10, other, 10)]
    assert runs(rows) == [[rows[0]], [rows[1]]]


def test_a_run_has_a_bound() -> None:
    image = random_image(3 * MAX_RUN_BYTES // CHUNK_BYTES, pack_chunks=10**6)
    found = runs(image.rows(0, image.manifest.chunk_count))
    assert len(found) > 1
    assert max(sum(row.encoded_bytes for row in run) for run in found) <= MAX_RUN_BYTES
    assert [row for run in found for row in run] == image.rows(0, image.manifest.chunk_count)


@pytest.mark.asyncio
async def test_one_request_brings_the_bytes_of_every_chunk_of_a_run() -> None:
    image = random_image(8)
    packs = Packs(image)
    rows = image.rows(2, 4)
    deliveries = await OriginSource(packs).fetch(image.manifest, rows, Errand())
    (pack,) = image.packs.values()
    assert [bytes(delivery.data) for delivery in deliveries] == [
        pack[row.offset :][: row.encoded_bytes] for row in rows
    ]
    assert len(packs.requests) == 1
