"""On a CUDA device the model gives what it gives on the CPU. Run by `make gpu`."""

from dataclasses import replace

import pytest
import torch

from longforge.model import PRESETS, CausalLM

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(scope="module")
def model() -> CausalLM:
    torch.manual_seed(5)
    return CausalLM(replace(PRESETS["micro"], vocab_size=97))


@torch.no_grad()
def test_logits_on_cuda_equal_those_on_the_cpu(model):
    ids = torch.randint(0, 97, (2, 301), generator=torch.Generator().manual_seed(1))
    on_cpu = model(ids)
    on_cuda = model.to("cuda")(ids.cuda()).cpu()
    model.to("cpu")
    torch.testing.assert_close(on_cuda, on_cpu, rtol=0, atol=2e-4)


def test_gradients_on_cuda_equal_those_on_the_cpu(model):
    ids = torch.randint(0, 97, (1, 201), generator=torch.Generator().manual_seed(2))
    gradients = []
    for device in ("cpu", "cuda"):
        model.to(device).zero_grad(set_to_none=True)
        logits = model(ids.to(device))
        torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:].to(device)).backward()
        gradients.append({n: p.grad.cpu() for n, p in model.named_parameters() if p.grad is not None})
    model.to("cpu")
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-3, atol=1e-4, msg=name)
