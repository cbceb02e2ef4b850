"""Machine code is read as it stands: kinds and sizes of accesses, the loops and the lines they are from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from fastproj.bench.audit.machine_code import (
    Access,
    Reading,
    amd_instructions,
    function_at,
    in_loops,
    nvidia_instructions,
    read_amdgcn,
)
from fastproj.bench.audit.machine_code import _nvidia_access as nvidia_access

NVIDIA = """
.text.kernel:
        //## File "/somewhere/tiles.py", line 7 inlined at "/somewhere/gram.py", line 4
        //## File "/somewhere/gram.py", line 4
        /*0000*/                   LDG.E.64 R2, desc[UR4][R8.64+0x8] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        //## File "/somewhere/gram.py", line 5
        /*0020*/                   LDG.E.128 R4, desc[UR4][R6.64] ;
        /*0030*/               @P1 BRA `(.L_x_1) ;
        /*0040*/                   LDG.E.U16 R9, desc[UR4][R6.64] ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   LDG.E R3, desc[UR4][R6.64] ;
        /*0070*/                   BRA `(.L_x_3) ;
.L_x_3:
        /*0080*/                   EXIT ;
"""
AMD = """
kernel:
\t.loc\t1 4 0 ; gram.py:4:0
\tglobal_load_dword v1, v[2:3], off
.LBB0_1:                                ; =>This Inner Loop Header: Depth=1
\t.loc\t3 70 20 ; tiles.py:2:20 @[ gram.py:5:35 ]
\tglobal_load_dwordx4 v[6:9], v[4:5], off
\tglobal_store_short v[2:3], v6, off
\tv_mfma_f32_32x32x8_bf16 a[0:3], v[1:2], v[3:4], a[0:3]
\ts_cbranch_scc1 .LBB0_1
; %bb.2:
\tscratch_store_dword off, v0, off offset:4
\ts_endpgm
    .private_segment_fixed_size: 12
    .vgpr_count:     40
"""


def test_nvidia_lines_are_told_apart() -> None:
    code = list(nvidia_instructions(NVIDIA))
    assert [c.label for c in code if c.label] == [".L_x_1", ".L_x_2", ".L_x_3"]
    first = next(c for c in code if c.text)
    assert first.text == "LDG.E.64 R2, desc[UR4][R8.64+0x8]"
    assert first.frames == (("/somewhere/tiles.py", 7), ("/somewhere/gram.py", 4))
    assert code[-1].frames == (("/somewhere/gram.py", 5),)


def test_only_what_comes_again_is_in_a_loop() -> None:
    """Neither what lies before and after a loop nor code out of line, whichever way the jumps go."""
    looped = [code.text for code in in_loops(tuple(nvidia_instructions(NVIDIA)))]
    assert looped == ["", "LDG.E.128 R4, desc[UR4][R6.64]", "@P1 BRA `(.L_x_1)"]
    backwards = NVIDIA.replace("BRA `(.L_x_3) ;", "BRA `(.L_x_1) ;")
    looped = [code.text for code in in_loops(tuple(nvidia_instructions(backwards)))]
    assert not any("LDG.E R3" in text for text in looped)


def test_a_jump_to_itself_is_a_loop() -> None:
    stuck = tuple(nvidia_instructions(".L_x_9:\n        /*0000*/                   BRA `(.L_x_9) ;\n"))
    assert [code.label for code in in_loops(stuck)] == [".L_x_9", None]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("LDG.E.128.CONSTANT R4, desc[UR4][R6.64]", ("load", 128)),
        ("@!P2 LDG.E.U8 R4, [R6.64]", ("load", 8)),
        ("LDG.E R4, [R6.64]", ("load", 32)),
        ("LDG.E.ENL2.256 R4, R8, desc[UR4][R6.64]", ("load", 256)),
        ("STG.E.64 desc[UR4][R2.64], R8", ("store", 64)),
        ("LDGSTS.E.BYPASS.LTC128B.128 [R2], desc[UR4][R6.64], P0", ("asynchronous copy", 128)),
        ("LDGSTS.E [R2], [R6.64]", ("asynchronous copy", 32)),
        ("LDGDEPBAR", None),
        ("LDS.128 R4, [R2]", None),
        ("STL [R1], R3", None),
    ],
)
def test_nvidia_accesses_have_kind_and_size(text: str, found: tuple[str, int] | None) -> None:
    assert nvidia_access(text) == found


def test_amd_assembly_is_read(tmp_path: Path) -> None:
    tiles, gram = tmp_path / "tiles.py", tmp_path / "gram.py"
    tiles.write_text("def load(x):\n    return x\n", encoding="utf-8")
    gram.write_text("import tiles\n\n\ndef kernel(x):\n    return tiles.load(x)\n", encoding="utf-8")
    reading = read_amdgcn(AMD, [tiles, gram], multiplies=True, shared_bytes=64)
    assert (reading.registers, reading.local_bytes, reading.shared_bytes) == (40, 12, 64)
    assert reading.spills == ("scratch_store_dword off, v0, off offset:4",)
    assert reading.tensor_core_instructions == 1
    assert reading.accesses == (
        Access("load", 128, ("load", "kernel"), "tiles.py:2", "global_load_dwordx4 v[6:9], v[4:5], off"),
        Access("store", 16, ("load", "kernel"), "tiles.py:2", "global_store_short v[2:3], v6, off"),
    )
    assert next(code.text for code in amd_instructions(AMD)) == "global_load_dword v1, v[2:3], off"
    # What the cache keeps is what was read.
    assert Reading.from_record(json.loads(json.dumps(reading.record()))) == reading


def test_a_report_without_its_numbers_is_refused() -> None:
    with pytest.raises(ValueError, match="vgpr_count"):
        read_amdgcn("\ts_endpgm\n", [], multiplies=False, shared_bytes=0)


def test_lines_belong_to_the_innermost_function(tmp_path: Path) -> None:
    path = tmp_path / "nested.py"
    path.write_text(
        "def outer():\n    def inner():\n        return 1\n    return inner\n\n\nX = 1\n", encoding="utf-8"
    )
    assert [function_at(path, line) for line in (1, 3, 4, 7)] == ["outer", "inner", "outer", None]
