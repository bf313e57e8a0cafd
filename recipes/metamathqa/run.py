"""peft's MetaMathQA comparison with adapters of this package: run in peft's method_comparison/MetaMathQA.

python HERE/run.py -v experiments/sparse_lora/llama-3.2-3B-moving-entries/
"""

import functools
import runpy
import sys

from hf_sparse_peft import Controller


def with_rules(make):
    """The harness's `get_optimizer_and_scheduler`, with the rules of the model's adapters hung on the optimizer."""

    @functools.wraps(make)
    def get_optimizer_and_scheduler(model, *, max_steps, **options):
        optimizer, scheduler = make(model, max_steps=max_steps, **options)
        rules = Controller(model, optimizer, total_steps=max_steps)
        optimizer.rules = rules  # a controller that nobody holds closes itself

        def before(model, args):
            if model.training:
                rules.before_step()

        model.register_forward_pre_hook(before)
        optimizer.register_step_post_hook(lambda *_: rules.after_step())
        return optimizer, scheduler

    return get_optimizer_and_scheduler


if __name__ == "__main__":
    sys.path.insert(0, "")
    import utils

    utils.get_optimizer_and_scheduler = with_rules(utils.get_optimizer_and_scheduler)
    runpy.run_path("run.py", run_name="__main__")
