"""Count what a GPU program leaves to cuDNN and cuBLAS, which XLA's cost analysis does not count.

A compiled GPU program calls these libraries for convolutions and for most products of matrices.
The calls name their operands, whose shapes are looked up among the other lines of a computation.
"""

import math
import re
from collections.abc import Iterator

from mosaic_jax.plan.hlo import Module, Shape, shapes

_RESULT = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.*?) [\w\-]+\(")
_CALL = re.compile(
    r"\s+(?:ROOT )?%?([\w.\-]+) = .*? custom-call\(([^)]*)\)"
    r'.*custom_call_target="__(?:cudnn\$conv|cublas\$).*'
)


def counted(module: Module, name: str) -> dict[str, float]:
    """Return the "flops" and "bytes" of a computation's library calls, without those of its loops.

    Bytes are those of operands and result; a call's workspace is left out.
    """
    totals = {"flops": 0.0, "bytes": 0.0}
    for part in module.reached(name):
        for line, arrays in _calls(module.computations[part].lines):
            totals["flops"] += _flops(line, [each.dims for each in arrays])
            totals["bytes"] += sum(each.bytes for each in arrays)
    return totals


def _calls(lines: list[str]) -> Iterator[tuple[str, list[Shape]]]:
    """Yield the line of each library call with its arrays: the operands, then the result."""
    calls = [found for line in lines if (found := _CALL.match(line))]
    results = {found[1]: found[2] for line in lines if calls and (found := _RESULT.match(line))}
    for call in calls:
        names = [name.strip().lstrip("%") for name in call[2].split(",")]
        yield call[0], [shapes(results[name])[0] for name in (*names, call[1])]


def _flops(line: str, dims: list[tuple[int, ...]]) -> float:
    """Return the operations of a call, of shapes of its operands and result."""
    if "__cudnn$conv" in line:
        return _convolution(line, dims)
    contracted = re.search(r'"lhs_contracting_dimensions":\[([^\]]*)\]', line)
    axes = [int(axis) for axis in re.findall(r"\d+", contracted[1] if contracted else "")]
    return 2.0 * math.prod(dims[-1]) * math.prod(dims[0][axis] for axis in axes)


def _convolution(line: str, dims: list[tuple[int, ...]]) -> float:
    """Return the operations of a convolution or of a gradient of one, without those on padding.

    All three multiply the same pairs, so they count as the convolution does, whose images, kernel
    and output are, in the direction at hand, operands or the result.
    """
    first, second, *_, last = dims
    images, kernel, output = (first, second, last)
    if "convBackwardInput" in line:
        images, kernel, output = (last, second, first)
    elif "convBackwardFilter" in line:
        images, kernel, output = (first, last, second)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", line)
    assert labels is not None
    pairs = 1
    for axis, window in enumerate(_windows(line)):
        here = [text.index(str(axis)) for text in labels.groups()]
        pairs *= _pairs(images[here[0]], output[here[2]], *window)
    channels = output[labels[3].index("f")] * kernel[labels[2].index("i")]  # of one group
    return 2.0 * output[labels[3].index("b")] * channels * pairs


def _windows(line: str) -> list[tuple[int, int, int, int]]:
    """Return the size, stride, padding before and dilation of a convolution's window, by axis."""
    text = re.search(r"window=\{([^}]*)\}", line)
    given = dict(part.split("=") for part in text[1].split()) if text else {}
    sizes = given.get("size", "").split("x") if text else []
    strides = given.get("stride", "x".join("1" for _ in sizes)).split("x")
    pads = given.get("pad", "x".join("0_0" for _ in sizes)).split("x")
    dilations = given.get("rhs_dilate", "x".join("1" for _ in sizes)).split("x")
    return [
        (int(size), int(stride), int(pad.split("_")[0]), int(dilation))
        for size, stride, pad, dilation in zip(sizes, strides, pads, dilations, strict=True)
    ]


def _pairs(images: int, output: int, size: int, stride: int, pad: int, dilation: int) -> int:
    """Count the pairs of output and kernel positions along an axis that meet a pixel."""
    return sum(
        0 <= place * stride + tap * dilation - pad < images
        for place in range(output)
        for tap in range(size)
    )
