"""The passes over shared memory that bench/bank_conflicts.py reads from a program's PTX."""

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    return lambda *lines: str(importlib.import_module("bench.bank_conflicts").passes("\n".join(lines)))


def strided(by):
    """%r2: thread t's address, t times `by` bytes behind the first."""
    return "\tmov.u32 \t%r1, %tid.x;", f"\tmul.lo.s32 \t%r3, %r1, {by};", "\tmov.b32 \t%r4, global_smem;", "\tadd.s32 \t%r2, %r4, %r3;"


@pytest.mark.parametrize("by,asked,expected", [
    (4, "ld.shared.b32 \t%r9, [%r2];", "1/1"),
    (8, "st.shared.b32 \t[%r2+64], %r9;", "2/1"),
    (128, "@%p3 ld.shared.f32 \t%f9, [ %r2 + 0 ];", "32/1"),
    (132, "ld.shared.u32 \t%r9, [%r2];", "1/1"),
    (0, "ld.shared.b32 \t%r9, [%r2];", "1/1"),  # one word for all
    (2, "st.shared.b16 \t[%r2], %rs1;", "1/1"),
    (8, "ld.shared.v2.b32 \t{%r8, %r9}, [%r2];", "2/2"),
    (16, "st.shared.v4.b32 \t[%r2], {%r6, %r7, %r8, %r9};", "4/4"),
    (64, "ld.shared.v4.b32 \t{%r6, %r7, %r8, %r9}, [%r2];", "16/4"),
    (16, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 \t{%r6, %r7, %r8, %r9}, [%r2];", "4/4"),
    (32, "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 \t{%r6, %r7}, [%r2];", "4/2"),
    (512, "ldmatrix.sync.aligned.m8n8.x4.shared.b16 \t{%r6, %r7, %r8, %r9}, [%r2];", "32/4"),
])
def test_a_bank_gives_a_word_a_pass(counted, by, asked, expected):
    assert counted(*strided(by), f"\t{asked}") == expected


def test_rows_that_are_swizzled_do_not_conflict(counted):
    """Eight rows of 128 bytes, the place in a row turned by the row's number: as Triton lays out a product's operand."""
    rows = ("\tmov.u32 \t%r1, %tid.x;", "\tand.b32 \t%r3, %r1, 7;", "\tshl.b32 \t%r4, %r3, 7;", "\tshr.u32 \t%r5, %r1, 3;")
    read = "\tldmatrix.sync.aligned.m8n8.x4.shared.b16 \t{%r11, %r12, %r13, %r14}, [%r10];"
    assert counted(*rows, "\tshl.b32 \t%r8, %r5, 4;", "\tor.b32 \t%r10, %r4, %r8;", read) == "32/4"
    assert counted(*rows, "\txor.b32 \t%r6, %r5, %r3;", "\tshl.b32 \t%r8, %r6, 4;", "\tor.b32 \t%r10, %r4, %r8;", read) == "4/4"
    assert counted(*rows, "\tlop3.b32 \t%r6, %r5, %r3, 0, 0x3c;", "\tbfe.u32 \t%r7, %r6, 0, 3;", "\tmad.lo.s32 \t%r10, %r7, 16, %r4;", read) == "4/4"


def test_what_depends_on_memory_is_unknown(counted):
    loaded = "\tld.global.b32 \t%r5, [%rd1];", "\tadd.s32 \t%r6, %r5, %r2;"
    assert counted(*strided(4), *loaded, "\tld.shared.b32 \t%r9, [%r6];", "\tld.shared.b32 \t%r9, [%r2];") == "1/1 and 1?"
    assert counted(*strided(4), "\tld.shared.b32 \t%r2, [%r2];", "\tld.shared.b32 \t%r9, [%r2];") == "1/1 and 1?"  # an address that was read
    assert counted(*strided(4), "\tcvt.rn.f32.s32 \t%f1, %r2;", "\tmul.f32 \t%f2, %f1, %f1;", "\tcvt.rzi.s32.f32 \t%r2, %f2;", "\tst.shared.b32 \t[%r2], %r9;") == "0/0 and 1?"


def test_only_the_longest_loop_counts(counted):
    conflicting, fine = "\tld.shared.b32 \t%r9, [%r3];", "\tld.shared.b32 \t%r9, [%r2];"
    start = *strided(4), "\tshl.b32 \t%r3, %r1, 7;"
    short, long = ("$L__BB0_1:", conflicting, "\t@%p1 bra \t$L__BB0_1;"), ("$L__BB0_2:", fine, fine, "\t@%p2 bra \t$L__BB0_2;")
    assert counted(*start, conflicting, *short, *long, conflicting) == "2/2"
    assert counted(*start, conflicting, *short, "\t@%p4 bra \t$L__BB0_9;", fine, "$L__BB0_9:") == "32/1" and counted(*start, conflicting, fine) == "33/2"
    assert counted() == "0/0"


def test_arguments_and_signs(counted):
    """Whole-number arguments are multiples of tiles, pointers 0; a negative number stays one."""
    assert counted("\tld.param.u64 \t%rd1, [kernel_param_0];", "\tld.param.b32 \t%r5, [kernel_param_1];", *strided(4), "\tsub.s32 \t%r6, %r2, %r5;", "\tshr.s32 \t%r7, %r6, 2;",
                   "\tcvt.s64.s32 \t%rd2, %r7;", "\tadd.s64 \t%rd3, %rd1, %rd2;", "\tld.shared.b8 \t%rs1, [%rd3];") == "1/1"
    negative = "\tmov.u32 \t%r1, %tid.x;", "\tsub.s32 \t%r2, %r1, 16;", "\tsetp.lt.s32 \t%p1, %r2, 0;", "\tselp.b32 \t%r3, 0, %r1, %p1;", "\tshl.b32 \t%r4, %r3, 7;"
    assert counted(*negative, "\tld.shared.b32 \t%r9, [%r4];") == "17/1"  # one address for the lower 16 threads, the others' 16 in the same bank


@pytest.mark.parametrize("line,expected", [
    ("bfe.u32 %r3, %r1, 1, 2;", lambda t: t >> 1 & 3), ("bfe.s32 %r3, %r1, 1, 2;", lambda t: (0, 1, -2, -1)[t >> 1 & 3]), ("neg.s32 %r3, %r1;", lambda t: -t),
    ("lop3.b32 %r3, %r1, 12, 5, 0x40;", lambda t: t & 12 & ~5), ("shr.s32 %r3, %r2, 2;", lambda t: t - 20 >> 2), ("shr.u32 %r3, %r2, 2;", lambda t: (t - 20) % 2 ** 32 >> 2),
    ("min.s32 %r3, %r2, 3;", lambda t: min(t - 20, 3)), ("shl.b16 %r3, %r1, 14;", lambda t: (t << 14) % 2 ** 16), ("cvt.u16.u32 %r3, %r2;", lambda t: (t - 20) % 2 ** 16),
    ("cvt.s64.s32 %r3, %r2;", lambda t: t - 20), ("mul.hi.u32 %r3, %r1, %r2;", None), ("ld.param.b32 %r3, [k];", lambda t: 4096), ("ld.param.b64 %r3, [k];", lambda t: 0),
    ("div.s32 %r3, %r2, 3;", lambda t: int((t - 20) / 3)), ("rem.s32 %r3, %r2, 3;", lambda t: t - 20 - 3 * int((t - 20) / 3)), ("div.s32 %r3, %r1, 0;", None),
    ("shl.b32 %r3, %r1, %r2;", lambda t: t << t - 20 if t > 19 else 0), ("setp.lt.and.s32 %r3, %r1, 3, 1;", None), ("prmt.b32 %r3, %r1, %r2, 0x5410U;", None),
], ids=lambda given: given if isinstance(given, str) else "")
def test_whole_numbers_are_those_of_ptx(counted, line, expected):
    """%r1: thread t's t; %r2: t - 20, negative for most."""
    warp = importlib.import_module("bench.bank_conflicts")._Warp()
    for each in ("mov.u32 %r1, %tid.x;", "sub.s32 %r2, %r1, 20;", "st.global.b32 [ %r1 + 0 ], %r2;", line):
        warp.run(each)
    found, wanted = warp.registers["%r3"], expected and [expected(t) for t in range(32)]
    assert found == wanted or found == [n % 2 ** 32 for n in wanted]
