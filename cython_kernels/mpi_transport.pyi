from typing import final

from mpi4py import MPI

@final
class MpiTransport:
    hellos: list[bytes]
    fault_tolerant: bool
    library_version: str
    tag_max: int
    def __init__(
        self,
        comm: MPI.Intracomm,
        control_bytes_max: int,
        connect_timeout_s: float,
        hello: bytes,
    ) -> None: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def error_class(self) -> int: ...
    @property
    def error_peer(self) -> int: ...
    def table_address(self) -> int: ...
    def close(self, timeout_s: float) -> bool: ...
