# mypy: ignore-errors
# ruff: noqa: ANN001, ANN201, ANN202, N803, N806
"""The fused layer's Triton kernels; `gmarpp.attribution.fused` launches them, and importing this needs Triton.

Both kernels cut the matrices A and G of one head, (Q, N), into tiles of QUERIES × KEYS entries that never leave the
registers. Each is a product of two blocks of tokens: scores are `scale · q kᵀ`, the gradient is `outer vᵀ`.

An example: a head of a ViT with 197 tokens and d = 64, in bfloat16 on an H100. `statistics_kernel` runs four programs,
for queries 0 to 63, 64 to 127, 128 to 191 and 192 to 196. Each keeps its q and outer, (64, 64), and goes over the keys
in seven steps: it loads k and v, (32, 64), and adds up what the tiles hold. `carry_kernel` runs four programs, too, of
64 keys each: they keep k and v, go over the queries in thirteen steps of 16, and multiply the tiles by the rows that
the caller gives, (16, 16). So up to 16 methods pass through one tile.

Shapes in comments are those of tiles; `q` and `n` are the positions of a tile's queries and keys. Positions beyond the
end load zeros. Offsets are 64 bits wide, for tensors of more than 2³¹ entries. Exponentials are powers of two, which is
what the hardware has: scores are in units of log 2, `e^s = 2^(s · log₂ e)`.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# The fewest rows that a matrix unit multiplies.
ROWS = tl.constexpr(16)


@triton.jit
def _head(image_stride, head_stride, image_head, heads, group, UNIT: tl.constexpr):
    """Return the offset of an image's head in a tensor (B, H / group, tokens, d) with strides in units of UNIT entries.

    The constant factor tells the compiler how pointers are aligned, and so how much it may load at once.
    """
    image = (image_head // heads).to(tl.int64)
    head = ((image_head % heads) // group).to(tl.int64)
    return image * image_stride * UNIT + head * head_stride * UNIT


@triton.jit
def _place(tokens, SIZE: tl.constexpr):
    """Return the image's head that this program works on, and the positions of its block of SIZE tokens."""
    blocks = tl.cdiv(tokens, SIZE)
    return tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * SIZE + tl.arange(0, SIZE)


@triton.jit
def _tokens(head, stride, positions, tokens, SIZE: tl.constexpr, BLOCK: tl.constexpr, UNIT: tl.constexpr):
    """Load tokens of one head, (positions, BLOCK); BLOCK is SIZE, or the power of two above it, filled with zeros."""
    channels = tl.arange(0, BLOCK)
    pointers = (head + positions.to(tl.int64) * stride * UNIT)[:, None] + channels[None, :]
    return tl.load(pointers, mask=(positions[:, None] < tokens) & (channels[None, :] < SIZE), other=0.0)


@triton.jit
def _bias(mask, query_stride, key_stride, q, n, queries, keys):
    """Return the addend of the scores, (QUERIES, KEYS), or (1, KEYS) for all queries: -inf where none attends."""
    allowed = n[None, :] < keys
    bias = tl.where(allowed, 0.0, float("-inf"))
    if mask is not None:
        pointers = (mask + q.to(tl.int64) * query_stride)[:, None] + (n.to(tl.int64) * key_stride)[None, :]
        entries = tl.load(pointers, mask=(q[:, None] < queries) & allowed, other=0)
        if mask.dtype.element_ty == tl.uint8:
            bias = tl.where(entries != 0, bias, float("-inf"))
        else:
            # The lowest finite number stays finite: only -inf forbids.
            finite = tl.maximum(entries.to(tl.float32), -2e38, propagate_nan=tl.PropagateNan.ALL) * LOG2_E
            bias += tl.where(entries == float("-inf"), float("-inf"), finite)
    return bias


@triton.jit
def _products(left, right, PRECISION: tl.constexpr):
    """Return `left rightᵀ` of tokens, float32."""
    return tl.dot(left, tl.trans(right), input_precision=PRECISION)


@triton.jit
def _where_attended(gradient, bias):
    """Return 0 where nothing is attended to."""
    return tl.where(bias == float("-inf"), 0.0, gradient)


@triton.jit
def _row_sums(tile, BY_THREAD: tl.constexpr):
    """Sum a tile's rows, (QUERIES,), or what each of four threads holds of a row, (QUERIES, 4): two of eight keys."""
    if BY_THREAD:
        sums = tl.sum(tl.sum(tl.reshape(tile, (tile.shape[0], tile.shape[1] // 8, 4, 2)), axis=3), axis=1)
    else:
        sums = tl.sum(tile, axis=1)
    return sums


@triton.jit
def _relu(tile):
    # A plain maximum would hide NaN by turning it into 0.
    return tl.maximum(tile, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _powers(scores, factor, highest):
    """Return the maximum of all scores so far times a factor above 0, what sums of the last one shrink by, and powers.

    These are `2^(factor · scores - maximum)`: one operation each, where scores that are multiplied before take two.
    """
    higher = tl.maximum(highest, factor * tl.max(scores, axis=1))
    # The maximum of a query that has attended to nothing so far is -inf, and -inf - -inf would be NaN.
    shift = tl.where(higher == float("-inf"), 0.0, higher)
    return higher, tl.exp2(highest - shift), tl.exp2(factor * scores - shift[:, None])


@triton.jit
def _store_sum(norms, place: tl.constexpr, sums):
    """Store a block's part of a norm, at its place among those that are wanted."""
    programs = tl.num_programs(0).to(tl.int64)
    tl.store(norms + place * programs + tl.program_id(0), tl.sum(sums))


# Triton recompiles a kernel for each value that it is specialized on, and each pattern of divisibility.
_STRIDES = [f"{name}_{axis}" for name in ("query", "key", "value", "outer") for axis in ("image", "head", "token")]
_ROWS = [
    f"{name}_{axis}" for name in ("attention", "product", "gradient") for axis in ("image", "head", "row", "count")
]
_SIZES = [*_STRIDES, "mask_image", "mask_head", "mask_query", "heads", "queries", "keys"]


@triton.jit
def _over_keys(
    query_tile, outer_tile, key, key_token, value, value_token, mask, mask_query, mask_key, q, queries, keys, scale,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    L1: tl.constexpr, POSITIVE_L1: tl.constexpr, L2: tl.constexpr, POSITIVE_L2: tl.constexpr, BY_THREAD: tl.constexpr,
):  # fmt: skip
    """Return what a block of queries finds in all keys: the highest score, and the sums of `statistics_kernel`.

    Within the loop a thread adds up what it holds; to add up a tile's keys, threads would wait for each other in every
    step. Nothing is masked but keys beyond the end where there is no mask, and the gradient's factor comes last.
    """
    factor = scale * LOG2_E
    highest = tl.full([QUERIES], float("-inf"), tl.float32)
    nothing = _row_sums(tl.zeros([QUERIES, KEYS], tl.float32), BY_THREAD)
    total, product = nothing, nothing
    l1, positive_l1, squares, positive_squares = nothing, nothing, nothing, nothing
    for start in range(0, keys, KEYS):
        n = start + tl.arange(0, KEYS)
        if not BY_THREAD:
            # Made later, it would decide how all tiles are laid out, and the loop would be half as long again.
            bias = _bias(mask, mask_query, mask_key, q, n, queries, keys)
        key_tile = _tokens(key, key_token, n, keys, SIZE, BLOCK, UNIT)
        scores = _products(query_tile, key_tile, PRECISION)
        if BY_THREAD:
            scores = tl.where(n[None, :] < keys, scores, float("-inf"))
            highest, shrink, powers = _powers(scores, factor, highest)
            shrink = shrink[:, None]
        else:
            highest, shrink, powers = _powers(scores * factor + bias, 1.0, highest)
        total = total * shrink + _row_sums(powers, BY_THREAD)
        if outer_tile is not None:
            value_tile = _tokens(value, value_token, n, keys, VALUE_SIZE, VALUE_BLOCK, UNIT)
            gradient = _products(outer_tile, value_tile, PRECISION)
            if not BY_THREAD:
                gradient = _where_attended(gradient, bias)
            positive = _relu(gradient)
            product = product * shrink + _row_sums(positive * powers, BY_THREAD)
            if L1:
                l1 += _row_sums(tl.abs(gradient), BY_THREAD)
            if POSITIVE_L1:
                positive_l1 += _row_sums(positive, BY_THREAD)
            if L2:
                squares += _row_sums(gradient * gradient, BY_THREAD)
            if POSITIVE_L2:
                positive_squares += _row_sums(positive * positive, BY_THREAD)
    return highest, total, product, l1, positive_l1, squares, positive_squares


@triton.jit(do_not_specialize=_SIZES)
def statistics_kernel(
    query, key, value, outer, mask, log_sums, product_rows, norms,
    query_image, query_head, query_token, key_image, key_head, key_token,
    value_image, value_head, value_token, outer_image, outer_head, outer_token,
    mask_image, mask_head, mask_query, mask_key,
    heads, group, queries, keys, scale, factor,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    L1: tl.constexpr, POSITIVE_L1: tl.constexpr, L2: tl.constexpr, POSITIVE_L2: tl.constexpr,
):  # fmt: skip
    """Compute logarithms of sums of powers, row sums of `ReLU(G) ⊙ A`, and part of G's norms, for a block of queries.

    The maximum m of the scores so far moves while the keys pass, as in an online softmax:
    `sum ← sum · 2^(m - m') + Σ_j 2^(s_j - m')`, and the product's row sums likewise; their quotient is
    `Σ_j ReLU(G)_ij A_ij`, `m' + log₂ sum` the logarithm. Norms are (k, B, H, blocks), the k that are wanted of Σ|G|,
    Σ ReLU(G), Σ G² and Σ ReLU(G)²; the flags L1 to POSITIVE_L2 say which.
    """
    # With a mask, tiles are laid out among the threads as it is loaded.
    BY_THREAD: tl.constexpr = mask is None
    image_head, q = _place(queries, QUERIES)
    key += _head(key_image, key_head, image_head, heads, group, UNIT)
    if mask is not None:
        mask += _head(mask_image, mask_head, image_head, heads, 1, 1)
    query += _head(query_image, query_head, image_head, heads, 1, UNIT)
    query_tile = _tokens(query, query_token, q, queries, SIZE, BLOCK, UNIT)
    outer_tile = None
    if outer is not None:
        value += _head(value_image, value_head, image_head, heads, group, UNIT)
        outer += _head(outer_image, outer_head, image_head, heads, 1, UNIT)
        outer_tile = _tokens(outer, outer_token, q, queries, VALUE_SIZE, VALUE_BLOCK, UNIT)
    highest, total, product, l1, positive_l1, squares, positive_squares = _over_keys(
        query_tile, outer_tile, key, key_token, value, value_token, mask, mask_query, mask_key, q, queries, keys, scale,
        SIZE, BLOCK, VALUE_SIZE, VALUE_BLOCK, QUERIES, KEYS, UNIT, PRECISION,
        L1, POSITIVE_L1, L2, POSITIVE_L2, BY_THREAD,
    )  # fmt: skip
    row = image_head.to(tl.int64) * queries + q
    if BY_THREAD:
        total, product = tl.sum(total, axis=1), tl.sum(product, axis=1)
    tl.store(log_sums + row, tl.where(total == 0.0, float("inf"), highest + tl.log2(total)), mask=q < queries)
    if outer is not None:
        sums = factor * product / tl.where(total == 0.0, 1.0, total)
        tl.store(product_rows + row, sums, mask=q < queries)
        if L1:
            _store_sum(norms, 0, factor * l1)
        if POSITIVE_L1:
            _store_sum(norms, L1, factor * positive_l1)
        if L2:
            _store_sum(norms, L1 + POSITIVE_L1, factor * factor * squares)
        if POSITIVE_L2:
            _store_sum(norms, L1 + POSITIVE_L1 + L2, factor * factor * positive_squares)


@triton.jit
def _times_rows(rows, stride, count, start, queries, relevance, carried, PRECISION: tl.constexpr):
    """Add `relevanceᵀ rowsᵀ`, (KEYS, ROWS), to what is carried: ROWS of a head's rows (count, Q).

    The relevance comes transposed, (KEYS, QUERIES), for queries from `start` on. Of eight queries 0 … 7 four threads
    hold two each as a result, 0 1 | 2 3 | 4 5 | 6 7, and as a factor in tf32, 0 4 | 1 5 | 2 6 | 3 7. A sum may be
    taken in any order: what a thread holds of query 1 is called 4, and so on, and stays where it is.
    """
    KEYS: tl.constexpr = relevance.shape[0]
    QUERIES: tl.constexpr = relevance.shape[1]
    pairs = tl.permute(tl.reshape(relevance, (KEYS, QUERIES // 8, 4, 2)), (0, 1, 3, 2))
    place = tl.arange(0, QUERIES)
    q = start + place // 8 * 8 + place % 4 * 2 + place % 8 // 4
    number = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    pointers = (rows + number.to(tl.int64) * stride)[:, None] + q[None, :]
    tile = tl.load(pointers, mask=(number[:, None] < count) & (q[None, :] < queries), other=0.0)
    # Three tf32 products keep what rows and tiles of float32 hold, to about 2⁻²¹.
    return tl.dot(tl.reshape(pairs, (KEYS, QUERIES)), tl.trans(tile), carried, input_precision=PRECISION)


@triton.jit
def _store_rows(output, first, count, total, image_head, n, keys, tile):
    """Store what is carried, (KEYS, ROWS), after the `first` rows of an output (B, H, total, N)."""
    number = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    pointers = output + (image_head.to(tl.int64) * total + first + number)[:, None] * keys + n[None, :]
    tl.store(pointers, tl.trans(tile), mask=(number[:, None] < count) & (n[None, :] < keys))


@triton.jit
def _over_queries(
    query, query_token, key, key_token, value, value_token, outer, outer_token, mask, mask_query, mask_key, log_sums,
    attention_rows, attention_row, attention_count, product_rows, product_row, product_count,
    gradient_rows, gradient_row, gradient_count, image_head, n, queries, keys, scale, factor,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, ROW_PRECISION: tl.constexpr,
):  # fmt: skip
    """Return what a head's rows carry to a block of keys, by attention, product and gradient, (KEYS, ROWS) each."""
    ATTENDS: tl.constexpr = attention_rows is not None or product_rows is not None
    DIFFERENTIATES: tl.constexpr = product_rows is not None or gradient_rows is not None
    if ATTENDS:
        key_tile = _tokens(key, key_token, n, keys, SIZE, BLOCK, UNIT)
    if DIFFERENTIATES:
        value_tile = _tokens(value, value_token, n, keys, VALUE_SIZE, VALUE_BLOCK, UNIT)
    by_attention = tl.zeros([n.shape[0], ROWS], tl.float32)
    by_product = tl.zeros([n.shape[0], ROWS], tl.float32)
    by_gradient = tl.zeros([n.shape[0], ROWS], tl.float32)
    for start in range(0, queries, QUERIES):
        q = start + tl.arange(0, QUERIES)
        if mask is not None:
            bias = tl.trans(_bias(mask, mask_query, mask_key, q, n, queries, keys))
        if ATTENDS:
            query_tile = _tokens(query, query_token, q, queries, SIZE, BLOCK, UNIT)
            scores = _products(key_tile, query_tile, PRECISION) * (scale * LOG2_E)
            if mask is not None:
                scores += bias
            # No query beyond the end has any attention.
            sums = tl.load(log_sums + image_head.to(tl.int64) * queries + q, mask=q < queries, other=float("inf"))
            attention = tl.exp2(scores - sums[None, :])
        if DIFFERENTIATES:
            outer_tile = _tokens(outer, outer_token, q, queries, VALUE_SIZE, VALUE_BLOCK, UNIT)
            gradient = _products(value_tile, outer_tile, PRECISION)
            if mask is not None:
                gradient = _where_attended(gradient, bias)
            positive = _relu(gradient)
        if attention_rows is not None:
            by_attention = _times_rows(
                attention_rows, attention_row, attention_count, start, queries, attention, by_attention, ROW_PRECISION
            )
        if product_rows is not None:
            product = positive * attention
            by_product = _times_rows(
                product_rows, product_row, product_count, start, queries, product, by_product, ROW_PRECISION
            )
        if gradient_rows is not None:
            by_gradient = _times_rows(
                gradient_rows, gradient_row, gradient_count, start, queries, positive, by_gradient, ROW_PRECISION
            )
    # Positive, the factor may as well come last.
    return by_attention, factor * by_product, factor * by_gradient


@triton.jit(do_not_specialize=[*_SIZES, *_ROWS])
def carry_kernel(
    query, key, value, outer, mask, log_sums, attention_rows, product_rows, gradient_rows, output,
    query_image, query_head, query_token, key_image, key_head, key_token,
    value_image, value_head, value_token, outer_image, outer_head, outer_token,
    mask_image, mask_head, mask_query, mask_key, attention_image, attention_head, attention_row,
    product_image, product_head, product_row, gradient_image, gradient_head, gradient_row,
    heads, group, queries, keys, attention_count, product_count, gradient_count, scale, factor,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, VALUE_SIZE: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    ROW_PRECISION: tl.constexpr,
):  # fmt: skip
    """Multiply rows by `A`, `ReLU(G) ⊙ A` and `ReLU(G)` of one head, for a block of keys; output (B, H, rows, N).

    `A_ij = 2^(s_ij - l_i)` with the logarithm l from `statistics_kernel`. All tiles are transposed, (KEYS,
    QUERIES), so that they are the left operand of the products with rows and stay in registers.
    """
    image_head, n = _place(keys, KEYS)
    query += _head(query_image, query_head, image_head, heads, 1, UNIT)
    key += _head(key_image, key_head, image_head, heads, group, UNIT)
    if mask is not None:
        mask += _head(mask_image, mask_head, image_head, heads, 1, 1)
    if outer is not None:
        outer += _head(outer_image, outer_head, image_head, heads, 1, UNIT)
        value += _head(value_image, value_head, image_head, heads, group, UNIT)
    if attention_rows is not None:
        attention_rows += _head(attention_image, attention_head, image_head, heads, 1, 1)
    if product_rows is not None:
        product_rows += _head(product_image, product_head, image_head, heads, 1, 1)
    if gradient_rows is not None:
        gradient_rows += _head(gradient_image, gradient_head, image_head, heads, 1, 1)
    by_attention, by_product, by_gradient = _over_queries(
        query, query_token, key, key_token, value, value_token, outer, outer_token, mask, mask_query, mask_key,
        log_sums, attention_rows, attention_row, attention_count, product_rows, product_row, product_count,
        gradient_rows, gradient_row, gradient_count, image_head, n, queries, keys, scale, factor,
        SIZE, BLOCK, VALUE_SIZE, VALUE_BLOCK, QUERIES, UNIT, PRECISION, ROW_PRECISION,
    )  # fmt: skip
    products = attention_count + product_count
    rows = products + gradient_count
    if attention_rows is not None:
        _store_rows(output, 0, attention_count, rows, image_head, n, keys, by_attention)
    if product_rows is not None:
        _store_rows(output, attention_count, product_count, rows, image_head, n, keys, by_product)
    if gradient_rows is not None:
        _store_rows(output, products, gradient_count, rows, image_head, n, keys, by_gradient)


INTERPRETED = not isinstance(carry_kernel, triton.JITFunction)
"""Whether the kernels run in Triton's interpreter, on a CPU."""
