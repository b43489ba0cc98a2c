"""What a boot is, as the recorder sees it."""

from node.images import CHUNK_BYTES, random_image
from vmthunder.ids import ChunkId, ImageId, PackId, digest
from vmthunder.image.manifest import Manifest, ManifestBuilder
from vmthunder.node.recorder import AFTER_READY_S, MOST_S, SILENCE_S, Recorder

IMAGE = random_image(64)


def read(recorder: Recorder, index: int, now_s: float, chunks: int = 1, *, direct: bool = False) -> list[int]:
    return recorder.touch(index * CHUNK_BYTES, (index + chunks) * CHUNK_BYTES, now_s, direct=direct)


def test_each_chunk_is_noted_once_with_its_time() -> None:
    recorder = Recorder(IMAGE.manifest)
    assert read(recorder, 5, 10.0) == [5]
    assert read(recorder, 5, 10.5) == []
    assert read(recorder, 4, 11.0, chunks=3) == [4, 6]
    read(recorder, 9, 11.5)
    boot = recorder.boot(complete=True)
    assert boot is not None
    assert [(touch.index, touch.at_ms) for touch in boot.touches] == [(5, 0), (4, 1000), (6, 1000), (9, 1500)]
    assert (boot.complete, boot.settled_ms, boot.image_id) == (True, 1500, IMAGE.manifest.image_id)


def test_holes_are_not_noted() -> None:
    builder = ManifestBuilder(2 * CHUNK_BYTES, CHUNK_BYTES)
    builder.add(1, ChunkId(bytes(32)), 100, 0, 0)
    data = builder.finish([PackId(bytes(32))])
    recorder = Recorder(Manifest.decode(data, ImageId(digest(data))))
    assert read(recorder, 0, 1.0, chunks=2) == [1]
    assert recorder.seen == b"\x01\x01"


def test_a_read_that_goes_on_where_the_last_one_ended_is_read_ahead() -> None:
    recorder = Recorder(IMAGE.manifest)
    read(recorder, 0, 1.0, chunks=2)
    read(recorder, 2, 1.0)
    read(recorder, 10, 1.0)
    read(recorder, 11, 1.0, direct=True)
    assert [(touch.index, touch.demand) for touch in recorder.touches] == [
        (0, True), (1, False), (2, False), (10, True), (11, True),
    ]  # fmt: skip


def test_a_boot_is_over_after_silence() -> None:
    recorder = Recorder(IMAGE.manifest)
    read(recorder, 0, 1.0, chunks=8)
    assert not recorder.is_over(1.0 + SILENCE_S - 0.1)
    assert recorder.is_over(1.0 + SILENCE_S)
    read(recorder, 20, 2.0 + SILENCE_S)
    assert len(recorder.touches) == 8
    assert recorder.seen[20]


def test_a_boot_is_over_soon_after_the_guest_is_ready() -> None:
    recorder = Recorder(IMAGE.manifest)
    read(recorder, 0, 1.0, chunks=8)
    recorder.ready(2.0)
    read(recorder, 20, 2.5)
    recorder.ready(4.0)
    assert recorder.is_over(2.0 + AFTER_READY_S)
    assert len(recorder.touches) == 9


def test_a_boot_that_never_rests_has_an_end() -> None:
    recorder = Recorder(IMAGE.manifest)
    read(recorder, 0, 0.0, chunks=8)
    for step in range(8, 64):
        read(recorder, step, (step - 8) * 7.0)
    assert not recorder.is_over(MOST_S - 210)
    recorder.touch(0, 1, 392.0, direct=False)
    assert recorder.is_over(MOST_S)


def test_a_look_at_the_image_is_no_boot_and_does_not_shift_the_one_that_follows() -> None:
    recorder = Recorder(IMAGE.manifest)
    read(recorder, 0, 1.0)
    assert not recorder.is_over(30.0)
    assert recorder.boot(complete=True) is None
    read(recorder, 8, 30.0, chunks=4)
    boot = recorder.boot(complete=True)
    assert boot is not None
    assert [touch.at_ms for touch in boot.touches] == [0] * 5
