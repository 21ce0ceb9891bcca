"""Attribution maps of Vision Transformers from intercepted attention; independent of Lightning.

**The path of one block**, number 3 of 0 to 4, class-token head, 224 pixels, patches of 16: a batch of B images, N = 197
tokens (one prefix token), D = 1024 channels, H = 16 heads of d = 64; nine methods, of which three carry rows through A,
four through ReLU(G) ⊙ A.

1. `plan.Plan` says what the methods need, before anything runs: here gradients from block to block, and the layers' own
   scores for LeGrad.
2. `block.Block` stands in place of the block's `forward`. Tokens (B, 197, 1024) come in, and the block runs as it is;
   recomputed, it runs inside a checkpoint.
3. Inside, it calls `scaled_dot_product_attention` with q, k, v (B, 16, 197, 64). The `seam` hands the call to
   `forward.ForwardPass`, which records it and answers with the fused function's output, O (B, 16, 197, 64), behind a
   node in the graph (`attend`). Nothing else is kept that autograd would not keep.
4. The tokens leave. The last block's are where `readout.Readout` finds, by the score's gradient, which tokens the head
   reads: r (B, 197), here 1 for the class token. `relevance.Relevance` starts with r for each method.
5. `own_scores.OwnScores` runs the block's tail once more, for the class token alone: its row of O, (B, 16, 1, 64), is
   the answer to the attention call. The head's score of the tail's output, (B, 1, 1024), is differentiated with
   respect to this answer.
6. The backward pass of the score reaches the node with dO (B, 16, 197, 64), after that of block 4. `descent.Descent`
   makes an `AttentionLayer` of q, k, v, dO: A = softmax(q kᵀ / 8) and G = dO vᵀ, both (B, 16, 197, 197), or neither,
   if the layer is a `FusedLayer`.
7. `products.RowProducts` asks for norms of the heads' G (B, 16), the row sums of ReLU(G) ⊙ A (B, 16, 197), and, all
   methods at once, for the products of rows (B, 16, 3 or 4, 197) with A or ReLU(G) ⊙ A: `r_3 = r_4 M_3`, (B, 197) each.
8. LeGrad adds the key sums of ReLU(g vᵀ), (B, 197), where g is the gradient of step 5.
9. The dense layer's matrices then yield the gradients of q, k and v; with a fused layer the network's own fused
   backward step does. The layer is freed, and the backward pass goes on to block 2.
10. Below block 0 the rows' patch tokens (B, 196) are the maps (B, 14, 14), which must be finite.

Block 4 is the last. As the head reads the class token only, `recompute.narrowed` keeps of it only its tokens: the
backward pass runs its tail again for the class token, which yields one row of dO, and the block up to its attention.

Without gradients from block to block (`rollout`, `legrad`, `attention`) blocks run without a graph, q, k and v are
kept, and the layers are visited from the top down when the forward pass is over; the rest is the same.

What Python decides by numbers on a GPU - whether scores are finite, whether tails are those of the blocks - it asks for
in `decisions`, once before the backward pass and once after it, so that the GPU seldom waits.

Methods that make their maps themselves run after all that, each by itself (`own_maps`).

A head that reads tokens of lower blocks too finds them at places of the graph of their own (`chain`), where the rows
take up its shares on their way down.

A network that attends in windows calls with q, k, v (B · W, H, n, d), of which `windowed.WindowedLayer` makes one layer
of all tokens of a grid; of one with fewer keys than tokens `reduced.ReducedLayer` does. Where tokens are merged
between two blocks, `Relevance.spread` hands the rows on to the finer grid. A block that merges them itself, because it
pools its queries, has a layer of Q queries and N keys; which tokens its residual is made of is seen when they enter
(`QueryPool.of`), and `layer.keep` hands on by it what stays.

A network that writes its attention out multiplies what came of a softmax, (B, H, N, N), by v: `written` hands the two
to the same `forward.ForwardPass`, and the layer is a `WrittenLayer`, which has A instead of q and k. Where the class
token alone attends, `class_attention.ClassLayer` makes one layer of all tokens of it; where it is not among a layer's
tokens, `Relevance.leave_out` drops its entry of the rows.

Methods of the balanced gradient have a backward pass of their own on the same graph (`balanced`). The tokens that enter
block 3 and the addition behind its attention have hooks (`stream`), which bring `x · ds/dm` and `x · ds/dx`, (B, 197)
each, before and after step 6.
"""

from gmarpp.attribution.explain import explain
from gmarpp.attribution.explanation import Explanation
from gmarpp.attribution.graphed import GraphedExplain
from gmarpp.attribution.method import AttributionMethod, FunctionMethod, MapMethod, Method
from gmarpp.attribution.methods import (
    GMAR,
    BalancedRollout,
    Chefer,
    GMARPlusPlus,
    LastAttention,
    LeGrad,
    RandomMap,
    Rollout,
    TokenRelevance,
)
from gmarpp.attribution.registry import METHODS, VARIANTS, register_method, resolve_method, select_methods
from gmarpp.attribution.target import Contrast
from gmarpp.labels import METHOD_LABELS
from gmarpp.network.architecture import Architecture
from gmarpp.network.errors import UnsupportedNetworkError
from gmarpp.network.families import architecture_of

__all__ = [
    "GMAR",
    "METHODS",
    "METHOD_LABELS",
    "VARIANTS",
    "Architecture",
    "AttributionMethod",
    "BalancedRollout",
    "Chefer",
    "Contrast",
    "Explanation",
    "FunctionMethod",
    "GMARPlusPlus",
    "GraphedExplain",
    "LastAttention",
    "LeGrad",
    "MapMethod",
    "Method",
    "RandomMap",
    "Rollout",
    "TokenRelevance",
    "UnsupportedNetworkError",
    "architecture_of",
    "explain",
    "register_method",
    "resolve_method",
    "select_methods",
]
