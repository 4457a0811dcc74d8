"""Doing several things at once, in order and in bounded memory."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from queue import Queue
from typing import Generic, TypeVar

Item = TypeVar('Item')
Result = TypeVar('Result')

END = object()


class Overlapped(Generic[Result]):
    """``map(function, items)`` in the background: in order, and never far ahead of the reader.

    A thread of its own draws the items, so that making them overlaps with everything else too; the
    calls run in ``executor``. What an item or a call raises is raised where its result would come.

    Args:
        function: Called with every item.
        items: Drawn one by one, in one thread.
        executor: Where the calls run.
        ahead: How many items at most are drawn whose results nobody has taken yet.
    """

    def __init__(
        self,
        function: Callable[[Item], Result],
        items: Iterable[Item],
        executor: Executor,
        ahead: int,
    ) -> None:
        self._futures: Queue[Future] = Queue()
        self._room = threading.Semaphore(ahead)
        self._closed = threading.Event()
        self._finished = False
        arguments = (function, items, executor)
        self._thread = threading.Thread(target=self._draw, args=arguments, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Result]:
        return self

    def __next__(self) -> Result:
        if self._finished:
            raise StopIteration
        result = self._futures.get().result()
        self._room.release()
        if result is END:
            self._finished = True
            self._thread.join()
            raise StopIteration
        return result

    def has_next_at_hand(self) -> bool:
        """Whether a result can be had without waiting; no if there are no more."""
        queue = self._futures.queue
        # Only one thread takes from the queue, so its first entry stays.
        return bool(queue) and queue[0].done() and not _is_end(queue[0])

    def close(self) -> None:
        """Draw no more items, and wait until the drawing has stopped."""
        self._closed.set()
        self._room.release()
        self._finished = True
        self._thread.join()

    def _draw(self, function: Callable, items: Iterable, executor: Executor) -> None:
        last: Future = Future()
        try:
            for item in items:
                self._room.acquire()
                if self._closed.is_set():
                    break
                self._futures.put(executor.submit(function, item))
            last.set_result(END)
        except BaseException as error:
            last.set_exception(error)
        self._futures.put(last)


def _is_end(future: Future) -> bool:
    return future.exception() is None and future.result() is END


class MemoryBudget:
    """Bytes that pictures under way may take; who wants more waits until others are done.

    Args:
        total: Bytes. A picture that is larger has to be alone.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._taken = 0
        self._open = False
        self._changed = threading.Condition()

    def take(self, amount: int) -> None:
        """Wait until there is room for so many bytes, and take them."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._open or not self._taken or self._taken + amount <= self._total
            )
            self._taken += amount

    def give_back(self, amount: int) -> None:
        """Return bytes that were taken."""
        with self._changed:
            self._taken -= amount
            self._changed.notify_all()

    def open(self) -> None:
        """Let everybody through: the work is ending."""
        with self._changed:
            self._open = True
            self._changed.notify_all()
