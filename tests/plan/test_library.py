"""Calls of cuDNN and cuBLAS count as XLA counts the operations that they stand for."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from mosaic_jax.plan import library
from mosaic_jax.plan.compiled import counted
from mosaic_jax.plan.hlo import Module

CONVOLUTION = """HloModule program

%body (loop: (s32[], {first}, {second})) -> (s32[], {first}, {second}) {{
  %loop = (s32[], {first}, {second}) parameter(0)
  %i = s32[] get-tuple-element(%loop), index=0
  %a = {first} get-tuple-element(%loop), index=1
  %b = {second} get-tuple-element(%loop), index=2
  %call = ({result}, u8[4096]{{0}}) custom-call(%a, %b), \
window={{size=3x3 stride=2x2 pad=1_1x1_1}}, dim_labels=b01f_o01i->b01f, \
feature_group_count={groups}, custom_call_target="__cudnn$conv{kind}"
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], {first}, {second}) tuple(%next, %a, %b)
}}

%condition (loop: (s32[], {first}, {second})) -> pred[] {{
  %loop = (s32[], {first}, {second}) parameter(0)
  %i = s32[] get-tuple-element(%loop), index=0
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

ENTRY %main (start: (s32[], {first}, {second})) -> (s32[], {first}, {second}) {{
  %start = (s32[], {first}, {second}) parameter(0)
  ROOT %while = (s32[], {first}, {second}) while(%start), condition=%condition, body=%body
}}
"""

IMAGES, KERNEL, OUTPUT = "f32[4,9,9,6]", "f32[8,3,3,{}]", "f32[4,5,5,8]"


def xla_count(function, *shapes) -> float:
    """Return XLA's operations of a function, compiled here."""
    found = jax.jit(function).lower(*(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    return found.compile().cost_analysis()["flops"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    ("kind", "first", "second", "result"),
    [
        ("Forward", IMAGES, KERNEL, OUTPUT),
        ("BackwardInput", OUTPUT, KERNEL, IMAGES),
        ("BackwardFilter", IMAGES, OUTPUT, KERNEL),
    ],
)
def test_convolutions_in_loops(kind, first, second, result, groups):
    arrays = [each.format(6 // groups) for each in (first, second, result)]
    first, second, result = arrays
    text = CONVOLUTION.format(kind=kind, groups=groups, first=first, second=second, result=result)
    window = ((2, 2), ((1, 1), (1, 1)))
    labels = ("NHWC", "OHWI", "NHWC")
    expected = xla_count(
        lambda x, k: lax.conv_general_dilated(
            x, k, *window, dimension_numbers=labels, feature_group_count=groups
        ),
        (4, 9, 9, 6),
        (8, 3, 3, 6 // groups),
    )
    module = Module(text)
    assert library.counted(module, module.entry) == {"flops": 0, "bytes": 0}
    found = library.counted(module, "body")
    assert found["flops"] == pytest.approx(expected)
    assert found["bytes"] == 4 * (4 * 9 * 9 * 6 + 8 * 3 * 3 * 6 // groups + 4 * 5 * 5 * 8)
    totals, once = counted(module)
    assert totals["flops"] == pytest.approx(5 * found["flops"], rel=1e-2)
    assert once["flops"] == pytest.approx(found["flops"], rel=1e-2)


def test_products_of_matrices():
    text = """HloModule program

ENTRY %main (a: bf16[7,32,10], b: bf16[7,32,20]) -> bf16[7,10,20] {
  %a = bf16[7,32,10]{2,1,0} parameter(0)
  %b = bf16[7,32,20]{2,1,0} parameter(1)
  %product = (bf16[7,10,20]{2,1,0}, s8[4194304]{0}) custom-call(%a, %b), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":{\
"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],\
"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
  ROOT %result = bf16[7,10,20]{2,1,0} get-tuple-element(%product), index=0
}
"""
    module = Module(text)
    found = library.counted(module, module.entry)
    expected = xla_count(lambda a, b: jnp.einsum("nkl,nkm->nlm", a, b), (7, 32, 10), (7, 32, 20))
    assert found["flops"] == expected == 2 * 7 * 10 * 20 * 32
    assert found["bytes"] == 2 * 7 * (32 * 10 + 32 * 20 + 10 * 20)


def test_the_text_counts_as_the_compiler_does():
    x = jnp.zeros((32, 32))
    program = jax.jit(lambda x: lax.fori_loop(0, 6, lambda _, y: jnp.sin(y) @ x, x)).lower(x)
    compiled = program.compile()
    module, cost = Module(compiled.as_text()), compiled.cost_analysis()
    (totals, once), (scaled, theirs) = counted(module), counted(module, cost)
    assert theirs == {"flops": cost["flops"], "bytes": cost["bytes accessed"]}
    assert once == pytest.approx(theirs)
    assert totals == pytest.approx(scaled)
    assert totals["flops"] == pytest.approx(6 * 2 * 32**3, rel=0.1)
