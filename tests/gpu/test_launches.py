"""Reading what XLA:GPU says that it will do; tests/engine/test_targets.py asks it about steps."""

from benchmarks.gpu.launches import read

THUNKS = """\
000: kCommandBuffer [source       | next=005 (1)]
    001: kCustomKernel [source       | next=002 (1)] gemm_fusion_dot_1 grid: [8, 1, 1]
    002: kConditional  [prev=001 (1) | next=004 (1)]
      true_branch:
        003: kCopy [source | sink] kCopy
    004: kCustomKernel [prev=002 (1) | sink        ] attention_decode grid: [8, 74, 1]
005: kWhile        [prev=000 (1) | sink]
condition:
    006: kCustomKernel [source | sink] wrapped_compare grid: [1, 1, 1]
  body:
    007: kCommandBuffer [source | sink]
        008: kCustomKernel [source | sink] loop_add_fusion grid: [1, 1, 1]
"""


def test_launches_are_counted_by_kind_inside_and_outside_of_graphs():
    found = read(THUNKS)
    assert found.kinds == {"product": 1, "attention": 1, "copy": 1, "other": 2}
    assert (found.n_graphs, found.n_alone) == (2, 1)


def test_loops_and_conditions_make_the_host_wait_outside_of_graphs_only():
    assert read(THUNKS).n_waits == 1
