"""A product with a frozen matrix of a wider dtype: autograd's numbers without its copy of the cast matrix."""

import pytest
import torch

from hf_sparse_peft.ops.frozen_product import frozen_product


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_autograds_to_the_bit_and_no_cast_copy_is_kept(dtype):
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    found = []
    for product in (lambda x: x.to(dtype) @ weight.to(dtype).t(), lambda x: frozen_product(x, weight, dtype)):
        x, kept = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(1)).requires_grad_(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = product(x)
        y.float().square().sum().backward()
        found.append((y, x.grad, kept))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert all(t.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr() for t in found[1][2])
