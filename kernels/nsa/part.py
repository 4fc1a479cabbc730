"""NSA for the queries of a part of the sequence, with all the keys that those may see.

Shapes: T tokens, n queries, H query heads, G KV groups, D head dim of q and k, E of v.
"""

from __future__ import annotations

from torch import Tensor

from kernels.documents import Documents
from kernels.nsa.api import nsa_attention
from kernels.nsa.spec import NsaSpec, Phi

KeysValues = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
"""k and v of the compressed, the selected and the window branch, in this order."""


def nsa_attention_part(
    q_nHD: Tensor,
    kv: KeysValues,
    phi_k: Phi | None,
    phi_v: Phi | None,
    gates_nH3: Tensor,
    docs: Documents,
    spec: NsaSpec,
    first: int,
    *,
    scale: float | None = None,
    stats: dict[str, Tensor] | None = None,
) -> Tensor:
    """Rows [first, first + n) of `nsa_attention`, from their queries and everyone's keys.

    Keys after the last query and documents that ended before the first are left out. The blocked
    path then computes these queries and no other. The Triton kernels work through the whole part
    of the first query's document in front of it, too, as queries of zero: there a part late in a
    long document costs as much time and memory as the document up to its end.

    Args:
        q_nHD: queries of tokens [first, first + n).
        kv: keys [T, G, D] and values [T, G, E] of all tokens.
        phi_k: compression of k_cmp, see `nsa_attention`.
        phi_v: of v_cmp.
        gates_nH3: gates of the queries.
        docs: the documents of all T tokens, on q's device.
        spec: the sizes.
        first: token of the first query.
        scale: of the scores; 1/sqrt(D) by default.
        stats: see `nsa_attention`; of these queries alone.

    Returns:
        [n, H, E] in q's dtype.

    Raises:
        ValueError: shapes do not fit together.
    """
    n = q_nHD.shape[0]
    if any(x.shape[0] != docs.total for x in kv):
        raise ValueError(
            f"keys and values of {[x.shape[0] for x in kv]} tokens, documents of {docs.total}"
        )
    if first == 0 and n == docs.total:
        return nsa_attention(
            q_nHD, *kv, phi_k, phi_v, gates_nH3, docs, spec, scale=scale, stats=stats
        )
    begin, seen = docs.seen_by(first, first + n)
    kc, vc, ks, vs, kw, vw = (x[begin : first + n] for x in kv)
    keys = (kc, vc, ks, vs, kw, vw)
    return nsa_attention(
        q_nHD, *keys, phi_k, phi_v, gates_nH3, seen, spec,
        scale=scale, first=first - begin, stats=stats,
    )  # fmt: skip
