"""Triton kernels: attention with its tangent in one pass, and the tangent alone given (o, lse).

Two accumulators: p tv and h v rescale alike, so they share one. The score tangent is
shifted per row by c (tq . mean k + q . mean tk) over the first key tile, which leaves the result unchanged
and keeps low-precision h = p t small when the keys have a common mode. Absent tangents cost no load and no
matmul; key ranges marked still take a loop without them.

Raw pointers, masks and no autotune: this style also runs in the interpreter (TRITON_INTERPRET=1).
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# A row all of whose entries are -1e9 is still a softmax of its scores, but lse = -1e9 cannot hold them.
LEAST = tl.constexpr(-20000.0)


@triton.jit
def load_rows(base, rows, stop, stride_n, columns, stride_d, width, UP: tl.constexpr):
    """(rows, columns) of a strided matrix, zero outside [0, stop) x [0, width)."""
    pointers = base + rows.to(tl.int64)[:, None] * stride_n + columns[None, :] * stride_d
    x = tl.load(pointers, mask=(rows[:, None] < stop) & (columns[None, :] < width), other=0.0)
    if UP:
        x = x.to(tl.float32)
    return x


@triton.jit
def mask_scores(s, rows, columns, row_stop, stop, Mask, stride_mn, stride_mm, CAUSAL: tl.constexpr, MASK: tl.constexpr):
    """Base 2 scores with disallowed entries at -inf. rows and columns are broadcastable index tensors.

    MASK: 0 none, 1 boolean bytes, 2 additive values in natural units, finite ones at least LEAST.
    """
    valid = (columns < stop) & (rows < row_stop)
    if CAUSAL:
        valid = valid & (columns <= rows)
    if MASK != 0:
        entry = tl.load(Mask + rows.to(tl.int64) * stride_mn + columns.to(tl.int64) * stride_mm, mask=valid, other=0)
        if MASK == 1:
            valid = valid & (entry != 0)
        else:
            bias = entry.to(tl.float32)
            bias = tl.where(bias == float("-inf"), bias, tl.maximum(bias, LEAST))
            s = s + bias * LOG2E
    return tl.where(valid, s, float("-inf"))


@triton.jit
def score_tangent(q, tq, k, tk, HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, PRECISION: tl.constexpr):
    """tq k^T + q tk^T without the absent terms; at least one is present."""
    if HAS_TQ:
        t = tl.dot(tq, tl.trans(k), input_precision=PRECISION)
        if HAS_TK:
            t = tl.dot(q, tl.trans(tk), t, input_precision=PRECISION)
    else:
        t = tl.dot(q, tl.trans(tk), input_precision=PRECISION)
    return t


@triton.jit
def row_shift(
    q, tq, K, TK, lo, hi, stride_kn, stride_kd, stride_tkn, stride_tkd, columns_d, D,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, UP: tl.constexpr,
):  # fmt: skip
    """Row means of the unscaled score tangent over the first key tile, without a matmul."""
    x = tl.zeros((BLOCK_M,), tl.float32)
    rows = lo + tl.arange(0, BLOCK_N)
    stop = tl.minimum(hi, lo + BLOCK_N)
    count = tl.maximum(stop - lo, 1).to(tl.float32)
    if HAS_TQ:
        k = load_rows(K, rows, stop, stride_kn, columns_d, stride_kd, D, UP).to(tl.float32)
        x += tl.sum(tq.to(tl.float32) * (tl.sum(k, 0) / count)[None, :], 1)
    if HAS_TK:
        tk = load_rows(TK, rows, stop, stride_tkn, columns_d, stride_tkd, D, UP).to(tl.float32)
        x += tl.sum(q.to(tl.float32) * (tl.sum(tk, 0) / count)[None, :], 1)
    return x


@triton.jit
def _over_keys(
    m, den, r, acc_o, acc_t, x, q, tq, lse2, rows, row_stop, lo, hi, K, V, TK, TV, Mask,
    stride_kn, stride_kd, stride_vn, stride_vd, stride_tkn, stride_tkd, stride_tvn, stride_tvd,
    stride_mn, stride_mm, scale, columns_d, columns_v, D, DV,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr, TANGENT: tl.constexpr,
    GIVEN: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, BLOCK_N: tl.constexpr,
    UP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One key range: online softmax and tangent, or with GIVEN the tangent under a known lse."""
    for start in range(lo, hi, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(K, columns, hi, stride_kn, columns_d, stride_kd, D, UP)
        v = load_rows(V, columns, hi, stride_vn, columns_v, stride_vd, DV, UP)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        s = mask_scores(s, rows[:, None], columns[None, :], row_stop, hi, Mask, stride_mn, stride_mm, CAUSAL, MASK)
        if GIVEN:
            p = tl.exp2(s - lse2[:, None])
        else:
            top = tl.maximum(m, tl.max(s, 1))
            safe = tl.where(top == float("-inf"), 0.0, top)
            p = tl.exp2(s - safe[:, None])
            decay = tl.exp2(m - safe)
            den = den * decay + tl.sum(p, 1)
            acc_o = tl.dot(p.to(v.dtype), v, acc_o * decay[:, None], input_precision=PRECISION)
            m = top
            if TANGENT:
                acc_t = acc_t * decay[:, None]
                r = r * decay
        if HAS_TV:
            tv = load_rows(TV, columns, hi, stride_tvn, columns_v, stride_tvd, DV, UP)
            acc_t = tl.dot(p.to(tv.dtype), tv, acc_t, input_precision=PRECISION)
        if HAS_TQ or HAS_TK:
            tk = k
            if HAS_TK:
                tk = load_rows(TK, columns, hi, stride_tkn, columns_d, stride_tkd, D, UP)
            t = score_tangent(q, tq, k, tk, HAS_TQ, HAS_TK, PRECISION)
            h = p * ((t - x[:, None]) * scale)
            r += tl.sum(h, 1)
            acc_t = tl.dot(h.to(v.dtype), v, acc_t, input_precision=PRECISION)
    return m, den, r, acc_o, acc_t


@triton.jit
def attention_kernel(
    Q, K, V, TQ, TK, TV, Mask, Out, TO, LSE, MU, Tiles, Spans,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_tqb, stride_tqh, stride_tqn, stride_tqd,
    stride_tkb, stride_tkh, stride_tkn, stride_tkd, stride_tvb, stride_tvh, stride_tvn, stride_tvd,
    stride_ob, stride_oh, stride_on, stride_od, stride_tob, stride_toh, stride_ton, stride_tod,
    stride_mb, stride_mh, stride_mn, stride_mm,
    scale, H, N, M, D, DV, TILES,
    HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr, HAS_TV: tl.constexpr, TANGENT: tl.constexpr,
    GIVEN: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, RANGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    UP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One query tile of one head. With GIVEN, Out and LSE are inputs and only TO and MU are written."""
    tile = tl.program_id(0) % TILES
    group = tl.program_id(0) // TILES
    b = (group // H).to(tl.int64)
    h = (group % H).to(tl.int64)
    head = group.to(tl.int64) * N
    Q += b * stride_qb + h * stride_qh
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    TQ += b * stride_tqb + h * stride_tqh
    TK += b * stride_tkb + h * stride_tkh
    TV += b * stride_tvb + h * stride_tvh
    Out += b * stride_ob + h * stride_oh
    TO += b * stride_tob + h * stride_toh
    Mask += b * stride_mb + h * stride_mh

    if RANGES:
        start = tl.load(Tiles + tile * 5)
        row_stop = tl.load(Tiles + tile * 5 + 1)
        first = tl.load(Tiles + tile * 5 + 2)
        middle = tl.load(Tiles + tile * 5 + 3)
        last = tl.load(Tiles + tile * 5 + 4)
    else:
        start = tile * BLOCK_M
        row_stop = N
        first = 0
        middle = 0
        last = 0
    rows = start + tl.arange(0, BLOCK_M)
    columns_d = tl.arange(0, BLOCK_D)
    columns_v = tl.arange(0, BLOCK_V)
    inside = rows < row_stop
    q = load_rows(Q, rows, row_stop, stride_qn, columns_d, stride_qd, D, UP)
    tq = q
    if HAS_TQ:
        tq = load_rows(TQ, rows, row_stop, stride_tqn, columns_d, stride_tqd, D, UP)

    m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    den = tl.zeros((BLOCK_M,), tl.float32)
    r = tl.zeros((BLOCK_M,), tl.float32)
    x = tl.zeros((BLOCK_M,), tl.float32)
    acc_o = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    acc_t = tl.zeros((BLOCK_M, BLOCK_V), tl.float32)
    lse2 = m
    if GIVEN:
        lse2 = tl.load(LSE + head + rows, mask=inside, other=0.0) * LOG2E
        lse2 = tl.where(lse2 == float("-inf"), 0.0, lse2)

    if RANGES:
        # On a still range the tangent has no q tk^T term; without tq it is zero and must not be shifted.
        if first < middle:
            if HAS_TQ:
                lo = tl.load(Spans + 2 * first)
                hi = tl.load(Spans + 2 * first + 1)
                x = row_shift(
                    q, tq, K, TK, lo, hi, stride_kn, stride_kd, stride_tkn, stride_tkd, columns_d, D,
                    HAS_TQ, False, BLOCK_M, BLOCK_N, UP,
                )  # fmt: skip
        elif middle < last:
            lo = tl.load(Spans + 2 * middle)
            hi = tl.load(Spans + 2 * middle + 1)
            x = row_shift(
                q, tq, K, TK, lo, hi, stride_kn, stride_kd, stride_tkn, stride_tkd, columns_d, D,
                HAS_TQ, HAS_TK, BLOCK_M, BLOCK_N, UP,
            )  # fmt: skip
        for i in range(first, middle):
            lo = tl.load(Spans + 2 * i)
            hi = tl.load(Spans + 2 * i + 1)
            m, den, r, acc_o, acc_t = _over_keys(
                m, den, r, acc_o, acc_t, x, q, tq, lse2, rows, row_stop, lo, hi, K, V, TK, TV, Mask,
                stride_kn, stride_kd, stride_vn, stride_vd, stride_tkn, stride_tkd, stride_tvn, stride_tvd,
                stride_mn, stride_mm, scale, columns_d, columns_v, D, DV,
                HAS_TQ, False, False, TANGENT, GIVEN, CAUSAL, MASK, BLOCK_N, UP, PRECISION,
            )  # fmt: skip
        for i in range(middle, last):
            lo = tl.load(Spans + 2 * i)
            hi = tl.load(Spans + 2 * i + 1)
            m, den, r, acc_o, acc_t = _over_keys(
                m, den, r, acc_o, acc_t, x, q, tq, lse2, rows, row_stop, lo, hi, K, V, TK, TV, Mask,
                stride_kn, stride_kd, stride_vn, stride_vd, stride_tkn, stride_tkd, stride_tvn, stride_tvd,
                stride_mn, stride_mm, scale, columns_d, columns_v, D, DV,
                HAS_TQ, HAS_TK, HAS_TV, TANGENT, GIVEN, CAUSAL, MASK, BLOCK_N, UP, PRECISION,
            )  # fmt: skip
    else:
        hi = M
        if CAUSAL:
            hi = tl.minimum(M, start + BLOCK_M)
        if HAS_TQ or HAS_TK:
            x = row_shift(
                q, tq, K, TK, 0, hi, stride_kn, stride_kd, stride_tkn, stride_tkd, columns_d, D,
                HAS_TQ, HAS_TK, BLOCK_M, BLOCK_N, UP,
            )  # fmt: skip
        m, den, r, acc_o, acc_t = _over_keys(
            m, den, r, acc_o, acc_t, x, q, tq, lse2, rows, row_stop, 0, hi, K, V, TK, TV, Mask,
            stride_kn, stride_kd, stride_vn, stride_vd, stride_tkn, stride_tkd, stride_tvn, stride_tvd,
            stride_mn, stride_mm, scale, columns_d, columns_v, D, DV,
            HAS_TQ, HAS_TK, HAS_TV, TANGENT, GIVEN, CAUSAL, MASK, BLOCK_N, UP, PRECISION,
        )  # fmt: skip

    offsets = rows.to(tl.int64)[:, None] * stride_on + columns_v[None, :] * stride_od
    written = inside[:, None] & (columns_v[None, :] < DV)
    if GIVEN:
        o = tl.load(Out + offsets, mask=written, other=0.0).to(tl.float32)
        to = acc_t - r[:, None] * o
        dead = tl.load(LSE + head + rows, mask=inside, other=0.0) == float("-inf")
        mu = tl.where(dead, 0.0, r + x * scale)
    else:
        dead = den == 0.0
        total = tl.where(dead, 1.0, den)
        o = acc_o / total[:, None]
        r = r / total
        to = acc_t / total[:, None] - r[:, None] * o
        mu = tl.where(dead, 0.0, r + x * scale)
        tl.store(Out + offsets, o.to(Out.dtype.element_ty), mask=written)
        lse = tl.where(dead, float("-inf"), (m + tl.log2(total)) * LN2)
        tl.store(LSE + head + rows, lse, mask=inside)
    if TANGENT:
        offsets = rows.to(tl.int64)[:, None] * stride_ton + columns_v[None, :] * stride_tod
        tl.store(TO + offsets, to.to(TO.dtype.element_ty), mask=written)
        tl.store(MU + head + rows, mu, mask=inside)
