"""Weighted sums of neighbouring pixels, by vector instructions that numba finds no way to.

A row of pixels is a flat array of three values each, float32 or uint32. Pixels are summed as
vectors of four: a whole pixel, and the first value of the next one. Numba's own loops would gather
the values of many pixels one by one, which takes four times as long.

Numba keeps machine code by the file of the function that was compiled: a change here comes into
effect once the modules that use it change too.
"""

from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

CHANNELS = 3
N_LANES = 4  # of a vector: a pixel, and a value that the next pixel's vector overwrites

_ELEMENTS = {types.float32: ir.FloatType(), types.uint32: ir.IntType(32)}
_ALL_FIRST = ir.Constant(ir.VectorType(ir.IntType(32), N_LANES), [0] * N_LANES)


@intrinsic
def pixel_sums(  # type: ignore[no-untyped-def]
    _context,
    line,  # (n,), C order: pixels; the last one that is read ends one value before the end
    at,  # int64 (outputs,): where in `line` the pixels of each output begin
    weights,  # (outputs, taps), C order
    taps,  # pixels of each output, which lie side by side; a literal is unrolled
    bias,  # added to every sum
    sums,  # (CHANNELS * outputs + 1,), C order: written; the last value means nothing
):
    """sums[3 x + c] = bias + sum over k < taps of weights[x, k] * line[at[x] + 3 k + c].

    `line`, weights, bias and sums are all float32, or all uint32. For numba's functions only.
    Nothing is checked: neither bounds nor types.
    """
    is_float = line.dtype == types.float32
    vector = ir.VectorType(_ELEMENTS[line.dtype], N_LANES)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        arrays = {}
        for place in (0, 1, 2, 5):
            make = context.make_array(signature.args[place])
            arrays[place] = make(context, builder, args[place])
        outputs = builder.extract_value(arrays[1].shape, 0)
        n_taps, one_bias = args[3], args[4]

        def vector_at(pointer: Any) -> Any:
            return builder.bitcast(pointer, vector.as_pointer())

        def four_times(value: Any) -> Any:
            one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, _index(0))
            return builder.shuffle_vector(one, one, _ALL_FIRST)

        def plus_product(total: Any, values: Any, weight: Any) -> Any:
            if is_float:
                product = builder.fmul(values, weight, flags=("fast",))
                return builder.fadd(total, product, flags=("fast",))
            return builder.add(total, builder.mul(values, weight))

        total = cgutils.alloca_once(builder, vector)  # becomes a register
        with cgutils.for_range(builder, outputs) as output:
            x = output.index
            first = builder.load(builder.gep(arrays[1].data, [x]))
            pixels = builder.gep(arrays[0].data, [first])
            weights_here = builder.gep(arrays[2].data, [builder.mul(x, n_taps)])
            builder.store(four_times(one_bias), total)
            with cgutils.for_range(builder, n_taps) as tap:
                k = tap.index
                pixel = builder.gep(pixels, [builder.mul(k, ir.Constant(k.type, CHANNELS))])
                # Aligned as a value is, not as a vector.
                values = builder.load(vector_at(pixel), align=4)
                weight = four_times(builder.load(builder.gep(weights_here, [k])))
                more = plus_product(builder.load(total), values, weight)
                builder.store(more, total)
            place = builder.gep(arrays[5].data, [builder.mul(x, ir.Constant(x.type, CHANNELS))])
            builder.store(builder.load(total), vector_at(place), align=4)
        return context.get_dummy_value()

    return types.void(line, at, weights, taps, bias, sums), code


@njit(nogil=True)
def unrolled_sums(line, at, weights, bias, sums):  # type: ignore[no-untyped-def]
    """`pixel_sums` for all taps of `weights`.

    A window no larger than its place has 2 of them, one of up to twice the sides 3 or 4: with a
    number that the compiler knows, these take half the time.
    """
    taps = weights.shape[1]
    if taps == 2:
        pixel_sums(line, at, weights, 2, bias, sums)
    elif taps == 3:
        pixel_sums(line, at, weights, 3, bias, sums)
    elif taps == 4:
        pixel_sums(line, at, weights, 4, bias, sums)
    else:
        pixel_sums(line, at, weights, taps, bias, sums)


def _index(number: int) -> Any:
    return ir.Constant(ir.IntType(32), number)
