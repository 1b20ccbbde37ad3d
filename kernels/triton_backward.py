"""Triton kernels: cotangents of attention through its output and, with HAS_G, through its tangent.

With delta = do.o, beta = g.to's partner g.o, gamma = g.to, the tiles are
a = do v^T + g tv^T, b = g v^T - beta, u = t - mu, dT = p b, dS = p (a - delta - gamma + u b), and
dq = c (dS k + dT tk), dk = c (dS^T q + dT^T tq), dv = p^T do + (p u)^T g, dtq = c dT k, dtk = c dT^T q,
dtv = p^T g. Two kernels, one per query tile and one per key tile, so that nothing is accumulated atomically.
"""

import triton
import triton.language as tl

from fewstep.kernels.triton_forward import LOG2E, load_rows, mask_scores, score_tangent


@triton.jit
def _query_keys(
    acc, acc_t, q, tq, do, g, lse2, sub, beta, mu, rows, row_stop, lo, hi, K, V, TK, TV, Mask,
    stride_kn, stride_kd, stride_vn, stride_vd, stride_tkn, stride_tkd, stride_tvn, stride_tvd,
    stride_mn, stride_mm, scale, columns_d, columns_v, D, DV,
    HAS_O: tl.constexpr, HAS_G: tl.constexpr, HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr,
    HAS_TV: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, UP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    for start in range(lo, hi, BLOCK_N):
        columns = start + tl.arange(0, BLOCK_N)
        k = load_rows(K, columns, hi, stride_kn, columns_d, stride_kd, D, UP)
        v = load_rows(V, columns, hi, stride_vn, columns_v, stride_vd, DV, UP)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        s = mask_scores(s, rows[:, None], columns[None, :], row_stop, hi, Mask, stride_mn, stride_mm, CAUSAL, MASK)
        p = tl.exp2(s - lse2[:, None])
        if HAS_O:
            ds = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        else:
            ds = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        if HAS_G:
            if HAS_TV:
                tv = load_rows(TV, columns, hi, stride_tvn, columns_v, stride_tvd, DV, UP)
                ds = tl.dot(g, tl.trans(tv), ds, input_precision=PRECISION)
            b = tl.dot(g, tl.trans(v), input_precision=PRECISION) - beta[:, None]
            dt = (p * b).to(k.dtype)
            if HAS_TQ or HAS_TK:
                tk = k
                if HAS_TK:
                    tk = load_rows(TK, columns, hi, stride_tkn, columns_d, stride_tkd, D, UP)
                t = score_tangent(q, tq, k, tk, HAS_TQ, HAS_TK, PRECISION) * scale
                ds += (t - mu[:, None]) * b
                if HAS_TK:
                    acc = tl.dot(dt, tk, acc, input_precision=PRECISION)
                if HAS_TQ:
                    acc_t = tl.dot(dt, k, acc_t, input_precision=PRECISION)
            else:
                ds -= mu[:, None] * b
        ds = p * (ds - sub[:, None])
        acc = tl.dot(ds.to(k.dtype), k, acc, input_precision=PRECISION)
    return acc, acc_t


@triton.jit
def backward_query_kernel(
    Q, K, V, TQ, TK, TV, DO, G, Mask, DQ, DTQ, LSE, SUB, BETA, MU, Tiles, Spans,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_tqb, stride_tqh, stride_tqn, stride_tqd,
    stride_tkb, stride_tkh, stride_tkn, stride_tkd, stride_tvb, stride_tvh, stride_tvn, stride_tvd,
    stride_dob, stride_doh, stride_don, stride_dod, stride_gb, stride_gh, stride_gn, stride_gd,
    stride_dqb, stride_dqh, stride_dqn, stride_dqd, stride_dtqb, stride_dtqh, stride_dtqn, stride_dtqd,
    stride_mb, stride_mh, stride_mn, stride_mm,
    scale, H, N, M, D, DV, TILES,
    HAS_O: tl.constexpr, HAS_G: tl.constexpr, HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr,
    HAS_TV: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, RANGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    UP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq and dtq of one query tile of one head."""
    tile = tl.program_id(0) % TILES
    group = tl.program_id(0) // TILES
    b = (group // H).to(tl.int64)
    h = (group % H).to(tl.int64)
    head = group.to(tl.int64) * N
    K += b * stride_kb + h * stride_kh
    V += b * stride_vb + h * stride_vh
    TK += b * stride_tkb + h * stride_tkh
    TV += b * stride_tvb + h * stride_tvh
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
    q = load_rows(Q + b * stride_qb + h * stride_qh, rows, row_stop, stride_qn, columns_d, stride_qd, D, UP)
    tq = q
    if HAS_TQ:
        tq = load_rows(TQ + b * stride_tqb + h * stride_tqh, rows, row_stop, stride_tqn, columns_d, stride_tqd, D, UP)
    do = load_rows(DO + b * stride_dob + h * stride_doh, rows, row_stop, stride_don, columns_v, stride_dod, DV, UP)
    g = do
    if HAS_G:
        g = load_rows(G + b * stride_gb + h * stride_gh, rows, row_stop, stride_gn, columns_v, stride_gd, DV, UP)
    lse2 = tl.load(LSE + head + rows, mask=inside, other=0.0) * LOG2E
    lse2 = tl.where(lse2 == float("-inf"), 0.0, lse2)
    sub = tl.load(SUB + head + rows, mask=inside, other=0.0)
    beta = sub
    mu = sub
    if HAS_G:
        beta = tl.load(BETA + head + rows, mask=inside, other=0.0)
        mu = tl.load(MU + head + rows, mask=inside, other=0.0)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    acc_t = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if RANGES:
        for i in range(first, middle):
            lo = tl.load(Spans + 2 * i)
            hi = tl.load(Spans + 2 * i + 1)
            acc, acc_t = _query_keys(
                acc, acc_t, q, tq, do, g, lse2, sub, beta, mu, rows, row_stop, lo, hi, K, V, TK, TV, Mask,
                stride_kn, stride_kd, stride_vn, stride_vd, stride_tkn, stride_tkd, stride_tvn, stride_tvd,
                stride_mn, stride_mm, scale, columns_d, columns_v, D, DV,
                HAS_O, HAS_G, HAS_TQ, False, False, CAUSAL, MASK, BLOCK_M, BLOCK_N, UP, PRECISION,
            )  # fmt: skip
        for i in range(middle, last):
            lo = tl.load(Spans + 2 * i)
            hi = tl.load(Spans + 2 * i + 1)
            acc, acc_t = _query_keys(
                acc, acc_t, q, tq, do, g, lse2, sub, beta, mu, rows, row_stop, lo, hi, K, V, TK, TV, Mask,
                stride_kn, stride_kd, stride_vn, stride_vd, stride_tkn, stride_tkd, stride_tvn, stride_tvd,
                stride_mn, stride_mm, scale, columns_d, columns_v, D, DV,
                HAS_O, HAS_G, HAS_TQ, HAS_TK, HAS_TV, CAUSAL, MASK, BLOCK_M, BLOCK_N, UP, PRECISION,
            )  # fmt: skip
    else:
        hi = M
        if CAUSAL:
            hi = tl.minimum(M, start + BLOCK_M)
        acc, acc_t = _query_keys(
            acc, acc_t, q, tq, do, g, lse2, sub, beta, mu, rows, row_stop, 0, hi, K, V, TK, TV, Mask,
            stride_kn, stride_kd, stride_vn, stride_vd, stride_tkn, stride_tkd, stride_tvn, stride_tvd,
            stride_mn, stride_mm, scale, columns_d, columns_v, D, DV,
            HAS_O, HAS_G, HAS_TQ, HAS_TK, HAS_TV, CAUSAL, MASK, BLOCK_M, BLOCK_N, UP, PRECISION,
        )  # fmt: skip
    written = inside[:, None] & (columns_d[None, :] < D)
    offsets = rows.to(tl.int64)[:, None] * stride_dqn + columns_d[None, :] * stride_dqd
    target = DQ + b * stride_dqb + h * stride_dqh
    tl.store(target + offsets, (acc * scale).to(DQ.dtype.element_ty), mask=written)
    if HAS_G and HAS_TQ:
        offsets = rows.to(tl.int64)[:, None] * stride_dtqn + columns_d[None, :] * stride_dtqd
        target = DTQ + b * stride_dtqb + h * stride_dtqh
        tl.store(target + offsets, (acc_t * scale).to(DTQ.dtype.element_ty), mask=written)


@triton.jit
def _key_queries(
    dk, dv, dtk, dtv, k, v, tk, tv, head, columns, stop, lo, hi, Q, TQ, DO, G, Mask, LSE, SUB, BETA, MU,
    stride_qn, stride_qd, stride_tqn, stride_tqd, stride_don, stride_dod, stride_gn, stride_gd,
    stride_mn, stride_mm, scale, columns_d, columns_v, D, DV,
    HAS_O: tl.constexpr, HAS_G: tl.constexpr, HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr,
    HAS_TV: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, UP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles are transposed here, (keys, queries), so that every product into dk and dv is a plain dot."""
    for start in range(lo, hi, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        inside = rows < hi
        q = load_rows(Q, rows, hi, stride_qn, columns_d, stride_qd, D, UP)
        lse2 = tl.load(LSE + head + rows, mask=inside, other=0.0) * LOG2E
        lse2 = tl.where(lse2 == float("-inf"), 0.0, lse2)
        sub = tl.load(SUB + head + rows, mask=inside, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2E)
        s = mask_scores(s, rows[None, :], columns[:, None], hi, stop, Mask, stride_mn, stride_mm, CAUSAL, MASK)
        p = tl.exp2(s - lse2[None, :])
        if HAS_O:
            do = load_rows(DO, rows, hi, stride_don, columns_v, stride_dod, DV, UP)
            ds = tl.dot(v, tl.trans(do), input_precision=PRECISION)
            dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        else:
            ds = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if HAS_G:
            g = load_rows(G, rows, hi, stride_gn, columns_v, stride_gd, DV, UP)
            beta = tl.load(BETA + head + rows, mask=inside, other=0.0)
            mu = tl.load(MU + head + rows, mask=inside, other=0.0)
            if HAS_TV:
                ds = tl.dot(tv, tl.trans(g), ds, input_precision=PRECISION)
                dtv = tl.dot(p.to(g.dtype), g, dtv, input_precision=PRECISION)
            b = tl.dot(v, tl.trans(g), input_precision=PRECISION) - beta[None, :]
            if HAS_TQ or HAS_TK:
                tq = q
                if HAS_TQ:
                    tq = load_rows(TQ, rows, hi, stride_tqn, columns_d, stride_tqd, D, UP)
                # t^T = tk q^T + k tq^T is the score tangent with the roles exchanged
                u = score_tangent(k, tk, q, tq, HAS_TK, HAS_TQ, PRECISION) * scale - mu[None, :]
                dt = (p * b).to(q.dtype)
                if HAS_TQ:
                    dk = tl.dot(dt, tq, dk, input_precision=PRECISION)
                if HAS_TK:
                    dtk = tl.dot(dt, q, dtk, input_precision=PRECISION)
            else:
                u = tl.zeros((BLOCK_N, BLOCK_M), tl.float32) - mu[None, :]
            ds += u * b
            dv = tl.dot((p * u).to(g.dtype), g, dv, input_precision=PRECISION)
        ds = p * (ds - sub[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv, dtk, dtv


@triton.jit
def backward_key_kernel(
    Q, K, V, TQ, TK, TV, DO, G, Mask, DK, DV_, DTK, DTV, LSE, SUB, BETA, MU, Tiles, Spans,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_tqb, stride_tqh, stride_tqn, stride_tqd,
    stride_tkb, stride_tkh, stride_tkn, stride_tkd, stride_tvb, stride_tvh, stride_tvn, stride_tvd,
    stride_dob, stride_doh, stride_don, stride_dod, stride_gb, stride_gh, stride_gn, stride_gd,
    stride_dkb, stride_dkh, stride_dkn, stride_dkd, stride_dvb, stride_dvh, stride_dvn, stride_dvd,
    stride_dtkb, stride_dtkh, stride_dtkn, stride_dtkd, stride_dtvb, stride_dtvh, stride_dtvn, stride_dtvd,
    stride_mb, stride_mh, stride_mn, stride_mm,
    scale, H, N, M, D, DV, TILES,
    HAS_O: tl.constexpr, HAS_G: tl.constexpr, HAS_TQ: tl.constexpr, HAS_TK: tl.constexpr,
    HAS_TV: tl.constexpr, CAUSAL: tl.constexpr, MASK: tl.constexpr, RANGES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    UP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv, dtk and dtv of one key tile of one head."""
    tile = tl.program_id(0) % TILES
    group = tl.program_id(0) // TILES
    b = (group // H).to(tl.int64)
    h = (group % H).to(tl.int64)
    head = group.to(tl.int64) * N
    Q += b * stride_qb + h * stride_qh
    TQ += b * stride_tqb + h * stride_tqh
    DO += b * stride_dob + h * stride_doh
    G += b * stride_gb + h * stride_gh
    Mask += b * stride_mb + h * stride_mh
    if RANGES:
        start = tl.load(Tiles + tile * 5)
        stop = tl.load(Tiles + tile * 5 + 1)
        first = tl.load(Tiles + tile * 5 + 2)
        middle = tl.load(Tiles + tile * 5 + 3)
        last = tl.load(Tiles + tile * 5 + 4)
    else:
        start = tile * BLOCK_N
        stop = M
        first = 0
        middle = 0
        last = 0
    columns = start + tl.arange(0, BLOCK_N)
    columns_d = tl.arange(0, BLOCK_D)
    columns_v = tl.arange(0, BLOCK_V)
    k = load_rows(K + b * stride_kb + h * stride_kh, columns, stop, stride_kn, columns_d, stride_kd, D, UP)
    v = load_rows(V + b * stride_vb + h * stride_vh, columns, stop, stride_vn, columns_v, stride_vd, DV, UP)
    tk = k
    tv = v
    if HAS_TK:
        tk = load_rows(TK + b * stride_tkb + h * stride_tkh, columns, stop, stride_tkn, columns_d, stride_tkd, D, UP)
    if HAS_TV:
        tv = load_rows(TV + b * stride_tvb + h * stride_tvh, columns, stop, stride_tvn, columns_v, stride_tvd, DV, UP)
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    dtk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dtv = tl.zeros((BLOCK_N, BLOCK_V), tl.float32)
    if RANGES:
        for i in range(first, middle):
            lo = tl.load(Spans + 2 * i)
            hi = tl.load(Spans + 2 * i + 1)
            dk, dv, dtk, dtv = _key_queries(
                dk, dv, dtk, dtv, k, v, tk, tv, head, columns, stop, lo, hi, Q, TQ, DO, G, Mask, LSE, SUB, BETA,
                MU, stride_qn, stride_qd, stride_tqn, stride_tqd, stride_don, stride_dod, stride_gn, stride_gd,
                stride_mn, stride_mm, scale, columns_d, columns_v, D, DV,
                HAS_O, HAS_G, False, HAS_TK, HAS_TV, CAUSAL, MASK, BLOCK_M, BLOCK_N, UP, PRECISION,
            )  # fmt: skip
        for i in range(middle, last):
            lo = tl.load(Spans + 2 * i)
            hi = tl.load(Spans + 2 * i + 1)
            dk, dv, dtk, dtv = _key_queries(
                dk, dv, dtk, dtv, k, v, tk, tv, head, columns, stop, lo, hi, Q, TQ, DO, G, Mask, LSE, SUB, BETA,
                MU, stride_qn, stride_qd, stride_tqn, stride_tqd, stride_don, stride_dod, stride_gn, stride_gd,
                stride_mn, stride_mm, scale, columns_d, columns_v, D, DV,
                HAS_O, HAS_G, HAS_TQ, HAS_TK, HAS_TV, CAUSAL, MASK, BLOCK_M, BLOCK_N, UP, PRECISION,
            )  # fmt: skip
    else:
        lo = 0
        if CAUSAL:
            lo = start
        dk, dv, dtk, dtv = _key_queries(
            dk, dv, dtk, dtv, k, v, tk, tv, head, columns, stop, lo, N, Q, TQ, DO, G, Mask, LSE, SUB, BETA,
            MU, stride_qn, stride_qd, stride_tqn, stride_tqd, stride_don, stride_dod, stride_gn, stride_gd,
            stride_mn, stride_mm, scale, columns_d, columns_v, D, DV,
            HAS_O, HAS_G, HAS_TQ, HAS_TK, HAS_TV, CAUSAL, MASK, BLOCK_M, BLOCK_N, UP, PRECISION,
        )  # fmt: skip
    at = columns.to(tl.int64)[:, None]
    inside = columns[:, None] < stop
    of_d = columns_d[None, :]
    of_v = columns_v[None, :]
    target = DK + b * stride_dkb + h * stride_dkh + at * stride_dkn + of_d * stride_dkd
    tl.store(target, (dk * scale).to(DK.dtype.element_ty), mask=inside & (of_d < D))
    target = DV_ + b * stride_dvb + h * stride_dvh + at * stride_dvn + of_v * stride_dvd
    tl.store(target, dv.to(DV_.dtype.element_ty), mask=inside & (of_v < DV))
    if HAS_G and HAS_TK:
        target = DTK + b * stride_dtkb + h * stride_dtkh + at * stride_dtkn + of_d * stride_dtkd
        tl.store(target, (dtk * scale).to(DTK.dtype.element_ty), mask=inside & (of_d < D))
    if HAS_G and HAS_TV:
        target = DTV + b * stride_dtvb + h * stride_dtvh + at * stride_dtvn + of_v * stride_dtvd
        tl.store(target, dtv.to(DTV.dtype.element_ty), mask=inside & (of_v < DV))
