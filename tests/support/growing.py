"""A model that notes in an attribute how long the cache in its buffer is, as models with rotary positions do."""

import torch
from torch import nn


class GrowingCache(nn.Module):
    """Restoring the buffer alone would break it: the attribute would promise a longer one."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("cache", torch.zeros(1, 1), persistent=False)
        self.length = 1

    def forward(self, x):
        if len(x) > self.length:
            self.length, self.cache = len(x), torch.arange(float(len(x))).unsqueeze(1)
        return self.fc(x) + self.cache[: len(x)]
