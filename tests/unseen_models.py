"""Small models of kinds that the submission was not tuned on, each with a task that it can learn.

The tasks are as easy as can be, so that a setting that learns nothing here has stalled.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations
from toy_workload import NUM_CLASSES, ToyWorkload

from workloads_smoke import spec

NUM_WORDS, LENGTH, BATCH_SIZE, WIDTH = 64, 12, 32, 16


class OnWords(nn.Module):
    """Base of models on words (N, 12); the class of a sentence is that of its first word."""


class OnImages(nn.Module):
    """Base of models on images (N, 3, 8, 8), brighter in one of the four quarters, its class."""


class TiedTransformer(OnWords):
    """Language model: one causal layer, the same matrix embeds words and scores the next one."""

    predicts_next_word = True

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_WORDS, WIDTH)
        self.position = nn.Parameter(torch.randn(LENGTH, WIDTH) * 0.02)
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True)
        self.out = nn.Linear(WIDTH, NUM_WORDS, bias=False)
        self.out.weight = self.embedding.weight

    def forward(self, words: Tensor, dropout_rate: float) -> Tensor:
        del dropout_rate
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        hidden = self.layer(self.embedding(words) + self.position, src_mask=mask, is_causal=True)
        scores: Tensor = self.out(hidden)[:, :-1].reshape(-1, NUM_WORDS)
        return scores


class SparseEmbeddings(OnWords):
    """Embedding layers with sparse gradients, one by one and in bags."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_WORDS, WIDTH, sparse=True)
        self.bag = nn.EmbeddingBag(NUM_WORDS, WIDTH, sparse=True)
        self.head = nn.Linear(2 * WIDTH, NUM_CLASSES)

    def forward(self, words: Tensor, dropout_rate: float) -> Tensor:
        del dropout_rate
        return self.head(torch.cat([self.embedding(words[:, 0]), self.bag(words)], dim=1))


class HugeTable(OnWords):
    """Far more rows than are ever looked up, longer than a table's limit."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(70_000, 4)
        self.head = nn.Linear(4, NUM_CLASSES)

    def forward(self, words: Tensor, dropout_rate: float) -> Tensor:
        del dropout_rate
        return self.head(self.table(words[:, 0] * 1000))


class Recurrent(OnWords):
    """Two layers of LSTM, both ways, then a GRU cell."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_WORDS, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, batch_first=True, bidirectional=True)
        self.gru = nn.GRUCell(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, NUM_CLASSES)

    def forward(self, words: Tensor, dropout_rate: float) -> Tensor:
        del dropout_rate
        hidden = self.lstm(self.embedding(words))[0]
        return self.head(self.gru(hidden[:, 0], hidden[:, -1, :WIDTH]))


class DepthwiseConvolutions(OnImages):
    """Each channel by itself, then 1 x 1 convolutions, with batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, WIDTH, 1)
        self.depthwise = nn.Conv2d(WIDTH, WIDTH, 3, groups=WIDTH, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.pointwise = nn.Conv2d(WIDTH, 8, 1)
        self.head = nn.Linear(32, NUM_CLASSES)

    def forward(self, images: Tensor, dropout_rate: float) -> Tensor:
        del dropout_rate
        hidden = self.pointwise(torch.relu(self.norm(self.depthwise(self.first(images)))))
        return self.head(functional.avg_pool2d(hidden, 4).flatten(1))


class GroupNorms(OnImages):
    """Down and up again: group norms and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, WIDTH, 3, stride=2, padding=1)
        self.norm = nn.GroupNorm(4, WIDTH)
        self.up = nn.ConvTranspose2d(WIDTH, 8, 2, stride=2)
        self.head = nn.Linear(8 * 4, NUM_CLASSES)

    def forward(self, images: Tensor, dropout_rate: float) -> Tensor:
        del dropout_rate
        hidden = torch.relu(self.up(torch.relu(self.norm(self.down(images)))))
        return self.head(functional.avg_pool2d(hidden, 4).flatten(1))


class Volumes(OnImages):
    """Convolutions with five and with three dimensional weights."""

    def __init__(self) -> None:
        super().__init__()
        self.volume = nn.Conv3d(1, 6, (3, 3, 3), padding=1)
        self.line = nn.Conv1d(18, 8, 5, stride=2)
        self.head = nn.Linear(8 * 30, NUM_CLASSES)

    def forward(self, images: Tensor, dropout_rate: float) -> Tensor:
        del dropout_rate
        hidden = torch.relu(self.volume(images[:, None])).reshape(len(images), 18, 64)
        return self.head(torch.relu(self.line(hidden)).flatten(1))


class OddParameters(OnImages):
    """Scalars, frozen and unused ones, an empty one, and one that is all ones long."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.temperature = nn.Parameter(torch.ones(1))
        self.frozen = nn.Linear(192, 192)
        self.frozen.requires_grad_(False)
        self.unused = nn.Linear(5, 7)
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.column = nn.Parameter(torch.ones(1, 192, 1))
        self.head = nn.Linear(192, NUM_CLASSES)

    def forward(self, images: Tensor, dropout_rate: float) -> Tensor:
        del dropout_rate
        hidden = images.flatten(1) + 0.1 * self.frozen(images.flatten(1))
        hidden = self.gain * hidden * self.column[:, :, 0]
        return self.head(hidden) * self.temperature


class Experts(OnImages):
    """One expert a batch: the others have no gradient at that step, some not for many steps."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(192, WIDTH) for _ in range(3))
        self.head = nn.Linear(WIDTH, NUM_CLASSES)
        self.num_calls = 0

    def forward(self, images: Tensor, dropout_rate: float) -> Tensor:
        del dropout_rate
        self.num_calls += 1
        chosen = 2 if self.num_calls % 17 == 0 else self.num_calls % 2
        return self.head(torch.tanh(self.experts[chosen](images.flatten(1))))


class Reparametrised(OnImages):
    """Weight norm, weights used twice, and inputs a hundred times too large."""

    def __init__(self) -> None:
        super().__init__()
        self.first = parametrizations.weight_norm(nn.Linear(192, 32))
        self.twice = nn.Linear(32, 32)
        self.head = nn.Linear(32, NUM_CLASSES)

    def forward(self, images: Tensor, dropout_rate: float) -> Tensor:
        del dropout_rate
        hidden = torch.tanh(0.01 * self.first(100.0 * images.flatten(1)))
        return self.head(torch.tanh(self.twice(torch.tanh(self.twice(hidden)))))


class DeepPlain(OnImages):
    """Ten layers, no norm, no shortcuts, wide then narrow."""

    def __init__(self) -> None:
        super().__init__()
        widths = [192, 48, *[24] * 8, NUM_CLASSES]
        self.layers = nn.ModuleList(
            nn.Linear(before, after) for before, after in itertools.pairwise(widths)
        )
        for layer in self.layers:
            nn.init.orthogonal_(layer.weight, gain=1.2)

    def forward(self, images: Tensor, dropout_rate: float) -> Tensor:
        hidden = images.flatten(1)
        for layer in self.layers[:-1]:
            hidden = torch.tanh(layer(hidden))
        return self.layers[-1](functional.dropout(hidden, dropout_rate, self.training))


class Unseen(NamedTuple):
    """A model and how far it has to get: the share of its first loss that may be left."""

    build: Callable[[], nn.Module]
    share_left: float


MODELS = {
    "tied transformer": Unseen(TiedTransformer, 0.7),
    "sparse embeddings": Unseen(SparseEmbeddings, 0.6),
    "huge table": Unseen(HugeTable, 0.6),
    "recurrent": Unseen(Recurrent, 0.6),
    "depthwise convolutions": Unseen(DepthwiseConvolutions, 0.6),
    "group norms": Unseen(GroupNorms, 0.6),
    "volumes": Unseen(Volumes, 0.6),
    "odd parameters": Unseen(OddParameters, 0.6),
    "experts": Unseen(Experts, 0.6),
    "reparametrised": Unseen(Reparametrised, 0.6),
    "deep plain": Unseen(DeepPlain, 0.6),
}


class UnseenWorkload(ToyWorkload):
    """A model of the table with its task."""

    def __init__(self, name: str, step_hint: int) -> None:
        super().__init__(step_hint)
        self._build = MODELS[name].build

    def init_model_fn(self, seed: int = 0) -> tuple[nn.Module, None]:
        torch.manual_seed(seed)
        model = self._build()
        self.is_on_words = isinstance(model, OnWords)
        self.predicts_next_word = getattr(model, "predicts_next_word", False)
        self.model_params_types = {
            name: spec.ParameterType.EMBEDDING
            if "embedding" in name or "table" in name
            else spec.ParameterType.WEIGHT
            for name, _ in model.named_parameters()
        }
        return model, None

    def batches(self, size: int = BATCH_SIZE, seed: int = 1) -> Iterator[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            if self.is_on_words:
                # Each word is followed by the next one but two or three, so that there is
                # something to predict.
                first = torch.randint(NUM_WORDS, (size, 1), generator=generator)
                steps = torch.randint(2, 4, (size, LENGTH - 1), generator=generator)
                inputs = (torch.cat([first, steps], dim=1).cumsum(1)) % NUM_WORDS
                targets = inputs[:, 0] % NUM_CLASSES
                if self.predicts_next_word:
                    targets = inputs[:, 1:].reshape(-1)
            else:
                inputs = torch.randn(size, 3, 8, 8, generator=generator)
                targets = torch.randint(NUM_CLASSES, (size,), generator=generator)
                quarters = inputs.view(size, 3, 2, 4, 2, 4)
                quarters[torch.arange(size), :, targets // 2, :, targets % 2] += 0.5
            yield {
                "inputs": inputs,
                "targets": targets,
                "weights": torch.ones(len(targets)),
            }
