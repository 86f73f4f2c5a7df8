"""Rows of a tensor as 16-byte chunks, the unit of every access to memory that ranks share.

A row on the wire starts at a multiple of 16 bytes and is padded to whole chunks. A tensor's rows may
start anywhere and have any stride: ``ALIGNED`` says that chunks of the tensor are chunks of memory
(one 16-byte access each); else they are assembled from single elements. A chunk is four int32 tensors.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from .ptx import load_chunk, store_chunk


class Rows(NamedTuple):
    """A 2-D tensor: elements of 2, 4 or 8 bytes; strides in bytes."""

    data: object  # tensor
    row_stride: int
    element_stride: int
    length: int  # elements of a row


class Slots(NamedTuple):
    """One region of the symmetric buffer: two slots of rows."""

    offset: int  # bytes from the buffer's start to slot 0
    nbytes: int  # of one slot
    rows: int  # of one slot


class Place(NamedTuple):
    """A 2-D tensor in symmetric memory, at the same offset on every rank; rows are whole chunks, 16-byte aligned."""

    data: object  # this rank's tensor
    table: object  # (W,) int64 tensor: address of the allocation on each rank
    multicast: int  # its multicast address, or 0
    offset: int  # bytes before row 0
    row_stride: int  # bytes
    length: int  # elements of a row


@triton.jit
def slot_offset(slots, epoch):
    """Bytes from the buffer's start to the slot of this epoch."""
    return slots.offset + (epoch & 1) * slots.nbytes


@triton.jit
def row_chunks(rows):
    """Chunks of one row on the wire (int)."""
    PER_CHUNK: tl.constexpr = 16 // (rows.data.dtype.element_ty.primitive_bitwidth // 8)
    return (rows.length + PER_CHUNK - 1) // PER_CHUNK


@triton.jit
def _gather_word(rows, row, chunk, mask, WORD: tl.constexpr):
    """The 32-bit word ``WORD`` (0..3) of each chunk."""
    ITEM: tl.constexpr = rows.data.dtype.element_ty.primitive_bitwidth // 8
    element = chunk * (16 // ITEM) + (WORD * 4) // ITEM
    address = rows.data.to(tl.int64) + row * rows.row_stride + element.to(tl.int64) * rows.element_stride
    inside = mask & (element < rows.length)
    if ITEM == 2:
        low = tl.load(address.to(tl.pointer_type(tl.int16)), mask=inside, other=0)
        second = mask & (element + 1 < rows.length)
        high = tl.load((address + rows.element_stride).to(tl.pointer_type(tl.int16)), mask=second, other=0)
        word = (low.to(tl.int32) & 0xFFFF) | (high.to(tl.int32) << 16)
    else:
        word = tl.load((address + (WORD * 4) % ITEM).to(tl.pointer_type(tl.int32)), mask=inside, other=0)
    return word


@triton.jit
def _scatter_word(rows, row, chunk, word, mask, WORD: tl.constexpr):
    """The inverse, into an output, whose rows are contiguous."""
    ITEM: tl.constexpr = rows.data.dtype.element_ty.primitive_bitwidth // 8
    element = chunk * (16 // ITEM) + (WORD * 4) // ITEM
    address = rows.data.to(tl.int64) + row * rows.row_stride + chunk * 16 + WORD * 4
    inside = mask & (element < rows.length)
    if ITEM == 2:
        tl.store(address.to(tl.pointer_type(tl.int16)), word.to(tl.int16), mask=inside)
        second = mask & (element + 1 < rows.length)
        tl.store((address + 2).to(tl.pointer_type(tl.int16)), (word >> 16).to(tl.int16), mask=second)
    else:
        tl.store(address.to(tl.pointer_type(tl.int32)), word, mask=inside)


@triton.jit
def gather_chunk(rows, row, chunk, mask, ALIGNED: tl.constexpr):
    """Chunks ``chunk (N,) int32`` of row ``row`` (int64), zeros where ``mask`` is off or the row has ended."""
    if ALIGNED:
        return load_chunk(rows.data.to(tl.int64) + row * rows.row_stride + chunk * 16, mask)
    return (
        _gather_word(rows, row, chunk, mask, 0),
        _gather_word(rows, row, chunk, mask, 1),
        _gather_word(rows, row, chunk, mask, 2),
        _gather_word(rows, row, chunk, mask, 3),
    )


@triton.jit
def scatter_chunk(rows, row, chunk, data, mask, ALIGNED: tl.constexpr):
    """The inverse: store chunks into a row of an output (local, contiguous)."""
    if ALIGNED:
        store_chunk(rows.data.to(tl.int64) + row * rows.row_stride + chunk * 16, data, mask, False)
    else:
        for word in tl.static_range(4):
            _scatter_word(rows, row, chunk, data[word], mask, word)


@triton.jit
def first_unit(start):
    """The first unit from ``start`` (int32) on that belongs to this program: unit ``u`` is program ``u mod G``'s."""
    programs = tl.num_programs(0)
    return start + (tl.program_id(0) - start % programs + programs) % programs
