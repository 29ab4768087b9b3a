"""
A micro-batcher: what has come while the model was busy runs together when it is free. There is no timer, so a request
that comes to a free model runs at once, and under load the batches grow by themselves.
"""

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any


FREE_PADDING = 512  # tokens with padding up to which a batch may hold any lengths: so few cost about the same
MANY = 1024  # items in a queue from which on it is looked through for those that nobody wants any more
LATER_SHARE = 16  # what runs when nothing else waits runs in batches this many times smaller, for the next may come


@dataclass(slots=True, eq=False)
class Item:
    """
    One row that waits.

    Attributes:
        value: what `run` needs of it.
        tokens (`int`): its length.
        kind (`Hashable`): rows of one kind may run together.
        future (`asyncio.Future`): the answer; who no longer wants it cancels it.
        since (`float`): when it came, of `time.perf_counter`.
    """

    value: Any
    tokens: int
    kind: Hashable
    future: asyncio.Future
    since: float = field(default_factory=time.perf_counter)


def take_batch(queue: deque[Item], max_tokens: int) -> list[Item]:
    """
    The oldest item and, in their order, those of its kind that fit beside it; all others stay, in their order.

    All rows of a batch become as long as its longest. So one long row among many short ones, which would cost as much
    as that many long ones, waits for its own turn: beyond `FREE_PADDING` a batch has no more padding than tokens.

    Args:
        queue (`deque` of [`Item`]): oldest first; it loses what is taken.
        max_tokens (`int`): of the items together, padding included; a first item of more runs alone.
    """
    batch, passed, tokens, longest = [], [], 0, 0
    while queue and (len(batch) + 1) * longest <= max_tokens:  # else nothing fits any more
        item = queue.popleft()
        padded = (len(batch) + 1) * max(longest, item.tokens)
        fits = padded <= max_tokens and padded <= max(2 * (tokens + item.tokens), FREE_PADDING)
        if batch and (item.kind != batch[0].kind or not fits):
            passed.append(item)
        else:
            batch.append(item)
            tokens += item.tokens
            longest = max(longest, item.tokens)
    queue.extendleft(reversed(passed))
    return batch


class MicroBatcher:
    """
    Hands waiting items to a function in a thread of its own, in batches.

    Args:
        run (`Callable`):
            From a batch of [`Item`] and the tokens that wait, its own included, to one answer for each item. Called in
            `thread`, never twice at a time.
        thread (`ThreadPoolExecutor`): of one thread.
        max_tokens (`Callable`): tokens of a batch at most, padding included; asked before each.
        dropped (`Callable`, *optional*): told the number of items that were cancelled before they ran.
    """

    def __init__(
        self,
        run: Callable[[list[Item], int], Sequence[Any]],
        thread: ThreadPoolExecutor,
        max_tokens: Callable[[], int],
        dropped: Callable[[int], Any] = lambda count: None,
    ):
        self.run, self.thread, self.max_tokens, self.dropped = run, thread, max_tokens, dropped
        self.queue: deque[Item] = deque()
        self.later: deque[Item] = deque()  # what runs when nothing else waits
        self._many = MANY
        self._filled = asyncio.Event()

    def submit(self, value: Any, tokens: int, kind: Hashable = None, *, later: bool = False) -> asyncio.Future:
        """
        The answer to come. Cancelled before the item's turn, the item costs nothing more. With `later` its turn comes
        when nothing else waits.
        """
        if len(self.queue) >= self._many:  # whatever runs may take for ever, while others give up and more come
            self._drop_cancelled()
            self._many = max(MANY, 2 * len(self.queue))
        item = Item(value, tokens, kind, asyncio.get_running_loop().create_future())
        (self.later if later else self.queue).append(item)
        self._filled.set()
        return item.future

    async def work(self) -> None:
        """Answer items as they come, until it is cancelled; then what still waits is cancelled too."""
        try:
            while True:
                await self._filled.wait()
                await self._run_once()
        finally:
            for item in (*self.queue, *self.later):
                item.future.cancel()

    def _answer(self, batch: list[Item], waiting: int) -> Sequence[Any]:
        try:
            return self.run(batch, waiting)
        except StopIteration as error:  # which no future takes: the batch, and all after it, would wait for ever
            raise RuntimeError("A batch ended in StopIteration.") from error

    def _drop_cancelled(self) -> deque[Item]:
        wanted = deque(item for item in self.queue if not item.future.done())
        self.dropped(len(self.queue) - len(wanted))
        self.queue = wanted
        return wanted

    async def _run_once(self) -> None:
        wanted = self._drop_cancelled()
        if not wanted and not self.later:
            self._filled.clear()
            return
        waiting, limit = sum(item.tokens for item in wanted), self.max_tokens()
        batch = take_batch(wanted, limit) or take_batch(self.later, limit // LATER_SHARE)
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self.thread, self._answer, batch, waiting)
            outcomes = [(item.future.set_result, answer) for item, answer in zip(batch, answers, strict=True)]
        except asyncio.CancelledError:
            for item in batch:
                item.future.cancel()
            raise
        except Exception as error:  # whatever it is, those who wait are told
            outcomes = [(item.future.set_exception, error) for item in batch]
        for item, (settle, outcome) in zip(batch, outcomes, strict=True):
            if not item.future.done():
                settle(outcome)
