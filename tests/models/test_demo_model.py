"""On the demo's own model and data: g0 is the directional derivative that it stands for."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import addax_ds
from addax_ds.data.encoding import encode
from addax_ds.data.train_rows import pad
from addax_ds.models import demo
from addax_ds.reading.records import prompt_completion
from addax_ds.tasks import TASKS
from tests.support.packages import needs_model
from tests.support.passes import measured_g0

pytestmark = [pytest.mark.slow, needs_model]

PROBES = 8
SEED = 3


@pytest.fixture(scope="module")
def folder():
    return demo.model_folder()


@pytest.fixture(scope="module")
def batch(folder) -> dict[str, torch.Tensor]:
    rows = TASKS["sst2-demo"].rows().train[:2]
    records = [prompt_completion(r.prompt, r.answer, r.origin, False) for r in rows]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return pad(encode(records, tokenizer, max_length=None, model_positions=None)[0], 0)


@pytest.fixture(scope="module")
def slopes(folder, batch) -> list[float]:
    """<z, grad L> of each probe, by autograd in fp32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model(**batch).loss.backward()
    return [
        sum(
            torch.dot(addax_ds.gaussian(SEED, step, n, 0, p.numel()), p.grad.view(-1)).item()
            for n, p in model.named_parameters()
        )
        for step in range(PROBES)
    ]


@pytest.mark.parametrize(("dtype", "least"), [(torch.float32, 0.99), (torch.bfloat16, 0.9)])
def test_g0_correlates_with_the_gradient_along_z(folder, batch, slopes, dtype, least):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    optimizer = addax_ds.Addax(model.parameters(), lr=0.0, alpha=1.0, zo_eps=1e-3, seed=SEED)
    addax_ds.attach(optimizer, model)
    measured = []
    for _ in range(PROBES):
        measured.append(measured_g0(optimizer, lambda: model(**batch).loss))
        optimizer.step()
    correlation = torch.corrcoef(torch.tensor([measured, slopes]))[0, 1].item()
    print(f"{dtype}: correlation of g0 with <z, grad L> over {PROBES} probes: {correlation:.5f}")
    assert correlation >= least
