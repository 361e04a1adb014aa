"""AuroraModeApprox against slow oracles: the CP algebra, what is shared in a call, GQT and ICE, parameter counts."""

from __future__ import annotations

import collections
import copy
import json
import math
import operator
import re
import threading
from typing import Any

import pytest
import tensorly
import torch
import torch.nn.functional as F
import transformers as hf
from case import Case
from families import FAMILIES, VOCAB, Family, blip_config, pairs, text_tower, tiny, tower, vision_tower, wake
from hypothesis import given, settings
from hypothesis import strategies as st
from methods import adapter, distance, fill, run, stir
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from peft_multimodal import AuroraModeApproxConfig, AuroraModeApproxModel, describe
from peft_multimodal.core.parts import CallScope
from peft_multimodal.methods.aurora_mode_approx.fusion import ContextBank, GatedQueryTransformation

BLIP, CLIP = FAMILIES["blip_retrieval"], FAMILIES["clip"]  # both: vision 48 wide, text 32, two layers each
BOTH = ["query", "cross"]
close = torch.testing.assert_close


def config_of(**changes) -> AuroraModeApproxConfig:
    """One group a shape and P drawn from N(0, 1): what the most matrices share, and nothing that is nearly one."""
    return AuroraModeApproxConfig(**{"share": "per_shape", "init_weights": "gauss", "r": 4, "dropout": 0.0, **changes})


def adapt(base: nn.Module, *, stirred: bool = True, **config) -> PeftModel:
    model = get_peft_model(base, config_of(**config))
    fill(BLIP, model)
    return stir(model) if stirred else model


def factor(model: PeftModel, part: str, group: str, name: str = "default") -> nn.Parameter:
    return getattr(model.base_model.model.aurora_mode_approx_shared, f"aurora_mode_approx_{part}")[name][group]


def slices(model: PeftModel, path: str, shapes: list[tuple[int, int]], s: float = 1, name: str = "default"):
    """s sum_qr M_rq v_r u_q^T of each matrix (d_in, d_out) of a module, in float64; M = diag(lambda P_n) or G(P_n)^T."""
    P = model.get_submodule(f"base_model.model.{path}").aurora_mode_approx_P_norm[name].detach().double()
    rank, core = P.shape[1], model.peft_config[name].core == "tucker"
    for row, (d_in, d_out) in zip(P, shapes, strict=True):
        parts = ("U", "V", "core" if core else "lambda_norm")
        U, V, inner = (factor(model, part, f"{d_in}x{d_out}", name).detach().double() for part in parts)
        update = torch.zeros(d_out, d_in, dtype=torch.float64)
        for r, q in torch.cartesian_prod(torch.arange(rank), torch.arange(rank)):
            m = sum(inner[q, r, k] * row[k] for k in range(rank)) if core else inner[r] * row[r] * (r == q)
            update += s * m * torch.outer(V[:, r], U[:, q])
        yield update


def dense(*args, **kwargs) -> Tensor:
    return torch.cat(list(slices(*args, **kwargs)))


class Attention(nn.Module):
    """One head; k and v read `context` if there is any."""

    def __init__(self, d_in: int = 6, d_out: int = 5, fused: bool = False) -> None:
        super().__init__()
        names = {"qkv": 3 * d_out} if fused else dict.fromkeys(("q_proj", "k_proj", "v_proj"), d_out)
        [self.add_module(name, nn.Linear(d_in, size)) for name, size in names.items()]
        self.out_proj = nn.Linear(d_out, d_in)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        y = x if context is None else context
        fused = hasattr(self, "qkv")
        q, k, v = self.qkv(x).chunk(3, dim=-1) if fused else (self.q_proj(x), self.k_proj(y), self.v_proj(y))
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


class Watch(TorchDispatchMode):
    """Counts the matrix products x U (R = 4), and the elements of the largest tensor that isn't a view of a parameter."""

    def __init__(self, model: PeftModel) -> None:
        super().__init__()
        factors = model.base_model.model.aurora_mode_approx_shared.aurora_mode_approx_U["default"]
        self.U, self.known = ({t.data_ptr() for t in ts} for ts in (factors.values(), model.parameters()))
        self.products = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func._schema.name.partition("::")[2] in ("mm", "addmm", "bmm", "baddbmm", "linear", "matmul"):
            reads_U = any(isinstance(a, Tensor) and a.data_ptr() in self.U for a in args)
            self.products += reads_U and out.shape[-1] == 4
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.known:
                self.largest = max(self.largest, t.numel())
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


def captured(module: nn.Module) -> list[Tensor]:
    """The list that the outputs of a module's calls go into."""
    calls: list[Tensor] = []
    module.register_forward_hook(lambda m, a, out: calls.append(out if isinstance(out, Tensor) else out[0]))
    return calls


# ---------------------------------------------------------------------------------------------------- the CP algebra


SIZES = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = tiny(hf.GPT2LMHeadModel, hf.GPT2Config(**SIZES, add_cross_attention=True))
PHI3 = tiny(hf.Phi3ForCausalLM, hf.Phi3Config(**text_tower(32, num_key_value_heads=2)))
TEXT = "text_encoder.encoder.layer.1"
PLACES = {
    "linear": (CLIP.build, "text_model.encoder.layers.1.self_attn.k_proj", [(32, 32)]),
    "cross key": (BLIP.build, f"{TEXT}.crossattention.self.key", [(48, 32)]),
    "fused": (BLIP.build, "vision_model.encoder.layers.0.self_attn.qkv", [(48, 48)] * 3),
    "fused Conv1D": (GPT2, "transformer.h.0.attn.c_attn", [(32, 32)] * 3),
    "fused Conv1D, k and v": (GPT2, "transformer.h.0.crossattention.c_attn", [(32, 32)] * 2),
    "fused, grouped queries": (PHI3, "model.layers.0.self_attn.qkv_proj", [(32, 32), (32, 16), (32, 16)]),
}


@pytest.mark.parametrize("core", ["cp", "tucker"])
@pytest.mark.parametrize("place", PLACES)
def test_update_is_a_sum_of_outer_products(place, core):
    build, path, shapes = PLACES[place]
    model = adapt(build(), alpha=6.0, core=core)  # s = 6 / 4
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


def count(groups: list[tuple[int, int, int]], r: int = 4) -> int:
    """(d_in + d_out) R + N R + R a group (d_in, d_out, N)."""
    return sum((d_in + d_out + n + 1) * r for d_in, d_out, n in groups)


SHARES = {
    "per_shape": [(48, 48, 6), (32, 32, 8), (48, 32, 4)],  # vision; text q, k, v and cross q; cross k, v
    "per_modality": [(48, 48, 6), (32, 32, 6), (32, 32, 2), (48, 32, 4)],
    "per_letter": [(48, 48, 2)] * 3 + [(32, 32, 2)] * 4 + [(48, 32, 2)] * 2,
    "none": [(48, 48, 1)] * 6 + [(32, 32, 1)] * 8 + [(48, 32, 1)] * 4,
}


@pytest.mark.parametrize("share", SHARES)
def test_share(share):
    model, groups = adapt(BLIP.build(), share=share), SHARES[share]
    for part, sizes in (("U", (0,)), ("V", (1,)), ("lambda_norm", ())):
        store = getattr(model.base_model.model.aurora_mode_approx_shared, f"aurora_mode_approx_{part}")["default"]
        assert sorted(tuple(p.shape) for p in store.values()) == sorted((*(g[i] for i in sizes), 4) for g in groups)
    assert model.get_nb_trainable_parameters()[0] == count(groups)
    assert len({p.data_ptr() for p in adapter(model).values()}) == 3 * len(groups) + 14  # a P each
    tucker = adapt(BLIP.build(), share=share, core="tucker")  # R^3 for R
    assert tucker.get_nb_trainable_parameters()[0] == count(groups) + len(groups) * (4**3 - 4)


def test_files_of_a_share_that_is_gone_load(tmp_path):
    """share="global" was allowed where all matrices have one shape, and gave what "per_shape" gives there."""
    model = adapt(BLIP.build(), towers=["vision"])
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "share": "global"}))
    with pytest.warns(UserWarning, match="share='per_shape', which gives the same, is taken"):
        loaded = PeftModel.from_pretrained(BLIP.build(), tmp_path)
    assert loaded.peft_config["default"].share == "per_shape"
    assert torch.equal(run(BLIP, loaded), run(BLIP, model))


def test_counts_at_full_size():
    with torch.device("meta"):
        blip, clip = hf.BlipForImageTextRetrieval(hf.BlipConfig()), hf.CLIPModel(hf.CLIPConfig())
    for base, regex, n, total in ((blip, None, 108, 105_280), (clip, r".*\.([qkv]|out)_proj", 96, 170_112)):
        model = get_peft_model(base, config_of(r=64, target_modules=regex), low_cpu_mem_usage=True)
        assert sum(len(p) for name, p in adapter(model).items() if "P_norm" in name) == n
        assert model.get_nb_trainable_parameters()[0] == total
    assert (count([(768, 768, 108)], 64), count([(768, 768, 48), (512, 512, 48)], 64)) == (105_280, 170_112)


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
def test_gradients_in_float64_against_finite_differences(core):
    model = adapt(Stack(Attention(4, 3)).double(), r=2, alpha=3.0, core=core)
    names, values = zip(*adapter(model).items(), strict=True)
    assert len(names) == 3 + 3
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    call = lambda x, *tensors: torch.func.functional_call(model, dict(zip(names, tensors, strict=True)), (x,))  # noqa: E731
    assert torch.autograd.gradcheck(call, (x, *values))
    if core == "cp":
        exact = dense(model, "layers.0.q_proj", [(4, 3)], 1.5)
        close(model.base_model.model.layers[0].q_proj.get_delta_weight("default"), exact, atol=1e-12, rtol=1e-12)


def test_first_gradient_is_that_of_V_and_the_gates():
    model = adapt(BLIP.build(), stirred=False, use_gqt=True, use_ice=True)
    moved = {n for n, g in gradients(model, BLIP.loss(model)).items() if g.abs().max() > 0}
    assert moved == {n for n in adapter(model) if "_V." in n or "query_gate" in n or "gamma" in n}
    assert len(moved) == 3 + 2 + 1


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
    widths, b, lk = (8, 6, 10) if kind == "other widths" else (8, 8, 8), 3, 5
    options = {"kdim": widths[1], "vdim": widths[2], "bias": kind != "no bias", "batch_first": batch_first}
    model = adapt(Multihead(**options)).eval()
    by_hand, lq = merged_by_hand(model, widths), {"self": 5, "one query": 1}.get(kind, 4)
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
    assert distance(model(*inputs)[0], model.base_model.model.attn.get_base_layer()(*inputs)[0]) > 1e-2
    alone = [t[0] if batch_first else t[:, 0] for t in inputs]
    call = {"attn_mask": torch.ones(lq, lk, dtype=torch.bool).triu(1), "is_causal": True, "need_weights": False}
    close(model(*alone, **call), by_hand(*alone, **call))  # no batch, causal


# ----------------------------------------------------------------------------------------------- one product x U a call


CALLS = {  # self-attentions need one, cross-attentions two (the text's and the image's), fused ones one
    "clip": (4, CLIP.build, lambda model: model(**CLIP.inputs())),
    "blip": (8, BLIP.build, lambda model: model(**BLIP.inputs())),
    "multihead, self": (1, Multihead, lambda model: model(torch.randn(3, 2, 8))),
    "multihead, cross": (2, Multihead, lambda model: model(torch.randn(3, 2, 8), *[torch.randn(4, 2, 8)] * 2)),
    "multihead, three": (3, Multihead, lambda model: model(*torch.randn(3, 4, 2, 8))),
}


@pytest.mark.parametrize("name", CALLS)
def test_one_product_per_input(name):
    expected, build, call = CALLS[name]
    model = adapt(build())
    with Watch(model) as watch:
        call(model)
    assert watch.products == expected


@pytest.mark.parametrize("reentrant", [True, False])
def test_one_product_in_a_recomputation(reentrant):
    model = adapt(CLIP.build()).train()
    expected = gradients(model, CLIP.loss(model))
    checkpoint(model, reentrant, "vision_model.embeddings", "text_model.embeddings")
    with Watch(model) as watch:
        loss = CLIP.loss(model)
        assert watch.products == 4
        close(gradients(model, loss), expected)
    assert watch.products == 2 * 4
    assert_nothing_left(model)


def test_threads_do_not_meet():
    model, inputs = adapt(Stack(Attention(), Attention())), [torch.randn(2, 3 + i, 6) for i in range(4)]
    U, between, results = factor(model, "U", "6x5"), threading.Barrier(len(inputs), timeout=20), {}
    step = lambda x: (model(x), torch.autograd.grad(model(x).square().sum(), U)[0])  # noqa: E731
    expected = {i: step(x) for i, x in enumerate(inputs)}

    def wait(*_) -> None:
        between.wait()

    def work(i: int) -> None:
        with Watch(model) as watch:
            out = step(inputs[i])
        assert watch.products == 2 * 2
        assert_nothing_left(model)
        results[i] = out

    for layer in model.base_model.model.layers:  # all threads stand between q and k at once
        layer.k_proj.register_forward_pre_hook(wait)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    close(dict(sorted(results.items())), expected)
    assert_nothing_left(model)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_outlives_an_interrupted_call(error):
    def interrupt(*_):
        raise error

    def cut_off(module: nn.Module, call) -> None:
        hook = module.register_forward_pre_hook(interrupt)
        with pytest.raises(error):
            call()
        hook.remove()

    model, x = adapt(Stack(Attention())), torch.randn(2, 3, 6)
    cut_off(model.base_model.model.layers[0].v_proj, lambda: model(x))
    factor(model, "U", "6x5").data.mul_(3)
    close(model(x), model(x.clone()))  # the same x, other factors: no product of the call that was cut off
    assert_nothing_left(model)
    blip = adapt(BLIP.build(), use_gqt=True)
    expected = blip(**BLIP.inputs(), use_itm_head=False).itm_score
    cut_off(blip.base_model.model.get_submodule(TEXT).output, lambda: blip(**BLIP.inputs()))
    assert torch.equal(blip(**BLIP.inputs(), use_itm_head=False).itm_score, expected)  # text alone after an image
    assert_nothing_left(blip)


def test_shared_products_keep_inputs_apart():
    model = adapt(Stack(Attention(), Attention()))
    attention, (x, y) = model.base_model.model.layers[0], torch.randn(2, 2, 3, 6)
    for context in (None, x, y, x.clone(), y[:, :2], x[:, :2], x[:, :]):
        parts = []
        for name in ("q_proj", "k_proj", "v_proj"):
            base, update = getattr(attention, name).base_layer, dense(model, f"layers.0.{name}", [(6, 5)]).float()
            parts.append(
                F.linear(x if name == "q_proj" or context is None else context, base.weight + update, base.bias)
            )
        q, k, v = parts
        close(attention(x, context), attention.out_proj((q @ k.mT).softmax(-1) @ v))


def test_compiled_in_one_graph_with_one_product_an_attention():
    found = []

    def backend(graph: torch.fx.GraphModule, inputs):
        calls = [n for n in graph.graph.nodes if n.target in (operator.matmul, torch.matmul)]
        found.append(sum(n.meta["example_value"].shape[-1] == 4 for n in calls))
        return graph.forward

    model, x = adapt(Stack(Attention(), Attention())), torch.randn(2, 3, 6)
    expected = gradients(model, model(x).square().sum())
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    close(gradients(model, compiled(x).square().sum()), expected)
    assert found == [2]
    assert_nothing_left(model)


@pytest.mark.parametrize("core", ["cp", "tucker"])
@pytest.mark.parametrize("layer", [lambda: Attention(40, 44), lambda: Attention(40, 40, True), lambda: Multihead(40)])
def test_training_step_never_makes_a_matrix(layer, core):
    model = adapt(Stack(layer()), core=core, dropout=0.1).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with Watch(model) as watch:
        model(torch.randn(2, 3, 40, requires_grad=True)).square().mean().backward()
        optimizer.step()
    assert watch.largest < 40 * 40
    with watch:
        next(m for m in model.modules() if hasattr(m, "get_delta_weight")).get_delta_weight("default")
    assert watch.largest >= 40 * 40


# ------------------------------------------------------------------------------------------- algebra outside training


def lora_of_rank(base: nn.Module, targets: list[str], rank: int) -> tuple[PeftModel, dict[str, Tensor]]:
    """A LoRA whose updates are slices of a CP tensor of that rank (A is shared, B_n = V diag(c_n)), and its updates."""
    model = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=targets)).eval()
    layers = {n: m for n, m in model.get_base_model().named_modules() if len(getattr(m, "lora_A", ()))}
    factors: dict[int, Tensor] = {}
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
    base, targets = (CLIP.build(), ["q_proj", "k_proj", "v_proj"]) if kind == "linear" else (GPT2(), ["c_attn"])
    tokens = {"input_ids": CLIP.inputs()["input_ids"]}
    output = lambda m: run(CLIP, m) if kind == "linear" else m(**tokens).logits.detach()  # noqa: E731
    start = output(base)
    lora, deltas = lora_of_rank(base, targets, 3)
    expected = output(lora)
    model, errors = AuroraModeApproxModel.from_lora(lora, config_of(r=r, alpha=7.0))
    assert errors.keys() == deltas.keys()
    for path, delta in deltas.items():
        mine = dense(model, path, [(delta.shape[1],) * 2] * (len(delta) // delta.shape[1])).float()
        assert errors[path] == pytest.approx(float((mine - delta).norm() / delta.norm()), abs=1e-5)
        assert errors[path] > 0.05 if r < 3 else errors[path] < 1e-3
    assert not any("lora" in n for n, _ in model.named_parameters())
    assert distance(start, expected) > 0.1
    assert (
        (distance(output(model.eval()), expected) > 0.1) if r < 3 else (distance(output(model.eval()), expected) < 0.02)
    )


def test_from_lora_of_an_untrained_tower():
    lora, deltas = lora_of_rank(CLIP.build(), ["q_proj"], 2)
    for path in (p for p in deltas if "vision" in p):
        lora.get_base_model().get_submodule(path).lora_B["default"].weight.data.zero_()
    model, errors = AuroraModeApproxModel.from_lora(lora, config_of(r=2))
    assert max(errors.values()) < 1e-3
    assert all(not dense(model, p, [(48, 48)]).any() for p in errors if "vision" in p)


def test_ones_start_all_matrices_on_one_update():
    base = Stack(Attention(), Attention())
    found = []
    for init in ("gauss", "ones"):
        torch.manual_seed(0)
        found.append(adapter(adapt(copy.deepcopy(base), r=64, stirred=False, init_weights=init)))
    drawn, ones = found
    for name, value in ones.items():
        expected = 1 + 0.02 * drawn[name] if "_P_norm" in name else drawn[name]
        assert torch.allclose(value, expected), name


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
        assert "_V." in name or value.any(), name


def test_tensorly_backend_is_left_alone():
    seen: list[str] = []

    def everything(own: str | None = None) -> None:
        if own:
            tensorly.set_backend(own, local_threadsafe=True)
        adapt(Stack(Attention()), init_weights="inherit").merge_and_unload()
        adapt(Stack(Attention()), core="tucker").merge_and_unload()
        AuroraModeApproxModel.from_lora(lora_of_rank(Stack(Attention(6, 6)), ["q_proj"], 2)[0], config_of(r=2))
        seen.append(tensorly.get_backend())

    everything()
    for work in (everything, lambda: everything("pytorch"), lambda: seen.append(tensorly.get_backend())):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    # a thread's own choice stays, and stays its own
    assert [*seen, tensorly.get_backend()] == ["numpy", "numpy", "pytorch", "numpy", "numpy"]


def test_add_weighted_adapter_is_the_exact_sum():
    model, by_hand = adapt(BLIP.build(), alpha=6.0), BLIP.build()
    model.add_adapter("other", config_of(r=3))
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
    close(run(BLIP, model), run(BLIP, by_hand), atol=1e-4, rtol=1e-4)


def test_what_is_refused():
    model, from_lora = adapt(BLIP.build()), AuroraModeApproxModel.from_lora
    add = model.base_model.add_weighted_adapter
    others = {"gqt": {"use_gqt": True}, "ice": {"use_ice": True}, "tucker": {"core": "tucker"}}
    for name, options in {**others, "alone": {"share": "none"}, "vision": {"towers": ["vision"]}}.items():
        model.add_adapter(name, config_of(dropout=0.1, **options))
        with pytest.raises(ValueError, match="Only CP adapters"):
            add(["default", name], [1.0, 1.0], "sum")
    lora = get_peft_model(CLIP.build(), LoraConfig(target_modules=["q_proj", "patch_embedding"]))
    calls = [
        ("as many weights", lambda: add([], [], "sum")),
        ("as many weights", lambda: add(["default"], [1, 2], "sum")),
        ("as many weights", lambda: add(["default"], [1], "gqt")),
        ("nobody", lambda: add(["nobody"], [1], "sum")),
        ("no LoRA adapter 'other'", lambda: from_lora(lora, adapter_name="other")),
        ("patch_embedding", lambda: from_lora(lora)),  # a convolution isn't dropped in silence
        (
            "core='cp'",
            lambda: from_lora(lora_of_rank(CLIP.build(), ["q_proj"], 3)[0], AuroraModeApproxConfig(core="tucker")),
        ),
        ("use_ice=True", lambda: adapt(CLIP.build()).base_model.collect_context([])),
    ]
    for name in ("clip", "flava", "vilt", "llava"):  # no fusion encoder
        calls.append(("use_gqt=True needs", lambda name=name: adapt(FAMILIES[name].build(), use_gqt=True)))
        calls.append(("use_ice=True needs", lambda name=name: adapt(FAMILIES[name].build(), use_ice=True)))
    for message, call in calls:
        with pytest.raises(ValueError, match=message):
            call()


# ------------------------------------------------------------------------------------- gated query, informative context


@pytest.mark.parametrize("branches", [["query"], BOTH, ["cross"]])
def test_gqt_is_the_equation(branches):
    model = adapt(BLIP.build(), stirred=False, use_gqt=True, gqt_branches=branches)
    assert torch.equal(run(BLIP, model), run(BLIP, BLIP.build()))
    assert model.get_nb_trainable_parameters()[0] == count(SHARES["per_shape"]) + 2 * len(branches) * (2 * 32 + 1)
    layer = stir(model).base_model.model.get_submodule(TEXT)
    q, x, out = map(captured, (layer.attention, layer.crossattention, layer))
    before: list[Tensor] = []  # the equation's y: what the output block makes of its input, by hand
    layer.output.register_forward_pre_hook(lambda m, a: before.append(m.LayerNorm(m.dense(a[0]) + a[1])))
    model(**BLIP.inputs())
    expected = before[0].detach().double()
    parameters = {n: v.double() for n, v in layer.aurora_mode_approx_gqt.aurora_mode_approx_gqt["default"].items()}
    for branch, kept in (("query", q[0]), ("cross", x[0])):
        if branch in branches:
            g, s, shift = (parameters[f"{branch}_{n}_norm"].detach() for n in ("gate", "scale", "shift"))
            for b, t, c in torch.cartesian_prod(*map(torch.arange, kept.shape)):
                expected[b, t, c] += math.tanh(g) * ((1 + s[c]) * kept[b, t, c] + shift[c])
    close(out[0], expected.float())
    assert distance(out[0], before[0]) > 0.05
    model(**BLIP.inputs(), use_itm_head=False)  # text alone isn't fused
    close(out[1], before[1])


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize(("name", "layers"), [("blip_vqa", 4), ("blip_captioning", 2)])
def test_gqt_decodes_alike_with_and_without_cache(name, layers, beams):
    family = FAMILIES[name]
    options = {"use_ice": name == "blip_vqa", "ice_bank_size": 4}
    model, inputs = adapt(family.build(), use_gqt=True, gqt_branches=BOTH, **options), family.generate_inputs()
    gates = [p for n, p in adapter(model).items() if "gate" in n]
    assert len(gates) == 2 * layers
    call = {"max_new_tokens": 6, "min_new_tokens": 6, "num_beams": beams, "do_sample": False}
    call |= {"output_logits": True, "return_dict_in_generate": True}
    cached, uncached = (model.generate(**inputs, use_cache=c, **call) for c in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    close(cached.logits, uncached.logits, atol=1e-4, rtol=1e-4)
    [gate.data.zero_() for gate in gates]
    assert distance(model.generate(**inputs, **call).logits[0], cached.logits[0]) > 1e-2


def donut() -> tuple[hf.PreTrainedModel, dict[str, Tensor]]:
    """A decoder that normalises before its blocks: its last child makes no output."""
    text = hf.MBartConfig(
        **{
            f"{part}_{name}": n
            for part in ("encoder", "decoder")
            for name, n in (("layers", 2), ("attention_heads", 4))
        },
        **{"vocab_size": VOCAB, "d_model": 32, "decoder_ffn_dim": 64, "pad_token_id": 0, "max_position_embeddings": 64},
    )
    config = hf.VisionEncoderDecoderConfig.from_encoder_decoder_configs(hf.ViTConfig(**vision_tower(48)), text)
    inputs = pairs()()
    return tiny(hf.VisionEncoderDecoderModel, config)(), {
        "pixel_values": inputs["pixel_values"],
        "decoder_input_ids": inputs["input_ids"],
    }


def blip_in_chunks() -> tuple[hf.PreTrainedModel, dict[str, Tensor]]:
    config = blip_config()
    config.text_config.chunk_size_feed_forward = 1
    return tiny(hf.BlipForImageTextRetrieval, config)(), BLIP.inputs()


OTHERS = {n: lambda n=n: (FAMILIES[n].build(), FAMILIES[n].inputs()) for n in ("blip_2", "bridgetower", "florence2")}
OTHERS |= {"donut": donut, "blip_in_chunks": blip_in_chunks}
LAYERS = {"blip_2": 1, "bridgetower": 4}  # elsewhere 2


@pytest.mark.parametrize("name", OTHERS)
def test_gqt_is_added_to_the_output_of_any_fusion_layer(name):
    base, inputs = OTHERS[name]()
    model = adapt(base, stirred=False, use_gqt=True)
    parts = [m for m in model.modules() if isinstance(m, GatedQueryTransformation)]
    assert len(parts) == LAYERS.get(name, 2)
    layer, gate = parts[0].host(), next(p for n, p in adapter(model).items() if "gate" in n)
    q = captured(layer.attention if hasattr(layer, "attention") else layer.self_attn)
    out = captured(layer)
    for value in (0.0, 1.0):
        gate.data.fill_(value)
        model(**inputs)
    close(out[1] - out[0], math.tanh(1) * q[0], atol=1e-5, rtol=1e-5)
    assert_nothing_left(model)


@pytest.mark.parametrize("branch", BOTH)
def test_gqt_in_a_q_former_that_reads_text_and_queries(branch):
    """The cross-attention sees the three queries alone: nothing else is transformed."""
    text = hf.OPTConfig(**text_tower(40), ffn_dim=80, word_embed_proj_dim=40)
    qformer = hf.Blip2QFormerConfig(**tower(32), vocab_size=VOCAB, encoder_hidden_size=48, use_qformer_text_input=True)
    parts = {"vision_config": hf.Blip2VisionConfig(**vision_tower(48)), "qformer_config": qformer, "text_config": text}
    base = tiny(hf.Blip2ForImageTextRetrieval, hf.Blip2Config(**parts, num_query_tokens=3))()
    model = adapt(base, stirred=False, use_gqt=True, gqt_branches=[branch])
    out = captured(next(m for m in model.modules() if hasattr(m, "aurora_mode_approx_gqt") and hasattr(m, "attention")))
    for value in (0.0, 1.0):
        [p.data.fill_(value) for n, p in adapter(model).items() if "gate" in n]
        model(**pairs()(), use_image_text_matching_head=True)
    assert distance(out[0][:, :3], out[1][:, :3]) > 1e-2
    assert torch.equal(out[0][:, 3:], out[1][:, 3:])
    model(**pairs()(), use_image_text_matching_head=False)  # the text alone, too
    assert_nothing_left(model)


@pytest.mark.parametrize("reentrant", [None, True, False])
def test_all_parts_against_finite_differences(reentrant):
    """d loss / d theta along random directions, through CP, GQT (q reaches the layers below) and ICE together."""
    model = adapt(BLIP.build(), use_gqt=True, gqt_branches=BOTH, use_ice=True, ice_bank_size=4).double().train()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in BLIP.inputs().items()}
    loss = lambda: model(**inputs).itm_score.square().sum()  # noqa: E731
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
            ends.append(float(loss()))
        parameter.data += 1e-5 * direction
        assert float((plain[name] * direction).sum()) == pytest.approx(
            (ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-6
        ), name
        assert plain[name].any(), name


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
    assert sorted(bank.texts[: int(bank.count), 0].tolist()) == pushed[-size:]
    assert not bank.texts[int(bank.count) :].any()


def test_ice_is_the_equation():
    model, start = adapt(BLIP.build(), stirred=False, use_ice=True, ice_bank_size=8), run(BLIP, BLIP.build())
    bank, fused = bank_of(model), captured(model.base_model.model.text_encoder)
    assert torch.equal(run(BLIP, model), start)  # gamma = 0
    bank.gamma_norm.data.fill_(0.7)
    model(**BLIP.inputs())
    bank.push(torch.randn(2, 32))
    model(**BLIP.inputs())
    for enhanced, size in ((fused[1], 3), (fused[2], 5)):
        expected, T = fused[0].double().clone(), bank.texts[5 - size : 5].double()  # the newest come first
        for b, t in torch.cartesian_prod(*map(torch.arange, expected.shape[:2])):
            scores = [math.exp(float(fused[0][b, t].double() @ text) / math.sqrt(32)) for text in T]
            expected[b, t] += sum(0.7 * s / sum(scores) * text for s, text in zip(scores, T, strict=True))
        close(enhanced, expected.float())
        assert distance(enhanced, fused[0]) > 0.05
    bank.count.zero_()
    bank.texts.zero_()
    assert torch.equal(run(BLIP, model), start)  # the bank is empty


def test_ice_scores_a_pair_alike_whoever_shares_its_batch(tmp_path):
    model, inputs = adapt(BLIP.build(), use_ice=True, ice_bank_size=4, use_gqt=True).eval(), BLIP.inputs()
    start = run(BLIP, model)
    for i in range(3):
        close(run(BLIP, model, **{k: v[i : i + 1] for k, v in inputs.items()})[0], start[i], atol=1e-5, rtol=1e-5)
    crossed = {**inputs, "pixel_values": inputs["pixel_values"].roll(1, 0)}  # negatives read the same bank
    both = {k: torch.cat([v, crossed[k]]) for k, v in inputs.items()}
    close(run(BLIP, model, **both), torch.cat([start, run(BLIP, model, **crossed)]), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(BLIP.build(), tmp_path)
    assert torch.equal(run(BLIP, again), start)
    assert torch.equal(bank_of(again).texts, bank_of(model).texts)
    assert int(bank_of(again).count) == 3


def test_ice_bank_is_filled_by_text_alone_in_training():
    model = adapt(BLIP.build(), stirred=False, use_ice=True, ice_bank_size=12)
    bank, texts = bank_of(model), captured(model.base_model.model.text_encoder)
    assert {n for n, p in bank.named_parameters() if p.requires_grad} == {"gamma_norm"}
    for train, fused, expected in ((0, 0, 3), (0, 1, 3), (1, 1, 3), (1, 0, 6), (1, 0, 9)):
        model.get_base_model().train(bool(train))
        model(**BLIP.inputs(), use_itm_head=bool(fused))
        assert int(bank.count) == expected
    with model.disable_adapter():
        model(**BLIP.inputs(), use_itm_head=False)
    assert int(bank.count) == 9
    assert not bank.texts.requires_grad
    for mode in (False, True):  # each text goes in once
        model.train(mode)
        bank.count.zero_()
        assert model.base_model.collect_context([BLIP.text_inputs()]) == 3
        close(bank.texts[:3].sort(0).values, texts[-1][:, 0].sort(0).values)


@pytest.mark.parametrize("options", [{"use_gqt": True}, {"use_ice": True}, {"use_gqt": True, "use_ice": True}])
def test_merge_is_refused_or_of_the_cp_part_alone(options):
    model, key = adapt(BLIP.build(), **options), f"{TEXT}.crossattention.self.key"
    before, acting = {k: v.clone() for k, v in model.state_dict().items()}, run(BLIP, model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"no weight updates.*cp_only=True"):
            merge()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.merge_adapter(cp_only=True)
    expected = before[f"base_model.model.{key}.base_layer.weight"].double() + dense(model, key, [(48, 32)])
    close(model.base_model.model.get_submodule(key).get_base_layer().weight.double(), expected, atol=1e-6, rtol=0)
    close(run(BLIP, model), acting, atol=1e-4, rtol=1e-4)  # GQT and ICE go on
    model.unmerge_adapter()
    close(run(BLIP, model), acting, atol=1e-4, rtol=1e-4)
    [p.data.zero_() for n, p in adapter(model).items() if "gate" in n or "gamma" in n]
    cp_alone = run(BLIP, model)
    assert distance(cp_alone, acting) > 1e-3
    bare = model.merge_and_unload(cp_only=True)
    assert not any("aurora" in n for n, _ in bare.named_modules())
    close(run(BLIP, bare), cp_alone, atol=1e-4, rtol=1e-4)


# --------------------------------------------------------------------------------------------------- the contract


# Families whose layers hold a self- and a cross-attention, and those whose text encoder also runs without the image.
CROSS_ATTENTION = ("blip_retrieval", "bridgetower", "blip_vqa", "blip_captioning", "blip_2", "florence2")
TEXT_ENCODER = ("blip_retrieval", "blip_vqa")


def aurora(family: Family, **changes: Any) -> PeftConfig | None:
    if family.name == "llama":  # decoders alone are among the auto mappings
        return None
    return AuroraModeApproxConfig(**{"r": 4, "alpha": 8.0, "dropout": 0.0, **changes})


def aurora_fusion(family: Family, **changes: Any) -> PeftConfig | None:
    """With the gated query transformation and the context enhancement, where the model has a fusion encoder."""
    if family.name not in CROSS_ATTENTION:
        return None
    parts = {"use_gqt": True, "use_ice": family.name in TEXT_ENCODER, "ice_bank_size": 4}
    return aurora(family, **{**parts, "gqt_branches": ["query", "cross"], **changes})


def aurora_parameters(base: nn.Module, config: AuroraModeApproxConfig) -> int:
    """(d_in + d_out) R + N R + R a group of N matrices of one tower, letter and shape, 2 d + 1 a layer and branch, 1 for the
    context.

    Counted on the base model's own modules: the default targets are its attentions' q, k and v.
    """
    assert config.share == "per_letter"
    towers = {matrix.module: matrix.tower for matrix in describe(base).matrices}
    groups: collections.Counter[tuple[str, str, int, int]] = collections.Counter()
    for path, module in base.named_modules():
        leaf = path.rpartition(".")[2]
        if isinstance(base, hf.LlavaForConditionalGeneration) and "vision_tower.encoder.layers.2" in path:
            continue  # the last layer of three, behind the one that is read
        if isinstance(module, nn.MultiheadAttention):
            groups.update((towers[path], letter, module.embed_dim, module.embed_dim) for letter in "qkv")
        elif not isinstance(module, nn.Linear):
            continue
        elif leaf == "qkv":
            groups.update((towers[path], letter, module.in_features, module.out_features // 3) for letter in "qkv")
        elif re.fullmatch("[qkv]|[qkv]_proj|query|key|value", leaf):
            groups[towers[path], leaf[0], module.in_features, module.out_features] += 1
    total = sum((d_in + d_out + n + 1) * config.r for (_, _, d_in, d_out), n in groups.items())
    if config.use_gqt:
        widths = [
            next(m.in_features for p, m in layer.named_modules() if re.search("(query|q_proj)$", p))
            for path, layer in base.named_modules()
            if re.search(r"\.\d+$", path)
            and any(re.search("crossattention$|encoder_attn$", p) for p, _ in layer.named_modules())
        ]
        total += sum((2 * d + 1) * len(config.gqt_branches) for d in widths)
    return total + config.use_ice


CASES = [
    Case(
        "aurora_mode_approx",
        aurora,
        aurora_parameters,
        anywhere=lambda: AuroraModeApproxConfig(r=2, alpha=4.0, dropout=0.0),
        whole=lambda: AuroraModeApproxConfig(dropout=0.0),
        merge={},
    ),
    Case("aurora_mode_approx-fusion", aurora_fusion, aurora_parameters, merge={"cp_only": True}),
]
