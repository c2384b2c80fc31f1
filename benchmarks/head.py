"""Log-probabilities from the output head: prefopt's tiles, plain code, and TRL's, on the same hidden states.

    .venv/bin/pip install -c constraints.txt -e '.[bench]'
    .venv/bin/python benchmarks/head.py                                      # 15M, float32, 2,048 tokens
    .venv/bin/python benchmarks/head.py --shape 15M 135M 0.5B --dtype float32 bfloat16
    .venv/bin/python benchmarks/head.py --device cuda --shape 135M 0.5B 1.5B 7B             # bfloat16, 8,192 tokens

`score` is the forward pass alone, `frozen weight` adds the gradient of the hidden states (LoRA), and
`trained weight` that of the weight too. The plain code is hidden @ weight.T, in float32 from there, log_softmax,
gather, autograd. `trl` is the ChunkedLogProbFunction that its trainers' models end in, with the
chunks they give it and nothing but log-probabilities asked for, which its DPO asks for of the reference only (of
the policy also entropy, mean logit and top-1); without Triton, so on a CPU, it runs in torch operations.

Every line is a process of its own: the median of seven runs after one to warm up, and its peak memory
above hidden states, weight and targets, gradients included. The last three columns are the largest difference
from float64 plain code on the same rounded inputs, for a loss over 32 tokens spread over all of them: of
log-probabilities in nats, of the gradients as a share of the largest. Weights and hidden states
are random, logits with a standard deviation of 3.
"""

import argparse
import json
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from measure import COLUMNS, contests, heading, machine, measured
from workload import SHAPES

CONTESTANTS = ("prefopt", "plain", "trl")
WORKS = ("score", "frozen weight", "trained weight")
CHECKED = 32
DIFFERENCES = ("value", "hidden gradient", "weight gradient")
Logprobs = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden, weight, targets


def prefopt() -> Logprobs:
    from prefopt.model.head import Head, target_logprobs

    return lambda hidden, weight, targets: target_logprobs(Head(weight, None, 1.0, None), hidden, targets)


def plain(wide: torch.dtype = torch.float32) -> Logprobs:
    """All logits at once, in `wide` after the product."""
    return lambda hidden, weight, targets: (
        (hidden @ weight.T).to(wide).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    )


def trl() -> Logprobs:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        found = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, chunk, None, 1.0, ("log_probs",))
        first: Tensor = found[0]
        return first

    return logprobs


class Task:
    """Inputs of one shape, and what is asked of them."""

    def __init__(self, tokens: int, width: int, vocabulary: int, dtype: torch.dtype, device: str, work: str) -> None:
        torch.manual_seed(0)
        self.hidden = torch.randn(tokens, width, dtype=dtype, device=device)
        self.weight = torch.randn(vocabulary, width, dtype=dtype, device=device).mul_(3 / width**0.5)
        self.targets = torch.randint(vocabulary, (tokens,), device=device)
        self.coefficients = torch.randn(tokens, device=device)
        self.wanted = [self.hidden, self.weight][: WORKS.index(work)]
        for tensor in self.wanted:
            tensor.requires_grad_()

    def run(self, logprobs: Logprobs, coefficients: Tensor | None = None) -> list[Tensor]:
        """Log-probabilities, and the gradients that are wanted of their sum times `coefficients`."""
        found = logprobs(self.hidden, self.weight, self.targets)
        given = self.coefficients if coefficients is None else coefficients
        return [found.detach(), *(torch.autograd.grad(found, self.wanted, given) if self.wanted else ())]

    def differences(self, logprobs: Logprobs) -> dict[str, float]:
        """Largest difference from float64; the other tokens go through, their coefficients are 0."""
        few = torch.linspace(
            0, len(self.targets) - 1, min(CHECKED, len(self.targets)), device=self.hidden.device
        ).long()
        chosen = torch.zeros_like(self.coefficients)
        chosen[few] = self.coefficients[few]
        values, *grads = self.run(logprobs, chosen)
        hidden, weight = self.hidden.detach()[few].double(), self.weight.detach().double()
        wanted = [hidden, weight][: len(self.wanted)]
        for tensor in wanted:
            tensor.requires_grad_()
        truth = plain(torch.float64)(hidden, weight, self.targets[few])
        exact = torch.autograd.grad(truth, wanted, self.coefficients[few].double()) if wanted else ()
        found = [float((values[few] - truth.detach()).abs().max())]
        if grads:
            grads[0] = grads[0][few]
        for grad, expected in zip(grads, exact, strict=True):
            found.append(float((grad - expected).abs().max() / expected.abs().max()))
        return dict(zip(DIFFERENCES, found, strict=False))


def contest(args: argparse.Namespace) -> dict[str, Any]:
    """Run one contestant in this process."""
    logprobs = {"prefopt": prefopt, "plain": plain, "trl": trl}[args.contestant]()
    vocabulary, width = SHAPES[args.shape[0]][:2]
    dtype, work = getattr(torch, args.dtype[0]), args.work[0]
    Task(64, 64, 256, dtype, args.device, work).run(logprobs)
    task = Task(args.tokens, width, vocabulary, dtype, args.device, work)
    result = measured(lambda: task.run(logprobs), args.device)
    return result | task.differences(logprobs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="default: 15M on a CPU, 0.5B on CUDA")
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), help="default: bfloat16 on CUDA")
    parser.add_argument("--tokens", type=int, help="scored tokens; default: 2048 on a CPU, 8192 on CUDA")
    parser.add_argument("--work", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, default=list(CONTESTANTS))
    parser.add_argument("--contestant", choices=CONTESTANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    on_gpu = args.device == "cuda"
    args.shape = args.shape or ["0.5B" if on_gpu else "15M"]
    args.dtype = args.dtype or ["bfloat16" if on_gpu else "float32"]
    args.tokens = args.tokens or (8192 if on_gpu else 2048)
    if args.contestant:
        print(json.dumps(contest(args)))
        return
    try:
        peer = version("trl")
    except PackageNotFoundError:
        peer = "missing"
    print(f"{machine(args.device)}, trl {peer}, {args.tokens:,} tokens\n")
    for shape in args.shape:
        for dtype in args.dtype:
            vocabulary, width = SHAPES[shape][:2]
            heading(f"{shape}: {width} wide, {vocabulary:,} words, {dtype}", *COLUMNS, *DIFFERENCES)
            for work in args.work:
                options = ["--device", args.device, "--shape", shape, "--dtype", dtype, "--work", work]
                options += ["--tokens", str(args.tokens)]
                contests(sys.argv[0], args.only, options, ours=CONTESTANTS[0], label=f"{work}, ", own=DIFFERENCES)
            print()


if __name__ == "__main__":
    main()
