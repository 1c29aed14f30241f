"""
Can the weights learn when to stop, apart from how often? Measures how the decisions of a policy move together.

    python benchmarks/decision_kernel.py outputs/run --base outputs/smollm2 --adapters START [LATER …] [--steps 0 9]

States are contexts after a search in the records of a run, with a belief below .1 or above .9, in each turn. The
decision in each is the log-odds z of a tool call against an answer. Printed are, for every adapter, the mean z of both
kinds of states and the gap between them; and for the first adapter the kernel K of the gradients of z with respect to
its weights, averaged over pairs of different states. For the same advantages, a step of gradient descent moves all z
together (K within + K between) / (K within - K between) times as far as it moves the two kinds apart.
"""

import argparse
import random
from collections import defaultdict

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from igpo_trl.evaluation import load_run

State = tuple[int, bool]  # turn, whether the belief is above .9


def read_states(run: str, first: int, last: int, number: int) -> dict[State, list[str]]:
    """Contexts after one, two and three or more searches, each once."""
    found = defaultdict[State, set[str]](set)
    for rollout in load_run(run):
        context = rollout.prompt
        for turn, each in enumerate(rollout.turns):
            if turn and each.belief is not None and first <= rollout.step <= last and not 0.1 <= each.belief <= 0.9:
                found[min(turn, 3), each.belief > 0.9].add(context)
            context += each.text + each.observation
    choose = random.Random(0)
    return {state: choose.sample(sorted(those), min(number, len(those))) for state, those in sorted(found.items())}


class Decision:
    """The log-odds of the token in which a tool call and an answer first differ."""

    def __init__(self, model: PeftModel, tokenizer: AutoTokenizer):
        self.model, self.encode = model, lambda text: tokenizer(text, add_special_tokens=False).input_ids
        call, answer = self.encode("<tool_call>"), self.encode("<answer>")
        differ = next(i for i, tokens in enumerate(zip(call, answer, strict=False)) if len(set(tokens)) > 1)
        self.start, self.call, self.answer = call[:differ], call[differ], answer[differ]

    def log_odds(self, context: str) -> torch.Tensor:
        ids = torch.tensor([self.encode(context) + self.start], device=self.model.device)
        logits = self.model(input_ids=ids, logits_to_keep=1).logits[0, -1]
        return logits[self.call] - logits[self.answer]

    def gradient(self, context: str) -> torch.Tensor:
        weights = [weight for weight in self.model.parameters() if weight.requires_grad]
        return torch.cat([each.flatten() for each in torch.autograd.grad(self.log_odds(context), weights)])


def pairs_mean(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean product of different rows."""
    products = a @ b.T
    if a is b:
        return float((products.sum() - products.trace()) / (len(a) * (len(a) - 1)))
    return float(products.mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run")
    parser.add_argument("--base", required=True, help="the model under the adapters")
    parser.add_argument("--adapters", nargs="+", required=True)
    parser.add_argument("--steps", type=int, nargs=2, default=(0, 10**9), help="first and last, as in the records")
    parser.add_argument("--states", type=int, default=12, help="of each kind and turn")
    parser.add_argument("--no-kernel", action="store_true", help="the log-odds alone")
    args = parser.parse_args()
    states = read_states(args.run, args.steps[0], args.steps[1], args.states)
    kinds = [f"{len(those)} {'high' if high else 'low'} after {turn}" for (turn, high), those in states.items()]
    print(f"States: {', '.join(kinds)} searches")
    base = AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.base)

    print("\n| adapter | z, low | z, high | gap | after 1, 2, 3 searches |\n|---|---|---|---|---|")
    model = PeftModel.from_pretrained(base, args.adapters[0], adapter_name="0", is_trainable=True)
    decision = Decision(model, tokenizer)
    for i, adapter in enumerate(args.adapters):
        if i:
            model.load_adapter(adapter, str(i))
        model.set_adapter(str(i))
        with torch.no_grad():
            z = {state: [float(decision.log_odds(each)) for each in those] for state, those in states.items()}
        mean = {state: sum(values) / len(values) for state, values in z.items()}
        turns = sorted({turn for turn, _ in mean if {(turn, False), (turn, True)} <= mean.keys()})
        z_low, z_high = (sum(mean[turn, is_high] for turn in turns) / len(turns) for is_high in (False, True))
        gaps = ", ".join(f"{mean[turn, False] - mean[turn, True]:.2f}" for turn in turns)
        print(f"| {adapter} | {z_low:+.2f} | {z_high:+.2f} | {z_low - z_high:.2f} | {gaps} |", flush=True)
    if args.no_kernel:
        return

    model.set_adapter("0")
    for name, weight in model.named_parameters():
        weight.requires_grad_("lora_" in name and name.endswith(".0.weight"))
    gradients = defaultdict[bool, list[torch.Tensor]](list)
    for (_, is_high), those in states.items():
        gradients[is_high] += [decision.gradient(each) for each in those]
    low, high = torch.stack(gradients[False]), torch.stack(gradients[True])
    within, between = (pairs_mean(low, low) + pairs_mean(high, high)) / 2, pairs_mean(low, high)
    ratio = (within + between) / (within - between)
    print(f"\nkernel within {within:.4g}, between {between:.4g}: together {ratio:.0f} times as far as apart")


if __name__ == "__main__":
    main()
