"""The settings of a communicator: from keyword arguments, from ``HOPCOLL_*``, or by default.

A keyword argument wins over the environment, the environment over the default. The settings that
decide how bytes are cut into messages must be the same at all ranks: `Config.agreed` lists them
and the engine compares them while the communicator is made.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["Config"]

#: One chunk is a whole number of items of any dtype, and of any cache line.
_CHUNK_ALIGNMENT_BYTES = 64
_CHUNK_BYTES_MAX = 1 << 30
_WINDOW_CHUNKS_MAX = 1024
#: A contribution and its header fit into one message below the transport's eager limit.
_EAGER_BYTES_MAX = 32768
#: The fastest way to learn a bandwidth at the start is a message of so many bytes.
_INLINE_BYTES_MIN = 512
_INLINE_BYTES_MAX = 65536
_PROGRESS = ("thread", "inline")
#: A rank that only waits for its turn on a crowded machine should not be taken for lost.
_DETECT_S_MIN = 0.2
_TRACE_BYTES_MIN = 65536


@dataclass(frozen=True)
class Config:
    """What can be set when a communicator is made. Immutable and hashable.

    Parameters
    ----------
    chunk_bytes : int, default 65536
        Bytes of one chunk, the unit of pipelining: a multiple of 64, at most 1 GiB. Open MPI's
        TCP transport sends a message above its eager limit (64 KiB, headers included) by
        rendezvous, which makes a chain of chunks more than twice as slow. Environment:
        ``HOPCOLL_CHUNK_BYTES``.
    window_chunks : int, default 16
        Chunks that may be under way in one stream between two ranks; 1 to 1024. Environment:
        ``HOPCOLL_WINDOW``.
    eager_bytes : int, default 4096
        A reduction of at most so many bytes takes the short path: every rank receives every
        contribution and folds them itself. 0 to 32768. Environment: ``HOPCOLL_EAGER_BYTES``.
    progress : {"thread", "inline"}, default "thread"
        Whether a native thread makes progress while this rank is outside of hopcoll's calls. With
        ``"inline"`` others wait for this rank until it calls again. Environment:
        ``HOPCOLL_PROGRESS``.
    timeout_s : float or None, default None
        How long a call waits before it raises `TransferTimeoutError`, in seconds; None and
        ``math.inf`` wait without limit. Environment: ``HOPCOLL_TIMEOUT_S``.
    detect_s : float or None, default 30.0
        How long a rank may be silent, in seconds, before the others take it for lost: a stopped
        process of the same host is killed then, and one that is out of reach is left out where
        more than half of the ranks go on. None and ``math.inf``: never. Deaths that MPI reports
        are noticed at once in any case. Without effect unless all ranks have the progress
        thread. Environment: ``HOPCOLL_DETECT_S``.
    late_bytes : int, default 67108864
        Memory for copies of results that are kept for ranks that are late, in bytes; 0 or more.
        Where it is used up, the oldest results of partial operations (``quorum``, ``deadline_s``)
        are forgotten, and a rank that asks for one gets a `MissedError`. Other operations keep a
        copy when another rank takes much longer. A result that does not fit is not copied: its
        call returns when all ranks have it. Environment: ``HOPCOLL_LATE_BYTES``.
    object_bytes : int, default 2147483648
        Memory for the objects that this rank holds (`Communicator.objects`), in bytes; 0 or more.
        Beyond it, copies that nothing uses go to files. Environment: ``HOPCOLL_OBJECT_BYTES``.
    object_scratch : str or None, default None
        The directory under which these files are made, in one of the job's; None is the one for
        temporary files (``SLURM_TMPDIR``, ``TMPDIR``). They go when the communicator closes, and
        those of a rank that was killed when ``hopcoll run`` ends. Environment:
        ``HOPCOLL_OBJECT_SCRATCH``.
    object_scratch_bytes : int, default 17179869184
        How long a rank's files may be together, in bytes; 0: there are none. What then does not fit
        is refused with an `ObjectStoreFullError`. Environment: ``HOPCOLL_OBJECT_SCRATCH_BYTES``.
    inline_bytes : int, default 32768
        Objects of at most so many bytes travel in the messages of the directory, larger ones are
        pulled from a rank that has them; 512 to 65536. Each rank has room for a message of this
        length from each other one. Environment: ``HOPCOLL_INLINE_BYTES``.
    trace : str or None, default None
        A folder into which each rank writes what its engine is told and what it does, for
        ``hopcoll replay``: ``rank-3.trace``. It is made if it is missing; a trace that is there
        already is not written over (`FileExistsError`). Environment: ``HOPCOLL_TRACE``.
    trace_bytes : int, default 268435456
        How long a rank's trace may become, in bytes, at least 65536. It stops there; the job goes
        on. Environment: ``HOPCOLL_TRACE_BYTES``.
    connect_timeout_s : float, default 60.0
        How long the making of the communicator waits for all ranks, in seconds. Environment:
        ``HOPCOLL_CONNECT_TIMEOUT_S``.

    Raises
    ------
    TypeError, ValueError
        A setting has a wrong type or is out of its range; the message starts with its name.
    """

    chunk_bytes: int = 65536
    window_chunks: int = 16
    eager_bytes: int = 4096
    progress: str = "thread"
    timeout_s: float | None = None
    detect_s: float | None = 30.0
    late_bytes: int = 64 << 20
    object_bytes: int = 2 << 30
    object_scratch: str | None = None
    object_scratch_bytes: int = 16 << 30
    inline_bytes: int = 32768
    trace: str | None = None
    trace_bytes: int = 256 << 20
    connect_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        chunk_bytes = _integer("chunk_bytes", self.chunk_bytes)
        if not 0 < chunk_bytes <= _CHUNK_BYTES_MAX or chunk_bytes % _CHUNK_ALIGNMENT_BYTES:
            raise ValueError(
                f"chunk_bytes must be a multiple of {_CHUNK_ALIGNMENT_BYTES} from "
                f"{_CHUNK_ALIGNMENT_BYTES} to {_CHUNK_BYTES_MAX}, not {chunk_bytes}"
            )
        window_chunks = _integer("window_chunks", self.window_chunks)
        if not 1 <= window_chunks <= _WINDOW_CHUNKS_MAX:
            raise ValueError(
                f"window_chunks must be from 1 to {_WINDOW_CHUNKS_MAX}, not {window_chunks}"
            )
        eager_bytes = _integer("eager_bytes", self.eager_bytes)
        if not 0 <= eager_bytes <= _EAGER_BYTES_MAX:
            raise ValueError(f"eager_bytes must be from 0 to {_EAGER_BYTES_MAX}, not {eager_bytes}")
        if self.progress not in _PROGRESS:
            raise ValueError(f"progress must be 'thread' or 'inline', not {self.progress!r}")
        set_field = object.__setattr__  # the way around a frozen dataclass, for itself only
        set_field(self, "chunk_bytes", chunk_bytes)
        set_field(self, "window_chunks", window_chunks)
        set_field(self, "eager_bytes", eager_bytes)
        set_field(self, "timeout_s", seconds("timeout_s", self.timeout_s))
        detect_s = seconds("detect_s", self.detect_s)
        if detect_s is not None and detect_s < _DETECT_S_MIN:
            raise ValueError(f"detect_s must be at least {_DETECT_S_MIN:g}, not {detect_s:g}")
        set_field(self, "detect_s", detect_s)
        late_bytes = _integer("late_bytes", self.late_bytes)
        if not 0 <= late_bytes < 1 << 62:
            raise ValueError(f"late_bytes must be 0 or more, not {late_bytes}")
        set_field(self, "late_bytes", late_bytes)
        object_bytes = _integer("object_bytes", self.object_bytes)
        if not 0 <= object_bytes < 1 << 62:
            raise ValueError(f"object_bytes must be 0 or more, not {object_bytes}")
        set_field(self, "object_bytes", object_bytes)
        if self.object_scratch is not None:
            set_field(self, "object_scratch", os.path.abspath(os.fspath(self.object_scratch)))
        scratch_bytes = _integer("object_scratch_bytes", self.object_scratch_bytes)
        if not 0 <= scratch_bytes < 1 << 62:
            raise ValueError(f"object_scratch_bytes must be 0 or more, not {scratch_bytes}")
        set_field(self, "object_scratch_bytes", scratch_bytes)
        inline_bytes = _integer("inline_bytes", self.inline_bytes)
        if not _INLINE_BYTES_MIN <= inline_bytes <= _INLINE_BYTES_MAX:
            raise ValueError(
                f"inline_bytes must be from {_INLINE_BYTES_MIN} to {_INLINE_BYTES_MAX}, "
                f"not {inline_bytes}"
            )
        set_field(self, "inline_bytes", inline_bytes)
        if self.trace is not None:
            set_field(self, "trace", os.path.abspath(os.fspath(self.trace)))
        trace_bytes = _integer("trace_bytes", self.trace_bytes)
        if not _TRACE_BYTES_MIN <= trace_bytes < 1 << 62:
            raise ValueError(f"trace_bytes must be at least {_TRACE_BYTES_MIN}, not {trace_bytes}")
        set_field(self, "trace_bytes", trace_bytes)
        connect_timeout_s = seconds("connect_timeout_s", self.connect_timeout_s)
        if connect_timeout_s is None:
            raise ValueError("connect_timeout_s must be finite: it bounds the wait of init")
        set_field(self, "connect_timeout_s", connect_timeout_s)

    @classmethod
    def collect(cls, environ: Mapping[str, str] | None = None, **settings: Any) -> Config:
        """Take each setting from the arguments, else from the environment, else by default.

        Local, and reads nothing but `environ`.

        Parameters
        ----------
        environ : mapping of str to str, optional
            Where the ``HOPCOLL_*`` variables are looked up; ``os.environ`` if None. A variable
            that is set but empty counts as not set.
        **settings
            Fields of this class. None means "not given".

        Returns
        -------
        Config

        Raises
        ------
        TypeError, ValueError
            As the class does; for a value of the environment the message starts with the name of
            the variable. TypeError also for a name that is no setting.
        """
        environ = os.environ if environ is None else environ
        known = {field.name for field in fields(cls)}
        for name in settings:
            if name not in known:
                raise TypeError(f"{name} is not a setting; there are {', '.join(sorted(known))}")
        chosen = {name: value for name, value in settings.items() if value is not None}
        from_environment = []
        for name, (variable, convert) in _VARIABLES.items():
            text = environ.get(variable, "").strip()
            if text and name not in chosen:
                try:
                    chosen[name] = convert(text)
                except ValueError:
                    what = "an integer" if convert is int else "a number of seconds"
                    raise ValueError(f"{variable} must be {what}, not {text!r}") from None
                from_environment.append(name)
        try:
            return cls(**chosen)
        except ValueError as error:
            # Who set the variable looks for the variable's name, not for the argument's.
            name = str(error).partition(" ")[0]
            if name not in from_environment:
                raise
            raise ValueError(f"{_VARIABLES[name][0]}: {error}") from None

    def agreed(self) -> tuple[float, ...]:
        """Return the settings that must be the same at all ranks, as a hashable tuple.

        Local.

        Returns
        -------
        tuple of numbers
            ``(chunk_bytes, window_chunks, eager_bytes, inline_bytes, detect_s)``; no limit is 0.
        """
        bytes_agreed = self.chunk_bytes, self.window_chunks, self.eager_bytes, self.inline_bytes
        return *bytes_agreed, self.detect_s or 0.0


_VARIABLES: dict[str, tuple[str, Callable[[str], Any]]] = {
    "chunk_bytes": ("HOPCOLL_CHUNK_BYTES", int),
    "window_chunks": ("HOPCOLL_WINDOW", int),
    "eager_bytes": ("HOPCOLL_EAGER_BYTES", int),
    "progress": ("HOPCOLL_PROGRESS", str),
    "timeout_s": ("HOPCOLL_TIMEOUT_S", float),
    "detect_s": ("HOPCOLL_DETECT_S", float),
    "late_bytes": ("HOPCOLL_LATE_BYTES", int),
    "object_bytes": ("HOPCOLL_OBJECT_BYTES", int),
    "object_scratch": ("HOPCOLL_OBJECT_SCRATCH", str),
    "object_scratch_bytes": ("HOPCOLL_OBJECT_SCRATCH_BYTES", int),
    "inline_bytes": ("HOPCOLL_INLINE_BYTES", int),
    "trace": ("HOPCOLL_TRACE", str),
    "trace_bytes": ("HOPCOLL_TRACE_BYTES", int),
    "connect_timeout_s": ("HOPCOLL_CONNECT_TIMEOUT_S", float),
}


def _integer(name: str, value: object) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not a bool")
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name} must be an integer, not {type(value).__name__}") from None


def seconds(name: str, value: float | None) -> float | None:
    """Check a time limit: a number of seconds, 0 or more; None and infinity are no limit.

    Local.

    Parameters
    ----------
    name : str
        What the value is called in an error.
    value : float or None
        Seconds.

    Returns
    -------
    float or None
        The limit; None where there is none.

    Raises
    ------
    TypeError, ValueError
        It is no number, negative or not a number at all (NaN).
    """
    if value is None:
        return None
    if isinstance(value, (bool, str)):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}")
    try:
        limit = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number of seconds, not {type(value).__name__}") from None
    if math.isnan(limit) or limit < 0:
        raise ValueError(f"{name} must be 0 or more seconds, not {value}")
    return None if math.isinf(limit) else limit
