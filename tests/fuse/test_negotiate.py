"""What is agreed with kernels of any age, and what an operator is told of it."""

import pytest

from vmthunder.fuse.negotiate import Negotiated, UnsupportedKernel, negotiate
from vmthunder.fuse.protocol import INIT_OUT, OUT_HEADER, InitFlag, InitIn, Request

REQUEST = Request(104, 26, 2, 0, 0, 0, 0)
LINUX_6_9 = InitFlag(0xFF_7FFF_FFFF)
LINUX_6_1 = LINUX_6_9 & ~(InitFlag.PASSTHROUGH | InitFlag.HAS_RESEND)
LINUX_4_19 = InitFlag.ASYNC_READ | InitFlag.ASYNC_DIO | InitFlag.PARALLEL_DIROPS


def agree(minor: int, flags: int) -> tuple[Negotiated, tuple[int, ...], list[str]]:
    agreed, reply, losses = negotiate(REQUEST, InitIn(7, minor, 131072, InitFlag(flags)))
    assert len(reply) == OUT_HEADER.size + INIT_OUT.size
    return agreed, INIT_OUT.unpack_from(reply, OUT_HEADER.size), losses


def test_a_kernel_that_has_everything_loses_nothing() -> None:
    agreed, answer, losses = agree(40, LINUX_6_9)
    assert losses == []
    assert agreed.resend
    assert agreed.passthrough
    assert agreed.store
    assert agreed.max_read_bytes == 1 << 20
    major, minor, readahead, flags, background, congestion, _, _, max_pages, _, flags2, stack_depth = answer
    assert (major, minor, readahead, max_pages, stack_depth) == (7, 40, 256 * 1024, 256, 1)
    assert congestion < background
    assert flags | flags2 << 32 == agreed.flags


def test_a_newer_kernel_is_spoken_to_in_our_version() -> None:
    assert agree(99, LINUX_6_9)[0].minor == 40


def test_without_resend_and_passthrough_both_losses_are_said() -> None:
    agreed, answer, losses = agree(38, LINUX_6_1)
    assert not agreed.resend
    assert not agreed.passthrough
    assert agreed.max_read_bytes == 1 << 20
    assert answer[-1] == 0, "a stack depth without passthrough"
    assert ["cannot send requests again" in losses[0], "passthrough" in losses[1]] == [True, True]


def test_without_large_reads_the_loss_is_said_too() -> None:
    agreed, answer, losses = agree(27, LINUX_4_19)
    assert agreed.max_read_bytes == 128 * 1024
    assert answer[8] == 0, "max_pages without MAX_PAGES"
    assert len(losses) == 3


def test_a_kernel_that_offers_flags_we_do_not_want_does_not_get_them() -> None:
    agreed, _, _ = agree(45, (1 << 63) - 1)
    assert not agreed.flags & (1 << 16), "a write-back cache"
    assert not agreed.flags & (1 << 17), "opens that we are not told of"
    assert not agreed.flags & (1 << 41), "requests over io_uring"


@pytest.mark.parametrize(("major", "minor"), [(7, 22), (8, 0), (6, 99)])
def test_a_kernel_that_speaks_another_protocol_is_refused(major: int, minor: int) -> None:
    with pytest.raises(UnsupportedKernel, match=rf"FUSE {major}\.{minor}"):
        negotiate(REQUEST, InitIn(major, minor, 0, InitFlag(0)))


def test_what_was_agreed_travels_to_the_worker_as_json() -> None:
    agreed, _, _ = agree(40, LINUX_6_9)
    assert Negotiated.from_json(agreed.to_json()) == agreed
