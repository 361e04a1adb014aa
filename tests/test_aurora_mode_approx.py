"""AuroraModeApprox against slow oracles: the CP algebra, what is shared in a call, GQT and ICE, parameter counts."""

from __future__ import annotations

import copy
import math
import operator
import threading

import pytest
import tensorly
import torch
import torch.nn.functional as F
import transformers as hf
from families import FAMILIES, VOCAB, pairs, text_tower, tiny, tower, vision_tower, wake
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import adapter, distance, stir
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_multimodal import AuroraModeApproxConfig, AuroraModeApproxModel
from peft_multimodal.methods.aurora_fusion import ContextBank
from peft_multimodal.tuner import CallScope

BLIP = FAMILIES["blip_retrieval"]  # vision 48 wide, text 32; two layers each
close = torch.testing.assert_close


def adapt(base: nn.Module, *, stirred: bool = True, **config) -> PeftModel:
    model = get_peft_model(base, AuroraModeApproxConfig(**{"r": 4, "dropout": 0.0, **config}))
    return stir(model) if stirred else model


def factor(model: PeftModel, part: str, group: str, name: str = "default") -> nn.Parameter:
    """U, V, lambda_norm or core of a group."""
    return getattr(model.base_model.model.aurora_mode_approx_shared, f"aurora_mode_approx_{part}")[name][group]


def slices(model: PeftModel, path: str, shapes: list[tuple[int, int]], s: float = 1, name: str = "default") -> list[Tensor]:
    """s sum_r lambda_r P_nr v_r u_r^T of each matrix (d_in, d_out) of a module, in float64."""
    P = model.get_submodule(f"base_model.model.{path}").aurora_mode_approx_P_norm[name].detach().double()
    updates = []
    for row, (d_in, d_out) in zip(P, shapes, strict=True):
        U, V, lam = (factor(model, p, f"{d_in}x{d_out}", name).detach().double() for p in ("U", "V", "lambda_norm"))
        assert (U.shape, V.shape) == ((d_in, len(lam)), (d_out, len(lam)))
        updates.append(torch.zeros(d_out, d_in, dtype=torch.float64))
        for r in range(len(lam)):
            updates[-1] += s * lam[r] * row[r] * torch.outer(V[:, r], U[:, r])
    return updates


def dense(*args, **kwargs) -> Tensor:
    return torch.cat(slices(*args, **kwargs))


def base_output(model: PeftModel, *args) -> Tensor:
    with model.disable_adapter():
        return model(*args)


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


class Fused(Attention):
    def __init__(self, d: int) -> None:
        nn.Module.__init__(self)
        self.qkv, self.out_proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.out_proj((q @ k.mT).softmax(-1) @ v)


class Multihead(nn.Module):
    def __init__(self, d: int = 8, **options) -> None:
        super().__init__()
        self.attn = wake(nn.MultiheadAttention(d, 2, **options))

    def forward(self, *inputs: Tensor, **options):
        return self.attn(*inputs, **options) if len(inputs) == 3 else self.attn(*inputs * 3, need_weights=False)[0]


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Products(TorchDispatchMode):
    """Counts the matrix products x U (R = 4)."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        factors = model.base_model.model.aurora_mode_approx_shared.aurora_mode_approx_U["default"]
        self.pointers, self.count = {U.data_ptr() for U in factors.values()}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name.partition("::")[2] in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"):
            reads_U = any(isinstance(a, Tensor) and a.data_ptr() in self.pointers for a in args)
            self.count += reads_U and out.shape[-1] == 4
        return out


def assert_nothing_left(model: nn.Module) -> None:
    scopes = [v for m in model.modules() for v in vars(m).values() if isinstance(v, CallScope)]
    assert scopes
    for scope in scopes:
        assert (scope.is_open, scope.seen, scope.values) == (False, None, {})


def gradients(model: PeftModel, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in adapter(model).items()}


def checkpoint(model: PeftModel, reentrant: bool, *embeddings: str) -> None:
    """transformers' own hook makes a leaf that BLIP's embeddings add to in place; so take the embeddings' outputs."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.get_base_model().disable_input_require_grads()
    for path in embeddings:
        model.get_base_model().get_submodule(path).register_forward_hook(lambda m, a, out: out.requires_grad_())


# ---------------------------------------------------------------------------------------------------- the CP algebra


def gpt2() -> hf.PreTrainedModel:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
    return tiny(hf.GPT2LMHeadModel, hf.GPT2Config(**sizes, add_cross_attention=True))()


def phi3() -> hf.PreTrainedModel:
    return tiny(hf.Phi3ForCausalLM, hf.Phi3Config(**text_tower(32, num_key_value_heads=2)))()


TEXT = "text_encoder.encoder.layer.1"
PLACES = {
    "linear": (FAMILIES["clip"].build, "text_model.encoder.layers.1.self_attn.k_proj", [(32, 32)]),
    "cross key": (BLIP.build, f"{TEXT}.crossattention.self.key", [(48, 32)]),
    "fused": (BLIP.build, "vision_model.encoder.layers.0.self_attn.qkv", [(48, 48)] * 3),
    "fused Conv1D": (gpt2, "transformer.h.0.attn.c_attn", [(32, 32)] * 3),
    "fused Conv1D, k and v": (gpt2, "transformer.h.0.crossattention.c_attn", [(32, 32)] * 2),
    "fused, grouped queries": (phi3, "model.layers.0.self_attn.qkv_proj", [(32, 32), (32, 16), (32, 16)]),
}


@pytest.mark.parametrize("place", PLACES)
def test_update_is_a_sum_of_outer_products(place):
    build, path, shapes = PLACES[place]
    model = adapt(build(), alpha=6.0)  # s = 6 / 4
    layer = model.base_model.model.get_submodule(path)
    base, update = layer.get_base_layer(), dense(model, path, shapes, s=1.5)
    weight = lambda: (base.weight.detach().T if "Conv1D" in place else base.weight.detach()).double()  # noqa: E731
    W, x = weight().clone(), torch.randn(2, 3, shapes[0][0])
    expected = F.linear(x.double(), W + update, None if base.bias is None else base.bias.double()).float()
    assert distance(expected, base(x)) > 0.1
    close(layer.get_delta_weight("default"), update.float())
    close(layer(x), expected, atol=1e-5, rtol=1e-5)
    model.merge_adapter(safe_merge=True)
    close(weight(), W + update, atol=1e-6, rtol=0)
    close(layer(x), expected, atol=1e-5, rtol=1e-5)
    model.unmerge_adapter()
    close(weight(), W, atol=1e-6, rtol=0)


def test_tucker_core_is_the_triple_sum():
    model = adapt(Stack(Attention(), Attention()), core="tucker", alpha=2.0)
    U, V, C = (factor(model, part, "6x5").detach().double() for part in ("U", "V", "core"))
    layer = model.base_model.model.layers[1].v_proj
    (c,) = layer.aurora_mode_approx_P_norm["default"].detach().double()
    G = torch.zeros(4, 4, dtype=torch.float64)
    for i in range(4):
        for j in range(4):
            for k in range(4):
                G[i, j] += C[i, j, k] * c[k]
    update, x = (0.5 * V @ G.T @ U.T).float(), torch.randn(2, 6)
    close(layer.get_delta_weight("default"), update)
    close(layer(x), F.linear(x, layer.base_layer.weight + update, layer.base_layer.bias))


def count(groups: list[tuple[int, int, int]], r: int = 4) -> int:
    """(d_in + d_out) R + N R + R a group (d_in, d_out, N)."""
    return sum((d_in + d_out + n + 1) * r for d_in, d_out, n in groups)


SHARES = {
    "per_shape": [(48, 48, 6), (32, 32, 8), (48, 32, 4)],  # vision; text q, k, v and cross q; cross k, v
    "per_modality": [(48, 48, 6), (32, 32, 6), (32, 32, 2), (48, 32, 4)],
    "none": [(48, 48, 1)] * 6 + [(32, 32, 1)] * 8 + [(48, 32, 1)] * 4,
    "global": [(48, 48, 6)],
}


@pytest.mark.parametrize("share", SHARES)
def test_share(share):
    towers, modules = (["vision"], 2) if share == "global" else (None, 14)
    model = adapt(BLIP.build(), share=share, towers=towers)
    for part, sizes in (("U", (0,)), ("V", (1,)), ("lambda_norm", ())):
        store = getattr(model.base_model.model.aurora_mode_approx_shared, f"aurora_mode_approx_{part}")["default"]
        expected = sorted((*(g[i] for i in sizes), 4) for g in SHARES[share])
        assert sorted(tuple(p.shape) for p in store.values()) == expected, part
    assert model.get_nb_trainable_parameters()[0] == count(SHARES[share])
    assert len({p.data_ptr() for p in adapter(model).values()}) == 3 * len(SHARES[share]) + modules  # a P each
    assert distance(BLIP.output(model(**BLIP.inputs())), BLIP.output(BLIP.build()(**BLIP.inputs()))) > 1e-3
    tucker = adapt(BLIP.build(), share=share, towers=towers, core="tucker")  # R^3 for R
    assert tucker.get_nb_trainable_parameters()[0] == count(SHARES[share]) + len(SHARES[share]) * (4**3 - 4)
    if share == "global":
        with pytest.raises(ValueError, match="share='global'.*32.*48"):
            adapt(BLIP.build(), share="global")


def test_counts_at_full_size():
    with torch.device("meta"):
        blip, clip = hf.BlipForImageTextRetrieval(hf.BlipConfig()), hf.CLIPModel(hf.CLIPConfig())
    model = get_peft_model(blip, AuroraModeApproxConfig(r=64), low_cpu_mem_usage=True)
    assert sum(len(p) for n, p in adapter(model).items() if "P_norm" in n) == 108
    assert model.get_nb_trainable_parameters()[0] == 105_280 == count([(768, 768, 108)], 64)
    targets = ["q_proj", "k_proj", "v_proj", "out_proj"]
    model = get_peft_model(clip, AuroraModeApproxConfig(r=64, target_modules=targets), low_cpu_mem_usage=True)
    assert sum(len(p) for n, p in adapter(model).items() if "P_norm" in n) == 96
    assert model.get_nb_trainable_parameters()[0] == 170_112 == count([(768, 768, 48), (512, 512, 48)], 64)


def test_dropout_is_of_training_and_unbiased():
    model = adapt(Stack(Attention()), dropout=0.3).train()
    layer, x = model.base_model.model.layers[0].q_proj, torch.randn(6)
    exact = dense(model, "layers.0.q_proj", [(6, 5)]).float() @ x
    drawn = layer(x.expand(40_000, 6)) - layer.base_layer(x)
    assert ((drawn.mean(0) - exact).abs() < 5 * drawn.std(0) / 200).all()
    assert len(drawn.detach().round(decimals=4).unique(dim=0)) == 2**4  # entries of x U are dropped, R = 4
    model.eval()
    close(layer(x.expand(9, 6)) - layer.base_layer(x), exact.expand(9, 5))


@pytest.mark.parametrize("core", ["cp", "tucker"])
def test_gradients_against_finite_differences(core):
    model = adapt(Stack(Attention(4, 3)), r=2, alpha=3.0, core=core).double()
    names, values = zip(*adapter(model).items(), strict=True)
    assert len(names) == 3 + 3
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)

    def output(x: Tensor, *tensors: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (x,))

    assert torch.autograd.gradcheck(output, (x, *values))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_base_of_another_dtype(dtype):
    x = torch.randn(2, 3, 6, dtype=dtype)
    model = adapt(Stack(Attention()).to(dtype), stirred=False)
    assert torch.equal(model(x), base_output(model, x))
    assert stir(model)(x).dtype == dtype
    layer, exact = model.base_model.model.layers[0].q_proj, dense(model, "layers.0.q_proj", [(6, 5)])
    close((layer(x) - layer.base_layer(x)).double(), x.double() @ exact.T, atol=0.05, rtol=0.05)
    if dtype == torch.float64:
        close(layer.get_delta_weight("default"), exact, atol=1e-12, rtol=1e-12)


def test_first_gradient_is_that_of_V_and_the_gates():
    model = adapt(BLIP.build(), stirred=False, use_gqt=True, use_ice=True)
    model.collect_context([BLIP.text_inputs()])
    moved = {n for n, g in gradients(model, BLIP.loss(model)).items() if g.abs().max() > 0}
    assert moved == {n for n in adapter(model) if "_V." in n or "query_gate" in n or "gamma" in n}
    assert len(moved) == 3 + 2 + 1


# ---------------------------------------------------------------------------------------------- nn.MultiheadAttention


def merged_by_hand(model: PeftModel, widths: tuple[int, int, int] = (8, 8, 8)) -> nn.MultiheadAttention:
    attn = copy.deepcopy(model.base_model.model.attn.get_base_layer()).eval()
    separate = (attn.q_proj_weight, attn.k_proj_weight, attn.v_proj_weight)
    weights = separate if attn.in_proj_weight is None else attn.in_proj_weight.data.chunk(3)
    for W, update in zip(weights, slices(model, "attn", [(d, 8) for d in widths]), strict=True):
        W.data += update.float()
    return attn


MASKS = (  # (B, Lq, Lk) -> attn_mask
    lambda b, q, k: None,
    lambda b, q, k: torch.rand(q, k) < 0.3,
    lambda b, q, k: torch.randn(q, k),
    lambda b, q, k: torch.rand(2 * b, q, k) < 0.3,
    lambda b, q, k: torch.randn(2 * b, q, k).masked_fill(torch.rand(2 * b, q, k) < 0.2, -torch.inf),
)


@pytest.mark.filterwarnings("ignore:Support for mismatched")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", ["self", "cross", "one query", "other widths", "no bias"])
def test_multihead_attention(kind, batch_first):
    widths = (8, 6, 10) if kind == "other widths" else (8, 8, 8)
    options = {"kdim": widths[1], "vdim": widths[2], "bias": kind != "no bias", "batch_first": batch_first}
    model = adapt(Multihead(**options)).eval()
    by_hand, b, lk = merged_by_hand(model, widths), 3, 5
    lq = {"self": 5, "one query": 1}.get(kind, 4)
    inputs = tuple(torch.randn(b, n, d) for n, d in zip((lq, lk, lk), widths, strict=True))
    inputs = (inputs[0],) * 3 if kind == "self" else inputs
    inputs = inputs if batch_first else tuple(t.transpose(0, 1) for t in inputs)
    padding = torch.arange(lk) >= torch.tensor([5, 2, 4])[:, None]
    for mask in MASKS:
        attn_mask = mask(b, lq, lk)
        if attn_mask is not None:
            attn_mask[..., 0] = 0  # every query sees something
        for key_padding_mask in (None, padding, torch.zeros(b, lk).masked_fill(padding, -torch.inf)):
            for weights in ({"need_weights": False}, {}, {"average_attn_weights": False}):
                call = {"attn_mask": attn_mask, "key_padding_mask": key_padding_mask, **weights}
                close(model(*inputs, **call), by_hand(*inputs, **call))
    assert distance(model(*inputs)[0], base_output(model, *inputs)[0]) > 1e-2


def test_multihead_attention_causal_and_unbatched():
    model = adapt(Multihead()).eval()
    x, causal = torch.randn(5, 2, 8), torch.ones(5, 5, dtype=torch.bool).triu(1)
    call = {"attn_mask": causal, "is_causal": True, "need_weights": False}
    close(model(x, x, x, **call), merged_by_hand(model)(x, x, x, **call))
    x = x[:, 0]
    close(model(x, x, x), merged_by_hand(model)(x, x, x))


# ----------------------------------------------------------------------------------------------- one product x U a call


def test_one_product_per_input():
    """Self-attentions need one, cross-attentions two (the text's and the picture's), fused ones one."""
    clip = FAMILIES["clip"]
    for family, share, expected in ((clip, "per_shape", 2 + 2), (BLIP, "per_shape", 2 + 2 + 4), (clip, "none", 12)):
        model = adapt(family.build(), share=share)
        with Products(model) as products:
            model(**family.inputs())
        assert products.count == expected
        assert_nothing_left(model)


@pytest.mark.parametrize(("inputs", "expected"), [("xxx", 1), ("xyy", 2), ("xyz", 3)])
def test_multihead_attention_shares_products_too(inputs, expected):
    model, tensors = adapt(Multihead()), {name: torch.randn(3, 2, 8) for name in "xyz"}
    with Products(model) as products:
        model(*(tensors[i] for i in inputs))
    assert products.count == expected


@pytest.mark.parametrize("reentrant", [True, False])
def test_one_product_in_a_recomputation(reentrant):
    family = FAMILIES["clip"]
    model = adapt(family.build()).train()
    expected = gradients(model, family.loss(model))
    checkpoint(model, reentrant, "vision_model.embeddings", "text_model.embeddings")
    with Products(model) as products:
        loss = family.loss(model)
        assert products.count == 2 + 2
        close(gradients(model, loss), expected)
    assert products.count == 2 * (2 + 2)
    assert_nothing_left(model)


def test_threads_do_not_meet():
    model = adapt(Stack(Attention(), Attention()))
    inputs = [torch.randn(2, 3 + i, 6) for i in range(4)]
    U = factor(model, "U", "6x5")
    step = lambda x: (model(x), torch.autograd.grad(model(x).square().sum(), U)[0])  # noqa: E731
    expected, results = [step(x) for x in inputs], {}
    between = threading.Barrier(len(inputs), timeout=20)
    for layer in model.base_model.model.layers:  # all threads stand between q and k at once
        layer.k_proj.register_forward_pre_hook(lambda *_: [between.wait()] and None)

    def work(i: int) -> None:
        with Products(model) as products:
            results[i] = step(inputs[i])
        assert products.count == 2 * 2
        assert_nothing_left(model)
        results[i] += ("done",)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    for i, (out, gradient) in enumerate(expected):
        close(results[i], (out, gradient, "done"))
    assert_nothing_left(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_outlives_an_interrupted_call(error):
    def interrupt(*_):
        raise error

    model, x = adapt(Stack(Attention())), torch.randn(2, 3, 6)
    layer = model.base_model.model.layers[0]
    hook = layer.v_proj.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        model(x)
    hook.remove()
    factor(model, "U", "6x5").data.mul_(3)
    close(model(x), model(x.clone()))  # the same x, other factors: no product of the call that was cut off
    assert_nothing_left(model)
    blip = adapt(BLIP.build(), use_gqt=True)  # text alone after a picture that was cut off
    expected = blip(**BLIP.inputs(), use_itm_head=False).itm_score
    hook = blip.base_model.model.get_submodule(TEXT).output.register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        blip(**BLIP.inputs())
    hook.remove()
    assert torch.equal(blip(**BLIP.inputs(), use_itm_head=False).itm_score, expected)
    assert_nothing_left(blip)


def test_shared_products_keep_inputs_and_copies_apart():
    model = adapt(Stack(Attention(), Attention()))
    attention = model.base_model.model.layers[0]
    x, y = torch.randn(2, 2, 3, 6)
    for context in (None, x, y, x.clone(), y[:, :2], x[:, :2], x[:, :]):
        parts = []
        for name in ("q_proj", "k_proj", "v_proj"):
            base, update = getattr(attention, name).base_layer, dense(model, f"layers.0.{name}", [(6, 5)]).float()
            parts.append(F.linear(x if name == "q_proj" or context is None else context, base.weight + update, base.bias))
        q, k, v = parts
        close(attention(x, context), attention.out_proj((q @ k.mT).softmax(-1) @ v))
    twin = copy.deepcopy(model)  # has its own scopes and factors
    factor(twin, "V", "6x5").data.zero_()
    with Products(twin) as products:
        close(twin(x), base_output(model, x))
    assert products.count == 2
    assert distance(model(x), twin(x)) > 1e-2


def test_compiled_in_one_graph_with_one_product_an_attention():
    found = []

    def backend(graph: torch.fx.GraphModule, inputs):
        calls = [n for n in graph.graph.nodes if n.op == "call_function" and n.target in (operator.matmul, torch.matmul)]
        found.append(sum(n.meta["example_value"].shape[-1] == 4 for n in calls))
        return graph.forward

    model, x = adapt(Stack(Attention(), Attention())), torch.randn(2, 3, 6)
    expected = gradients(model, model(x).square().sum())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    close(compiled(x), model(x))
    assert found == [2]
    close(gradients(model, compiled(x).square().sum()), expected)
    assert_nothing_left(model)
    clip = adapt(FAMILIES["clip"].build())
    eager = clip(**FAMILIES["clip"].inputs()).logits_per_image
    torch._dynamo.reset()
    close(torch.compile(clip, fullgraph=True, backend="eager")(**FAMILIES["clip"].inputs()).logits_per_image, eager)


class LargestNew(TorchDispatchMode):
    """The most elements of any tensor that is made, views of parameters apart."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.known, self.largest = {p.untyped_storage().data_ptr() for p in model.parameters()}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.numel())
        return out


@pytest.mark.parametrize("core", ["cp", "tucker"])
@pytest.mark.parametrize("layer", [lambda: Attention(40, 44), lambda: Fused(40), lambda: Multihead(40)])
def test_training_step_never_makes_a_matrix(layer, core):
    model = adapt(Stack(layer()), core=core, dropout=0.1).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with LargestNew(model) as tensors:
        model(torch.randn(2, 3, 40, requires_grad=True)).square().mean().backward()
        optimizer.step()
    assert tensors.largest < 40 * 40
    with tensors:
        next(m for m in model.modules() if hasattr(m, "get_delta_weight")).get_delta_weight("default")
    assert tensors.largest >= 40 * 40


# ------------------------------------------------------------------------------------------- algebra outside training


def lora_of_rank(base: nn.Module, targets: list[str], rank: int) -> tuple[PeftModel, dict[str, Tensor]]:
    """A LoRA whose updates are slices of a CP tensor of that rank (A is shared, B_n = V diag(c_n)), and its updates."""
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)).eval()
    factors: dict[int, Tensor] = {}
    layers = {n: m for n, m in model.get_base_model().named_modules() if len(getattr(m, "lora_A", ()))}
    for module in layers.values():
        A, B = module.lora_A["default"].weight.data, module.lora_B["default"].weight.data
        d = A.shape[1]
        U, V = factors.setdefault(d, torch.randn(2, rank, d) / d**0.5)
        A.copy_(U)
        B.copy_(torch.cat([V.T * (0.5 + torch.rand(rank)) * torch.randn(rank).sign() for _ in range(len(B) // d)]))
    deltas = {n: m.get_delta_weight("default").detach() for n, m in layers.items()}
    return model, {n: d.T if isinstance(base, hf.GPT2LMHeadModel) else d for n, d in deltas.items()}


@pytest.mark.parametrize(("kind", "r"), [("linear", 3), ("linear", 5), ("Conv1D", 3), ("linear", 1)])
def test_from_lora(kind, r):
    """A CP tensor of rank 3 is recovered from rank 3 on; the errors are true at any rank."""
    family, lossy = FAMILIES["clip"], r < 3
    base, targets = (family.build(), ["q_proj", "k_proj", "v_proj"]) if kind == "linear" else (gpt2(), ["c_attn"])
    inputs = family.inputs() if kind == "linear" else {"input_ids": family.inputs()["input_ids"]}
    output = family.output if kind == "linear" else lambda out: out.logits
    start = output(base(**inputs))
    lora, deltas = lora_of_rank(base, targets, 3)
    expected = output(lora(**inputs))
    model, errors = AuroraModeApproxModel.from_lora(lora, AuroraModeApproxConfig(r=r, alpha=7.0))
    assert errors.keys() == deltas.keys()
    assert (max(errors.values()) > 0.1) if lossy else (max(errors.values()) < 1e-3)
    for path, delta in deltas.items():
        mine = dense(model, path, [(delta.shape[1],) * 2] * (len(delta) // delta.shape[1])).float()
        assert errors[path] == pytest.approx(float((mine - delta).norm() / delta.norm()), abs=1e-5)
    assert not any("lora" in n for n, _ in model.named_parameters())
    assert distance(start, expected) > 0.1
    if not lossy:
        close(output(model.eval()(**inputs)), expected, atol=0.02, rtol=0.02)


def test_from_lora_of_an_untrained_tower():
    lora, deltas = lora_of_rank(FAMILIES["clip"].build(), ["q_proj"], 2)
    for path in (p for p in deltas if "vision" in p):
        lora.get_base_model().get_submodule(path).lora_B["default"].weight.data.zero_()
    model, errors = AuroraModeApproxModel.from_lora(lora, AuroraModeApproxConfig(r=2))
    assert max(errors.values()) < 1e-3
    assert all(not dense(model, p, [(48, 48)]).any() for p in errors if "vision" in p)


def test_from_lora_refuses():
    lora, _ = lora_of_rank(FAMILIES["clip"].build(), ["q_proj"], 3)
    with pytest.raises(ValueError, match="no LoRA adapter 'other'"):
        AuroraModeApproxModel.from_lora(lora, adapter_name="other")
    with pytest.raises(ValueError, match="core='cp'"):
        AuroraModeApproxModel.from_lora(lora, AuroraModeApproxConfig(core="tucker"))
    convolution = get_peft_model(FAMILIES["clip"].build(), LoraConfig(target_modules=["q_proj", "patch_embedding"]))
    with pytest.raises(ValueError, match="patch_embedding"):  # not dropped in silence
        AuroraModeApproxModel.from_lora(convolution)


def test_inherit_takes_the_weights_factors():
    base, x = Stack(Attention(12, 10), Attention(12, 10)), torch.randn(2, 3, 12)
    U, V, P = torch.randn(12, 2), torch.randn(10, 2), torch.randn(6, 2)
    for row, name in enumerate(f"layers.{i}.{n}_proj" for i in range(2) for n in "qkv"):
        base.get_submodule(name).weight.data.copy_((V * P[row]) @ U.T)
    found = []
    for seed, init in ((1, "inherit"), (2, "inherit"), (1, "gauss")):
        torch.manual_seed(seed)
        found.append(adapt(copy.deepcopy(base), r=2, stirred=False, init_weights=init))
        assert torch.equal(found[-1](x), base(x))
    first, second, gauss = (adapter(model) for model in found)
    assert all(torch.equal(first[n], second[n]) for n in first)
    assert all(distance(first[n], gauss[n]) > 0.01 for n in first if "_U" in n or "_P" in n)
    cosines = F.normalize(factor(found[0], "U", "12x10"), dim=0).T @ F.normalize(U, dim=0)
    assert (cosines.abs().amax(0) > 0.9).all()


@pytest.mark.parametrize("options", [{"r": 16}, {"share": "none"}, {"r": 1, "target_modules": ["q_proj"]}])
def test_inherit_is_finite(options):
    """A rank above the widths, groups of one matrix, one number in all of P."""
    for name, value in adapter(adapt(Stack(Attention()), init_weights="inherit", stirred=False, **options)).items():
        assert value.isfinite().all(), name
        assert "_V." in name or value.abs().max() > 0, name


def test_tensorly_backend_is_left_alone():
    def everything(own: str | None = None) -> None:
        if own:
            tensorly.set_backend(own, local_threadsafe=True)
        adapt(Stack(Attention()), init_weights="inherit").merge_and_unload()
        adapt(Stack(Attention()), core="tucker").merge_and_unload()
        lora, _ = lora_of_rank(Stack(Attention(6, 6)), ["q_proj"], 2)
        AuroraModeApproxModel.from_lora(lora, AuroraModeApproxConfig(r=2))
        seen.append(tensorly.get_backend())

    seen: list[str] = []
    everything()
    for work in (everything, lambda: everything("pytorch"), lambda: seen.append(tensorly.get_backend())):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    # a thread's own choice stays, and stays its own
    assert [*seen, tensorly.get_backend()] == ["numpy", "numpy", "pytorch", "numpy", "numpy"]


def test_add_weighted_adapter_is_the_exact_sum():
    model, by_hand = adapt(BLIP.build(), alpha=6.0), BLIP.build()
    model.add_adapter("other", AuroraModeApproxConfig(r=3, dropout=0.0))
    stir(model, "other", seed=1)
    model.base_model.add_weighted_adapter(["default", "other"], [0.7, -1.3], "sum")
    assert model.active_adapters == ["default"]
    for path, module in by_hand.named_modules():
        shapes = {"qkv": [(48, 48)] * 3, "query": [(32, 32)]}.get(path.rpartition(".")[2], [])
        shapes = [(48 if "cross" in path else 32, 32)] if path.endswith(("key", "value")) else shapes
        if shapes:
            update = 0.7 * dense(model, path, shapes, 1.5) - 1.3 * dense(model, path, shapes, 1.0, "other")
            close(model.base_model.model.get_submodule(path).get_delta_weight("sum"), update.float())
            module.weight.data += update.float()
    model.set_adapter("sum")
    close(BLIP.output(model(**BLIP.inputs())), BLIP.output(by_hand(**BLIP.inputs())), atol=1e-4, rtol=1e-4)


def test_add_weighted_adapter_refuses_what_is_no_sum():
    model = adapt(BLIP.build())
    others = {"gqt": {"use_gqt": True}, "ice": {"use_ice": True}, "tucker": {"core": "tucker"}}
    for name, options in {**others, "alone": {"share": "none"}, "vision": {"towers": ["vision"]}}.items():
        model.add_adapter(name, AuroraModeApproxConfig(r=4, **options))
        with pytest.raises(ValueError, match="Only CP adapters"):
            model.base_model.add_weighted_adapter(["default", name], [1.0, 1.0], "sum")
    for arguments in (([], [], "sum"), (["default"], [1, 2], "sum"), (["default"], [1], "gqt"), (["nobody"], [1], "sum")):
        with pytest.raises(ValueError, match="nobody|as many weights"):
            model.base_model.add_weighted_adapter(*arguments)
    assert "sum" not in model.peft_config


# ------------------------------------------------------------------------------------------- gated query transformation


def captured(module: nn.Module) -> list[Tensor]:
    """The list that the outputs of a module's calls go into."""
    calls: list[Tensor] = []
    module.register_forward_hook(lambda m, a, out: calls.append(out if isinstance(out, Tensor) else out[0]))
    return calls


@pytest.mark.parametrize("branches", [["query"], ["query", "cross"], ["cross"]])
def test_gqt_is_the_equation(branches):
    model = adapt(BLIP.build(), stirred=False, use_gqt=True, gqt_branches=branches)
    assert torch.equal(BLIP.output(model(**BLIP.inputs())), BLIP.output(BLIP.build()(**BLIP.inputs())))
    assert model.get_nb_trainable_parameters()[0] == count(SHARES["per_shape"]) + 2 * len(branches) * (2 * 32 + 1)
    layer = stir(model).base_model.model.get_submodule(TEXT)
    q, x, y, out = map(captured, (layer.attention, layer.crossattention, layer.output, layer))
    model(**BLIP.inputs())
    expected = y[0].double().clone()
    parameters = {n: v.double() for n, v in layer.aurora_mode_approx_gqt.aurora_mode_approx_gqt["default"].items()}
    for branch, kept in (("query", q[0]), ("cross", x[0])):
        if branch in branches:
            g, s, shift = (parameters[f"{branch}_{n}_norm"] for n in ("gate", "scale", "shift"))
            for b, t, c in torch.cartesian_prod(*map(torch.arange, kept.shape)):
                expected[b, t, c] += math.tanh(g) * ((1 + s[c]) * kept[b, t, c] + shift[c])
    close(out[0], expected.float())
    assert distance(out[0], y[0]) > 0.05
    model(**BLIP.inputs(), use_itm_head=False)  # text alone isn't fused: the layer gives what its output block gives
    assert torch.equal(out[1], y[1])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("name", "layers"), [("blip_vqa", 4), ("blip_captioning", 2)])
def test_gqt_decodes_alike_with_and_without_cache(name, layers, beams):
    family, vqa = FAMILIES[name], name == "blip_vqa"
    options = {"use_gqt": True, "gqt_branches": ["query", "cross"], "use_ice": vqa, "ice_bank_size": 4}
    model = adapt(family.build(), stirred=False, **options)
    if vqa:
        model.collect_context([family.text_inputs()])
    gates = [p for n, p in adapter(stir(model)).items() if "gate" in n]
    assert len(gates) == 2 * layers
    call = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    call |= {"output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (model.generate(**family.generate_inputs(), use_cache=c, **call) for c in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    close(cached.logits, uncached.logits, atol=1e-4, rtol=1e-4)
    [gate.data.zero_() for gate in gates]
    assert distance(model.generate(**family.generate_inputs(), **call).logits[0], cached.logits[0]) > 1e-2


@pytest.mark.parametrize(("name", "layers"), [("blip_2", 1), ("bridgetower", 4), ("florence2", 2)])
def test_gqt_in_other_fusion_encoders(name, layers):
    family = FAMILIES[name]
    model, inputs = adapt(family.build(), stirred=False, use_gqt=True, gqt_branches=["query", "cross"]), family.inputs()
    before = family.output(model(**inputs))
    assert torch.equal(before, family.output(family.build()(**inputs)))
    gates = [p for n, p in adapter(model).items() if "query_gate" in n]
    assert len(gates) == layers
    [gate.data.fill_(1.0) for gate in gates]
    assert distance(family.output(model(**inputs)), before) > 1e-3


@pytest.mark.parametrize("branch", ["query", "cross"])
def test_gqt_in_a_q_former_that_reads_text_and_queries(branch):
    """The cross-attention sees the three queries alone: nothing else is transformed."""
    text = hf.OPTConfig(**text_tower(40), ffn_dim=80, word_embed_proj_dim=40)
    qformer = hf.Blip2QFormerConfig(**tower(32), vocab_size=VOCAB, encoder_hidden_size=48, use_qformer_text_input=True)
    config = hf.Blip2Config(hf.Blip2VisionConfig(**vision_tower(48)), qformer, text, num_query_tokens=3)
    model = adapt(tiny(hf.Blip2ForImageTextRetrieval, config)(), stirred=False, use_gqt=True, gqt_branches=[branch])
    out = captured(next(m for m in model.modules() if hasattr(m, "aurora_mode_approx_gqt") and hasattr(m, "attention")))
    for value in (0.0, 1.0):
        [p.data.fill_(value) for n, p in adapter(model).items() if "gate" in n]
        model(**pairs()(), use_image_text_matching_head=True)
    assert distance(out[0][:, :3], out[1][:, :3]) > 1e-2
    assert torch.equal(out[0][:, 3:], out[1][:, 3:])


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_all_parts_against_finite_differences(reentrant):
    """d loss / d theta along random directions, through CP, GQT (q reaches the layers below) and ICE together."""
    parts = {"use_gqt": True, "gqt_branches": ["query", "cross"], "use_ice": True, "ice_bank_size": 4}
    model = adapt(BLIP.build(), stirred=False, **parts)
    model.collect_context([BLIP.text_inputs()])
    stir(model).double().train()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in BLIP.inputs().items()}

    def loss() -> Tensor:
        return model(**inputs).itm_score.square().sum()

    plain = gradients(model, loss())
    if reentrant is not None:
        checkpoint(model, reentrant, "vision_model.embeddings", "text_encoder.embeddings")
        close(gradients(model, loss()), plain)
        assert_nothing_left(model)
        return
    for name, parameter in adapter(model).items():
        direction, ends = torch.randn_like(parameter), []
        for step in (1e-5, -2e-5):
            parameter.data += step * direction
            ends.append(loss())
        parameter.data += 1e-5 * direction
        slope = float(ends[0] - ends[1]) / 2e-5
        assert float((plain[name] * direction).sum()) == pytest.approx(slope, rel=1e-4, abs=1e-6), name
        assert plain[name].any(), name


@pytest.mark.parametrize("name", ["clip", "flava", "vilt", "llava"])
def test_fusion_parts_need_a_fusion_encoder(name):
    for option in ("use_gqt", "use_ice"):
        with pytest.raises(ValueError, match=rf"{option}=True needs .*fusion encoder"):
            adapt(FAMILIES[name].build(), **{option: True})
    with pytest.raises(ValueError, match="use_ice=True"):
        adapt(FAMILIES[name].build()).base_model.collect_context([])


# ------------------------------------------------------------------------------------- informative context enhancement


def with_bank(size: int = 8, **options) -> tuple[PeftModel, ContextBank]:
    model = adapt(BLIP.build(), stirred=False, use_ice=True, ice_bank_size=size, **options).eval()
    return model, bank_of(model)


def bank_of(model: PeftModel) -> ContextBank:
    return next(m for m in model.modules() if isinstance(m, ContextBank))


@given(st.integers(1, 6), st.lists(st.integers(1, 8), max_size=6))
@settings(deadline=None)
def test_bank_holds_the_latest(size, pushes):
    bank, pushed = ContextBank(size, 2), []
    for number in pushes:
        features = torch.arange(len(pushed) + 1, len(pushed) + number + 1).float()
        pushed += features.tolist()
        bank.push(features[:, None].expand(number, 2))
    kept = bank.texts[: int(bank.count), 0].tolist()
    assert sorted(kept) == pushed[-size:]
    assert not bank.texts[int(bank.count) :].any()


def test_ice_is_the_equation():
    model, bank = with_bank()
    start = BLIP.output(BLIP.build()(**BLIP.inputs()))
    bank.gamma_norm.data.fill_(0.7)
    assert torch.equal(BLIP.output(model(**BLIP.inputs())), start)  # the bank is empty
    bank.push(torch.randn(5, 32))
    fused = captured(model.base_model.model.text_encoder)
    model(**BLIP.inputs())
    bank.gamma_norm.data.zero_()
    assert torch.equal(BLIP.output(model(**BLIP.inputs())), start)
    expected, T = fused[1].double().clone(), bank.texts[: int(bank.count)].double()
    for b, t in torch.cartesian_prod(*map(torch.arange, expected.shape[:2])):
        scores = [math.exp(float(fused[1][b, t].double() @ text) / math.sqrt(32)) for text in T]
        for score, text in zip(scores, T, strict=True):
            expected[b, t] += 0.7 * score / sum(scores) * text
    close(fused[0], expected.float())
    assert distance(*fused) > 0.05


def test_ice_scores_a_pair_alike_whoever_shares_its_batch(tmp_path):
    model, bank = with_bank(size=4, use_gqt=True)
    bank.push(torch.randn(3, 32))
    inputs = BLIP.inputs()
    start = BLIP.output(stir(model)(**inputs))
    for i in range(3):
        alone = BLIP.output(model(**{k: v[i : i + 1] for k, v in inputs.items()}))
        close(alone[0], start[i], atol=1e-5, rtol=1e-5)
    crossed = {**inputs, "pixel_values": inputs["pixel_values"].roll(1, 0)}  # negatives read the same bank
    both = {k: torch.cat([v, crossed[k]]) for k, v in inputs.items()}
    expected = torch.cat([start, BLIP.output(model(**crossed))])
    close(BLIP.output(model(**both)), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BLIP.build(), tmp_path)
    assert torch.equal(BLIP.output(again(**inputs)), start)
    assert torch.equal(bank_of(again).texts, bank.texts)
    assert int(bank_of(again).count) == 3


def test_ice_bank_is_filled_by_text_alone_in_training():
    model, bank = with_bank(size=8)
    assert {n for n, p in bank.named_parameters() if p.requires_grad} == {"gamma_norm"}
    texts = captured(model.base_model.model.text_encoder)
    for mode, fused, expected in ((False, False, 0), (False, True, 0), (True, True, 0), (True, False, 3), (True, False, 6)):
        model.train(mode)(**BLIP.inputs(), use_itm_head=fused)
        assert int(bank.count) == expected
    base = model.disable_adapter()
    with base:
        model(**BLIP.inputs(), use_itm_head=False)
    assert int(bank.count) == 6
    assert not bank.texts.requires_grad
    for mode in (False, True):  # each text goes in once
        model.train(mode)
        bank.count.zero_()
        bank.texts.zero_()
        assert model.base_model.collect_context([BLIP.text_inputs()]) == 3
        close(bank.texts[:3].sort(0).values, texts[-1][:, 0].sort(0).values)
        assert not bank.texts[3:].any()


# ------------------------------------------------------------------------------------------- merging beside GQT and ICE


@pytest.mark.parametrize("options", [{"use_gqt": True}, {"use_ice": True}, {"use_gqt": True, "use_ice": True}])
def test_merge_is_refused_or_of_the_cp_part_alone(options):
    model, inputs = adapt(BLIP.build(), stirred=False, **options), BLIP.inputs()
    if "use_ice" in options:
        model.collect_context([BLIP.text_inputs()])
    acting, key = BLIP.output(stir(model)(**inputs)), f"{TEXT}.crossattention.self.key"
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="no weight updates.*cp_only=True"):
            merge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.merge_adapter(cp_only=True)
    weight = model.base_model.model.get_submodule(key).get_base_layer().weight.double()
    expected = before[f"base_model.model.{key}.base_layer.weight"].double() + dense(model, key, [(48, 32)])
    close(weight, expected, atol=1e-6, rtol=0)
    close(BLIP.output(model(**inputs)), acting, atol=1e-4, rtol=1e-4)  # GQT and ICE go on
    model.unmerge_adapter()
    close(BLIP.output(model(**inputs)), acting, atol=1e-4, rtol=1e-4)
    [p.data.zero_() for n, p in adapter(model).items() if "gate" in n or "gamma" in n]
    cp_alone = BLIP.output(model(**inputs))
    assert distance(cp_alone, acting) > 1e-3
    bare = model.merge_and_unload(cp_only=True)
    assert not any("aurora" in n for n, _ in bare.named_modules())
    close(BLIP.output(bare(**inputs)), cp_alone, atol=1e-4, rtol=1e-4)
