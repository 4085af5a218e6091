"""Records when the memory behind tensors is allocated and freed, on any device, meta included.

Every operation passes a `TorchDispatchMode`, which sees its results. A storage that was not seen
before is an allocation; its end is told by a weak reference. What kernels and communication
libraries allocate for themselves is not seen.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Event = tuple[Any, ...]
"""``("alloc", id, bytes)``, ``("free", id)``, or what a user of the tape appends."""


class Tape(TorchDispatchMode):
    """Events of everything that runs while it is entered.

    Args:
        label: called as ``label(tensor, tag)`` for each new storage, with the innermost `tagged`;
            returns its category.

    Attributes:
        events: in the order in which they happened.
        categories: category of each storage, by id.
        enabled: whether operations are looked at.
    """

    def __init__(self, label: Callable[[Tensor, str | None], str]) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.categories: list[str] = []
        self.enabled = True
        self._label = label
        self._tags: list[str] = []
        self._ids: dict[int, int] = {}
        self._references: dict[int, Any] = {}
        self._ignored: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and note the storages of its results."""
        result = function(*args, **(kwargs or {}))
        if self.enabled:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.note(leaf)
        return result

    @contextmanager
    def tagged(self, tag: str) -> Iterator[None]:
        """Give storages that are made meanwhile a tag."""
        self._tags.append(tag)
        try:
            yield
        finally:
            self._tags.pop()

    def note(self, tensor: Tensor, category: str | None = None) -> int | None:
        """Note the storage of a tensor, if it is new, and return its id; None if it is ignored."""
        tensor = getattr(tensor, "_local_tensor", tensor)  # of a DTensor
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._ids:
            return self._ids[key]
        if key in self._ignored:
            return None
        tag = self._tags[-1] if self._tags else None
        number = len(self.categories)
        self.categories.append(category or self._label(tensor, tag))
        self._ids[key] = number
        self._references[number] = weakref.ref(storage, lambda _: self._forget(key, number))
        self.events.append(("alloc", number, storage.nbytes()))
        return number

    def ignore(self, tensor: Tensor) -> None:
        """Leave a storage out; the caller keeps it alive."""
        self._ignored.add(id(tensor.untyped_storage()))

    def resized(self, tensor: Tensor) -> int:
        """Note that a storage was given memory, or that it was taken away; return its id."""
        number = self.note(tensor)
        assert number is not None
        self.events.append(("free", number))
        self.events.append(("alloc", number, tensor.untyped_storage().nbytes()))
        return number

    def _forget(self, key: int, number: int) -> None:
        del self._ids[key], self._references[number]
        self.events.append(("free", number))
