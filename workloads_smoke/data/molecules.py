"""Random molecule-like graphs with many binary properties, some of them not measured.

A molecule is a random tree of atoms with a few rings closed; atoms and bonds have integer
features as in ogbg-molpcba (9 and 3). A property holds where a molecule contains a certain path of
three atom kinds; a few labels are wrong, and many are missing, as in the real data. Molecules are
drawn independently, so splits share nothing.
"""

import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from workloads_smoke.data.queue import Batch, Gather

NUM_NODE_FEATURES = 9
NUM_EDGE_FEATURES = 3
NUM_TASKS = 16
MAX_ATOMS = 18
MIN_ATOMS = 8
NUM_KINDS = 5
SPLIT_SIZES = {"train": 6_000, "validation": 800, "test": 800}
LABEL_NOISE = 0.03
MISSING = 0.3
_KIND_WEIGHTS = np.array([0.45, 0.2, 0.15, 0.12, 0.08])
_SEED = 60240


class GraphsTuple(NamedTuple):
    """A batch of graphs with the fields of jraph's class of that name.

    Attributes:
        nodes: Features, shape (all nodes, features).
        edges: Features, shape (all edges, features); each bond appears in both directions.
        receivers: Node at each edge's head.
        senders: Node at each edge's tail.
        globals: Unused on input.
        n_node: Nodes of each graph.
        n_edge: Edges of each graph.
    """

    nodes: Tensor
    edges: Tensor
    receivers: Tensor
    senders: Tensor
    globals: Tensor
    n_node: Tensor
    n_edge: Tensor


class Molecules(NamedTuple):
    """All molecules of a split, padded to MAX_ATOMS.

    Attributes:
        kinds: Kind of each atom, shape (molecules, MAX_ATOMS), -1 beyond the last.
        bonds: Bond order between two atoms, 0 for none, symmetric.
        labels: Properties, shape (molecules, NUM_TASKS), NaN where missing.
    """

    kinds: np.ndarray
    bonds: np.ndarray
    labels: np.ndarray


@functools.cache
def load_molecules(split: str) -> Molecules:
    """Draw the molecules of a split: 'train', 'validation' or 'test'."""
    count = SPLIT_SIZES[split]
    rng = np.random.default_rng([_SEED, list(SPLIT_SIZES).index(split)])
    sizes = rng.integers(MIN_ATOMS, MAX_ATOMS + 1, size=count)
    kinds = rng.choice(NUM_KINDS, p=_KIND_WEIGHTS, size=(count, MAX_ATOMS))
    kinds[np.arange(MAX_ATOMS) >= sizes[:, None]] = -1
    bonds = _random_bonds(rng, sizes)
    return Molecules(kinds, bonds, _properties(rng, kinds, bonds))


def _random_bonds(rng: np.random.Generator, sizes: np.ndarray) -> np.ndarray:
    """Join each atom to one of the three before it, then close about two rings a molecule."""
    count = len(sizes)
    rows = np.arange(count)
    bonds = np.zeros((count, MAX_ATOMS, MAX_ATOMS), dtype=np.int64)
    for atom in range(1, MAX_ATOMS):
        back = np.minimum(rng.integers(1, 4, size=count), atom)
        order = rng.choice(3, p=[0.7, 0.25, 0.05], size=count) + 1
        bonds[rows, atom, atom - back] = np.where(atom < sizes, order, 0)
    for _ in range(2):
        first = rng.integers(0, sizes - 5)
        bonds[rows, first + 5, first] = np.maximum(bonds[rows, first + 5, first], 1)
    return bonds + bonds.transpose(0, 2, 1)


def _properties(rng: np.random.Generator, kinds: np.ndarray, bonds: np.ndarray) -> np.ndarray:
    """Decide the properties, flip some labels and lose others."""
    paths = _task_paths()
    is_kind = (kinds[:, :, None] == np.arange(NUM_KINDS)).astype(np.float32)
    joined = (bonds > 0).astype(np.float32)
    doubly = (bonds > 1).astype(np.float32)
    labels = np.empty((len(kinds), NUM_TASKS), dtype=np.float32)
    for task, (left, middle, right) in enumerate(paths):
        # Every other property wants a double bond on the left.
        first = (doubly if task % 2 else joined) @ is_kind[:, :, [left]]
        second = joined @ is_kind[:, :, [right]]
        # A path may not return to where it came from.
        if left == right:
            second = second - 1
        through = (is_kind[:, :, [middle]] * first * np.maximum(second, 0)).sum(axis=(1, 2))
        labels[:, task] = through > 0
    flipped = rng.random(labels.shape) < LABEL_NOISE
    labels = np.where(flipped, 1 - labels, labels)
    labels[rng.random(labels.shape) < MISSING] = np.nan
    return labels


def _task_paths() -> list[tuple[int, int, int]]:
    """Return the atom kinds of each property's path, chosen once for all splits."""
    rng = np.random.default_rng(_SEED)
    every = [
        (left, middle, right)
        for left in range(NUM_KINDS)
        for middle in range(NUM_KINDS)
        for right in range(left, NUM_KINDS)
    ]
    chosen = rng.choice(len(every), size=NUM_TASKS, replace=False)
    return [every[number] for number in chosen]


def atom_features(kinds: np.ndarray, bonds: np.ndarray) -> np.ndarray:
    """Return the features of atoms, shape (..., atoms, 9): kind (one of five), degree, valence.

    The last two tell place and parity, which carry no information about the labels.
    """
    degree = (bonds > 0).sum(axis=-1)
    valence = bonds.sum(axis=-1)
    place = np.arange(kinds.shape[-1]) / kinds.shape[-1] + np.zeros(kinds.shape)
    columns = [kinds == kind for kind in range(NUM_KINDS)]
    columns += [degree / 3, valence / 4, place, np.arange(kinds.shape[-1]) % 2 + 0 * place]
    return np.stack(columns, axis=-1).astype(np.float32)


def gather_molecules(molecules: Molecules) -> Gather:
    """Return a function that makes a batch of graphs out of molecules' indices.

    Missing labels have weight zero and the value zero, as in the benchmark.
    """
    features = atom_features(molecules.kinds, molecules.bonds)

    def gather(indices: Tensor) -> Batch:
        chosen = indices.numpy()
        kinds, bonds = molecules.kinds[chosen], molecules.bonds[chosen]
        present = kinds >= 0
        sizes = present.sum(axis=1)
        starts = np.cumsum(sizes) - sizes
        graph, sender, receiver = np.nonzero(bonds)
        order = bonds[graph, sender, receiver]
        edges = (order[:, None] == np.arange(1, NUM_EDGE_FEATURES + 1)).astype(np.float32)
        labels = torch.from_numpy(molecules.labels[chosen])
        present_labels = ~labels.isnan()
        graphs = GraphsTuple(
            nodes=torch.from_numpy(features[chosen][present]),
            edges=torch.from_numpy(edges),
            receivers=torch.from_numpy(starts[graph] + receiver),
            senders=torch.from_numpy(starts[graph] + sender),
            globals=torch.zeros(len(chosen), NUM_TASKS),
            n_node=torch.from_numpy(sizes),
            n_edge=torch.from_numpy(np.bincount(graph, minlength=len(chosen))),
        )
        return {"inputs": graphs, "targets": labels.nan_to_num(0.0), "weights": present_labels}

    return gather
