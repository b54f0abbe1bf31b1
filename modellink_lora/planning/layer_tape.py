"""What one decoder layer allocates and frees, operator by operator, for one micro-batch. Pure arithmetic.

The lists follow the operators of our layer (models/spec.py, adapters/lora.py, or fused_tape.py for the fused path)
and what autograd keeps of them. They were read off an allocation tracker on CPU over gloo, torch 2.13 and megatron-core
0.16.1, and tests/distributed/test_memory.py holds them to it. Other devices differ where a kernel is fused: an Ascend
NPU's RMSNorm makes none of the fp32 pieces, NCCL's reduce-scatter no copy of its input; there the peaks inside a layer
are a little lower.
"""

from __future__ import annotations

import functools

from modellink_lora.planning.fused_tape import FusedLinear
from modellink_lora.planning.tape import TARGETS, WIDTH, Footprint, Shapes, Tape, norm_backward, norm_forward


@functools.lru_cache(maxsize=4096)
def layer(shapes: Shapes, ranks: tuple[int, int, int, int], *, grad_in: bool, recompute_attention: bool) -> Footprint:
    """One decoder layer.

    Args:
        ranks: LoRA rank on each of TARGETS, 0 where there is no adapter.
        grad_in: the input needs a gradient; that of a model's first layer does not.
        recompute_attention: selective recompute, which keeps the inputs of core attention only.
    """
    tape = Tape()
    run = _Layer(tape, shapes, dict(zip(TARGETS, ranks, strict=True)), grad_in, recompute_attention)
    tape.add("x", shapes.residual)
    run.forward()
    kept, forward = tape.live - shapes.residual, tape.peak  # the output is the next one's input
    tape.drop("y")
    tape.add("gradient", shapes.residual)
    tape.mark()
    run.backward()
    return Footprint(kept, forward, tape.peak)


class _Layer:
    """The operators of one layer in order. `flows` says whether what is computed now needs a gradient."""

    def __init__(self, tape: Tape, shapes: Shapes, ranks: dict[str, int], grad_in: bool, recompute: bool) -> None:
        self.tape, self.d, self.ranks, self.grad_in, self.recompute = tape, shapes, ranks, grad_in, recompute
        w, tokens = shapes.width, shapes.tokens
        self.q = tokens * shapes.heads * shapes.head_dim * w
        self.k = tokens * shapes.groups * shapes.head_dim * w
        self.qkv = self.q + 2 * self.k
        self.f = tokens * shapes.ffn * w
        self.whole = tokens * shapes.hidden * w  # [s, b, h]
        self.log_sum = 4 * tokens * shapes.heads  # fp32, kept by fused attention
        after = grad_in
        self.flows = {"norm1": after}
        for name in TARGETS:
            after = after or bool(ranks[name])
            self.flows[name] = after  # of its output

    # ---- forward

    def forward(self) -> None:
        tape, d = self.tape, self.d
        self._norm("norm1", d.local_tokens * d.hidden, d.local_tokens, self.grad_in)
        self._linear("linear_qkv", self.qkv, d.hidden, column=True)
        self._attention()
        self._linear("linear_proj", d.residual, self.q // (d.tokens * d.width), column=False)
        fused = not (self.recompute or d.attention_dropout) and self.flows["linear_qkv"]  # which keeps its result
        if not (fused or self._keeps_input("linear_proj")):
            tape.drop("attention")
        tape.drop("query")
        if d.attention_dropout:
            tape.drop("rotated k", "linear_qkv")
        self._residual("x1", "linear_proj")
        if not self.grad_in:  # a norm keeps its input
            tape.drop("x")
        if not self._keeps_input("linear_qkv"):
            tape.drop("norm1")
        self._norm("norm2", d.local_tokens * d.hidden, d.local_tokens, self.flows["linear_proj"])
        self._linear("linear_fc1", 2 * self.f, d.hidden, column=True)
        tape.add("product", self.f)  # silu(gate) at first
        if not self.flows["linear_fc1"]:
            tape.drop("linear_fc1")
        self._linear("linear_fc2", d.residual, d.ffn, column=False)
        self._residual("y", "linear_fc2")
        if not self._keeps_input("linear_fc1"):
            tape.drop("norm2")
        if not self._keeps_input("linear_fc2"):
            tape.drop("product")
        if not self.flows["linear_proj"]:
            tape.drop("x1")

    def _keeps_input(self, name: str) -> bool:
        """A frozen linear keeps no input; its adapter keeps the input itself, or else the copy that it works on.

        A fused adapter works on no copy, and keeps nothing that can be computed again.
        """
        if not self.ranks[name]:
            return False
        if self.d.fusion:
            return not self._computes_again(name)
        return not self.d.lora_dropout and self.d.adapter_dtype == self.d.dtype

    def _computes_again(self, name: str) -> bool:
        """The input of a fused adapter is that of a norm or gate which keeps what it is made from (models/spec.py)."""
        made = {"linear_qkv": "norm1", "linear_fc1": "linear_proj", "linear_fc2": "linear_fc1"}  # flows into norm, gate
        recomputes = self.d.fusion is not None and self.d.fusion.recompute_inputs
        return recomputes and name in made and self.flows[made[name]]

    def _fused(self, name: str, inputs: int, *, column: bool) -> FusedLinear:
        outputs = {"linear_qkv": self.qkv, "linear_fc1": 2 * self.f}.get(name, 0) // (self.d.tokens * self.d.width)
        return FusedLinear(self.d, name, self.ranks[name], column, inputs, outputs or self.d.hidden)

    def _norm(self, name: str, elements: int, rows: int, flows: bool) -> None:
        norm_forward(self.tape, name, self.d, elements, rows)
        if not flows:
            self.tape.drop(f"{name} inverse")

    def _linear(self, name: str, out: int, inputs: int, *, column: bool) -> None:
        """A frozen linear and its adapter: `out` bytes of result, `inputs` features on this rank."""
        tape, d, rank = self.tape, self.d, self.ranks[name]
        if rank and d.fusion:
            self._fused(name, inputs, column=column).forward(tape)
            return
        if d.sequence_parallel and column:
            tape.spike(self.whole, out)  # gathered input
        if d.sequence_parallel and not column:
            tape.spike(2 * self.whole, out)  # partial sum, and gloo's copy of it
        if not rank:
            tape.add(name, out)
            return
        tape.add("base", out)
        wide = WIDTH[d.adapter_dtype]
        tokens = d.local_tokens if column else d.tokens
        elements = tokens * inputs
        if d.lora_dropout:
            tape.spike(d.hash * elements)
            tape.spike((1 + d.width) * elements)
            tape.add(f"{name} dropped", d.width * elements)
        if wide != d.width:
            tape.add(f"{name} cast", wide * elements)
            tape.drop(f"{name} dropped")
        low = rank * wide * (d.tokens if column else d.local_tokens)  # column: gathered; row: reduce-scattered
        tape.add(f"{name} low", low)
        scale = wide / d.width
        tape.add("delta", int(out * scale))
        tape.spike(out if scale == 1 else 2 * out)  # rounded to the base's dtype, then the sum
        tape.drop("base", "delta")
        tape.add(name, out)

    def _attention(self) -> None:
        tape, d, flows = self.tape, self.d, self.flows["linear_qkv"]
        grouped = d.heads != d.groups
        tape.add("query", self.q if grouped else 0)  # heads of a group lie apart in qkv: a copy
        if d.qk_norm:
            self._head_norm("query norm", self.q, flows)
            self._head_norm("key norm", self.k, flows)
        table = d.length * d.head_dim * d.width  # cosines or sines, made anew for query and key
        tape.add("rotary", 4 * table)
        tape.spike(3 * self.q)
        tape.add("rotated q", self.q)
        tape.add("rotated k", self.k)
        if d.qk_norm:
            tape.drop("query norm", "key norm")
        if d.attention_dropout:
            self._explicit_attention()
        else:
            tape.add("log sum", self.log_sum)
        tape.add("attention", self.q)
        if self.recompute or not flows:
            tape.drop("log sum", "weights", "repeated")
        if not flows:
            tape.drop("rotary", "rotated q", "rotated k", "linear_qkv")

    def _head_norm(self, name: str, size: int, flows: bool) -> None:
        elements = size // self.d.width
        self._norm(name, elements, elements // self.d.head_dim, flows)
        if flows and name == "query norm":
            self.tape.add("query kept", 0 if self.d.heads == self.d.groups else size)
            self.tape.drop("query")

    def _explicit_attention(self) -> None:
        """Softmax out of single operators: [b, n, s, s] kept in fp32 and, thinned, in the model's dtype."""
        tape, d = self.tape, self.d
        square = d.batch * d.heads * d.length**2
        tape.add("repeated", 2 * self.q)  # keys and values, a copy for each head
        tape.spike((d.width if d.width < 4 else 0) * square + 3 * 4 * square)
        tape.spike((4 + 4 + d.hash) * square)
        tape.add("weights", (4 + d.width) * square + d.length**2)

    def _residual(self, name: str, branch: str) -> None:
        tape, d = self.tape, self.d
        if d.hidden_dropout:
            tape.spike(d.hash * d.local_tokens * d.hidden)
            tape.spike(2 * d.residual + d.local_tokens * d.hidden)
        tape.add(name, d.residual)
        tape.drop(branch)

    # ---- backward; "gradient" is that of the residual stream, and stays until a branch has come back

    def backward(self) -> None:
        tape, d = self.tape, self.d
        grad = self._linear_backward("linear_fc2", "product", self.f, d.ffn, self.flows["linear_fc1"], column=False)
        if not grad:
            self._free_all()
            return
        tape.add("d linear_fc1", 2 * self.f)
        tape.spike(self.f)  # silu(gate); gradient times up
        tape.drop(grad, "linear_fc1")
        grad = self._linear_backward(
            "linear_fc1", "norm2", d.residual, d.hidden, self.flows["linear_proj"], column=True
        )
        if not grad:
            self._free_all()
            return
        self._norm_backward("norm2", grad, "x1")
        grad = self._linear_backward(
            "linear_proj", "attention", self.q, self.q // (d.tokens * d.width), self.flows["linear_qkv"], column=False
        )
        if not grad:
            self._free_all()
            return
        self._attention_backward(grad)
        grad = self._linear_backward("linear_qkv", "norm1", d.residual, d.hidden, self.grad_in, column=True)
        if grad:
            self._norm_backward("norm1", grad, "x")
        self._free_all()

    def _free_all(self) -> None:
        self.tape.drop(*list(self.tape._sizes))

    def _linear_backward(
        self, name: str, given: str, size: int, inputs: int, flows: bool, *, column: bool
    ) -> str:  # fmt: skip
        """Frees what the adapter kept; returns the name of the input's gradient, empty where none is needed."""
        tape, d, rank = self.tape, self.d, self.ranks[name]
        kept_elsewhere = given == "attention" and not d.attention_dropout  # by fused attention
        if rank and d.fusion:
            linear = self._fused(name, inputs, column=column)
            linear.backward(tape, f"d {given}", again=self._computes_again(name), flows=flows)
            if not kept_elsewhere:
                tape.drop(given)
            return f"d {given}" if flows else ""
        tokens = d.local_tokens if column else d.tokens
        elements = tokens * inputs
        if rank:
            if flows:
                tape.add("d delta", size)
                if d.lora_dropout:
                    tape.spike(d.hash * elements)
                    tape.spike((1 + d.width) * elements)
            tape.drop(f"{name} low", f"{name} dropped", f"{name} cast")
            if self._keeps_input(name) and not kept_elsewhere:
                tape.drop(given)
        if not flows:
            tape.drop(f"d {name}")
            return ""
        if d.sequence_parallel and not column:
            tape.spike(self.whole, size)  # gathered gradient
        tape.add("d base", self.whole if column else size)
        tape.drop(f"d {name}")
        if d.sequence_parallel and column:
            tape.spike(size, self.whole)  # scattered gradient, and gloo's copy of the sum
            tape.drop("d base")
            tape.add("d base", size)
        if not rank:
            return self._rename("d base", f"d {given}", size)
        tape.add(f"d {given}", size)
        tape.drop("d delta", "d base")
        return f"d {given}"

    def _rename(self, old: str, new: str, size: int) -> str:
        self.tape.drop(old)
        self.tape.add(new, size)
        return new

    def _norm_backward(self, name: str, grad: str, residual: str) -> None:
        tape, d = self.tape, self.d
        elements = d.local_tokens * d.hidden
        norm_backward(tape, elements)
        tape.drop(grad, f"{name} inverse", residual)
        tape.spike(2 * d.residual)  # branch plus residual

    def _attention_backward(self, grad: str) -> None:
        tape, d = self.tape, self.d
        if self.recompute:
            tape.add("recomputed", self.q + self.log_sum)
            if d.attention_dropout:
                self._explicit_attention()
        if d.attention_dropout:
            square = d.batch * d.heads * d.length**2
            tape.spike((d.width + 4 + 4 + d.hash) * square)
            tape.spike((d.width + 3 * 4) * square)
        tape.add("d q", self.q)
        tape.add("d kv", 2 * self.k)
        tape.drop(
            grad, "rotated q", "rotated k", "linear_qkv", "attention", "log sum", "recomputed", "weights", "repeated"
        )
        tape.spike(5 * self.q // 2)
        if d.qk_norm:
            norm_backward(tape, self.q // d.width)
        tape.drop("rotary", "query kept", "query norm inverse", "key norm inverse")
        tape.spike(self.qkv)
        tape.drop("d q", "d kv")
        tape.add("d linear_qkv", self.qkv)
