"""Refs of objects, and what goes with the last of them."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hopcoll._keeper import Keeper

__all__ = ["ObjectRef", "check_ref", "ref_of"]

_KEY_BYTES = 16


class ObjectRef:
    """The name of an object, which may exist, or not yet, or no more. Immutable and hashable.

    It can be pickled and sent to any rank. Two refs are equal when they name the same object.

    A ref without a name that was never pickled cannot be anywhere else: when the program drops the
    last such ref to what it put or had reduced, the object is deleted everywhere, from this rank's
    next call on. The ref of a result has the refs of its inputs. An object whose ref was pickled
    or has a name may be wanted by others that nobody can count, and stays until `Objects.delete`.

    Parameters
    ----------
    name : str, optional
        What all ranks know it by: refs of the same name are equal. Without a name it is a new one,
        equal to no other.
    """

    __slots__ = ("_claim", "_inputs", "_key", "_name", "_stamp")

    _claim: _Claim | None
    _inputs: tuple[ObjectRef, ...]
    _key: bytes
    _name: str | None
    _stamp: int

    def __init__(self, name: str | None = None) -> None:
        if name is not None and not isinstance(name, str):
            raise TypeError(f"name must be a str, not {type(name).__name__}")
        if name is None:
            key = os.urandom(_KEY_BYTES)
            self._fill(key, name, 0, claim=_Claim(key))
        else:
            key = hashlib.blake2b(name.encode(), digest_size=_KEY_BYTES).digest()
            self._fill(key, name, 0)

    def _fill(
        self,
        key: bytes,
        name: str | None,
        stamp: int,
        inputs: tuple[ObjectRef, ...] = (),
        claim: _Claim | None = None,
    ) -> ObjectRef:
        store = object.__setattr__
        store(self, "_claim", claim)
        store(self, "_inputs", inputs)
        store(self, "_key", key)
        store(self, "_name", name)
        store(self, "_stamp", stamp)
        return self

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"ObjectRef is immutable: {name} cannot be set")

    @property
    def name(self) -> str | None:
        """The name that it was made with."""
        return self._name

    @property
    def inputs(self) -> tuple[ObjectRef, ...]:
        """Of which objects `Objects.reduce` makes it; empty for all others."""
        return self._inputs

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ObjectRef) and other._key == self._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        return f"<ObjectRef {self._key.hex()[:12] if self._name is None else repr(self._name)}>"

    def __copy__(self) -> ObjectRef:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> ObjectRef:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._claim is not None:
            self._claim.left = True
        return ref_of, (self._key, self._name, self._stamp, self._inputs)

    def _put(self, stamp: int, inputs: tuple[ObjectRef, ...] = ()) -> ObjectRef:
        """The same ref, which says that there was such an object."""
        ref = ObjectRef.__new__(ObjectRef)
        return ref._fill(self._key, self._name, stamp, inputs, self._claim)

    def _held_by(self, keeper: Keeper | None) -> None:
        """There may be an object, of this store; or, without one, there is none any more."""
        if self._claim is not None:
            self._claim.keeper = keeper


class _Claim:
    """What all refs of this process to an object without a name have, and with them goes."""

    __slots__ = ("keeper", "key", "left")

    def __init__(self, key: bytes) -> None:
        self.key = key
        #: A ref was pickled, and may be anywhere.
        self.left = False
        self.keeper: Keeper | None = None

    def __del__(self) -> None:
        # Anywhere, and at any time: only put aside.
        if self.keeper is not None and not self.left:
            self.keeper.refs_left.append(self.key)


def ref_of(
    key: bytes, name: str | None, stamp: int, inputs: tuple[ObjectRef, ...] = ()
) -> ObjectRef:
    return ObjectRef.__new__(ObjectRef)._fill(key, name, stamp, inputs)


def check_ref(noun: str, ref: Any) -> ObjectRef:
    if isinstance(ref, str):
        return ObjectRef(ref)
    if not isinstance(ref, ObjectRef):
        raise TypeError(f"{noun} must be an ObjectRef or a name, not {type(ref).__name__}")
    return ref
