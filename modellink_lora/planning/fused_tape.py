"""What one fused LoRA linear allocates and frees (adapters/fused_functions.py), and at which level it runs. Pure.

Letters: n tokens of this rank, T tokens of all ranks, i inputs, o outputs, r rank, S and U r-wide products.
"""

from __future__ import annotations

from dataclasses import dataclass

from modellink_lora.planning.tape import Fusion, Shapes, Tape

_ALIGNMENT = 8  # columns of a border, as adapters/fused.py rounds them
_BLOCK, _CPU_BLOCK = 2**24, 2**19  # elements that device/lora_ops.py masks or casts at a time


def level_of(shapes: Shapes, *, column: bool) -> str:
    """ "L0", "L1" or "L2", as `decide` of adapters/fused.py says with torch: a test holds the two together."""
    fusion, dropout = shapes.fusion, shapes.lora_dropout
    assert fusion is not None
    if shapes.ranks == 1 or not shapes.sequence_parallel:
        return "L0"
    if fusion.level == "L2" and not column and dropout:
        return "L1"
    if fusion.level != "auto":
        return fusion.level
    if column or (fusion.fused_collectives and not dropout):
        return "L2"
    if shapes.width == 2:
        return "L0"
    return "L1" if dropout else "L2"


def border(rank: int) -> int:
    """Columns or rows that stand beside a weight or activation for `rank` of them."""
    return -(-rank // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class FusedLinear:
    """One linear on one rank; forward and backward write on a tape what lives when."""

    shapes: Shapes
    name: str
    rank: int
    column: bool
    inputs: int  # features on this rank
    outputs: int

    def forward(self, tape: Tape) -> None:
        d, name = self.shapes, self.name
        if self.level != "L0":
            self._bordered_forward(tape)
        elif d.sequence_parallel and self.column:
            tape.add(name, self._out)
            tape.add(f"{name} low", self._bytes(d.tokens, self.rank))
            tape.spike(self._in_flight(self.inputs), self._block(d.tokens * self.inputs))
        else:
            tape.spike(self._block(self._given))
            tape.add(f"{name} low", self._bytes(self._tokens_in, self.rank))
            if d.sequence_parallel:
                self._scattered(tape, self.outputs)
            tape.add(name, self._out)
        if d.lora_dropout:
            tape.add(f"{name} keys", 4 * (self._tokens_in + self.inputs))

    def _bordered_forward(self, tape: Tape) -> None:
        d, name, edge = self.shapes, self.name, border(self.rank)
        if self.column:
            tape.add("buffer", self._bytes(d.local_tokens, self.inputs + edge))
            tape.spike(self._block(self._given))
            tape.add(name, self._out)
            tape.add(f"{name} low", self._bytes(d.tokens, self.rank))
            tape.spike(self._in_flight(self.inputs + edge))
            tape.drop("buffer")
            return
        tape.spike(self._block(self._given))
        self._scattered(tape, self.outputs + edge)
        tape.add("scattered", self._bytes(d.local_tokens, self.outputs + edge))
        tape.add(f"{name} low", self._bytes(d.local_tokens, self.rank))
        tape.add(name, self._out)
        tape.drop("scattered")

    def backward(self, tape: Tape, gradient: str, *, again: bool, flows: bool) -> None:
        """Adds the input's gradient, named `gradient`, if it `flows`; frees what `forward` kept but for the input.

        Args:
            again: the input is computed once more.
        """
        d, edge = self.shapes, border(self.rank)
        given, masked = self._bytes(self._tokens_in, self.inputs), (d.hash + 1) * bool(d.lora_dropout)
        if again:
            elements = self._given if self.column else 0  # of a norm; a gate needs no room beside its result
            tape.spike(d.wide(elements), 4 * elements, given)
            tape.add("again", given)
        if self.level != "L0" and self.column:
            width = edge + (self.inputs if flows else 0)
            self._scattered(tape, width)
            tape.add("scattered", self._bytes(d.local_tokens, width))
            if flows:
                tape.add(gradient, given)
            tape.spike(self._block(self._given))
        else:
            row_gathers = d.sequence_parallel and not self.column
            tape.add("U", self._bytes(d.tokens if d.sequence_parallel else self._tokens_in, self.rank))
            if flows:
                tape.add(gradient, given)
            if row_gathers:
                width = self.outputs + (edge if self.level != "L0" else 0)
                tape.add("buffer", self._bytes(d.local_tokens, width) if self.level != "L0" else 0)
                tape.spike(self._in_flight(width), masked * self._given // self._chunks if flows else 0)
                tape.drop("buffer")
            else:
                tape.spike(self._block(d.tokens * self.outputs, mask=False))
                if flows and d.sequence_parallel:
                    self._scattered(tape, self.inputs, masked * d.tokens * self.inputs)
                elif flows:
                    tape.spike(masked * self._given)
            tape.spike(self._block(self._given))
        tape.drop("again", "U", "scattered", f"{self.name} low", f"{self.name} keys", f"d {self.name}")

    # ---- sizes

    @property
    def level(self) -> str:
        return level_of(self.shapes, column=self.column)

    @property
    def _fusion(self) -> Fusion:
        assert self.shapes.fusion is not None
        return self.shapes.fusion

    @property
    def _chunks(self) -> int:
        return self._fusion.chunks or 1  # chosen per shape: 1 takes most memory

    @property
    def _tokens_in(self) -> int:
        return self.shapes.local_tokens if self.column else self.shapes.tokens

    @property
    def _given(self) -> int:
        """Elements of x."""
        return self._tokens_in * self.inputs

    @property
    def _out(self) -> int:
        return self._bytes(self.shapes.tokens if self.column else self.shapes.local_tokens, self.outputs)

    def _bytes(self, tokens: int, features: int) -> int:
        return tokens * features * self.shapes.width

    def _in_flight(self, width: int) -> int:
        """Of a gather: the chunk that is multiplied and the one that is sent."""
        whole = self._bytes(self.shapes.tokens, width)
        return whole * min(2, self._chunks) // self._chunks

    def _scattered(self, tape: Tape, width: int, beside: int = 0) -> None:
        """Partial sums of all chunks, gloo's copies of them, and the result."""
        whole = self._bytes(self.shapes.tokens, width)
        tape.spike(whole, max(whole, beside // self._chunks), whole // self.shapes.ranks)

    def _block(self, elements: int, *, mask: bool = True) -> int:
        """Room for a block that is masked, or cast to fp32 on a CPU."""
        d = self.shapes
        each = 4 if d.cpu and d.width < 4 else 0
        if mask and d.lora_dropout:
            each = (4 if d.cpu else d.width) + 1 + d.hash
        return min(elements, _CPU_BLOCK if d.cpu else _BLOCK) * each
