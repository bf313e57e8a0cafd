"""Reinforcement learning whose generator is patched: a 4-bit policy trains a sparse adapter by GRPO, and the dense
model that generates gets its new values after every step, as an engine that takes weight patches would.

Without arguments it runs offline on the demo base beside it, in less than a minute on one CPU core:

    python recipes/grpo_patches.py

The generator here is a plain transformers model. With vLLM, what `Generator.update` is given goes to the server as
`to_vllm_patches(hub.patch_between(last, patch, base))`, between pausing and resuming it, with the prefix cache cleared.
At the end the greedy tokens of the patched generator are compared with those of the merged model: they are equal.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from dataclasses import dataclass, field

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # of rollout_func, trl's place for generators of one's own

import common
import demo_data
import torch
from evaluation import exact_match
from peft import PeftModel, get_peft_model
from reporting import print_table
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from hf_sparse_peft import callbacks_for, hub, make_optimizer
from hf_sparse_peft.hub import Patch, merge_to_dense


@dataclass
class RecipeArguments(common.RecipeArguments):
    """What to train, and when the generator, which is bf16, is told."""

    patch_every: int = field(default=1, metadata={"help": "Optimizer steps between two patches of the generator."})


class Generator:
    """The server's stand-in: a dense model that is patched in place."""

    def __init__(self, folder: str, tokenizer) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.tokenizer, self.seconds, self.sizes = tokenizer, [], []

    def update(self, patch: Patch) -> None:
        """From the patch that is applied to `patch`."""
        start = time.perf_counter()
        hub.swap_patch(self.model, patch)
        self.seconds.append(time.perf_counter() - start)
        self.sizes.append((patch.entries, patch.unchanged, patch.payload_bytes))

    @torch.no_grad()
    def rollouts(self, prompts: list[str], args: GRPOConfig) -> dict[str, list]:
        """One sampled completion for each prompt, up to its end token, with the log-probabilities of its tokens."""
        batch = self.tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False
        )
        sampling = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
        out = self.model.generate(
            **batch.to(self.model.device), max_new_tokens=args.max_completion_length, output_logits=True,
            return_dict_in_generate=True, **sampling,
        )  # fmt: skip
        tokens = out.sequences[:, batch["input_ids"].shape[1] :]
        logits = torch.stack(out.logits, dim=1).float() / args.temperature
        chosen = logits.log_softmax(-1).gather(2, tokens[:, :, None])[:, :, 0]
        ended = (tokens == self.tokenizer.eos_token_id).cumsum(1)
        lengths = ((ended == 0).sum(1) + (ended[:, -1] > 0)).tolist()
        rows = zip(batch["input_ids"], batch["attention_mask"].bool(), strict=True)
        return {
            "prompt_ids": [row[mask].tolist() for row, mask in rows],
            "completion_ids": [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)],
            "logprobs": [row[:n].tolist() for row, n in zip(chosen, lengths, strict=True)],
        }


def load_policy(folder: str, recipe: RecipeArguments, args: GRPOConfig) -> PeftModel:
    """The base in NF4 or bf16 with the sparse adapter."""
    base = common.load_base(AutoModelForCausalLM, folder, recipe, args)
    defaults = {"task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    return get_peft_model(base, common.choose_method(recipe, defaults, args.seed).config)


def reward(completions: list[str], answer: list[str], **_) -> list[float]:
    """1 for the answer, a fifth for another number."""
    found = [(text.strip(), right.strip()) for text, right in zip(completions, answer, strict=True)]
    return [1.0 if text == right else 0.2 * text.isdigit() for text, right in found]


def main(argv: list[str]) -> dict[str, float]:
    """Train, patch the generator meanwhile, compare it with the merged model; returns the figures."""
    start = time.perf_counter()
    recipe, args = common.begin(__file__, argv, RecipeArguments, GRPOConfig)
    folder = recipe.model_name_or_path or common.DEMO_BASE
    tokenizer = AutoTokenizer.from_pretrained(folder)
    policy, generator = load_policy(folder, recipe, args), Generator(folder, tokenizer)
    train = demo_data.word_problems(recipe.train_examples or 1000, seed=args.seed, split="train")
    test = demo_data.word_problems(recipe.test_examples, seed=args.seed, split="test")
    before, patched_at = exact_match(generator.model, tokenizer, test, max_new_tokens=4), [0]

    def rollout(prompts: list[str], trainer: GRPOTrainer) -> dict[str, list]:
        if trainer.state.global_step >= patched_at[-1] + recipe.patch_every:
            generator.update(hub.make_patch(policy, base=folder))
            patched_at.append(trainer.state.global_step)
        return generator.rollouts(prompts, args)

    trainer = GRPOTrainer(
        model=policy, reward_funcs=reward, args=args, train_dataset=train, processing_class=tokenizer,
        rollout_func=rollout, callbacks=callbacks_for(policy),
        optimizers=(make_optimizer(policy, args), None),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)  # thirty figures a step
    trainer.train()
    generator.update(hub.make_patch(policy, base=folder))
    equal = compare(policy, generator, folder, test)
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    first, last = (sum(some) / len(some) for some in (rewards[:5], rewards[-5:]))
    after = exact_match(generator.model, tokenizer, test, max_new_tokens=4)
    hub.revert_patch(generator.model)
    reverted = exact_match(generator.model, tokenizer, test, max_new_tokens=4)
    entries, unchanged, payload = generator.sizes[-1]
    figures = {
        "reward_first": first, "reward_last": last, "exact_match_before": before, "exact_match": after,
        "exact_match_reverted": reverted, "patches": len(generator.sizes), "entries": entries, "unchanged": unchanged,
        "payload_bytes": payload, "swap_ms": 1000 * sorted(generator.seconds)[len(generator.seconds) // 2],
        "equal_tokens": equal, "seconds": time.perf_counter() - start,
    }  # fmt: skip
    print_table(
        [
            ("mean reward, first and last five steps", f"{first:.2f}", f"{last:.2f}"),
            ("exact match of the generator, %", f"{before:.1f}", f"{after:.1f}"),
            ("exact match when the patch is taken back, %", "", f"{reverted:.1f}"),
            ("patches", "", f"{len(generator.sizes)}"),
            ("values of the last one", "", f"{entries:,}"),
            ("left out, rounding leaves them as they are", "", f"{unchanged:,}"),
            ("bytes of the last one (index 4, value 2)", "", f"{payload:,}"),
            ("bytes of the dense model", "", f"{sum(p.numel() for p in generator.model.parameters()) * 2:,}"),
            ("median time of a swap, ms", "", f"{figures['swap_ms']:.1f}"),
            ("tokens equal to the merged model's", "", f"{equal:,}"),
        ],
        title=f"GRPO, {'NF4' if recipe.load_in_4bit else 'bf16'} policy, patched bf16 generator",
    )
    return figures


@torch.no_grad()
def compare(policy: PeftModel, generator: Generator, folder: str, test) -> int:
    """Greedy tokens of the patched generator, all of them those of the adapter merged into the dense checkpoint.

    Raises:
        ValueError: a weight or a token differs.
    """
    with tempfile.TemporaryDirectory() as saved:
        policy.save_pretrained(saved)
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        merged = merge_to_dense(PeftModel.from_pretrained(dense, saved)).eval()
    batch = generator.tokenizer(
        list(test["prompt"]), return_tensors="pt", padding=True, padding_side="left", return_token_type_ids=False
    )
    models = (generator.model, merged.to(generator.model.device))
    greedy = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    served, expected = (model.generate(**batch.to(model.device), **greedy) for model in models)
    same = all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))
    if not same or not torch.equal(served, expected):
        raise ValueError("The patched generator is not the merged model: was something else trained than its adapter?")
    return served.shape[0] * (served.shape[1] - batch["input_ids"].shape[1])


if __name__ == "__main__":
    main(sys.argv[1:])
