from collections.abc import Sequence
from typing import final

from typing_extensions import Buffer

from cython_kernels.mpi_transport import MpiTransport

class PeerDiedError(ConnectionError):
    peer: int
    watermark_bytes: int
    def __init__(self, message: str, peer: int, watermark_bytes: int) -> None: ...

class PeerGaveUpError(PeerDiedError): ...

class TransferTimeout(TimeoutError):
    peer: int
    watermark_bytes: int
    def __init__(self, message: str, peer: int, watermark_bytes: int) -> None: ...

@final
class Pipeline:
    transport: MpiTransport
    def __init__(
        self,
        transport: MpiTransport,
        chunk_bytes: int,
        window: int,
        *,
        kill_after_chunks: int = 0,
    ) -> None: ...
    @property
    def moved_chunks(self) -> int: ...
    @property
    def open_count(self) -> int: ...
    def send(
        self, buffer: Buffer, dest: int, tag: int = 0, timeout_s: float | None = None
    ) -> None: ...
    def receive(
        self, buffer: Buffer, source: int, tag: int = 0, timeout_s: float | None = None
    ) -> None: ...
    def relay(
        self,
        buffer: Buffer,
        source: int,
        dests: int | Sequence[int],
        tag: int = 0,
        timeout_s: float | None = None,
    ) -> None: ...
    def reduce(
        self,
        own: Buffer,
        result: Buffer,
        source: int,
        dest: int | None,
        dtype: int,
        op: int,
        tag: int = 0,
        timeout_s: float | None = None,
    ) -> None: ...
    def settle(self, timeout_s: float) -> bool: ...
