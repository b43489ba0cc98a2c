"""The window of background reads grows while nothing queues and leaves room when something does."""

from vmthunder.node.window import FIRST_BYTES, LEAST_BYTES, MOST_BYTES, Window

CHUNK = 32 << 10


class Line:
    """A link of a rate with a queue: what is under way arrives in order."""

    def __init__(self, bytes_s: float, base_s: float) -> None:
        self.bytes_s, self.base_s = bytes_s, base_s
        self.window = Window()
        self.now_s = 0.0
        self.most_queue_s = 0.0
        """Since the line was settled."""

    def run(self, seconds: float, background_share: float = 1.0, settled_s: float = 1.0) -> float:
        """Keep the window full for so long; the mean rate."""
        under_way: list[float] = []  # when asked
        settled_s += self.now_s
        end_s, done = self.now_s + seconds, 0
        rate = self.bytes_s * background_share
        free_s = self.now_s
        while self.now_s < end_s:
            while not under_way or (len(under_way) + 1) * CHUNK <= self.window.limit_bytes:
                under_way.append(self.now_s)
            asked_s = under_way[0]
            free_s = max(free_s, asked_s + self.base_s) + CHUNK / rate
            self.now_s = max(self.now_s, free_s)
            if self.now_s > settled_s:
                self.most_queue_s = max(self.most_queue_s, free_s - asked_s - self.base_s)
            self.window.arrived(CHUNK, free_s - asked_s, len(under_way) * CHUNK, self.now_s)
            under_way.pop(0)
            done += CHUNK
        return done / seconds


def test_a_fast_line_is_filled() -> None:
    line = Line(125e6, 0.001)
    line.run(0.5)
    assert line.run(2) >= 0.9 * 125e6


def test_a_slow_line_is_filled_and_its_queue_stays_short() -> None:
    line = Line(2.5e6, 0.002)  # 20 Mbit/s: one chunk takes 13 ms
    assert line.run(5) >= 0.9 * 2.5e6
    assert line.most_queue_s <= 3.5 * CHUNK / 2.5e6


def test_it_makes_room_when_others_use_the_line() -> None:
    line = Line(125e6, 0.001)
    line.run(2)
    before = line.window.limit_bytes
    line.run(2, background_share=0.1)
    assert line.window.limit_bytes < before / 3


def test_it_stays_within_its_bounds() -> None:
    window = Window()
    for step in range(1000):
        window.arrived(CHUNK, 0.001, MOST_BYTES, step * 0.001)
    assert window.limit_bytes == MOST_BYTES
    for step in range(1000):
        window.arrived(CHUNK, 1.0, MOST_BYTES, 2 + step * 0.05)
    assert window.limit_bytes == LEAST_BYTES


def test_one_late_answer_is_no_queue() -> None:
    window = Window()
    for step in range(20):
        window.arrived(CHUNK, 0.001, window.limit_bytes, step * 0.001)
    before = window.limit_bytes
    window.arrived(CHUNK, 0.5, window.limit_bytes, 0.03)
    assert window.limit_bytes >= before


def test_a_window_that_is_not_filled_does_not_grow() -> None:
    window = Window()
    for step in range(100):
        window.arrived(CHUNK, 0.001, CHUNK, step * 0.001)
    assert window.limit_bytes == FIRST_BYTES


def test_beside_a_guest_no_more_is_under_way_than_arrives_in_no_time() -> None:
    slow, fast = Line(2.5e6, 0.002), Line(125e6, 0.001)
    slow.run(3)
    fast.run(3)
    assert slow.window.beside_bytes < CHUNK
    assert fast.window.beside_bytes > 16 * CHUNK
