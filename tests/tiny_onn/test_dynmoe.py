"""DynMoE layer: what a token fires, how the controller steers it, what recomputation keeps."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.experts.naive import expert_ffn_naive
from kernels.experts.router import cosine_scores
from tests.ranks import Ranks, run_ranks
from tiny_onn.dynmoe import DenseFfn, DynMoe, build_ffn, update_controllers
from tiny_onn.dynmoe_config import DynMoeConfig

WIDTH = 32
ONE = torch.tensor(1.0)


def config(**changes: object) -> DynMoeConfig:
    return DynMoeConfig(**{"experts": 8, "expert_hidden": 16, "explore_share": 0.25, **changes})


def layer(seed: int = 0, width: int = WIDTH, **changes: object) -> DynMoe:
    torch.manual_seed(seed)
    return DynMoe(config(**changes), width)


def tokens(count: int = 64, seed: int = 1, width: int = WIDTH) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def grads(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def fired_of(module: DynMoe, x: Tensor) -> Tensor:
    s = cosine_scores(x, module.direction_EC.detach())
    z = module.tau_0 * s - module.theta_0 - module.theta_E.detach() - module.controller_bias_E
    best = z >= z.amax(1, keepdim=True)
    return (z > 0) | best


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("shared", [False, True])
def test_output_is_the_gated_sum_of_the_fired_experts(activation, shared):
    m = layer(activation=activation, shared_expert=shared, max_experts=8).double()
    x, delta = tokens().double(), 0.1 * tokens(64, 2, 16).double()
    fired = fired_of(m, x)
    s = cosine_scores(x, m.direction_EC.detach())
    p = torch.where(fired, m.tau_0 * s, -torch.inf).softmax(1)
    y = expert_ffn_naive(
        x, m.w_in_EIC, m.w_out_ECF, p, fired, activation=activation, hidden_delta_TF=delta
    )
    if shared:
        y = y + m.shared(x, delta)
    torch.testing.assert_close(m.eval()(x, delta, None), y)


@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("kind", ["dynmoe", "dense"])
def test_a_small_delta_of_the_hidden_channels_reaches_output_and_gradients_in_bf16(
    kind, activation
):
    torch.manual_seed(0)
    cfg = config(kind=kind, activation=activation, shared_expert=True)
    m = build_ffn(cfg, WIDTH).eval().bfloat16()
    x, g = tokens(256).bfloat16(), tokens(256, 2).bfloat16()
    delta = torch.full((256, cfg.hidden_width()), 1 / 512)

    def values(dtype, delta):
        own = copy.deepcopy(m).to(dtype)
        leaf = x.to(dtype, copy=True).requires_grad_()
        y = own(leaf, delta.to(dtype), None)
        y.backward(g.to(dtype))
        named = {n: w for n, w in grads(own).items() if n.startswith(("w_", "shared"))}
        return {"y": y.detach(), "dx": leaf.grad, **named}

    plain = values(torch.float64, 0 * delta)
    exact, ours, without = (
        {n: (v.double() * plain[n]).sum() / plain[n].square().sum() for n, v in found.items()}
        for found in (
            values(torch.float64, delta),
            values(torch.bfloat16, delta),
            values(torch.bfloat16, 0 * delta),
        )
    )
    for name, gain in exact.items():
        assert gain - 1 == pytest.approx(1 / 512, rel=1e-6), name
        # A value of bf16 is off by as much; the weighted mean over all of them by less.
        assert ours[name] - without[name] == pytest.approx(1 / 512, rel=0.5), name


def test_training_and_evaluation_fire_alike():
    # With a threshold nobody reaches, the fallback decides for every token.
    for lift in (0.0, 100.0):
        m = layer()
        m.controller_bias_E += lift
        x = tokens()
        y_train = m.train()(x, None, ONE)
        y_eval = m.eval()(x, None, ONE)
        torch.testing.assert_close(y_train, y_eval, rtol=1e-5, atol=1e-7)
        assert m.eval()(x, None, None).abs().sum(1).min() > 0


@pytest.mark.parametrize("width", [64, 512, 2048])
def test_a_fresh_layer_fires_the_target(width):
    counts = []
    for seed in range(20):
        m = layer(seed, width, expert_hidden=4, target_experts=2.5)
        m.record = True
        m(tokens(256, seed, width), None, ONE)
        counts.append(m.stats["experts_per_token"])
    mean = torch.stack(counts)
    assert abs(mean.mean() - 2.5) < 4 * mean.std() / len(counts) ** 0.5 + 0.01


def train_step(m: DynMoe, x: Tensor, optimizer: torch.optim.Optimizer, target: Tensor) -> float:
    scale = torch.tensor(1 / len(x))
    loss = ((m(x, None, scale) - target) ** 2).sum() * scale
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    update_controllers(m)
    return float(loss.detach())


def test_the_controller_brings_a_drifting_stream_back_to_the_target():
    m = layer(target_experts=2.0, max_experts=6)
    m.controller_bias_E += 3.0  # nearly nothing fires at first
    m.record = True
    optimizer = torch.optim.Adam(m.parameters(), lr=1e-3)
    teacher = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5)) / 4
    seen = []
    for step in range(260):
        # A common direction that grows to the size of the tokens themselves.
        x = tokens(128, 100 + step) + min(step / 100, 1.0) * torch.ones(WIDTH)
        train_step(m, x, optimizer, x @ teacher)
        seen.append(float(m.stats["experts_per_token"]))
    assert seen[0] < 1.2
    late = seen[-60:]
    assert abs(sum(late) / len(late) - 2.0) < 0.1
    assert int(m.stats["dead_experts"]) == 0
    assert float(m.load_mean_E.min()) > 0.01
    # No collapse to a single expert: the counts differ from token to token.
    assert (m.stats["experts_per_token_counts"][1:4] > 0).all()


def test_idle_experts_are_pulled_back():
    m = layer(target_experts=2.0, recycle=False)
    with torch.no_grad():
        m.theta_E[3] += 6.0
    m.record = True
    optimizer = torch.optim.SGD(m.parameters(), lr=0.0)
    loads = []
    for step in range(400):
        x = tokens(128, step)
        train_step(m, x, optimizer, torch.zeros_like(x))
        loads.append(float(m.stats["expert_load"][3]))
        if step == 120:
            assert int(m.stats["dead_experts"]) == 1
    assert loads[0] == 0
    assert loads[-1] > 0.2 * 0.25
    assert int(m.stats["dead_experts"]) == 0


def test_surprise_off_is_balanced_top_k():
    m = layer(surprise="off", target_experts=2.0)
    with torch.no_grad():
        m.theta_E[0] -= 3.0  # a favourite
    m.record = True
    optimizer = torch.optim.SGD(m.parameters(), lr=0.0)
    loads = []
    for step in range(300):
        x = tokens(128, step)
        train_step(m, x, optimizer, torch.zeros_like(x))
        assert m.stats["experts_per_token_counts"].tolist() == [0, 0, 128]
        loads.append(m.stats["expert_load"])
    assert loads[0][0] > 0.9
    late = torch.stack(loads[-50:]).mean(0)
    assert (late - 0.25).abs().max() < 0.05
    assert "surprise" not in m.stats


def test_gradients_reach_the_router_and_experts_that_never_fired():
    m = layer(explore_share=0.0, min_experts=1, target_experts=1.5)
    with torch.no_grad():
        m.theta_E[5] += 4.0
    x = tokens(32).requires_grad_()
    assert not fired_of(m, x.detach())[:, 5].any()
    m(x, None, ONE).pow(2).sum().backward()
    assert m.w_in_EIC.grad[5].abs().max() == 0
    assert m.theta_E.grad[5].abs() > 0
    assert m.direction_EC.grad[5].abs().max() > 0
    assert m.log_tau.grad.abs() > 0
    assert x.grad.abs().max() > 0


def test_the_lesson_of_surprise_arrives_at_the_thresholds():
    x, g = tokens(32), 1e-3 * tokens(32, 9)
    seen = []
    for coefficient in (0.0, 1.0):
        m = layer(router_coefficient=coefficient)
        m(x, None, ONE).backward(g)
        seen.append(m.theta_E.grad)
    assert (seen[1] - seen[0]).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_neither_gradients_nor_counts(reentrant, dtype):
    results = []
    for recompute in (False, True):
        m = layer(shared_expert=True).to(dtype)
        m.record = True
        x = tokens().to(dtype).requires_grad_()
        delta = (0.1 * tokens(64, 2, 16)).to(dtype).requires_grad_()
        args = (x, delta, torch.tensor(0.01))
        y = checkpoint(m, *args, use_reentrant=reentrant) if recompute else m(*args)
        y.backward(tokens(64, 3).to(dtype) * 0.01)
        stats = {k: v.clone() for k, v in m.stats.items()}
        results.append((y.detach(), x.grad, delta.grad, m.counts_X.clone(), grads(m), stats))
    plain, recomputed = results
    for a, b in zip(plain[:4], recomputed[:4], strict=True):
        assert torch.equal(a, b)
    for named, others in zip(plain[4:], recomputed[4:], strict=True):
        assert named.keys() == others.keys()
        for name in named:
            torch.testing.assert_close(others[name], named[name], rtol=0, atol=0, equal_nan=True)
    assert plain[3][-1] == 64


def test_counts_add_up_over_micro_batches_and_leave_evaluation_out():
    m, x = layer(), tokens(60)
    for part in x.split(20):
        m(part, None, ONE).sum().backward()
    m.eval()
    m(x, None, ONE)
    counts = fired_of(m, x).sum(0)
    m.train()
    assert m.counts_X.tolist()[-1] == 60
    assert (m.counts_X[:-1] <= counts).all()  # the cap at max_experts may take some away
    update_controllers(m)
    assert not m.counts_X.any()
    assert m.step_1.item() == 1


def test_repeating_a_step_is_bitwise_equal():
    results = []
    for _ in range(2):
        m = layer()
        x = tokens(257).requires_grad_()
        m(x, None, ONE).pow(2).sum().backward()
        update_controllers(m)
        results.append([x.grad, m.controller_bias_E, *grads(m).values()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_cast_keeps_the_controllers_state_exact():
    m = layer()
    m.controller_bias_E += 1 / 3
    m.load_mean_E += 1 / 7
    half = m.to(torch.bfloat16)
    assert half.w_in_EIC.dtype == torch.bfloat16
    assert half.controller_bias_E.dtype == torch.float32
    assert torch.equal(half.controller_bias_E, torch.full((8,), 1 / 3))
    assert half(tokens(4).bfloat16(), None, ONE).dtype == torch.bfloat16


def test_the_controllers_state_travels_in_the_state_dict():
    m = layer()
    for seed in range(3):
        m(tokens(32, seed), None, ONE).sum().backward()
        update_controllers(m)
    other = layer(seed=1)
    other.load_state_dict(m.state_dict())
    for name, buffer in m.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name
    assert m.step_1.item() == 3
    x = tokens(16, 8)
    assert torch.equal(m(x, None, ONE), other(x, None, ONE))


@pytest.mark.parametrize("count", [0, 1])
def test_none_and_one_token(count):
    m = layer()
    m.record = True
    x = tokens(count).requires_grad_()
    y = m(x, None, ONE)
    assert y.shape == (count, WIDTH)
    y.sum().backward()
    update_controllers(m)
    assert all(torch.isfinite(g).all() for g in grads(m).values())
    assert torch.isfinite(m.controller_bias_E).all()
    assert torch.isfinite(m.stats["experts_per_token"])


def test_stats_are_kept_only_while_recording_and_hold_no_graph():
    m, x = layer(), tokens()
    m(x, None, ONE).sum().backward()
    assert not m.stats
    m.record = True
    m(x, None, ONE).sum().backward()
    shapes = {name: tuple(value.shape) for name, value in m.stats.items()}
    assert shapes == {
        "experts_per_token": (),
        "experts_per_token_counts": (5,),
        "expert_load": (8,),
        "dead_experts": (),
        "active_experts": (),
        "recycled_experts": (),
        "router_entropy": (),
        "expert_surprise": (8,),
        "surprise": (),
        "router_loss": (),
        "agreement": (),
    }
    assert not any(value.requires_grad for value in m.stats.values())
    assert m.stats["experts_per_token_counts"].sum() == 64
    assert 0 <= m.stats["agreement"] <= 1
    assert 0 < m.stats["router_entropy"] < math.log(4)


def test_dense_has_the_same_active_width_and_the_same_call():
    cfg = config(kind="dense", target_experts=2.5, shared_expert=True)
    m = build_ffn(cfg, WIDTH)
    assert isinstance(m, DenseFfn)
    assert m.w_out_CF.shape == (WIDTH, 2.5 * 16 + 16) == (WIDTH, cfg.hidden_width())
    x, delta = tokens(5), tokens(5, 2, 56)
    gate, up = (x @ m.w_in_IC.t()).chunk(2, 1)
    expected = (torch.sigmoid(gate) * gate * up * (1 + delta)) @ m.w_out_CF.t()
    torch.testing.assert_close(m(x, delta, ONE), expected)
    assert isinstance(build_ffn(config(), WIDTH), DynMoe)
    assert config(dense_hidden=40, kind="dense").hidden_width() == 40
    assert config().hidden_width() == 16


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"kind": "moe"}, "ffn.kind"),
        ({"surprise": "on"}, "ffn.surprise"),
        ({"activation": "gelu"}, "activation"),
        ({"target_experts": 5.0}, "max_experts"),
        ({"min_experts": 0}, "min_experts"),
        ({"max_experts": 9}, "max_experts <= experts"),
        ({"explore_share": 2.0}, "explore_share"),
        ({"explore_share": 0.7}, "explore_share 0.7 .* set it to 1 or 0.5"),
        ({"explore_share": 0.45}, "explore_share 0.45 .* set it to 0.5 or 0.3333"),
        ({"surprise": "off", "target_experts": 2.5}, "target_experts 2.5 .* to 2 or 3"),
        ({"router_kl_weight": -1.0}, "router_kl_weight"),
        ({"router_ce_weight": -0.1}, "router_ce_weight"),
        ({"router_temperature": 0.0}, "router_temperature"),
        ({"dead_window": 0}, "dead_window"),
        ({"balance_gain": -1.0}, "balance_gain"),
        ({"expert_hidden": 0}, "expert_hidden"),
        ({"max_pool": 4}, "max_pool"),
        ({"max_pool": 16, "surprise": "off"}, "max_pool"),
        ({"grow_share": 0.0}, "grow_share"),
    ],
)
def test_impossible_configurations_are_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named):
        config(**changes)


def test_the_share_that_explores_is_the_configured_one():
    for share in (0.02, 0.1, 0.15, 0.25, 1.0):
        m = layer(explore_share=share)
        assert 1 / m.layer_spec().route.stride == pytest.approx(share, rel=0.1)


def _two_layers(mesh: object, shares: list[int]) -> list[Tensor]:
    m = nn.Sequential(layer(0), layer(1))
    x = tokens(64).split(shares)[mesh.rank]
    m[1](m[0](x, None, ONE), None, ONE).sum().backward()
    update_controllers(m)
    return [b for _, b in m.named_buffers()]


def test_controllers_of_all_ranks_stay_bitwise_alike_and_equal_one_rank():
    (alone,) = run_ranks(_two_layers, 1, [64])
    with Ranks(2) as ranks:
        for shares in ([40, 24], [64, 0]):
            for buffers in ranks.run(_two_layers, shares):
                assert all(torch.equal(a, b) for a, b in zip(buffers, alone, strict=True))
