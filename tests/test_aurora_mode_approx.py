"""AuroraModeApprox against slow oracles: the CP algebra, what is shared in a call, GQT and ICE, parameter counts."""

from __future__ import annotations

import copy
import math
import operator
import threading
import warnings

import peft
import pytest
import tensorly
import torch
import torch.nn.functional as F
import transformers as hf
from families import FAMILIES, VOCAB, blip_config, pairs, text_tower, tiny, vision_tower, wake
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import adapter, distance, stir
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_multimodal import AuroraModeApproxConfig, AuroraModeApproxModel
from peft_multimodal.methods.aurora_fusion import ContextBank
from peft_multimodal.tuner import CallScope

# ------------------------------------------------------------------------------------------------------------ helpers


def adapt(base: nn.Module, *, stirred: bool = True, **config) -> PeftModel:
    model = get_peft_model(base, AuroraModeApproxConfig(**{"r": 4, "dropout": 0.0, **config}))
    return stir(model) if stirred else model


def store(model: PeftModel, part: str, group: str, name: str = "default") -> Tensor:
    """U, V, lambda_norm or core of a group, in float64."""
    shared = model.base_model.model.aurora_mode_approx_shared
    return getattr(shared, f"aurora_mode_approx_{part}")[name][group].detach().double()


def dense(model: PeftModel, path: str, shapes: list[tuple[int, int]], s: float = 1.0, name: str = "default") -> Tensor:
    """s sum_r lambda_r P_nr v_r u_r^T of each matrix (d_in, d_out) of a module, one below the other; float64."""
    P = model.base_model.model.get_submodule(path).aurora_mode_approx_P_norm[name].detach().double()
    assert len(P) == len(shapes)
    updates = []
    for n, (d_in, d_out) in enumerate(shapes):
        U, V, lam = (store(model, part, f"{d_in}x{d_out}", name) for part in ("U", "V", "lambda_norm"))
        assert (U.shape, V.shape) == ((d_in, len(lam)), (d_out, len(lam)))
        update = torch.zeros(d_out, d_in, dtype=torch.float64)
        for r in range(len(lam)):
            update += s * lam[r] * P[n, r] * torch.outer(V[:, r], U[:, r])
        updates.append(update)
    return torch.cat(updates)


class Attention(nn.Module):
    """One head; k and v read `context` if there is any."""

    def __init__(self, d_in: int = 6, d_out: int = 5) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(d_in, d_out) for _ in "qkv")
        self.out_proj = nn.Linear(d_out, d_in)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        context = x if context is None else context
        q, k, v = self.q_proj(x), self.k_proj(context), self.v_proj(context)
        return self.out_proj((q @ k.mT).softmax(-1) @ v)


class Fused(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.qkv, self.out_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out_proj((q @ k.mT).softmax(-1) @ v)


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Products(TorchDispatchMode):
    """Counts the matrix products x U."""

    def __init__(self, model: nn.Module, r: int = 4) -> None:
        super().__init__()
        factors = model.get_submodule("base_model.model.aurora_mode_approx_shared")
        self.pointers = {U.data_ptr() for U in factors.aurora_mode_approx_U["default"].values()}
        self.count, self.r = 0, r

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name.partition("::")[2] in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"):
            reads_U = any(isinstance(a, Tensor) and a.data_ptr() in self.pointers for a in args)
            self.count += reads_U and out.shape[-1] == self.r
        return out


def scopes(model: nn.Module) -> list[CallScope]:
    return [v for m in model.modules() for v in vars(m).values() if isinstance(v, CallScope)]


def assert_nothing_left(model: nn.Module) -> None:
    assert scopes(model)
    for scope in scopes(model):
        assert not scope.is_open
        assert scope.seen is None
        assert scope.values == {}


def gradients(model: PeftModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in adapter(model).items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


# ---------------------------------------------------------------------------------------------------- the CP algebra


def gpt2() -> hf.PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
    return tiny(hf.GPT2LMHeadModel, hf.GPT2Config(**sizes, add_cross_attention=True))()


def phi3() -> hf.PreTrainedModel:
    return tiny(hf.Phi3ForCausalLM, hf.Phi3Config(**text_tower(32, num_key_value_heads=2)))()


TEXT = "text_encoder.encoder.layer.1"
PLACES = {
    "linear": (FAMILIES["clip"].build, "text_model.encoder.layers.1.self_attn.k_proj", [(32, 32)]),
    "cross key": (FAMILIES["blip_retrieval"].build, f"{TEXT}.crossattention.self.key", [(48, 32)]),
    "fused": (FAMILIES["blip_retrieval"].build, "vision_model.encoder.layers.0.self_attn.qkv", [(48, 48)] * 3),
    "fused Conv1D": (gpt2, "transformer.h.0.attn.c_attn", [(32, 32)] * 3),
    "fused Conv1D, k and v": (gpt2, "transformer.h.0.crossattention.c_attn", [(32, 32)] * 2),
    "fused, grouped queries": (phi3, "model.layers.0.self_attn.qkv_proj", [(32, 32), (32, 16), (32, 16)]),
}


@pytest.mark.parametrize("place", PLACES)
def test_update_is_a_sum_of_outer_products(place):
    build, path, shapes = PLACES[place]
    model = adapt(build(), alpha=6.0)  # s = 6 / 4
    layer = model.base_model.model.get_submodule(path)
    base, transposed = layer.get_base_layer(), "Conv1D" in place
    update = dense(model, path, shapes, s=1.5)
    W = base.weight.detach().double().clone()
    W = W.T if transposed else W
    bias = None if base.bias is None else base.bias.double()
    x = torch.randn(2, 3, shapes[0][0])
    expected = F.linear(x.double(), W + update, bias).float()
    assert distance(expected, base(x)) > 0.1
    torch.testing.assert_close(layer.get_delta_weight("default"), update.float())
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    model.merge_adapter(safe_merge=True)
    torch.testing.assert_close((base.weight.T if transposed else base.weight).double(), W + update, atol=1e-6, rtol=0)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close((base.weight.T if transposed else base.weight).double(), W, atol=1e-6, rtol=0)


def test_tucker_core_is_the_triple_sum():
    model = adapt(Stack(Attention(6, 5), Attention(6, 5)), core="tucker", alpha=2.0)
    U, V, C = (store(model, part, "6x5") for part in ("U", "V", "core"))
    layer = model.base_model.model.layers[1].v_proj
    (c,) = layer.aurora_mode_approx_P_norm["default"].detach().double()
    G = torch.zeros(4, 4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            for k in range(4):
                G[i, j] += C[i, j, k] * c[k]
    update = 0.5 * V @ G.T @ U.T
    x = torch.randn(2, 6)
    expected = (x.double() @ (layer.base_layer.weight.double() + update).T + layer.base_layer.bias.double()).float()
    torch.testing.assert_close(layer.get_delta_weight("default"), update.float())
    torch.testing.assert_close(layer(x), expected)
    # with a super-diagonal core it is the CP form
    with torch.no_grad():
        core = model.base_model.model.aurora_mode_approx_shared.aurora_mode_approx_core["default"]["6x5"].zero_()
        core[range(4), range(4), range(4)] = lam = torch.tensor([1.0, -2.0, 0.5, 3.0])
    torch.testing.assert_close(layer.get_delta_weight("default"), (0.5 * V * (lam * c) @ U.T).float())


def count(groups: list[tuple[int, int, int]], r: int) -> int:
    """(d_in + d_out) R + N R + R a group (d_in, d_out, N)."""
    return sum((d_in + d_out + n + 1) * r for d_in, d_out, n in groups)


BLIP_GROUPS = {  # tiny BLIP: vision 48, text 32, two layers each
    "per_shape": [(48, 48, 6), (32, 32, 8), (48, 32, 4)],  # text q, k, v and cross q; cross k, v
    "per_modality": [(48, 48, 6), (32, 32, 6), (32, 32, 2), (48, 32, 4)],
    "none": [(48, 48, 1)] * 6 + [(32, 32, 1)] * 8 + [(48, 32, 1)] * 4,
}


@pytest.mark.parametrize("share", BLIP_GROUPS)
def test_share(share):
    model = adapt(FAMILIES["blip_retrieval"].build(), share=share)
    groups = BLIP_GROUPS[share]
    shared = model.base_model.model.aurora_mode_approx_shared
    for part, size in (("U", lambda g: (g[0], 4)), ("V", lambda g: (g[1], 4)), ("lambda_norm", lambda g: (4,))):
        shapes = [tuple(p.shape) for p in getattr(shared, f"aurora_mode_approx_{part}")["default"].values()]
        assert sorted(shapes) == sorted(map(size, groups)), part
    assert model.get_nb_trainable_parameters()[0] == count(groups, 4)
    assert len({p.data_ptr() for p in adapter(model).values()}) == 3 * len(groups) + 14  # a P for each module
    family = FAMILIES["blip_retrieval"]
    assert distance(family.output(model(**family.inputs())), family.output(family.build()(**family.inputs()))) > 1e-3


def test_share_global_needs_one_shape():
    with pytest.raises(ValueError, match="share='global'.*32.*48"):
        adapt(FAMILIES["blip_retrieval"].build(), share="global")
    model = adapt(FAMILIES["blip_retrieval"].build(), share="global", towers=["vision"])
    assert model.get_nb_trainable_parameters()[0] == count([(48, 48, 6)], 4)


def test_tucker_count():
    model = adapt(FAMILIES["blip_retrieval"].build(), core="tucker", towers=["vision"])
    assert model.get_nb_trainable_parameters()[0] == (48 + 48 + 6) * 4 + 4**3


def test_counts_at_full_size():
    with torch.device("meta"):
        blip, clip = hf.BlipForImageTextRetrieval(hf.BlipConfig()), hf.CLIPModel(hf.CLIPConfig())
    model = get_peft_model(blip, AuroraModeApproxConfig(r=64), low_cpu_mem_usage=True)
    rows = [p for n, p in adapter(model).items() if "P_norm" in n]
    assert sum(len(p) for p in rows) == 108
    assert model.get_nb_trainable_parameters()[0] == 105_280 == count([(768, 768, 108)], 64)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    model = get_peft_model(clip, AuroraModeApproxConfig(r=64, target_modules=targets), low_cpu_mem_usage=True)
    assert len([n for n in adapter(model) if "P_norm" in n]) == 96
    assert len([n for n in adapter(model) if "_U." in n]) == 2
    assert model.get_nb_trainable_parameters()[0] == 170_112 == count([(768, 768, 48), (512, 512, 48)], 64)


def test_dropout_is_of_training_and_unbiased():
    model = adapt(Stack(Attention()), dropout=0.3).train()
    layer = model.base_model.model.layers[0].q_proj
    x = torch.randn(6)
    many = x.expand(40_000, 6)
    base = layer.base_layer(x)
    exact = (dense(model, "layers.0.q_proj", [(6, 5)]) @ x.double()).float()
    drawn = layer(many) - base
    error = drawn.std(0) / math.sqrt(len(many))
    assert (drawn.std(0) > 0.01).all()
    assert ((drawn.mean(0) - exact).abs() < 5 * error).all()
    assert drawn.detach().round(decimals=4).unique(dim=0).shape[0] == 2**4  # entries of x U are dropped, R = 4
    model.eval()
    torch.testing.assert_close(layer(x) - base, exact)
    assert torch.equal(layer(many)[0], layer(many)[1])


@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_gradients_against_finite_differences(core):
    model = adapt(Stack(Attention(4, 3)), r=2, alpha=3.0, core=core).double()
    names, values = zip(*adapter(model).items(), strict=True)
    assert {n.split("approx_")[-1].split(".")[0] for n in names} >= {"U", "V", "P_norm"}
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def output(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *values))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_base_of_another_dtype(dtype):
    x = torch.randn(2, 3, 6, dtype=dtype)
    model = adapt(Stack(Attention()).to(dtype), stirred=False)
    assert torch.equal(model(x), base_output(model, x))
    stir(model)
    assert model(x).dtype == dtype
    exact = dense(model, "layers.0.q_proj", [(6, 5)])
    layer = model.base_model.model.layers[0].q_proj
    if dtype == torch.float64:
        torch.testing.assert_close(layer.get_delta_weight("default").double(), exact, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close((layer(x) - layer.base_layer(x)).double(), x.double() @ exact.T, atol=0.05, rtol=0.05)


def base_output(model: PeftModel, x: Tensor) -> Tensor:
    with model.disable_adapter():
        return model(x)


def test_first_gradient_is_that_of_V_alone():
    family = FAMILIES["blip_retrieval"]
    model = adapt(family.build(), stirred=False, use_gqt=True, use_ice=True)
    model.collect_context([family.text_inputs()])
    moved = {n for n, g in gradients(model, family.loss(model)).items() if g.abs().max() > 0}
    by_hand = {n for n in adapter(model) if "_V." in n or "query_gate" in n or "gamma" in n}
    assert moved == by_hand
    assert len(by_hand) == 3 + 2 + 1


# ---------------------------------------------------------------------------------------------- nn.MultiheadAttention


class Holder(nn.Module):
    def __init__(self, **options) -> None:
        super().__init__()
        self.attn = wake(nn.MultiheadAttention(8, 2, **options))

    def forward(self, *args, **kwargs):
        return self.attn(*args, **kwargs)


def merged_by_hand(model: PeftModel, shapes: list[tuple[int, int]]) -> nn.MultiheadAttention:
    attn = copy.deepcopy(model.base_model.model.attn.get_base_layer())
    parts = dense(model, "attn", shapes).float().split([8, 8, 8]) if len({s[0] for s in shapes}) == 1 else None
    with torch.no_grad():
        if parts:
            attn.in_proj_weight += torch.cat(parts)
        else:  # rows of different widths: one matrix at a time
            P = model.base_model.model.attn.aurora_mode_approx_P_norm["default"]
            for row, (d_in, _), W in zip(P, shapes, (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight), strict=True):
                U, V, lam = (store(model, part, f"{d_in}x8").float() for part in ("U", "V", "lambda_norm"))
                for r in range(4):
                    W += lam[r] * row[r] * torch.outer(V[:, r], U[:, r])
    return attn


MASKS = {
    None: lambda b, q, k: None,
    "bool 2D": lambda b, q, k: torch.rand(q, k) < 0.3,
    "float 2D": lambda b, q, k: torch.randn(q, k),
    "bool 3D": lambda b, q, k: torch.rand(2 * b, q, k) < 0.3,
    "float 3D": lambda b, q, k: torch.randn(2 * b, q, k).masked_fill(torch.rand(2 * b, q, k) < 0.2, -torch.inf),
}


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "cross", "one query", "other widths", "no bias"])
def test_multihead_attention(kind, batch_first):
    options = {"kdim": 6, "vdim": 10} if kind == "other widths" else {"bias": kind != "no bias"}
    shapes = [(8, 8), (6, 8), (10, 8)] if kind == "other widths" else [(8, 8)] * 3
    model = adapt(Holder(batch_first=batch_first, **options)).eval()
    expected_attn = merged_by_hand(model, shapes).eval()
    b, lq, lk = 3, {"self": 5, "one query": 1}.get(kind, 4), 5
    query, key, value = (torch.randn(b, n, d) for n, (d, _) in zip((lq, lk, lk), shapes, strict=True))
    inputs = (query,) * 3 if kind in ("self", "no bias") else (query, key, value)
    lk = inputs[1].shape[1]
    inputs = inputs if batch_first else tuple(t.transpose(0, 1) for t in inputs)
    padding = torch.zeros(b, lk, dtype=torch.bool)
    padding[1, 2:] = True
    for name, mask in MASKS.items():
        attn_mask = mask(b, lq, lk)
        if attn_mask is not None:
            attn_mask[..., 0] = 0  # every query sees something
        for key_padding_mask in (None, padding, torch.zeros(b, lk).masked_fill(padding, -torch.inf)):
            for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
                call = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, **weights}
                out, attention = model(*inputs, **call)
                expected, expected_attention = expected_attn(*inputs, **call)
                torch.testing.assert_close(out, expected, msg=lambda m, n=name: f"{n}: {m}")
                torch.testing.assert_close(attention, expected_attention)
    assert distance(expected, model.base_model.model.attn.get_base_layer()(*inputs, **call)[0]) > 1e-2


def test_multihead_attention_causal_and_unbatched():
    model = adapt(Holder()).eval()
    expected_attn = merged_by_hand(model, [(8, 8)] * 3).eval()
    x, causal = torch.randn(5, 2, 8), torch.ones(5, 5, dtype=torch.bool).triu(1)
    call = {"attn_mask": causal, "is_causal": True, "need_weights": False}
    torch.testing.assert_close(model(x, x, x, **call)[0], expected_attn(x, x, x, **call)[0])
    x = x[:, 0]
    torch.testing.assert_close(model(x, x, x), expected_attn(x, x, x))


def test_multihead_attention_products():
    """The q, k and v of one input share a product there too."""
    model = adapt(Holder(batch_first=True))
    x, y = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    for call, expected in (((x, x, x), 1), ((x, y, y), 2)):
        with Products(model) as products:
            model(*call)
        assert products.count == expected


# ----------------------------------------------------------------------------------------------- one product x U a call


def test_one_product_per_input():
    """Self-attentions need one, cross-attentions two (the text's and the picture's), fused ones one."""
    for name, expected in (("clip", 2 + 2), ("blip_retrieval", 2 + 2 + 2 * 2), ("bridgetower", None)):
        family = FAMILIES[name]
        model = adapt(family.build())
        with Products(model) as products:
            model(**family.inputs())
        if expected is not None:
            assert products.count == expected, name
        assert_nothing_left(model)
    three = adapt(FAMILIES["clip"].build(), share="none")  # nothing to share
    with Products(three) as products:
        three(**FAMILIES["clip"].inputs())
    assert products.count == 3 * (2 + 2)


@pytest.mark.parametrize("reentrant", [True, False])
def test_one_product_in_a_recomputation(reentrant):
    family = FAMILIES["clip"]
    model = adapt(family.build()).train()
    expected = gradients(model, family.loss(model))
    model.enable_input_require_grads()
    model.get_base_model().vision_model.embeddings.register_forward_hook(lambda m, a, out: out.requires_grad_())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with Products(model) as products:
        loss = family.loss(model)
        assert products.count == 2 + 2
        found = gradients(model, loss)
    assert products.count == 2 * (2 + 2)
    assert_close(found, expected)
    assert_nothing_left(model)


def test_threads_do_not_meet():
    model = adapt(Stack(Attention(), Attention()))
    inputs = [torch.randn(2, 3 + i, 6) for i in range(4)]
    expected = [model(x).detach() for x in inputs]
    between, results = threading.Barrier(len(inputs), timeout=20), {}
    for layer in model.base_model.model.layers:  # all threads stand between q and k at once
        layer.k_proj.register_forward_pre_hook(lambda *_: [between.wait()] and None)

    def work(i: int) -> None:
        with Products(model) as products:
            outputs = [model(inputs[i]) for _ in range(3)]
            (gradient,) = torch.autograd.grad(outputs[0].sum(), [store_parameter(model)])
        results[i] = (outputs, products.count, gradient)
        assert_nothing_left(model)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert results.keys() == set(range(4))
    for i, (outputs, number, _) in results.items():
        assert number == 3 * 2
        assert all(torch.equal(out, expected[i]) for out in outputs)
    assert_nothing_left(model)


def store_parameter(model: PeftModel) -> nn.Parameter:
    return model.base_model.model.aurora_mode_approx_shared.aurora_mode_approx_U["default"]["6x5"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_outlives_an_interrupted_call(error):
    def interrupt(*_):
        raise error

    model = adapt(Stack(Attention()))
    x = torch.randn(2, 3, 6)
    hook = model.base_model.model.layers[0].v_proj.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        model(x)
    hook.remove()
    with torch.no_grad():
        store_parameter(model).mul_(3)
    path, layer = "layers.0.q_proj", model.base_model.model.layers[0].q_proj
    expected = layer.base_layer(x) + x @ dense(model, path, [(6, 5)]).float().T
    found = []
    layer.register_forward_hook(lambda m, a, out: found.append(out))
    model(x)
    torch.testing.assert_close(found[0], expected)
    assert_nothing_left(model)


def test_shared_products_keep_inputs_apart():
    model = adapt(Stack(Attention(), Attention()))
    attention = model.base_model.model.layers[0]
    x, y = torch.randn(2, 2, 3, 6)
    W = {n: (getattr(attention, n).base_layer, dense(model, f"layers.0.{n}", [(6, 5)])) for n in ("q_proj", "k_proj", "v_proj")}

    def expected(x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (F.linear(i, m.weight + d.float(), m.bias) for i, (m, d) in zip((x, context, context), W.values(), strict=True))
        return attention.out_proj((q @ k.mT).softmax(-1) @ v)

    for context in (None, x, y, x.clone(), y[:, :2], x[:, :2], x[:, :]):
        torch.testing.assert_close(attention(x, context), expected(x, x if context is None else context))
    torch.testing.assert_close(attention(y, x), expected(y, x))
    twin = copy.deepcopy(model)  # its own scopes and factors
    with torch.no_grad():
        twin.base_model.model.aurora_mode_approx_shared.aurora_mode_approx_V["default"]["6x5"].zero_()
    torch.testing.assert_close(twin(x), base_output(model, x))
    assert not torch.allclose(model(x), twin(x))
    with Products(twin) as products:
        twin(x)
    assert products.count == 2


def test_compiled_in_one_graph_with_one_product_an_attention():
    found = []

    def backend(graph: torch.fx.GraphModule, inputs):
        calls = [n for n in graph.graph.nodes if n.op == "call_function" and n.target in (operator.matmul, torch.matmul)]
        found.append(sum(n.meta["example_value"].shape[-1] == 4 for n in calls))
        return graph.forward

    model = adapt(Stack(Attention(), Attention()))
    x = torch.randn(2, 3, 6)
    expected = gradients(model, model(x).square().sum())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    torch.testing.assert_close(compiled(x), model(x))
    assert found == [2]
    assert_close(gradients(model, compiled(x).square().sum()), expected)
    assert_nothing_left(model)
    family = FAMILIES["clip"]
    clip = adapt(family.build())
    eager = family.output(clip(**family.inputs()))
    torch._dynamo.reset()
    out = torch.compile(clip, fullgraph=True, backend="eager")(**family.inputs())
    torch.testing.assert_close(family.output(out), eager)


class LargestNew(TorchDispatchMode):
    """The most elements of any tensor that is made, views of what exists apart."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("core", ["cp", "tucker"])
@pytest.mark.parametrize("layer", [lambda: Attention(40, 44), lambda: Fused(40), lambda: Holder8()], ids=["q k v", "fused", "mha"])
def test_training_step_never_makes_a_matrix(layer, core):
    model = adapt(Stack(layer()), core=core, dropout=0.1).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    x = torch.randn(2, 3, 40, requires_grad=True)
    with LargestNew(model) as tensors:
        model(x).square().mean().backward()
        optimizer.step()
    assert tensors.largest < 40 * 40
    with LargestNew(model) as tensors:
        next(iter(model.base_model.matrix_layers("default").values())).get_delta_weight("default")
    assert tensors.largest >= 40 * 40


class Holder8(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(40, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]


# ------------------------------------------------------------------------------------------- algebra outside training


def lora_of_rank(base: nn.Module, targets: list[str], rank: int) -> PeftModel:
    """A LoRA whose updates are slices of a CP tensor of that rank: A is shared, B_n = V diag(c_n)."""
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets))
    factors: dict[tuple[int, ...], Tensor] = {}
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_A") and module.lora_A:
                A, B = module.lora_A["default"].weight, module.lora_B["default"].weight
                pieces = len(B) // A.shape[1]
                shared = factors.setdefault((A.shape[1],), torch.randn(2, rank, A.shape[1]) / A.shape[1] ** 0.5)
                A.copy_(shared[0])
                B.copy_(torch.cat([shared[1].T * torch.randn(rank) for _ in range(pieces)]))
    return model.eval()


@pytest.mark.parametrize(("kind", "r"), [("linear", 3), ("linear", 5), ("Conv1D", 3)])
def test_from_lora_recovers_an_exact_cp(kind, r):
    family = FAMILIES["clip"]
    base, targets = (family.build(), ["q_proj", "k_proj", "v_proj"]) if kind == "linear" else (gpt2(), ["c_attn"])
    inputs = family.inputs() if kind == "linear" else {"input_ids": family.inputs()["input_ids"]}
    output = family.output if kind == "linear" else lambda out: out.logits
    start = output(base(**inputs))
    lora = lora_of_rank(base, targets, 3)
    expected = output(lora(**inputs))
    deltas = {n: m.get_delta_weight("default") for n, m in lora.get_base_model().named_modules() if hasattr(m, "lora_A")}
    if kind == "Conv1D":
        deltas = {n: d.T for n, d in deltas.items()}
    model, errors = AuroraModeApproxModel.from_lora(lora, AuroraModeApproxConfig(r=r))
    assert errors.keys() == deltas.keys()
    assert max(errors.values()) < 1e-3
    for path, delta in deltas.items():
        mine = dense(model, path, [(delta.shape[1],) * 2] * (len(delta) // delta.shape[1])).float()
        assert errors[path] == pytest.approx(float((mine - delta).norm() / delta.norm()), abs=1e-5)
    assert not any("lora" in n for n, _ in model.named_parameters())
    assert distance(start, expected) > 0.1
    torch.testing.assert_close(output(model.eval()(**inputs)), expected, atol=0.02, rtol=0.02)


def test_from_lora_reports_what_it_loses_and_refuses():
    family = FAMILIES["clip"]
    lora = lora_of_rank(family.build(), ["q_proj"], 3)
    deltas = {n: m.get_delta_weight("default") for n, m in lora.get_base_model().named_modules() if hasattr(m, "lora_A")}
    with pytest.raises(ValueError, match="no LoRA adapter 'other'"):
        AuroraModeApproxModel.from_lora(lora, adapter_name="other")
    with pytest.raises(ValueError, match="core='cp'"):
        AuroraModeApproxModel.from_lora(lora, AuroraModeApproxConfig(core="tucker"))
    model, errors = AuroraModeApproxModel.from_lora(lora, AuroraModeApproxConfig(r=1, alpha=7.0))
    for path, delta in deltas.items():
        mine = dense(model, path, [(delta.shape[1],) * 2]).float()
        assert errors[path] == pytest.approx(float((mine - delta).norm() / delta.norm()), rel=1e-4)
    assert max(errors.values()) > 0.1
    convolution = get_peft_model(family.build(), LoraConfig(target_modules=["q_proj", "patch_embedding"]))
    with pytest.raises(ValueError, match="patch_embedding"):  # not dropped in silence
        AuroraModeApproxModel.from_lora(convolution)


def test_inherit_takes_the_weights_factors():
    base = Stack(Attention(12, 10), Attention(12, 10))
    U, V, P = torch.randn(12, 2), torch.randn(10, 2), torch.randn(6, 2)
    with torch.no_grad():
        for row, name in enumerate(f"layers.{i}.{n}_proj" for i in range(2) for n in "qkv"):
            base.get_submodule(name).weight.copy_((V * P[row]) @ U.T)
    x = torch.randn(2, 3, 12)
    before = base(x)
    options = {"r": 2, "stirred": False, "init_weights": "inherit"}
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        found.append(adapt(copy.deepcopy(base), **options))
        assert torch.equal(found[-1](x), before)
    for name, value in adapter(found[0]).items():
        assert torch.equal(value, adapter(found[1])[name]), name
    mine = store(found[0], "U", "12x10").float()
    cosines = F.normalize(mine, dim=0).T @ F.normalize(U, dim=0)
    assert (cosines.abs().amax(0) > 0.9).all()
    torch.manual_seed(1)
    gauss = adapt(copy.deepcopy(base), r=2, stirred=False)
    assert distance(mine, store(gauss, "U", "12x10")) > 0.01


@pytest.mark.parametrize("options", [{"r": 16}, {"share": "none"}, {"r": 1, "target_modules": ["q_proj"]}])
def test_inherit_is_finite(options):
    """A rank above the widths, groups of one matrix, one number in all of P."""
    model = adapt(Stack(Attention()), init_weights="inherit", **{"stirred": False, **options})
    for name, value in adapter(model).items():
        assert value.isfinite().all(), name
        assert "_V." in name or value.abs().max() > 0, name


def test_tensorly_backend_is_left_alone():
    def everything():
        model = adapt(Stack(Attention()), init_weights="inherit")
        model.merge_adapter()
        model.unmerge_adapter()
        AuroraModeApproxModel.from_lora(lora_of_rank(Stack(Attention(6, 6)), ["q_proj"], 2), AuroraModeApproxConfig(r=2))
        adapt(Stack(Attention()), core="tucker").merge_and_unload()

    def in_thread(work):
        seen, errors = [], []

        def run():
            try:
                seen.append(work())
            except Exception as error:  # noqa: BLE001
                errors.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not errors
        return seen[0]

    def own_backend():
        tensorly.set_backend("pytorch", local_threadsafe=True)
        everything()
        return tensorly.get_backend()

    assert tensorly.get_backend() == "numpy"
    everything()
    assert tensorly.get_backend() == "numpy"
    assert in_thread(tensorly.get_backend) == "numpy"
    in_thread(everything)
    assert in_thread(tensorly.get_backend) == "numpy"
    assert in_thread(own_backend) == "pytorch"  # a thread's own choice stays, and stays its own
    assert tensorly.get_backend() == "numpy"
    assert in_thread(tensorly.get_backend) == "numpy"


def test_add_weighted_adapter_is_the_exact_sum():
    family = FAMILIES["blip_retrieval"]
    model = adapt(family.build(), alpha=6.0)
    model.add_adapter("other", AuroraModeApproxConfig(r=3, dropout=0.0))
    stir(model, "other", seed=1)
    assert model.active_adapters == ["default"]
    model.base_model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "sum")
    assert model.active_adapters == ["default"]
    by_hand = family.build()
    with torch.no_grad():
        for path, module in by_hand.named_modules():
            shapes = {"qkv": [(48, 48)] * 3, "query": [(32, 32)]}.get(path.rpartition(".")[2])
            if path.endswith(("key", "value")):
                shapes = [(48 if "cross" in path else 32, 32)]
            if shapes:
                parts = (0.7 * dense(model, path, shapes, 1.5), -1.3 * dense(model, path, shapes, 1.0, "other"))
                module.weight += sum(parts).float()
                delta = model.base_model.model.get_submodule(path).get_delta_weight("sum")
                torch.testing.assert_close(delta, sum(parts).float())
    expected = family.output(by_hand(**family.inputs()))
    model.set_adapter("sum")
    torch.testing.assert_close(family.output(model(**family.inputs())), expected, atol=1e-4, rtol=1e-4)
    assert distance(expected, base_output_of(family, model)) > 1e-2


def base_output_of(family, model: PeftModel) -> Tensor:
    with model.disable_adapter():
        return family.output(model(**family.inputs()))


def test_add_weighted_adapter_refuses_what_is_no_sum():
    model = adapt(FAMILIES["blip_retrieval"].build())
    others = {"gqt": {"use_gqt": True}, "ice": {"use_ice": True}, "tucker": {"core": "tucker"}, "alone": {"share": "none"}}
    others |= {"vision": {"towers": ["vision"]}}
    for name, options in others.items():
        model.add_adapter(name, AuroraModeApproxConfig(r=4, **options))
        with pytest.raises(ValueError, match="Only CP adapters"):
            model.base_model.add_weighted_adapter(["default", name], [1.0, 1.0], "sum")
    for adapters, weights, name in (([], [], "sum"), (["default"], [1.0, 2.0], "sum"), (["default"], [1.0], "gqt"), (["nobody"], [1.0], "sum")):
        with pytest.raises(ValueError, match="nobody|as many weights"):
            model.base_model.add_weighted_adapter(adapters, weights, name)
    assert "sum" not in model.peft_config


# ------------------------------------------------------------------------------------------- gated query transformation


def captured(module: nn.Module, calls: list[Tensor]) -> None:
    module.register_forward_hook(lambda m, a, out: calls.append(out[0] if isinstance(out, tuple) else out))


@pytest.mark.parametrize("branches", [["query"], ["query", "cross"], ["cross"]])
def test_gqt_is_the_equation(branches):
    family = FAMILIES["blip_retrieval"]
    model = adapt(family.build(), stirred=False, use_gqt=True, gqt_branches=branches).eval()
    assert torch.equal(family.output(model(**family.inputs())), family.output(family.build()(**family.inputs())))
    assert model.get_nb_trainable_parameters()[0] == count(BLIP_GROUPS["per_shape"], 4) + 2 * len(branches) * (2 * 32 + 1)
    stir(model)
    layer = model.base_model.model.get_submodule(TEXT)
    q, x, y, out = [], [], [], []
    for module, calls in ((layer.attention, q), (layer.crossattention, x), (layer.output, y), (layer, out)):
        captured(module, calls)
    model(**family.inputs())
    expected = y[0].double()
    p = {n: v.double() for n, v in layer.aurora_mode_approx_gqt.aurora_mode_approx_gqt["default"].items()}
    for branch, kept in (("query", q[0]), ("cross", x[0])):
        if branch in branches:
            gate, scale, shift = (p[f"{branch}_{n}_norm"] for n in ("gate", "scale", "shift"))
            for b, t, c in [(b, t, c) for b in range(len(kept)) for t in range(kept.shape[1]) for c in range(32)]:
                expected[b, t, c] += math.tanh(gate) * ((1 + scale[c]) * kept[b, t, c] + shift[c])
    torch.testing.assert_close(out[0], expected.float())
    assert distance(out[0], y[0]) > 0.05
    # Text alone is not fused: a layer gives what its own output block gives.
    model(**family.inputs(), use_itm_head=False)
    assert torch.equal(out[1], y[1])


def test_gqt_forgets_an_interrupted_call():
    def interrupt(*_):
        raise KeyboardInterrupt

    family = FAMILIES["blip_retrieval"]
    model = adapt(family.build(), use_gqt=True)
    layer = model.base_model.model.get_submodule(TEXT)
    expected = model(**family.inputs(), use_itm_head=False).itm_score
    hook = layer.output.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(**family.inputs())
    hook.remove()
    assert torch.equal(model(**family.inputs(), use_itm_head=False).itm_score, expected)
    assert_nothing_left(model)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["blip_vqa", "blip_captioning"])
def test_gqt_decodes_alike_with_and_without_cache(name, beams):
    family = FAMILIES[name]
    options = {"use_gqt": True, "gqt_branches": ["query", "cross"], "use_ice": name == "blip_vqa", "ice_bank_size": 4}
    model = adapt(family.build(), stirred=False, **options)
    layers = {n for n in adapter(model) if "query_gate" in n}
    assert len(layers) == (4 if name == "blip_vqa" else 2)  # question encoder and decoder
    if name == "blip_vqa":
        model.collect_context([family.text_inputs()])
    stir(model)
    call = {"max_new_tokens": 6, "num_beams": beams, "output_logits": True, "return_dict_in_generate": True}
    call |= {"do_sample": False, "min_new_tokens": 6}
    cached, uncached = (model.generate(**family.generate_inputs(), use_cache=c, **call) for c in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    for a, b in zip(cached.logits, uncached.logits, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for n, p in adapter(model).items():
            if "gate" in n or "gamma" in n:
                p.zero_()
    ungated = model.generate(**family.generate_inputs(), **call)
    assert distance(ungated.logits[0], cached.logits[0]) > 1e-2


@pytest.mark.parametrize(("name", "layers"), [("blip_2", 1), ("bridgetower", 4), ("florence2", 2)])
def test_gqt_in_other_fusion_encoders(name, layers):
    family = FAMILIES[name]
    model = adapt(family.build(), stirred=False, use_gqt=True, gqt_branches=["query", "cross"])
    inputs = family.inputs()
    assert torch.equal(family.output(model(**inputs)), family.output(family.build()(**inputs)))
    gates = [p for n, p in adapter(model).items() if "query_gate" in n]
    assert len(gates) == layers
    before = family.output(model(**inputs))
    with torch.no_grad():
        for gate in gates:
            gate.fill_(1.0)
    assert distance(family.output(model(**inputs)), before) > 1e-3


def test_gqt_in_a_q_former_that_reads_text_and_queries():
    """Its cross-attention sees the queries alone: only they are transformed, and text-only calls are unchanged."""
    vision = hf.Blip2VisionConfig(**vision_tower(48))
    qformer = {"encoder_hidden_size": 48, "use_qformer_text_input": True, "max_position_embeddings": 64}
    text = hf.OPTConfig(**text_tower(40), ffn_dim=80, word_embed_proj_dim=40)
    qformer = hf.Blip2QFormerConfig(**text_tower(32), **{k: v for k, v in qformer.items() if k != "max_position_embeddings"})
    config = hf.Blip2Config(vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=3)
    base = tiny(hf.Blip2ForImageTextRetrieval, config)()
    inputs = pairs()()
    call = {**inputs, "use_image_text_matching_head": True}
    model = adapt(base, stirred=False, use_gqt=True, gqt_branches=["query", "cross"])
    path = next(n.rpartition(".aurora_mode_approx_gqt.")[0] for n, _ in model.named_parameters() if "query_gate" in n)
    layer = model.get_submodule(path.removesuffix(".aurora_mode_approx_gqt"))
    out: list[Tensor] = []
    captured(layer, out)
    before = model(**call).logits_per_image
    gates = [p for n, p in adapter(model).items() if "gate" in n]
    with torch.no_grad():
        [g.fill_(1.0) for g in gates]
    assert distance(model(**call).logits_per_image, before) > 1e-3
    assert out[0].shape == out[1].shape
    assert distance(out[0][:, :3], out[1][:, :3]) > 1e-3
    assert torch.equal(out[0][:, 3:], out[1][:, 3:])  # text tokens had no cross-attention


@pytest.mark.parametrize("reentrant", [True, False])
def test_gqt_gradients_survive_checkpointing(reentrant):
    family = FAMILIES["blip_retrieval"]
    model = adapt(family.build(), use_gqt=True, gqt_branches=["query", "cross"]).train()
    expected = gradients(model, family.loss(model))
    assert all(g.abs().max() > 0 for g in expected.values())
    for embeddings in ("vision_model.embeddings", "text_encoder.embeddings"):
        module = model.get_base_model().get_submodule(embeddings)
        module.register_forward_hook(lambda m, a, out: out.requires_grad_())
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    assert_close(gradients(model, family.loss(model)), expected, atol=1e-5, rtol=1e-4)
    assert_nothing_left(model)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_all_parts_against_finite_differences(checkpointing):
    """d loss / d theta along random directions, through CP, GQT (q reaches the layers below) and ICE together."""
    family = FAMILIES["blip_retrieval"]
    model = adapt(family.build(), stirred=False, use_gqt=True, gqt_branches=["query", "cross"], use_ice=True, ice_bank_size=4)
    model.collect_context([family.text_inputs()])
    stir(model).double()
    inputs = family.inputs()
    inputs["pixel_values"] = inputs["pixel_values"].double()

    def loss() -> Tensor:
        return model(**inputs).itm_score.square().sum()

    if checkpointing:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(model, loss())
    for name, parameter in adapter(model).items():
        direction = torch.randn_like(parameter)
        with torch.no_grad():
            ends = []
            for step in (1e-5, -2e-5):
                parameter += step * direction
                ends.append(loss())
            parameter += 1e-5 * direction
        slope = float((ends[0] - ends[1]) / 2e-5)
        assert float((found[name] * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("name", ["clip", "flava", "vilt", "llava"])
def test_fusion_parts_need_a_fusion_encoder(name):
    for option in ("use_gqt", "use_ice"):
        with pytest.raises(ValueError, match=rf"{option}=True needs .*fusion encoder"):
            adapt(FAMILIES[name].build(), **{option: True})


# ------------------------------------------------------------------------------------- informative context enhancement


def with_bank(size: int = 8, **options) -> tuple[PeftModel, ContextBank]:
    model = adapt(FAMILIES["blip_retrieval"].build(), stirred=False, use_ice=True, ice_bank_size=size, **options).eval()
    return model, model.base_model.model.text_encoder.aurora_mode_approx_ice.aurora_mode_approx_ice["default"]


@given(st.integers(1, 6), st.lists(st.integers(1, 8), max_size=6))
@settings(deadline=None)
def test_bank_holds_the_latest(size, pushes):
    bank, pushed = ContextBank(size, 2), []
    for number in pushes:
        features = torch.arange(len(pushed), len(pushed) + number).float()[:, None].expand(number, 2) + 1
        pushed += features[:, 0].tolist()
        bank.push(features)
    kept = bank.texts[: int(bank.count), 0].tolist()
    assert sorted(kept) == pushed[-size:]
    assert not bank.texts[int(bank.count) :].any()


def test_ice_is_the_equation():
    family = FAMILIES["blip_retrieval"]
    model, bank = with_bank()
    start = family.output(family.build()(**family.inputs()))
    with torch.no_grad():
        bank.gamma_norm.fill_(0.7)
    assert torch.equal(family.output(model(**family.inputs())), start)  # the bank is empty
    bank.push(torch.randn(5, 32))
    fused: list[Tensor] = []
    captured_state(model, fused)
    model(**family.inputs())
    with torch.no_grad():
        bank.gamma_norm.zero_()
    assert torch.equal(family.output(model(**family.inputs())), start)
    expected, T = fused[1].double().clone(), bank.texts[:5].double()
    for b in range(len(expected)):
        for t in range(expected.shape[1]):
            scores = [math.exp(float(fused[1][b, t].double() @ text) / math.sqrt(32)) for text in T]
            for score, text in zip(scores, T, strict=True):
                expected[b, t] += 0.7 * score / sum(scores) * text
    torch.testing.assert_close(fused[0], expected.float())
    assert distance(*fused) > 0.05


def captured_state(model: PeftModel, calls: list[Tensor]) -> None:
    model.base_model.model.text_encoder.register_forward_hook(lambda m, a, out: calls.append(out.last_hidden_state))


def test_ice_scores_a_pair_alike_whoever_shares_its_batch(tmp_path):
    family = FAMILIES["blip_retrieval"]
    model, bank = with_bank(size=4, use_gqt=True)
    bank.push(torch.randn(3, 32))
    stir(model)
    inputs = family.inputs()
    together = family.output(model(**inputs))
    for i in range(3):
        alone = family.output(model(**{k: v[i : i + 1] for k, v in inputs.items()}))
        torch.testing.assert_close(alone[0], together[i], atol=1e-5, rtol=1e-5)
    order = torch.tensor([2, 0, 1])  # texts beside other pictures: every pair reads the same bank
    crossed = family.output(model(**{**inputs, "pixel_values": inputs["pixel_values"][order]}))
    twice = {k: torch.cat([v, v]) for k, v in inputs.items()}
    twice["pixel_values"] = torch.cat([inputs["pixel_values"], inputs["pixel_values"][order]])
    torch.testing.assert_close(family.output(model(**twice)), torch.cat([together, crossed]), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(family.build(), tmp_path)
    assert torch.equal(family.output(again(**inputs)), together)
    loaded = again.base_model.model.text_encoder.aurora_mode_approx_ice.aurora_mode_approx_ice["default"]
    assert torch.equal(loaded.texts, bank.texts)
    assert int(loaded.count) == 3


def test_ice_bank_is_filled_by_text_alone_in_training():
    family = FAMILIES["blip_retrieval"]
    model, bank = with_bank(size=8)
    assert {n for n, p in bank.named_parameters() if p.requires_grad} == {"gamma_norm"}
    texts: list[Tensor] = []
    captured_state(model, texts)
    for mode, fused, expected in ((False, False, 0), (False, True, 0), (True, True, 0), (True, False, 3), (True, False, 6)):
        model.train(mode)
        model(**family.inputs(), use_itm_head=fused)
        assert int(bank.count) == expected
    assert torch.equal(bank.texts[:3], texts[-1][:, 0])
    assert not bank.texts.requires_grad
    with model.disable_adapter():
        model(**family.inputs(), use_itm_head=False)
    assert int(bank.count) == 6
    gradients(model, model(**family.inputs()).itm_score.sum())
    assert bank.texts.grad is None
    for mode in (False, True):  # each text goes in once
        model.train(mode)
        bank.count.zero_()
        bank.texts.zero_()
        assert model.base_model.collect_context([family.text_inputs()]) == 3
        assert torch.equal(bank.texts[:3], texts[-1][:, 0])
        assert not bank.texts[3:].any()


def test_collect_context_needs_ice():
    with pytest.raises(ValueError, match="use_ice=True"):
        adapt(FAMILIES["blip_retrieval"].build()).base_model.collect_context([FAMILIES["blip_retrieval"].text_inputs()])


# ------------------------------------------------------------------------------------------- merging beside GQT and ICE


@pytest.mark.parametrize("options", [{"use_gqt": True}, {"use_ice": True}, {"use_gqt": True, "use_ice": True}])
def test_merge_is_refused_or_of_the_cp_part_alone(options):
    family = FAMILIES["blip_retrieval"]
    model = adapt(family.build(), stirred=False, **options)
    if "use_ice" in options:
        model.collect_context([family.text_inputs()])
    stir(model)
    inputs, before = family.inputs(), {k: v.clone() for k, v in model.state_dict().items()}
    acting = family.output(model(**inputs))
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="no weight updates.*cp_only=True"):
            merge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.merge_adapter(cp_only=True)
    merged = model.base_model.model.get_submodule(f"{TEXT}.crossattention.self.key").get_base_layer().weight
    update = dense(model, f"{TEXT}.crossattention.self.key", [(48, 32)])
    key = f"base_model.model.{TEXT}.crossattention.self.key.base_layer.weight"
    torch.testing.assert_close(merged.double(), before[key].double() + update, atol=1e-6, rtol=0)
    torch.testing.assert_close(family.output(model(**inputs)), acting, atol=1e-4, rtol=1e-4)  # GQT and ICE go on
    model.unmerge_adapter()
    torch.testing.assert_close(family.output(model(**inputs)), acting, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        for n, p in adapter(model).items():
            if "gate" in n or "gamma" in n:
                p.zero_()
    cp_alone = family.output(model(**inputs))
    assert distance(cp_alone, acting) > 1e-3
    bare = model.merge_and_unload(cp_only=True)
    assert type(bare) is type(family.build())
    assert not any("aurora" in n for n, _ in bare.named_modules())
    torch.testing.assert_close(family.output(bare(**inputs)), cp_alone, atol=1e-4, rtol=1e-4)
