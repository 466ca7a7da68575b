from typing import Final

from typing_extensions import Buffer

INT8: Final = 0
INT16: Final = 1
INT32: Final = 2
INT64: Final = 3
UINT8: Final = 4
UINT16: Final = 5
UINT32: Final = 6
UINT64: Final = 7
FLOAT16: Final = 8
BFLOAT16: Final = 9
FLOAT32: Final = 10
FLOAT64: Final = 11
COMPLEX64: Final = 12
COMPLEX128: Final = 13
BOOL: Final = 14
BYTES: Final = 15

SUM: Final = 0
PROD: Final = 1
MIN: Final = 2
MAX: Final = 3
LAND: Final = 4
LOR: Final = 5
LXOR: Final = 6
BAND: Final = 7
BOR: Final = 8
BXOR: Final = 9
AVG: Final = 10
NONE: Final = 11

DTYPE_NAMES: Final[tuple[str, ...]]
OP_NAMES: Final[tuple[str, ...]]
VARIANTS: Final[tuple[str, ...]]

def itemsize_of(dtype: int) -> int: ...
def supported(dtype: int, op: int) -> bool: ...
def reduce(
    dtype: int,
    op: int,
    left: Buffer,
    right: Buffer,
    dest: Buffer,
    *,
    variant: str | None = None,
) -> None: ...
def divide_array(dtype: int, dest: Buffer, divisor: int, *, variant: str | None = None) -> None: ...
