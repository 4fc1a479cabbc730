"""Native Sparse Attention: the oracle is the paper, and the blocked path is the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kernels.documents import Documents
from kernels.nsa import NsaSpec, nsa_attention
from kernels.nsa.blocked import nsa_blocked
from kernels.nsa.naive import block_importance, compress_naive, nsa_naive, selection_gap
from kernels.nsa.plan import CPU_TILE, cut
from kernels.nsa.spec import EMPTY_LSE, NsaCall, Phi
from tests.kernels.nsa_cases import LENGTHS, Case, compare, random_case, relative

SPEC = NsaSpec(selected=4, window=128)
SMALL = NsaSpec(block=4, stride=2, select=8, selected=3, initial=1, local=1, window=6)


def test_weights_of_the_default_importance_are_12221():
    assert NsaSpec().importance_offsets == (-1, 0, 1, 2, 3)
    assert NsaSpec().importance_weights == (1, 2, 2, 2, 1)
    assert NsaSpec(block=16).importance_weights == (1, 1, 1, 1)
    assert NsaSpec(block=64, select=32).importance_weights == (1, 2, 2, 2, 1)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"block": 24}, "block"),
        ({"select": 40}, "select"),
        ({"selected": 2}, "selected"),
        ({"local": 0}, "local"),
        ({"initial": -1}, "initial"),
        ({"window": 0}, "window"),
    ],
)
def test_sizes_without_a_meaning_are_refused_by_name(wrong, field):
    with pytest.raises(ValueError, match=rf"NsaSpec\.{field} "):
        NsaSpec(**wrong)


def test_importance_of_the_oracle_uses_the_weights_on_the_right_blocks():
    p = torch.rand(256, 1, 1, 15, dtype=torch.float64)
    importance = block_importance(p, NsaSpec())[:, 0]
    p = torch.nn.functional.pad(p[:, 0, 0], (1, 1))
    for j in range(4):
        first = 4 * j  # padded index of compressed block 4j - 1
        wanted = p[:, first : first + 5] @ torch.tensor([1.0, 2, 2, 2, 1], dtype=torch.float64)
        assert torch.allclose(importance[:, j], wanted)


def test_oracle_compresses_whole_blocks_only_and_knows_the_mean():
    x = torch.randn(65, 2, 4, dtype=torch.float64)
    mean = compress_naive(x, None, NsaSpec())
    assert mean.shape == (3, 2, 4)
    assert torch.allclose(mean[1], x[16:48].mean(0))
    eye = Phi(torch.eye(4).double().div(32).repeat(32, 1, 1), torch.zeros(32, 4).double())
    assert torch.allclose(compress_naive(x, eye, NsaSpec()), mean)


def test_queries_without_a_compressed_block_get_zero_and_a_finite_log_sum_exp():
    result = random_case([31, 40], NsaSpec()).oracle()
    blind = torch.cat([torch.arange(31), 31 + torch.arange(31)])
    assert torch.equal(result.branches[0][blind], torch.zeros_like(result.branches[0][blind]))
    assert (result.lse[0][blind] == EMPTY_LSE).all()
    seeing = torch.arange(62, 71)
    assert (result.branches[0][seeing] != 0).all()
    assert all(torch.isfinite(lse).all() for lse in result.lse)


def test_forced_blocks_are_chosen_once_and_future_blocks_never():
    spec = NsaSpec(selected=4, initial=1, local=2)
    result = random_case([300], spec).oracle()
    chosen = result.selection[0]
    current = torch.arange(300) // 64
    for t in (0, 63, 64, 130, 299):
        c = int(current[t])
        assert chosen[t, :, c].all()
        assert chosen[t, :, max(c - 1, 0)].all()
        assert chosen[t, :, 0].all()
        assert not chosen[t, :, c + 1 :].any()
        assert (chosen[t].sum(-1) == min(4, c + 1)).all()


@pytest.mark.parametrize("length", LENGTHS)
def test_blocked_equals_the_oracle_on_one_document(length):
    compare(random_case([length], SPEC), nsa_blocked, 2e-6)


@pytest.mark.parametrize(
    "lengths", [LENGTHS, LENGTHS[::-1], [1] * 40, [5, 300, 1, 1, 64, 64, 2, 128, 129]]
)
def test_blocked_equals_the_oracle_on_packed_documents(lengths):
    compare(random_case(lengths, SPEC), nsa_blocked, 2e-6)


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
def test_blocked_equals_the_oracle_for_every_group_size(group):
    compare(random_case([200, 90], SPEC, H=group * 2, G=2, D=8, E=8), nsa_blocked, 2e-6)


@pytest.mark.parametrize(
    "spec",
    [
        NsaSpec(),
        SMALL,
        NsaSpec(block=64, stride=16, select=32, selected=5, initial=2, local=1, window=7),
        NsaSpec(block=16, stride=16, select=64, selected=2, initial=0, local=1, window=1),
        NsaSpec(block=32, stride=8, select=16, selected=6, initial=0, local=3, window=1000),
        NsaSpec(block=128, stride=16, select=16, selected=3, initial=1, local=1, window=40),
    ],
)
def test_blocked_equals_the_oracle_for_other_sizes(spec):
    compare(random_case([230, 17, 120], spec, seed=3), nsa_blocked, 2e-6)


def test_blocked_equals_the_oracle_with_values_of_another_width():
    compare(random_case([150, 60], SPEC, D=16, E=8), nsa_blocked, 2e-6)
    compare(random_case([150, 60], SPEC, D=8, E=12), nsa_blocked, 2e-6)


def test_blocked_equals_the_oracle_with_mean_compression():
    compare(random_case([330, 31, 32], SPEC, learned=False), nsa_blocked, 2e-6)


def test_blocked_equals_the_oracle_with_shared_keys_and_values():
    case = random_case([330, 31, 32], SPEC)
    q, k, v, gates, *phi = (case.tensors[i] for i in (0, 1, 2, 7, 8, 9, 10, 11))
    maps = (Phi(*phi[:2]), Phi(*phi[2:]))
    leaves = [q, k, v, gates, *phi]
    call = NsaCall(q, k, v, k, v, k, v, *maps, gates, case.docs, case.spec)
    found, wanted = nsa_blocked(call), nsa_naive(call).out_THE
    assert relative(found, wanted) < 2e-6
    upstream = torch.randn_like(found)
    for f, w in zip(
        torch.autograd.grad(found, leaves, upstream),
        torch.autograd.grad(wanted, leaves, upstream.double()),
        strict=True,
    ):
        assert relative(f, w) < 2e-6 or w.norm() < 1e-4


def test_blocked_takes_a_scale_of_its_own():
    case = random_case([100], SPEC)
    found = nsa_blocked(case.call, scale=0.7)
    assert relative(found, nsa_naive(case.call, scale=0.7).out_THE) < 2e-6


def test_blocked_in_bf16_is_as_good_as_its_inputs():
    case = random_case([400, 33, 100], SPEC, dtype=torch.bfloat16)
    # bf16 rounds to 8 bits: 2^-9 a rounding; a changed near tie in the selection costs more.
    compare(case, nsa_blocked, 0.04)


@pytest.mark.parametrize("lengths", [[23], [9, 3, 14]])
@pytest.mark.parametrize("learned", [True, False])
def test_gradients_equal_finite_differences(lengths, learned):
    case = random_case(lengths, SMALL, H=2, G=1, D=4, E=4, learned=learned, dtype=torch.float64)

    def run(*tensors):
        return nsa_blocked(Case(list(tensors), case.docs, case.spec).call)

    assert torch.autograd.gradcheck(run, case.tensors, fast_mode=True, eps=1e-6, atol=1e-6)


def test_equal_scores_everywhere_select_the_lowest_blocks_in_both():
    case = random_case([1000], replace(SPEC, selected=5))
    with torch.no_grad():
        case.tensors[0].zero_()
    compare(case, nsa_blocked, 2e-6)
    # Blocks inside the document tie; the first few score less for lack of a block before them.
    chosen = case.oracle().selection[0][-1, 0]
    assert chosen.nonzero().flatten().tolist() == [0, 1, 2, 14, 15]


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_logits_of_ten_thousand_give_no_nan(sign):
    case = random_case([200, 5, 70], SPEC, D=16)
    with torch.no_grad():
        for i in (0, 1, 3, 5):
            case.tensors[i].fill_(50.0)
        case.tensors[0].mul_(sign)
        case.tensors[0][::3] *= -1
        for i in (3, 5):
            case.tensors[i][::2] *= -1
    found = nsa_blocked(case.call)
    wanted = case.oracle()
    assert wanted.lse[1].abs().max() > 9e3
    assert relative(found, wanted.out_THE) < 2e-6
    for grad in torch.autograd.grad(found, case.tensors, torch.ones_like(found)):
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("at", [1, 40, 64, 127, 128, 200, 449])
def test_changing_the_future_leaves_the_past_bitwise_alone(at):
    case = random_case([450], SPEC)
    before = nsa_blocked(case.call)
    with torch.no_grad():
        for x in case.tensors[:8]:
            x[at:] = x[at:].flip(0) * -1.5 + 0.25
    after = nsa_blocked(case.call)
    assert torch.equal(before[:at], after[:at])
    assert not torch.equal(before[at:], after[at:])


def test_gradients_do_not_flow_from_the_past_to_the_future():
    case = random_case([450], SPEC)
    out = nsa_blocked(case.call)
    for name, grad in zip(
        case.names[:8], torch.autograd.grad(out[:200].sum(), case.tensors[:8]), strict=True
    ):
        assert (grad[200:] == 0).all(), name
        assert (grad[:200] != 0).any(), name


def test_changing_another_document_changes_nothing():
    case = random_case([70, 300, 20, 30, 40], SPEC)
    before = nsa_blocked(case.call)
    with torch.no_grad():
        for x in case.tensors[:8]:
            x[70:370] = x[70:370] * -2.0
            x[390:420] += 1.0
    after = nsa_blocked(case.call)
    for same in (slice(0, 70), slice(370, 390), slice(420, 460)):
        assert torch.equal(before[same], after[same])
    assert not torch.equal(before[70:370], after[70:370])


def test_two_runs_are_bitwise_equal_and_so_are_their_gradients():
    case = random_case(LENGTHS, SPEC)
    upstream = torch.randn(case.docs.total, 4, 16)
    runs = []
    for _ in range(2):
        # A new layout each time: nothing may depend on what was cached.
        again = Case(case.tensors, Documents(case.docs.lengths), case.spec)
        out = nsa_blocked(again.call)
        runs.append([out, *torch.autograd.grad(out, case.tensors, upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_selection_of_the_blocked_path_gives_no_importance_away():
    from kernels.nsa.blocked import _select
    from kernels.nsa.compression import compress
    from kernels.nsa.plan import plan_for

    case = random_case([900], SPEC)
    oracle = case.oracle()
    q, kc = case.tensors[:2]
    plan = plan_for(case.docs, SPEC, 4)
    k = compress(kc, case.call[7], plan).detach()
    chosen = torch.zeros(900, 2, 15, dtype=torch.bool)
    for tile in plan.tiles:
        q_GRBD = q.detach().view(900, 2, 2, 16).permute(1, 2, 0, 3)[:, :, tile.begin : tile.end]
        own = chosen[tile.begin : tile.end, :, : tile.block_end]
        if tile.scored:
            own.copy_(_select(q_GRBD, k, plan, tile, 0.25).transpose(0, 1))
        else:
            own.copy_(plan.blocks_of(tile)[0][:, None])
    gap = selection_gap(oracle.importance[0], chosen, SPEC)
    assert gap.max() < 1e-6


def test_tiles_cover_every_query_once_and_short_documents_share_them():
    lengths = (20, 20, 500, 1, 1, 63, 64, 128, 129, 3)
    tiles = cut(lengths, CPU_TILE)
    assert tiles[0] == (0, 40)
    assert [b for _, b in tiles[:-1]] == [a for a, _ in tiles[1:]]
    assert tiles[-1][1] == sum(lengths)
    assert max(b - a for a, b in tiles) <= CPU_TILE
    assert len(cut((10,) * 100, CPU_TILE)) == 9


def test_selected_distance_is_the_oracles():
    case = random_case([900, 100], SPEC)
    found: dict[str, torch.Tensor] = {}
    wanted: dict[str, torch.Tensor] = {}
    nsa_attention(*case.call, implementation="blocked", stats=found)
    nsa_attention(*case.call, implementation="naive", stats=wanted)
    assert torch.allclose(found["selected_distance"], wanted["selected_distance"], rtol=1e-3)
    short = random_case([60], SPEC)
    nsa_attention(*short.call, stats=found)
    assert float(found["selected_distance"]) == 0.0


def test_auto_is_blocked_on_a_cpu_and_naive_keeps_the_dtype():
    case = random_case([100], SPEC)
    auto = nsa_attention(*case.call)
    assert torch.equal(auto, nsa_attention(*case.call, implementation="blocked"))
    naive = nsa_attention(*case.call, implementation="naive")
    assert naive.dtype == torch.float32
    assert relative(auto, naive) < 2e-6


def test_a_call_that_cannot_run_says_why():
    case = random_case([100], SPEC)
    with pytest.raises(ValueError, match=r"triton.*cannot run: .*cpu"):
        nsa_attention(*case.call, implementation="triton")
    with pytest.raises(ValueError, match="'fast' is none of"):
        nsa_attention(*case.call, implementation="fast")
    call = list(case.call)
    call[10] = Documents([99])
    with pytest.raises(ValueError, match="100 tokens, the documents have 99"):
        nsa_attention(*call)
    call = list(case.call)
    call[5] = call[5][:, :1]
    with pytest.raises(ValueError, match=r"k_win has shape \(100, 1, 16\), expected"):
        nsa_attention(*call)
    call = list(case.call)
    call[0] = call[0][:, :3]
    with pytest.raises(ValueError, match="3 query heads cannot be shared evenly by 2 KV groups"):
        nsa_attention(*call)
    call = list(case.call)
    call[7] = Phi(call[7].weight_lDD[:16], call[7].position_lD)
    with pytest.raises(ValueError, match="phi_k has weight"):
        nsa_attention(*call)


def test_position_term_of_the_keys_changes_nothing_and_its_gradient_is_exactly_zero():
    """It moves all compressed keys alike, so every score of a query by the same amount."""
    case = random_case([5, 90], SPEC, dtype=torch.float64)
    position = 9
    assert case.names[position] == "phi_k.position"
    wanted = case.oracle().out_THE
    (gradient,) = torch.autograd.grad(
        wanted, case.tensors[position], torch.randn_like(wanted), retain_graph=True
    )
    assert gradient.abs().max() < 1e-12
    moved = list(case.tensors)
    moved[position] = torch.randn_like(moved[position])
    torch.testing.assert_close(Case(moved, case.docs, SPEC).oracle().out_THE, wanted)
    own = nsa_blocked(case.call)
    (gradient,) = torch.autograd.grad(own, case.tensors[position], torch.randn_like(own))
    assert torch.count_nonzero(gradient) == 0


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.04)], ids=str
)
@pytest.mark.parametrize("widths", [(16, 16), (16, 8)])
def test_blocked_on_a_gpu_equals_the_oracle_and_itself(dtype, tolerance, widths):
    case = random_case(LENGTHS, SPEC, D=widths[0], E=widths[1], dtype=dtype).to("cuda:0")
    compare(case, nsa_blocked, tolerance)
    runs = []
    for _ in range(2):
        out = nsa_blocked(case.call)
        runs.append([out, *torch.autograd.grad(out, case.tensors, torch.ones_like(out))])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
