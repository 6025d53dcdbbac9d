"""The collator in the workers of a DataLoader: batches are those of the main process, whatever way a worker is started."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import DataLoader

from .test_conversations import store_of
from .test_families import PICTURES, collator_of, three_pictures


@pytest.mark.full
@pytest.mark.parametrize("start", ["spawn", "fork"])
def test_workers_make_the_batches_of_the_main_process(tmp_path, start):
    """A spawned worker gets collator and store by pickle, a forked one with whatever the main process has open."""
    targets = store_of(tmp_path / "targets", {str(n): (picture, "a red cat") for n, picture in enumerate(PICTURES)})
    collator = collator_of("llava", "left", targets=targets)
    samples = [three_pictures(str(n % 4)) for n in range(12)]
    here = [collator(samples[first : first + 2]) for first in range(0, 12, 2)]
    loader = DataLoader(samples, batch_size=2, num_workers=2, collate_fn=collator, multiprocessing_context=start)
    there = list(loader)
    assert len(there) == len(here)
    for batch, expected in zip(there, here, strict=True):
        assert batch.keys() == expected.keys()
        assert "lavender_targets" in batch
        for name, value in batch.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)
