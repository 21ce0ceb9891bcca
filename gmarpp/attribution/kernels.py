# mypy: ignore-errors
# ruff: noqa: ANN001, ANN202, N803
"""The fused layer's Triton kernels; `gmarpp.attribution.fused` launches them, and importing this needs Triton.

Both kernels cut the matrices of one head, A and G (Q × N), into tiles of QUERIES × KEYS that live in registers only. A
tile of scores is ``scale · q kᵀ``, and a tile of the gradient ``outer vᵀ``, each one product of two blocks of rows.

An example: a head of a ViT with 197 tokens and d = 64, tiles of 64 × 64. `statistics_kernel` starts four programs, for
queries 0 to 63, 64 to 127, 128 to 191 and 192 to 196. Each keeps its q and outer (64, 64), goes over the keys in four
steps, and in each loads k and v (64, 64) and adds up what the tiles hold. `carry_kernel` starts four programs, too, for
64 keys each: they keep k and v, go over the queries, and multiply tiles from the left with rows (16, 64) that the caller
gives, so that up to 16 methods pass through one tile.

Shapes in comments are those of tiles. `q` and `n` are the positions of a tile's queries and keys; positions beyond the
end load zeros. Offsets are 64 bits wide, as tensors may have more than 2³¹ entries. Powers are of two, which is what the
hardware has: scores are in units of log 2, ``e^s = 2^(s · log₂ e)``.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
ROWS = tl.constexpr(16)  # the fewest rows that a matrix unit multiplies


@triton.jit
def _head(tensor, strides, image_head, heads, group):
    """Point to the head of an image, of a tensor (B, H / group, tokens, d)."""
    image = (image_head // heads).to(tl.int64)
    head = (image_head % heads) // group
    return tensor + image * strides[0] + head * strides[1]


@triton.jit
def _tokens(head, stride, positions, tokens, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Load tokens of one head, (positions, BLOCK); BLOCK is SIZE, or the power of two above it, filled with zeros."""
    channels = tl.arange(0, BLOCK)
    pointers = (head + positions.to(tl.int64) * stride)[:, None] + channels[None, :]
    return tl.load(pointers, mask=(positions[:, None] < tokens) & (channels[None, :] < SIZE), other=0.0)


@triton.jit
def _bias(mask, strides, q, n, queries, keys, CAUSAL: tl.constexpr):
    """What is added to the scores, (QUERIES, KEYS), or (1, KEYS) for all queries: -inf where nothing is attended to."""
    allowed = n[None, :] < keys
    if CAUSAL:
        allowed = allowed & (n[None, :] <= q[:, None])
    bias = tl.where(allowed, 0.0, float("-inf"))
    if mask is not None:
        pointers = (mask + q.to(tl.int64) * strides[2])[:, None] + (n.to(tl.int64) * strides[3])[None, :]
        entries = tl.load(pointers, mask=(q[:, None] < queries) & allowed, other=0)
        if mask.dtype.element_ty == tl.uint8:
            bias = tl.where(entries != 0, bias, float("-inf"))
        else:
            bias = bias + entries.to(tl.float32) * LOG2_E
    return bias


@triton.jit
def _scores(query, key, bias, scale, PRECISION: tl.constexpr):
    """``log₂ e · (scale · q kᵀ + mask)``, (QUERIES, KEYS), float32."""
    return tl.dot(query, tl.trans(key), input_precision=PRECISION) * (scale * LOG2_E) + bias


@triton.jit
def _gradient(outer, value, bias, PRECISION: tl.constexpr):
    """``outer vᵀ``, (QUERIES, KEYS), float32; 0 where nothing is attended to."""
    gradient = tl.dot(outer, tl.trans(value), input_precision=PRECISION)
    return tl.where(bias == float("-inf"), 0.0, gradient)


@triton.jit
def _relu(tile):
    # A plain maximum would turn NaN into 0, and so hide it.
    return tl.maximum(tile, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["heads", "queries", "keys"])
def statistics_kernel(
    query, key, value, outer, mask, log_sum_exp, product_rows, norms,
    query_strides, key_strides, value_strides, outer_strides, mask_strides,
    heads, group, queries, keys, scale, gradient_factor,
    CAUSAL: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of the scores and row sums of ``ReLU(G) ⊙ A`` for a block of queries, and its part of G's norms.

    The maximum m of the scores so far moves while the keys pass, as in an online softmax:
    ``sum ← sum · 2^(m - m') + Σ_j 2^(s_j - m')``, and the product's row sums likewise; their quotient is
    ``Σ_j ReLU(G)_ij A_ij``, ``m' + log₂ sum`` the log-sum-exp. Norms are (4, B, H, blocks): Σ|G|, Σ ReLU(G), Σ G²,
    Σ ReLU(G)².
    """
    blocks = tl.cdiv(queries, QUERIES)
    image_head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    q = block * QUERIES + tl.arange(0, QUERIES)
    key_head = _head(key, key_strides, image_head, heads, group)
    mask_head = mask if mask is None else _head(mask, mask_strides, image_head, heads, 1)
    query_tile = _tokens(_head(query, query_strides, image_head, heads, 1), query_strides[2], q, queries, SIZE, BLOCK)
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    total, product = tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES], tl.float32)
    if outer is not None:
        value_head = _head(value, value_strides, image_head, heads, group)
        outer_head = _head(outer, outer_strides, image_head, heads, 1)
        outer_tile = _tokens(outer_head, outer_strides[2], q, queries, VALUE_SIZE, VALUE_BLOCK)
        l1, positive_l1 = tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES], tl.float32)
        squares, positive_squares = tl.zeros([QUERIES], tl.float32), tl.zeros([QUERIES], tl.float32)
    for start in range(0, keys, KEYS):
        n = start + tl.arange(0, KEYS)
        bias = _bias(mask_head, mask_strides, q, n, queries, keys, CAUSAL)
        key_tile = _tokens(key_head, key_strides[2], n, keys, SIZE, BLOCK)
        scores = _scores(query_tile, key_tile, bias, scale, PRECISION)
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        # As long as a query has attended to nothing its maximum is -inf, and -inf - -inf would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        shrink, powers = tl.exp2(highest - shift), tl.exp2(scores - shift[:, None])
        total, highest = total * shrink + tl.sum(powers, axis=1), higher
        if outer is not None:
            value_tile = _tokens(value_head, value_strides[2], n, keys, VALUE_SIZE, VALUE_BLOCK)
            gradient = _gradient(outer_tile, value_tile, bias, PRECISION)
            positive = _relu(gradient)
            product = product * shrink + tl.sum(positive * powers, axis=1)
            l1 += tl.sum(tl.abs(gradient), axis=1)
            positive_l1 += tl.sum(positive, axis=1)
            squares += tl.sum(gradient * gradient, axis=1)
            positive_squares += tl.sum(positive * positive, axis=1)
    row = image_head.to(tl.int64) * queries + q
    tl.store(log_sum_exp + row, (highest + tl.log2(total)) / LOG2_E, mask=q < queries)
    if outer is not None:
        sums = product * gradient_factor / tl.where(total == 0.0, 1.0, total)
        tl.store(product_rows + row, sums, mask=q < queries)
        norms += tl.program_id(0)
        programs = tl.num_programs(0).to(tl.int64)
        tl.store(norms, tl.sum(l1) * gradient_factor)
        tl.store(norms + programs, tl.sum(positive_l1) * gradient_factor)
        tl.store(norms + 2 * programs, tl.sum(squares) * gradient_factor * gradient_factor)
        tl.store(norms + 3 * programs, tl.sum(positive_squares) * gradient_factor * gradient_factor)


@triton.jit
def _times_rows(rows, count, image_head, q, queries, relevance, carried):
    """Add ``rows @ relevance`` to what is carried, (ROWS, KEYS): ROWS of `count` rows, from a tensor (B, H, count, Q)."""
    number = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    pointers = rows + (image_head.to(tl.int64) * count + number)[:, None] * queries + q[None, :]
    tile = tl.load(pointers, mask=(number[:, None] < count) & (q[None, :] < queries), other=0.0)
    # Three tf32 products keep what float32 rows and tiles hold, to about 2⁻²¹, whatever the precision of the scores.
    return tl.dot(tile, relevance, carried, input_precision="tf32x3")


@triton.jit
def _store_rows(output, first, count, total, image_head, n, keys, tile):
    """Store what is carried, (ROWS, KEYS), behind the `first` rows of an output (B, H, total, N)."""
    number = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    pointers = output + (image_head.to(tl.int64) * total + first + number)[:, None] * keys + n[None, :]
    tl.store(pointers, tile, mask=(number[:, None] < count) & (n[None, :] < keys))


@triton.jit(do_not_specialize=["heads", "queries", "keys", "attention_count", "product_count", "gradient_count"])
def carry_kernel(
    query, key, value, outer, mask, log_sum_exp, attention_rows, product_rows, gradient_rows, output,
    query_strides, key_strides, value_strides, outer_strides, mask_strides,
    heads, group, queries, keys, attention_count, product_count, gradient_count, scale, gradient_factor,
    CAUSAL: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows times ``A``, ``ReLU(G) ⊙ A`` and ``ReLU(G)`` of one head, for a block of keys; output (B, H, rows, N).

    ``A_ij = 2^(s_ij - lse_i)`` with the log-sum-exp that `statistics_kernel` gave.
    """
    ATTENDS: tl.constexpr = attention_rows is not None or product_rows is not None
    DIFFERENTIATES: tl.constexpr = product_rows is not None or gradient_rows is not None
    blocks = tl.cdiv(keys, KEYS)
    image_head, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    n = block * KEYS + tl.arange(0, KEYS)
    mask_head = mask if mask is None else _head(mask, mask_strides, image_head, heads, 1)
    if ATTENDS:
        query_head = _head(query, query_strides, image_head, heads, 1)
        key_head = _head(key, key_strides, image_head, heads, group)
        key_tile = _tokens(key_head, key_strides[2], n, keys, SIZE, BLOCK)
    if DIFFERENTIATES:
        outer_head = _head(outer, outer_strides, image_head, heads, 1)
        value_head = _head(value, value_strides, image_head, heads, group)
        value_tile = _tokens(value_head, value_strides[2], n, keys, VALUE_SIZE, VALUE_BLOCK)
    by_attention = tl.zeros([ROWS, KEYS], tl.float32)
    by_product, by_gradient = tl.zeros([ROWS, KEYS], tl.float32), tl.zeros([ROWS, KEYS], tl.float32)
    for start in range(0, queries, QUERIES):
        q = start + tl.arange(0, QUERIES)
        bias = _bias(mask_head, mask_strides, q, n, queries, keys, CAUSAL)
        if ATTENDS:
            query_tile = _tokens(query_head, query_strides[2], q, queries, SIZE, BLOCK)
            lse = tl.load(log_sum_exp + image_head.to(tl.int64) * queries + q, mask=q < queries, other=float("inf"))
            # A query that attends to nothing has -inf; its attention is 0.
            lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
            attention = tl.exp2(_scores(query_tile, key_tile, bias, scale, PRECISION) - lse[:, None])
        if DIFFERENTIATES:
            outer_tile = _tokens(outer_head, outer_strides[2], q, queries, VALUE_SIZE, VALUE_BLOCK)
            positive = _relu(_gradient(outer_tile, value_tile, bias, PRECISION))
        if attention_rows is not None:
            by_attention = _times_rows(attention_rows, attention_count, image_head, q, queries, attention, by_attention)
        if product_rows is not None:
            by_product = _times_rows(product_rows, product_count, image_head, q, queries, positive * attention, by_product)
        if gradient_rows is not None:
            by_gradient = _times_rows(gradient_rows, gradient_count, image_head, q, queries, positive, by_gradient)
    products = attention_count + product_count
    rows = products + gradient_count
    if attention_rows is not None:
        _store_rows(output, 0, attention_count, rows, image_head, n, keys, by_attention)
    if product_rows is not None:
        by_product *= gradient_factor
        _store_rows(output, attention_count, product_count, rows, image_head, n, keys, by_product)
    if gradient_rows is not None:
        by_gradient *= gradient_factor
        _store_rows(output, products, gradient_count, rows, image_head, n, keys, by_gradient)


INTERPRETED = not isinstance(carry_kernel, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, on a CPU."""
