"""The project's only inline assembly: one function per meaning, each with the PTX text it emits.

Every function works on tensors of 64-bit addresses, one element a thread. Side effects happen once
per element *held by a thread*: give at least ``32 * num_warps`` elements, or Triton replicates each
element over several threads and the effect with it. The functions on ``LANES`` elements guard
themselves (``%tid.x < 32``), so that the first warp alone acts.

Whatever touches memory is ``is_pure=False`` (or two loads may be merged across a barrier), never
writes an input operand, and gives every output a value where the mask is off.

``moe_ops/emulator/machine.py`` executes the same text on a CPU; a new form needs a line there.
"""

import triton
import triton.language as tl

LANES = tl.constexpr(32)  # one warp: the largest number of ranks that one signal covers


def _predicated(instruction: str, mask: int, outputs: int) -> tl.constexpr:
    """PTX that runs ``instruction`` where operand ``mask`` is not 0, and gives zeros elsewhere.

    Outputs are early-clobber in the constraints, as they are written before the address is read.
    """
    zeros = "".join(f"mov.b32 ${i}, 0; " for i in range(outputs))
    return tl.constexpr(f"{{ .reg .pred p; setp.ne.b32 p, ${mask}, 0; {zeros}@p {instruction}; }}")


_CHUNK_OUT = tl.constexpr("=&r,=&r,=&r,=&r,l,r")
_LOAD_CHUNK = _predicated("ld.global.v4.b32 {$0, $1, $2, $3}, [$4]", mask=5, outputs=4)
_REDUCE_BF16 = _predicated(
    "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {$0, $1, $2, $3}, [$4]", mask=5, outputs=4
)
_REDUCE_FP16 = _predicated(
    "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.f16x2 {$0, $1, $2, $3}, [$4]", mask=5, outputs=4
)
_REDUCE_FP32 = _predicated("multimem.ld_reduce.relaxed.sys.global.add.v4.f32 {$0, $1, $2, $3}, [$4]", mask=5, outputs=4)
_STORE_CHUNK = _predicated("st.global.v4.b32 [$1], {$2, $3, $4, $5}", mask=6, outputs=1)
_MULTICAST_CHUNK = _predicated("multimem.st.relaxed.sys.global.v4.f32 [$1], {$2, $3, $4, $5}", mask=6, outputs=1)


@triton.jit
def load_chunk(address, mask):
    """16 bytes at each ``address (N,) int64``: four int32 tensors, 0 where ``mask`` is off."""
    return tl.inline_asm_elementwise(
        _LOAD_CHUNK, _CHUNK_OUT, [address, mask.to(tl.int32)], (tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.constexpr_function
def _load_all_text(count: int) -> str:
    """PTX: ``count`` 16-byte loads in a row, each with a mask of its own.

    The fence keeps ptxas from moving some of them behind the first use of others: the caller wants all in flight.
    """
    outputs = 4 * count
    zeros = "".join(f"mov.b32 ${i}, 0; " for i in range(outputs))
    guards = "".join(f".reg .pred p{i}; setp.ne.b32 p{i}, ${outputs + count + i}, 0; " for i in range(count))
    loads = "".join(
        f"@p{i} ld.global.v4.b32 {{${4 * i}, ${4 * i + 1}, ${4 * i + 2}, ${4 * i + 3}}}, [${outputs + i}]; "
        for i in range(count)
    )
    return f"{{ {guards}{zeros}{loads}fence.acq_rel.cta; }}"


@triton.constexpr_function
def _load_all_constraints(count: int) -> str:
    return ",".join(["=&r"] * (4 * count) + ["l"] * count + ["r"] * count)


@triton.constexpr_function
def _words(count: int) -> tuple[tl.dtype, ...]:
    return (tl.int32,) * count


@triton.jit
def load_chunks(addresses, masks, COUNT: tl.constexpr):
    """``load_chunk`` at ``COUNT`` addresses (a tuple of (N,) int64) at once: a tuple of ``4 * COUNT`` int32 tensors.

    ``masks``: as many, int32.
    """
    return tl.inline_asm_elementwise(
        _load_all_text(COUNT), _load_all_constraints(COUNT), addresses + masks, _words(4 * COUNT),
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def reduce_chunk(address, mask, DTYPE: tl.constexpr):
    """Sum of the 16 bytes at a multicast ``address (N,) int64`` over all ranks, in fp32, rounded to ``DTYPE`` once.

    The order of the additions is the switch's. Four int32 tensors, 0 where ``mask`` is off.
    """
    if DTYPE == tl.bfloat16:
        ASM: tl.constexpr = _REDUCE_BF16
    elif DTYPE == tl.float16:
        ASM: tl.constexpr = _REDUCE_FP16
    else:
        ASM: tl.constexpr = _REDUCE_FP32
    return tl.inline_asm_elementwise(
        ASM, _CHUNK_OUT, [address, mask.to(tl.int32)], (tl.int32, tl.int32, tl.int32, tl.int32),
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def store_chunk(address, chunk, mask, MULTICAST: tl.constexpr):
    """Store 16 bytes (``chunk``: four int32 tensors) at each ``address (N,) int64`` where ``mask`` is on.

    With ``MULTICAST`` the address is a multicast one and the bytes reach every rank.
    """
    if MULTICAST:
        ASM: tl.constexpr = _MULTICAST_CHUNK
    else:
        ASM: tl.constexpr = _STORE_CHUNK
    tl.inline_asm_elementwise(
        ASM, "=&r,l,r,r,r,r,r", [address, chunk[0], chunk[1], chunk[2], chunk[3], mask.to(tl.int32)], tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


_FIRST_WARP = (
    "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.lt.u32 p, t, 32; setp.ne.and.b32 p, $3, 0, p; mov.b32 $0, 0; "
)
_RELEASE_WORD = tl.constexpr(_FIRST_WARP + "@p st.release.sys.global.b64 [$1], $2; }")
_RELAXED_WORD = tl.constexpr(_FIRST_WARP + "@p st.relaxed.sys.global.b64 [$1], $2; }")


@triton.jit
def signal_word(address, word, mask, RELEASE: tl.constexpr):
    """The first warp stores ``word (LANES,) int64`` at ``address (LANES,)``: system scope, one store each."""
    tl.inline_asm_elementwise(
        _RELEASE_WORD if RELEASE else _RELAXED_WORD, "=&r,l,l,r", [address, word, mask.to(tl.int32)], tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def abort_word(address, word, mask):
    """As ``signal_word``, by whichever warp comes here: the failure path, where a repeated store does no harm."""
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $3, 0; mov.b32 $0, 0; @p st.release.sys.global.b64 [$1], $2; }",
        "=&r,l,l,r", [address, word, mask.to(tl.int32)], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


_POLL = "{ .reg .pred p; setp.ne.b32 p, $2, 0; mov.b64 $0, 0; @p "
_ACQUIRE_WORD = tl.constexpr(_POLL + "ld.acquire.sys.global.b64 $0, [$1]; }")
_POLL_WORD = tl.constexpr(_POLL + "ld.relaxed.sys.global.b64 $0, [$1]; }")


@triton.jit
def poll_word(address, mask, ACQUIRE: tl.constexpr):
    """``(LANES,) int64`` at ``address (LANES,)``: system scope, by every warp; 0 where ``mask`` is off."""
    return tl.inline_asm_elementwise(
        _ACQUIRE_WORD if ACQUIRE else _POLL_WORD, "=&l,l,r", [address, mask.to(tl.int32)], tl.int64,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def block_any(flag):
    """Whether ``flag`` (scalar int32, may differ between warps) is not 0 in any warp: a block barrier, one verdict."""
    return tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.b32 p, $1, 0; barrier.cta.red.or.pred p, 0, p; selp.b32 $0, 1, 0, p; }",
        "=r,r", [flag], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def prefetch_l2(address, size, count):
    """Threads 0 ... count - 1 ask L2 for ``size`` bytes at their element of ``address``: (N,) int32 and int64 tensors.

    N elements lie on the threads in order and again from ``N`` on. Sizes and addresses are multiples of 16.
    """
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 t; mov.u32 t, %tid.x; setp.lt.u32 p, t, $3; mov.b32 $0, 0; "
        "@p cp.async.bulk.prefetch.L2.global [$1], $2; }",
        "=&r,l,r,r", [address, size, count], tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def device_clock():
    """Nanoseconds of the device's global timer (resolution about 1 us)."""
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], tl.int64, is_pure=False, pack=1)


@triton.jit
def fence_aliases(token):
    """Order accesses through a multicast address against those through the same memory's own address."""
    tl.inline_asm_elementwise("fence.proxy.alias; mov.b32 $0, $1;", "=&r,r", [token], tl.int32, is_pure=False, pack=1)


@triton.jit
def record_failure(failed, poison_at, poison, record_at, header, epoch, ranks, amounts):
    """Where ``failed``: the first to get here stores ``poison`` (was 0) and the four words of the host's record.

    All operands scalars (int64, but ``failed`` int32). One lane of a warp acts; of several warps, blocks or kernels
    the compare-and-swap lets one through. The header comes last, so a host that sees it sees the rest.
    """
    tl.inline_asm_elementwise(
        "{ .reg .pred p; .reg .b32 lane; .reg .b64 old; mov.u32 lane, %laneid; setp.eq.u32 p, lane, 0; "
        "setp.ne.and.b32 p, $1, 0, p; mov.b32 $0, 0; mov.b64 old, 1; "
        "@p atom.relaxed.gpu.global.cas.b64 old, [$2], 0, $3; setp.eq.b64 p, old, 0; "
        "@p st.global.b64 [$4+8], $6; @p st.global.b64 [$4+16], $7; @p st.global.b64 [$4+24], $8; "
        "@p st.release.sys.global.b64 [$4], $5; }",
        "=&r,r,l,l,l,l,l,l,l", [failed, poison_at, poison, record_at, header, epoch, ranks, amounts], tl.int32,
        is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit
def round_pair(low, high, DTYPE: tl.constexpr):
    """Two fp32 rounded to nearest even into one int32 (``low`` in the low half). ``DTYPE``: bf16 or fp16.

    Not Triton's cast, because its interpreter rounds fp32 to bf16 wrongly (ties up, carry lost; 3.9.0).
    """
    if DTYPE == tl.bfloat16:
        ASM: tl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;"
    else:
        ASM: tl.constexpr = "cvt.rn.f16x2.f32 $0, $2, $1;"
    return tl.inline_asm_elementwise(ASM, "=r,f,f", [low, high], tl.int32, is_pure=True, pack=1)
