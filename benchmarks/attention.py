"""One layer's attention, forward and backward, over the rows of a micro-batch laid out in several ways.

    .venv/bin/python benchmarks/attention.py                                          # 15M and 135M, float32
    .venv/bin/python benchmarks/attention.py --shape 0.5B 1.5B 7B --dtype bfloat16 --mix 180/330/270
    .venv/bin/python benchmarks/attention.py --device cuda                            # every shape, bfloat16

The same pairs, as many as fit the token budget with prompts stored once, and the same random queries, keys
and values for everybody. `shared`: prefopt's layout, a prompt's queries and keys once for both of its completions.
`unshared`: both sequences of a pair whole, one after the other in one row, through the same code.
`padded`: a row for each sequence, as long as the longest, through transformers' SDPA with a causal
and padding mask. `by segment` is a call of SDPA for each segment, as on a CPU; on CUDA `varlen` and `flex` are one
kernel call for the row.

Every line is a process of its own: the median of seven runs after one to warm up, in which masks are
made, as a micro-batch makes them once for all layers; peak memory above the inputs, with masks, output
and gradients. `slots` are the tokens a row has room for, which the rest of a model has to work through. The
last two columns are the largest difference from float32 attention one sequence at a time, as a share
of the largest value: of the output, and of the gradients of queries, keys and values. The gradient of a
shared prompt is the sum over its copies.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from measure import COLUMNS, contests, heading, machine, measured
from prefopt.data.group import CompletionGroup
from prefopt.data.pack import PackedBatch, SegmentLayout, pack
from prefopt.model.attention import segment_attention
from prefopt.model.attention_cuda import flex, varlen
from workload import MIXES, SHAPES, Pair, groups_of, rows

CONTESTANTS = {
    "cpu": ("shared by segment", "unshared by segment", "padded"),
    "cuda": ("shared varlen", "shared flex", "unshared varlen", "padded"),
}
EVERYBODY = tuple(dict.fromkeys(who for names in CONTESTANTS.values() for who in names))
OWN = ("slots", "output", "gradients")
PADDING = -1
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # [rows, heads, slots, dim] each -> [rows, slots, heads, dim]


@dataclass(frozen=True)
class Truth:
    """The row with prompts once: its states, and which of its slots each sequence consists of."""

    states: list[Tensor]  # queries, keys and values, [slots, heads, dim] each
    upstream: Tensor  # the output's gradient, of the queries' shape
    sequences: list[Tensor]

    @classmethod
    def of(cls, batch: PackedBatch, shape: str, dtype: torch.dtype) -> "Truth":
        """Random numbers for one row."""
        _, width, _, _, heads, kv_heads = SHAPES[shape]
        torch.manual_seed(0)
        device, slots, dim = batch.input_ids.device, len(batch.input_ids), width // heads
        q, k, v, upstream = (
            torch.randn(slots, n, dim, dtype=dtype, device=device) for n in (heads, kv_heads, kv_heads, heads)
        )
        return cls([q, k, v], upstream, [torch.tensor([*p, *own], device=device) for p, own in batch.spans])

    def attended(self) -> tuple[Tensor, list[Tensor]]:
        """Output and gradients, float32, one sequence at a time."""
        leaves = [s.float().requires_grad_() for s in self.states]
        q, k, v = (leaf.transpose(0, 1) for leaf in leaves)
        copies = torch.cat(self.sequences).bincount()
        output = torch.empty_like(self.upstream, dtype=torch.float32)
        groups, scale = len(q) // len(k), q.shape[-1] ** -0.5
        for slots in self.sequences:
            keys, values = (s[:, slots].repeat_interleave(groups, dim=0) for s in (k, v))
            hidden = torch.ones(len(slots), len(slots), dtype=torch.bool, device=q.device).triu(1)
            scores = (q[:, slots] @ keys.mT * scale).masked_fill(hidden, float("-inf"))
            result = (scores.softmax(-1) @ values).transpose(0, 1)
            result.backward(self.upstream[slots].float() / copies[slots, None, None])
            output[slots] = result.detach()
        return output, [leaf.grad for leaf in leaves if leaf.grad is not None]


class Contest:
    """One contestant's arrangement of a row."""

    def __init__(self, who: str, pairs: list[Pair], shape: str, dtype: torch.dtype, device: str) -> None:
        groups = groups_of(pairs)
        batch = pack(groups).to(torch.device(device))
        self.truth = Truth.of(batch, shape, dtype)
        if who == "padded":
            self.order = torch.nn.utils.rnn.pad_sequence(self.truth.sequences, True, PADDING)
            self.attend = padded((self.order != PADDING).sum(1))
        elif who.startswith("unshared"):
            self.order = torch.cat(self.truth.sequences)[None]
            whole = [CompletionGroup(g.prompt_ids, (one,), g.source) for g in groups for one in g.completions]
            self.attend = kernel(who, pack(whole).to(torch.device(device)).layout)
        else:
            self.order = torch.arange(len(batch.input_ids), device=device)[None]
            self.attend = kernel(who, batch.layout)
        self.real = self.order != PADDING
        at = self.order.clamp(min=0)
        # The copies of a prompt have its output's gradient between them.
        share = self.real / self.order[self.real].bincount()[at]
        self.upstream = self.truth.upstream[at].mul_(share.to(dtype)[..., None, None])
        self.states = [s[at].requires_grad_() for s in self.truth.states]  # [rows, slots, heads, dim] as a model's

    def run(self) -> tuple[Tensor, ...]:
        """Output and gradients, in this contestant's order."""
        output = self.attend(*(s.transpose(1, 2) for s in self.states))
        return output.detach(), *torch.autograd.grad(output, self.states, self.upstream)

    def differences(self) -> dict[str, float]:
        """Largest difference from `Truth.attended`, as a share of the largest value."""
        output, *grads = self.run()
        expected, exact = self.truth.attended()
        order = self.order[self.real]
        found = {"output": (output[self.real].float() - expected[order]).abs().max() / expected.abs().max()}
        off = []
        for grad, right in zip(grads, exact, strict=True):
            summed = torch.zeros_like(right).index_add_(0, order, grad[self.real].float())
            off.append((summed - right).abs().max() / right.abs().max())
        found["gradients"] = torch.stack(off).max()
        return {name: float(value) for name, value in found.items()}


def kernel(who: str, layout: SegmentLayout) -> Attend:
    """prefopt's attention over one row."""
    if who.endswith("varlen"):
        return lambda q, k, v: varlen(q, k, v, layout, scaling=None, window=None)
    if who.endswith("flex"):
        return lambda q, k, v: flex(q, k, v, layout, scaling=None, window=None)
    return lambda q, k, v: segment_attention(torch.nn.Module(), q, k, v, None, layout=layout)[0]


def padded(lengths: Tensor) -> Attend:
    """What transformers does with rows padded on the right."""

    @cache
    def mask() -> Tensor:
        slots = torch.arange(int(lengths.max()), device=lengths.device)
        causal: Tensor = slots <= slots[:, None]
        return (causal & (slots < lengths[:, None, None]))[:, None]  # [rows, 1, queries, keys]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer: Any = torch.nn.Module()
        layer.num_key_value_groups = q.shape[1] // k.shape[1]
        return sdpa_attention_forward(layer, q, k, v, mask())[0]

    return attend


def contest(args: argparse.Namespace) -> dict[str, Any]:
    """Run one contestant in this process."""
    dtype = getattr(torch, args.dtype)
    drawn = rows(args.mix[0], max(1, args.tokens // 64), SHAPES[args.shape[0]][0])
    fitting = sum(total <= args.tokens for total in accumulate(sum(map(len, pair)) for pair in drawn))
    few = [(p[:64], c[:32], r[:32]) for p, c, r in drawn[:2]]
    Contest(args.contestant, few, args.shape[0], dtype, args.device).run()
    made = Contest(args.contestant, drawn[: max(1, fitting)], args.shape[0], dtype, args.device)
    return measured(made.run, args.device) | {"slots": made.order.numel()} | made.differences()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--mix", nargs="+", default=list(MIXES), help="prompt/chosen/rejected mean lengths")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="default: 15M and 135M on a CPU, all on CUDA")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA, else float32")
    parser.add_argument("--tokens", type=int, help="budget of the row; default: 4096 on a CPU, 16384 on CUDA")
    parser.add_argument("--only", nargs="+", choices=EVERYBODY, help="default: all that the device has")
    parser.add_argument("--contestant", choices=EVERYBODY, help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.shape = args.shape or (list(SHAPES) if on_gpu else ["15M", "135M"])
    args.dtype = args.dtype or ("bfloat16" if on_gpu else "float32")
    args.tokens = args.tokens or (16_384 if on_gpu else 4096)
    everybody = CONTESTANTS[args.device]
    if args.contestant:
        print(json.dumps(contest(args)))
        return
    print(f"{machine(args.device)}, {args.dtype}, rows of up to {args.tokens:,} tokens\n")
    for shape in args.shape:
        _, width, _, _, heads, kv_heads = SHAPES[shape]
        for mix in args.mix:
            heading(f"{mix}, {shape}: {heads} heads, {kv_heads} for keys, {width // heads} wide", *COLUMNS, *OWN)
            options = ["--device", args.device, "--mix", mix, "--shape", shape]
            options += ["--dtype", args.dtype, "--tokens", str(args.tokens)]
            contests(sys.argv[0], args.only or everybody, options, ours=everybody[0], own=OWN)
            print()


if __name__ == "__main__":
    main()
