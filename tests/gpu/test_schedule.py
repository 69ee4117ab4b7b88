"""Reading SASS, and what follows from it."""

import pytest

from benchmarks.gpu import sass
from benchmarks.gpu.schedule import CHIPS, Tile, figures, occupancy

CODE = """
.text.attention:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
.L_x_1:
        /*0020*/                   HMMA.16816.F32.BF16 R48, R32.reuse, R44, RZ ;
        /*0030*/                   IMAD.MOV.U32 R7, RZ, RZ, R29 ;
        /*0040*/              @!P0 MUFU.EX2 R1, R1 ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/              @!P2 BRA `(.L_x_0) ;
        /*0070*/               @P3 BRA `(.L_x_2) ;
.L_x_2:
        /*0080*/                   EXIT ;
.L_x_3:
        /*0090*/                   BRA `(.L_x_3);
"""


def kernel(**changed) -> sass.Kernel:
    code = sass.parse(CODE)
    made = sass.Kernel("attention", 128, 36_864, 89, 0, False, sass.loops(code), sass.count(code))
    return made._replace(**changed)


def test_innermost_loop_has_its_instructions_by_kind():
    (loop,) = kernel().tile_loops
    assert loop == {"matrix": 1, "move": 1, "exp": 1, "wait": 1}
    assert kernel().whole.total() == 10


@pytest.mark.parametrize(
    ("changed", "n_ctas"),
    [({}, 5), ({"shared_size": 71_680}, 3), ({"n_registers": 255}, 2), ({"n_threads": 1024}, 0)],
)
def test_registers_shared_memory_and_warps_bound_what_runs_at_once(changed, n_ctas):
    assert occupancy(kernel(**changed), CHIPS["h100"]) == n_ctas


def test_floors_are_of_64_cells_and_the_largest_binds():
    tile = Tile(rows=16, cells=32, head_size=128, cell_size=512)
    found = figures(kernel(), CHIPS["a100"], tile)
    assert found.interior == 8 and found.floors["issue"] == 8  # 4 warps, 4 schedulers
    assert found.floors["unit"] == 4 * 16 * 64 * 128 / 2048
    assert found.floors["bytes"] == pytest.approx(64 * 512 / 13.39, rel=1e-3)
    assert found.binds.startswith("bytes ")


def test_missing_tool_is_named_with_its_package(monkeypatch):
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setenv("PATH", "")
    with pytest.raises(FileNotFoundError, match="pip install nvidia-cuda-nvdisasm"):
        sass.find_tool("nvdisasm")
