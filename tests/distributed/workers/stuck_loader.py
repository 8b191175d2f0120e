"""A trainer that fails while its loader is referred to and a worker is busy: it must end all the same.

Started by test_workers.py.
"""

import time

from torch.utils.data import DataLoader

from sana_kit.workers import prepare_worker


class Slow:
    def __len__(self):
        return 4

    def __getitem__(self, index):
        if index:
            time.sleep(1000)
        return index


batches = iter(DataLoader(Slow(), batch_size=1, num_workers=1, worker_init_fn=prepare_worker, persistent_workers=True))
next(batches)
raise SystemExit("the update failed")
